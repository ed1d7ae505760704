package advertise

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/mdlayher/ndp"
	"golang.org/x/sys/unix"
)

// speaker advertises on one interface, from one address.
type speaker struct {
	name    string
	index   int
	address netip.Addr
	wire    wire
	log     *slog.Logger
	report  func(name string, problem error)

	changes chan Interface
	end     chan bool     // whether to withdraw
	done    chan struct{} // closed when run has ended
	heard   atomic.Bool   // the last advertisement left
	deaf    atomic.Bool   // the socket is of no use any more

	// of run
	now     Interface
	due     schedule
	others  routers
	failure error // of sending
}

// incoming is a message of the LAN that is in order.
type incoming struct {
	message ndp.Message
	from    netip.Addr
}

func newSpeaker(i Interface, w wire, o Options) *speaker {
	return &speaker{
		name: i.Name, index: i.Index, address: i.Address, wire: w, log: o.Log, report: o.Report, now: i,
		changes: make(chan Interface, 1), end: make(chan bool, 1), done: make(chan struct{}),
	}
}

// serves reports whether the speaker can go on as i: as a router is known by its address, another is another router.
func (s *speaker) serves(i Interface) bool {
	return i.Index == s.index && i.Address == s.address && i.Name == s.name
}

func (s *speaker) broken() bool { return s.deaf.Load() }

// change tells the speaker of the interface as it is now. It does not wait; the newest counts. One caller at a time.
func (s *speaker) change(i Interface) {
	select {
	case <-s.changes:
	default:
	}
	s.changes <- i
}

// run speaks until it is ended, and closes the wire.
func (s *speaker) run() {
	defer close(s.done)
	received, quit := make(chan incoming), make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.receive(received, quit)
	}()
	defer func() {
		close(quit)
		s.wire.Close()
		<-stopped
	}()

	if m, err := ndp.MarshalMessage(&ndp.RouterSolicitation{}); err == nil {
		err = s.wire.send(m, allRouters) // who else is a router here?
		s.log.Debug("asked for the other routers", "interface", s.name, "error", err)
	}
	s.due.next = time.Now().Add(begin)
	timer := time.NewTimer(begin)
	defer timer.Stop()
	for {
		select {
		case withdraw := <-s.end:
			if withdraw { // though it may have said nothing yet: clients may know the box from before a restart
				s.withdraw()
			}
			return
		case i := <-s.changes:
			if i == s.now {
				continue
			}
			s.now = i
			s.due.renew(time.Now())
		case in := <-received:
			s.listen(in)
		case <-timer.C:
			s.advertise()
		}
		timer.Reset(time.Until(s.due.next))
	}
}

// receive passes on what is in order until the wire is closed.
func (s *speaker) receive(to chan<- incoming, quit <-chan struct{}) {
	buffer := make([]byte, 1<<16)
	for {
		n, from, limit, err := s.wire.receive(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Debug("listening for routers failed", "interface", s.name, "error", err)
			s.deaf.Store(true) // the next Set opens another
			return
		}
		m := parse(buffer[:n], from.WithZone(""), limit)
		if m == nil {
			continue
		}
		select {
		case to <- incoming{m, from.WithZone("")}:
		case <-quit:
			return
		}
	}
}

func (s *speaker) listen(in incoming) {
	now := time.Now()
	switch m := in.message.(type) {
	case *ndp.RouterSolicitation:
		s.due.solicited(now)
	case *ndp.RouterAdvertisement:
		if in.from == s.address {
			return // a loop of the LAN's
		}
		before := s.others.consensus()
		s.others.hear(m, in.from, now)
		if s.others.consensus() != before && s.due.sent > 0 {
			s.due.renew(now)
		}
		s.tell()
	}
}

func (s *speaker) advertise() {
	now := time.Now()
	s.others.forget(now)
	m, err := s.now.advertisement(Lifetime, s.others.consensus())
	if err == nil {
		err = s.wire.send(m, allNodes)
	}
	s.heard.Store(err == nil)
	s.failure = nil
	if err != nil {
		s.due.failed(now)
		s.failure = fmt.Errorf("%s: sending a router advertisement: %w", s.name, err)
		if errors.Is(err, unix.EPERM) {
			s.failure = fmt.Errorf("%w; a firewall of the box drops it: let ICMPv6 type 134 out", s.failure)
		}
	} else {
		s.due.done(now)
	}
	s.tell()
}

// tell reports all that is wrong at present.
func (s *speaker) tell() { s.report(s.name, errors.Join(s.failure, s.others.problems(s.now))) }

// withdraw tells clients that the box is no router any more. RFC 4861 section 6.2.5 asks for up to three, and for three
// seconds between any two: nobody should wait so long for the end, and one alone may be lost.
func (s *speaker) withdraw() {
	m, err := s.now.advertisement(0, s.others.consensus())
	for i := 0; i < 3 && err == nil; i++ {
		if i > 0 {
			time.Sleep(50 * time.Millisecond)
		}
		err = s.wire.send(m, allNodes)
	}
	if err != nil {
		s.log.Debug("withdrawing the box as IPv6 router failed", "interface", s.name, "error", err)
	}
}
