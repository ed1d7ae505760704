package exchange

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestReachTimes wants addresses to be tried one after the other, soon, and what comes late discarded.
func TestReachTimes(t *testing.T) {
	type outcome struct {
		after time.Duration
		err   error
	}
	refused := errors.New("refused")
	for _, row := range []struct {
		name     string
		outcomes []outcome // of each address
		winner   int       // -1: none
		took     time.Duration
		tried    int
	}{
		{"the first works", []outcome{{after: time.Millisecond}, {}}, 0, time.Millisecond, 1},
		{"the first fails", []outcome{{10 * time.Millisecond, refused}, {after: time.Millisecond}}, 1, 11 * time.Millisecond, 2},
		{"the first is silent", []outcome{{after: time.Hour}, {after: time.Millisecond}, {}}, 1, stagger + time.Millisecond, 2},
		{"the first is slow", []outcome{{after: stagger + 10*time.Millisecond}, {after: time.Minute}}, 0, stagger + 10*time.Millisecond, 2},
		{"all fail", []outcome{{0, refused}, {time.Second, refused}, {0, refused}}, -1, time.Second, 3},
		{"all are silent", []outcome{{after: time.Hour}, {after: time.Hour}, {after: time.Hour}}, -1, 2 * time.Second, 3},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := &endpoint{}
				for i := range row.outcomes {
					e.fixed = append(e.fixed, loopback(uint16(i+1)))
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				begun := time.Now()
				var tried, running atomic.Int32
				ask := func() (int, error) {
					return reach(ctx, e, func(ctx context.Context, to netip.AddrPort) (int, error) {
						tried.Add(1)
						running.Add(1)
						defer running.Add(-1)
						o := row.outcomes[to.Port()-1]
						if err := at(o.after)(ctx); err != nil {
							return -1, err
						}
						return int(to.Port()) - 1, o.err
					}, func(int) {})
				}
				made, err := ask()
				if (err == nil) != (row.winner >= 0) || err == nil && made != row.winner || time.Since(begun) != row.took || int(tried.Load()) != row.tried || running.Load() != 0 {
					t.Errorf("%d, %v after %v; %d tried, %d still running", made, err, time.Since(begun), tried.Load(), running.Load())
				}
				if row.name == "all are silent" && !errors.Is(err, context.DeadlineExceeded) || row.name == "all fail" && err.Error() != "127.0.0.1:1: refused; 127.0.0.1:3: refused; 127.0.0.1:2: refused" {
					t.Error(err)
				}
				if err == nil { // what worked is tried first then
					tried.Store(0)
					if made, err := ask(); made != row.winner || err != nil || tried.Load() > 1 && row.outcomes[made].after < stagger {
						t.Errorf("again: %d, %v; %d tried", made, err, tried.Load())
					}
				}
			})
		})
	}
}

// TestReachDiscards wants what is made too late to be undone.
func TestReachDiscards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &endpoint{fixed: []netip.AddrPort{loopback(1), loopback(2)}}
		discarded := 0
		made, err := reach(t.Context(), e, func(_ context.Context, to netip.AddrPort) (uint16, error) {
			time.Sleep(time.Second) // both heed no context, and are ready at nearly the same time
			return to.Port(), nil
		}, func(late uint16) { discarded = int(late) })
		if made != 1 || err != nil || discarded != 2 {
			t.Errorf("made %d, %v; discarded %d", made, err, discarded)
		}
	})
}
