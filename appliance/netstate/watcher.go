package netstate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Watcher follows one network namespace. The kernel's messages only wake it: it then reads the whole state anew and
// compares, so that a lost, reordered or misunderstood message cannot leave it wrong.
type Watcher struct {
	log     *slog.Logger
	options options
	socket  *os.File        // tells that something changed
	handle  *netlink.Handle // answers what is
	close   sync.Once

	snapshot atomic.Pointer[Snapshot]
	changes  chan Delta
}

type options struct {
	groups        []int
	receiveBuffer int
	// A burst of messages is over after quiet without one; a burst without end is read every limit.
	quiet, limit time.Duration
	// resync is the time after which the state is read without any message.
	resync time.Duration
	// retry is the time after which a failed reading is repeated.
	retry time.Duration
}

func defaults() options {
	return options{
		groups: groups,
		quiet:  50 * time.Millisecond, limit: 500 * time.Millisecond,
		resync: time.Minute, retry: time.Second,
	}
}

// Watch begins to follow the network namespace that the calling thread is in, and takes the first Snapshot. Changes
// from then on are told once Run is called.
func Watch(ctx context.Context, log *slog.Logger) (*Watcher, error) {
	return watch(ctx, log, defaults())
}

func watch(ctx context.Context, log *slog.Logger, o options) (_ *Watcher, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("watching the network: %w", err)
		}
	}()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w := &Watcher{log: log, options: o, changes: make(chan Delta)}
	// Subscribing comes first: a change during the dump wakes Run.
	if w.socket, err = subscribe(o.groups, o.receiveBuffer); err != nil {
		return nil, err
	}
	if w.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, errors.Join(err, w.socket.Close())
	}
	s, err := dump(w.handle)
	if err != nil {
		w.Close()
		return nil, err
	}
	w.snapshot.Store(s)
	return w, nil
}

// Snapshot returns the newest known state.
func (w *Watcher) Snapshot() *Snapshot { return w.snapshot.Load() }

// Changes tells every difference from the Snapshot of Watch, or from what was received last. While nobody receives,
// changes are joined: a receiver is never told what is over. The channel is closed when Run returns.
func (w *Watcher) Changes() <-chan Delta { return w.changes }

// Close frees a Watcher. Run does so when it returns; a Watcher that never ran needs it.
func (w *Watcher) Close() {
	w.close.Do(func() {
		w.socket.Close()
		w.handle.Close()
	})
}

// Run follows the network until ctx ends, then returns nil. It must be called at most once.
func (w *Watcher) Run(ctx context.Context) error {
	woken := make(chan struct{}, 1)
	failed := make(chan error, 1)
	go func() { failed <- w.receive(woken) }()
	defer close(w.changes)
	var received bool
	defer func() {
		w.Close()
		if !received {
			<-failed
		}
	}()

	var (
		told   = w.Snapshot()      // what the receiver knows
		delta  Delta               // what it is to be told
		tell   chan Delta          // nil while there is nothing to tell
		burst  time.Time           // when the present burst began; zero: none
		reread = newStoppedTimer() // end of the burst, or a repetition
		resync = time.NewTicker(w.options.resync)
	)
	defer reread.Stop()
	defer resync.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			received = true
			return err
		case <-woken:
			if burst.IsZero() {
				burst = time.Now()
			}
			reread.Reset(min(w.options.quiet, time.Until(burst.Add(w.options.limit))))
			continue
		case tell <- delta:
			told, tell = delta.Snapshot, nil
			continue
		case <-reread.C:
		case <-resync.C:
		}
		burst = time.Time{}
		s, err := dump(w.handle)
		if err != nil {
			w.log.Warn("cannot read the state of the network; trying again", "error", err, "after", w.options.retry)
			reread.Reset(w.options.retry)
			continue
		}
		w.snapshot.Store(s)
		delta, tell = Delta{Diff(told, s), s}, nil
		if len(delta.Reasons) > 0 {
			tell = w.changes
		}
	}
}

func newStoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// receive passes on that messages came until the socket is closed.
func (w *Watcher) receive(woken chan<- struct{}) error {
	buffer := make([]byte, 4096)
	for {
		switch err := awaitMessage(w.socket, buffer); {
		case errors.Is(err, os.ErrClosed):
			return nil
		case errors.Is(err, unix.ENOBUFS):
			// Only the news is lost, and that there is some is all that matters.
			w.log.Debug("the kernel had more news than the socket could hold; reading everything")
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("receiving the kernel's news of the network: %w", err)
		}
		select {
		case woken <- struct{}{}:
		default:
		}
	}
}
