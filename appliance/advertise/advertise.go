// Package advertise makes the box the IPv6 default router of its LANs, beside the main router and before it: router
// advertisements (RFC 4861) with the preference High (RFC 4191). They number nothing: prefixes, and with them the
// clients' addresses, stay the main router's.
//
// The lifetime that clients are told is what happens after a crash. Were it a few intervals, it would be a heartbeat,
// and clients would go around the box soon after its daemon has died: what the policy keeps in would leave by the main
// router, though the box still forwards what is direct and still drops what needs a proxy. A box that is gone
// altogether needs no short lifetime: its clients notice that it does not answer (RFC 4861 sections 6.3.6 and 7.3) and
// take another router within seconds. So Lifetime is RFC 4861's own 30 minutes, and whoever stops on purpose withdraws.
package advertise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Lifetime is how long clients keep the box as their router, and as their DNS server, after they last heard of it.
const Lifetime = 30 * time.Minute

// Interface is a LAN to advertise on.
type Interface struct {
	Name    string
	Index   int
	MAC     [6]byte
	Address netip.Addr // the link-local one that clients send to, without a zone
	DNS     bool       // clients are to ask Address for names
}

// Options are what an Advertiser is made of. All are required, but a Mark.
type Options struct {
	Mark uint32 // firewall mark (SO_MARK) of its sockets; 0: none
	Log  *slog.Logger
	// Report is told what is wrong on an interface, one line for each thing, and nil when all is well again. It may be
	// called by several goroutines at once, and often with the same.
	Report func(name string, problem error)
}

// Advertiser sends router advertisements on the interfaces of the last Set while it runs. Its methods may be called
// from any goroutine.
type Advertiser struct {
	options Options
	open    func(Interface) (wire, error)
	ready   chan struct{}
	tasks   sync.WaitGroup

	mu       sync.Mutex
	speakers map[int]*speaker // by interface index
	failed   []string         // interfaces whose sockets could not be opened
	running  bool
	closed   bool
}

// New makes an Advertiser with nothing to do.
func New(o Options) *Advertiser {
	open := func(i Interface) (wire, error) { return listen(i, o.Mark) }
	return &Advertiser{options: o, open: open, ready: make(chan struct{}), speakers: map[int]*speaker{}}
}

// Set is where to advertise from now on, as a whole; the same again costs nothing, and tries again what failed. Where it
// was until now and is no longer it is withdrawn before Set returns, which takes a tenth of a second. Sockets are those
// of the calling thread's network namespace. What cannot be done is reported.
func (a *Advertiser) Set(wanted []Interface) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.drop(func(s *speaker) bool {
		return s.broken() || !slices.ContainsFunc(wanted, s.serves)
	}, true)
	failed := a.failed
	a.failed = nil
	for _, i := range wanted {
		if s := a.speakers[i.Index]; s != nil {
			s.change(i)
			continue
		}
		w, err := a.open(i)
		if err != nil {
			a.failed = append(a.failed, i.Name)
			a.options.Report(i.Name, fmt.Errorf("%s: the box does not become the IPv6 router: %w", i.Name, err))
			continue
		}
		s := newSpeaker(i, w, a.options)
		a.speakers[i.Index] = s
		if a.running {
			a.tasks.Go(s.run)
		}
	}
	for _, name := range failed {
		if !slices.Contains(a.failed, name) {
			a.options.Report(name, nil)
		}
	}
}

// drop ends the speakers that are chosen, side by side, and waits for them.
func (a *Advertiser) drop(chosen func(*speaker) bool, withdraw bool) {
	var ended []*speaker
	for index, s := range a.speakers {
		if chosen(s) {
			delete(a.speakers, index)
			ended = append(ended, s)
			if !a.running {
				s.wire.Close()
				close(s.done)
				continue
			}
			s.end <- withdraw
		}
	}
	for _, s := range ended {
		<-s.done
		a.options.Report(s.name, nil)
	}
}

// Run advertises until ctx ends. Then it withdraws what it advertised, if ctx was just cancelled; where context.Cause
// tells another cause, a failure or a successor that takes over, clients keep the box, as after a crash.
func (a *Advertiser) Run(ctx context.Context) error {
	a.mu.Lock()
	a.running = true
	for _, s := range a.speakers {
		a.tasks.Go(s.run)
	}
	a.mu.Unlock()
	close(a.ready)
	<-ctx.Done()
	a.end(errors.Is(context.Cause(ctx), context.Canceled))
	a.tasks.Wait()
	return nil
}

// Close frees an Advertiser that never ran. Run does so itself.
func (a *Advertiser) Close() { a.end(false) }

func (a *Advertiser) end(withdraw bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	a.drop(func(*speaker) bool { return true }, withdraw)
}

// Ready is closed when Run advertises.
func (a *Advertiser) Ready() <-chan struct{} { return a.ready }

func (a *Advertiser) String() string { return "router advertisements" }

// Advertised reports whether clients on the interface of that index have been told of the box.
func (a *Advertiser) Advertised(index int) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.speakers[index]
	return s != nil && s.heard.Load()
}
