// Package proxy is the transparent relay: it takes the TCP connections and UDP datagrams that the
// datapath steers to its sockets and carries them to the outbound that the policy chose.
//
// TCP is spliced: all but small messages never enter this process. UDP moves in batches between
// connected sockets, one per flow, so that the kernel demultiplexes. Both run on a few threads that
// block in epoll, not on the Go runtime's poller: see loop.
//
// The listeners are bound to the loopback address, where only packets arrive that were assigned to
// them or sent from this box; what the Verdicts do not know as proxied is refused. So nobody can use
// them as an open proxy.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
	"sidegate/appliance/sniff"
)

// Verdicts says what becomes of a flow that the datapath handed to the listeners. Both methods are
// called from several threads.
type Verdicts interface {
	// Flow is what the policy wants of a new flow. It must not block. ok is false if the flow is unknown,
	// or none of the proxy's: it is refused. It is asked once per flow, but for UDP again about each
	// datagram that was on its way here when Decide gave the flow to the kernel, and when a remote that the client's
	// flow to may be the kernel's has sent something through an upstream: then it must say that the flow is direct.
	Flow(network policy.Network, client, destination netip.AddrPort) (route Route, ok bool)
	// Decide is asked about a flow that was to be sniffed, with what its first bytes told, and records its answer in the datapath. For TCP it may look the name up, until
	// ctx ends; for UDP it must not block. ok is false if the flow is to be refused; Sniff is not
	// looked at.
	Decide(ctx context.Context, network policy.Network, client, destination netip.AddrPort, told Told) (route Route, ok bool)
}

// Told is what a flow's first bytes told.
type Told struct {
	Name string // lower case, no final dot; empty: none
	// Hidden says that the name may be one that many sites share: the hello has an encrypted one inside (ECH), or
	// only something that looks like that.
	Hidden bool
}

// Route is where a flow goes.
type Route struct {
	// Outbound is a name that Outbounds knows. policy.OutboundDirect means, for TCP, that this box
	// connects to the destination itself and relays; for UDP, which the kernel can take over, that it
	// forwards the flow from now on, and that what is here already is sent on in the client's name. Of
	// an Own flow UDP is relayed, too.
	Outbound string
	// Own says that the client is this box itself. Nothing can be forwarded in its name.
	Own bool
	// Mark is the firewall mark that the kernel gives the packets of a direct flow. The datagrams that are
	// sent on in the client's name have it, or Options.Mark if it is 0; to the sockets of this box that take
	// the client's place, it adds what is of Options.RuleMarks. So all of a rule go the same way.
	Mark uint32
	// Name is what a proxy upstream is told instead of the address, "" for the address. TCP only.
	Name string
	// Sniff says that nothing is decided: the first bytes are to be read, then Decide is asked.
	Sniff bool
}

// forwarded reports whether the kernel is to forward a UDP flow.
func (r Route) forwarded() bool { return r.Outbound == policy.OutboundDirect && !r.Own }

// directMark is the mark to be added to the sockets by which this box sends a direct flow itself.
func (s *Server) directMark(r Route) uint32 {
	if r.Outbound != policy.OutboundDirect {
		return 0
	}
	return r.Mark & s.options.RuleMarks
}

// Outbounds finds an outbound by name. It is asked once per TCP connection or UDP session.
type Outbounds interface {
	Outbound(name string) (outbound.Outbound, bool)
}

// Options says what a Server works with. Verdicts and Outbounds are required; every other field has
// a usable zero value.
type Options struct {
	Verdicts  Verdicts
	Outbounds Outbounds
	Log       *slog.Logger // nil: no log

	// Mark is the firewall mark (SO_MARK) of the sockets that face the clients, so that the datapath
	// knows them as the daemon's own. 0: none.
	Mark uint32
	// RuleMarks are the bits of Route.Mark that the policy's rules choose, and not the datapath. 0: none.
	RuleMarks uint32

	DialTimeout  time.Duration // bounds deciding on a sniffed connection and reaching an outbound; 0: 10 s
	SniffTimeout time.Duration // how long to wait for a name in the first bytes; 0: 300 ms
	HalfClosed   time.Duration // life of a silent, half-closed connection; 0: 2 h
	UDPIdle      time.Duration // life of a silent UDP session or flow; 0: 5 min (RFC 4787 REQ-5)

	// Threads is the number of epoll threads for TCP and, again, for UDP; 0: one per CPU, at most 4.
	Threads int
	Limits  Limits
}

// Limits bounds what one client address may hold, so that a flood costs nobody else anything. They
// are lowered where the process may open too few descriptors for them. 0 is the default. This box
// itself (Route.Own) may have more of UDP: see ownShare.
type Limits struct {
	Connections int // TCP; beyond it new ones are reset. 16,384
	Sessions    int // UDP source endpoints × outbounds; beyond it the client's least recently used goes. 512
	Flows       int // UDP source and destination pairs; beyond it the client's least recently used goes. 2,048
}

func (o *Options) setDefaults() {
	setDefault(&o.DialTimeout, 10*time.Second)
	setDefault(&o.SniffTimeout, 300*time.Millisecond)
	setDefault(&o.HalfClosed, 2*time.Hour)
	setDefault(&o.UDPIdle, 5*time.Minute)
	setDefault(&o.Threads, min(runtime.NumCPU(), 4))
	setDefault(&o.Limits.Connections, 16384)
	setDefault(&o.Limits.Sessions, 512)
	setDefault(&o.Limits.Flows, 2048)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

func setDefault[T ~int | ~int64](value *T, usual T) {
	if *value <= 0 {
		*value = usual
	}
}

// Sockets are what the datapath assigns packets to. The IPv6 ones are nil on a box without IPv6.
type Sockets struct {
	TCP4, TCP6, UDP4, UDP6 syscall.Conn
}

// Server is the relay. Listen makes it, Serve runs it.
type Server struct {
	options Options
	log     *slog.Logger
	counters
	descriptors descriptors

	tcp     *tcp
	udp     *udp
	started atomic.Bool
}

// Listen opens the listening sockets, transparent and bound to a free port of the loopback address.
// Nothing is accepted before Serve; from now on either Serve or Close must be called.
//
// It raises RLIMIT_NOFILE of the process as far as it may. It needs CAP_NET_ADMIN.
func Listen(o Options) (_ *Server, err error) {
	if o.Verdicts == nil || o.Outbounds == nil {
		return nil, errors.New("opening the proxy: verdicts and outbounds are required")
	}
	o.setDefaults()
	s := &Server{options: o, log: o.Log}
	s.descriptors.limit = raiseDescriptors()
	s.options.Limits.fit(s.descriptors.limit)
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.tcp, err = listenTCP(s); err != nil {
		return nil, fmt.Errorf("opening the proxy's tcp listeners: %w", err)
	}
	if s.udp, err = listenUDP(s); err != nil {
		return nil, fmt.Errorf("opening the proxy's udp listeners: %w", err)
	}
	return s, nil
}

// Sockets returns the listening sockets. They live until Serve or Close returns.
func (s *Server) Sockets() Sockets {
	var sockets Sockets
	sockets.TCP4, sockets.TCP6 = s.tcp.sockets()
	sockets.UDP4, sockets.UDP6 = s.udp.sockets()
	return sockets
}

// Serve relays until ctx ends, then resets every connection, closes every descriptor and waits for
// every goroutine and thread of its own. It returns nil after ctx ended, and what failed otherwise.
// It can be called once.
func (s *Server) Serve(ctx context.Context) error {
	if s.started.Swap(true) {
		return errors.New("serving the proxy: it has been served or closed before")
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.tcp.serve(ctx) })
	g.Go(func() error { return s.udp.serve(ctx) })
	if err := g.Wait(); err != nil {
		return fmt.Errorf("serving the proxy: %w", err)
	}
	return nil
}

// Close releases the sockets of a Server that is not going to be served. After Serve it does nothing.
func (s *Server) Close() {
	if s.started.Swap(true) {
		return
	}
	if s.tcp != nil {
		s.tcp.close()
	}
	if s.udp != nil {
		s.udp.close()
	}
}

// flow is the only way to a new flow's route. A flow to the loopback address, where our listeners are bound, is one
// that somebody on this box opened to them: whatever the policy says, relaying it would be a loop, or an open
// proxy to what serves this box only.
func (s *Server) flow(network policy.Network, client, destination netip.AddrPort) (Route, bool) {
	if destination.Addr().IsLoopback() {
		return Route{}, false
	}
	return s.options.Verdicts.Flow(network, client, destination)
}

// decide is flow for one whose first bytes were looked at.
func (s *Server) decide(ctx context.Context, network policy.Network, client, destination netip.AddrPort, r sniff.Result) (Route, bool) {
	return s.options.Verdicts.Decide(ctx, network, client, destination, Told{r.Name, r.ECH})
}

var processStart = time.Now()

// monotonic is the time since the process started, in nanoseconds.
func monotonic() int64 { return int64(time.Since(processStart)) }
