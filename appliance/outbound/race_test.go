package outbound

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// lookedUp is an upstream whose host the given function looks up.
func lookedUp(port uint16, lookup func(context.Context, string) ([]netip.Addr, error)) *upstream {
	o := Options{Lookup: lookup}
	return &upstream{outbound: "hk", kind: "socks5 server", host: "proxy.test", port: port, options: o, dialer: o.dialer()}
}

func addrs(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

// TestLookup: the first address that answers is taken, and what is wrong with the others is said where none does.
func TestLookup(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	for what, c := range map[string]struct {
		found []netip.Addr
		err   error
		want  string // in the error; empty: it connects
	}{
		"one":               {found: addrs("127.0.0.1")},
		"the second":        {found: addrs("127.0.0.9", "127.0.0.1")},
		"none listens":      {found: addrs("127.0.0.9", "127.0.0.8"), want: "refused"},
		"there is none":     {want: "no address"},
		"the look-up fails": {err: errors.New("SERVFAIL"), want: "looking up proxy.test: SERVFAIL"},
	} {
		asked := ""
		u := lookedUp(port, func(_ context.Context, host string) ([]netip.Addr, error) {
			asked = host
			return c.found, c.err
		})
		conn, err := u.connect(t.Context())
		switch {
		case c.want == "" && err != nil, c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", what, err, c.want)
		case asked != "proxy.test":
			t.Errorf("%s: looked up %q", what, asked)
		}
		if conn != nil {
			conn.Close()
		}
	}
	if _, err := lookedUp(1, func(context.Context, string) ([]netip.Addr, error) {
		return addrs("127.0.0.9"), nil
	}).connect(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the cause is lost: %v", err)
	}
}

// TestLookupEnds: a look-up that never answers holds nobody longer than the dial may take.
func TestLookupEnds(t *testing.T) {
	u := lookedUp(1, func(ctx context.Context, _ string) ([]netip.Addr, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	u.options.DialTimeout = 50 * time.Millisecond
	if _, err := u.connect(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// TestRaceWaits: the dials that lost have ended when the winner is there, and when the caller gave up.
func TestRaceWaits(t *testing.T) {
	noLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	// All at once: each takes the head start that the first address has.
	var races sync.WaitGroup
	defer races.Wait()
	for i := range 40 {
		races.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var running atomic.Int32
			u := lookedUp(port, nil)
			u.dialer.ControlContext = func(ctx context.Context, _, address string, _ syscall.RawConn) error {
				if strings.HasPrefix(address, "127.0.0.1:") {
					return nil
				}
				// An address that does not answer.
				running.Add(1)
				defer running.Add(-1)
				if i%2 == 1 {
					cancel()
				}
				<-ctx.Done()
				runtime.Gosched()
				return ctx.Err()
			}
			conn, err := u.race(ctx, addrs("127.0.0.9", "127.0.0.1"))
			if n := running.Load(); n != 0 {
				t.Errorf("%d dials are still running", n)
			}
			if won := err == nil; won != (i%2 == 0) {
				t.Errorf("race %d: %v", i, err)
			}
			if conn != nil {
				conn.Close()
			}
		})
	}
}
