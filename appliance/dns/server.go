package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sync/errgroup"
)

// Sockets are what the datapath assigns packets to. The IPv6 ones are nil on a box without IPv6.
type Sockets struct {
	TCP4, TCP6, UDP4, UDP6 syscall.Conn
}

// Server is the listener. Listen makes it, Use gives it a Resolver, Serve runs it.
type Server struct {
	options  Options
	log      *slog.Logger
	clients  *clients
	resolver atomic.Pointer[Resolver]
	counters serverCounters

	udp     []*udpListener
	tcp     *tcp
	own     map[netip.Addr]bool // where our listeners are bound: nobody has business there
	started atomic.Bool

	ctx       context.Context // of Serve
	work      sync.WaitGroup  // queries under way, and renewals
	strangers atomic.Int64    // datagrams whose clients are being identified

	retired struct {
		mu        sync.Mutex
		filtered  uint64
		upstreams map[string]Upstream // figures of resolvers that were in use before
	}
}

// Listen opens the listening sockets, transparent and bound to addresses that only assigned packets reach,
// and this box: UDP to port 53 of 127.83.71.53 and of 100::5347:35, because replies carry the port, and TCP
// to a free port of the loopback address. Nothing is answered before Serve; from now on either Serve or
// Close must be called. It needs CAP_NET_ADMIN and CAP_NET_BIND_SERVICE.
func Listen(o Options) (_ *Server, err error) {
	if o.Learner == nil {
		return nil, errors.New("opening the dns listeners: a learner is required")
	}
	s := newServer(o)
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	for _, f := range families {
		l, err := listenUDP(s, f)
		if f.missing(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("opening the dns listener for udp: %w", err)
		}
		s.udp = append(s.udp, l)
		s.own[f.address] = true
	}
	if s.tcp, err = listenTCP(s); err != nil {
		return nil, fmt.Errorf("opening the dns listener for tcp: %w", err)
	}
	return s, nil
}

// newServer makes one without sockets.
func newServer(o Options) *Server {
	o.setDefaults()
	s := &Server{options: o, log: o.Log, clients: newClients(o), own: make(map[netip.Addr]bool)}
	s.retired.upstreams = make(map[string]Upstream)
	return s
}

// defaultQueries is more than any client asks for itself: caches between us and the clients do.
const defaultQueries = 250000

func (o *Options) setDefaults() {
	setDefault(&o.Limits.Queries, defaultQueries)
	setDefault(&o.Limits.Outstanding, 512)
	setDefault(&o.Limits.Connections, 32)
	if o.Allow == nil {
		o.Allow = allowPrivate
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// Sockets returns the listening sockets. They live until Serve or Close returns.
func (s *Server) Sockets() Sockets {
	var sockets Sockets
	sockets.TCP4, sockets.TCP6 = s.tcp.sockets()
	sockets.UDP4 = rawSocket(s.udp[0].fd)
	if len(s.udp) > 1 {
		sockets.UDP6 = rawSocket(s.udp[1].fd)
	}
	return sockets
}

// Use makes r answer from now on. Before the first Use the answer is SERVFAIL. The caller then closes the
// one before, which waits for what it has under way.
func (s *Server) Use(r *Resolver) {
	s.retired.mu.Lock()
	defer s.retired.mu.Unlock()
	if old := s.resolver.Swap(r); old != nil && old != r {
		old.addTo(&s.retired.filtered, s.retired.upstreams)
	}
}

// LimitQueries replaces Limits.Queries; 0 is the default. What clients have asked before counts.
func (s *Server) LimitQueries(n int) {
	setDefault(&n, defaultQueries)
	s.clients.limitQueries(n)
}

// Serve answers until ctx ends, then closes every descriptor and waits for every goroutine and thread of
// its own. It returns nil after ctx ended, and what failed otherwise. It can be called once.
func (s *Server) Serve(ctx context.Context) error {
	if s.started.Swap(true) {
		return errors.New("serving dns: it has been served or closed before")
	}
	defer s.close()
	g, ctx := errgroup.WithContext(ctx)
	s.ctx = ctx
	for _, l := range s.udp {
		g.Go(l.run)
	}
	g.Go(func() error { return s.tcp.serve(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		for _, l := range s.udp {
			l.stop()
		}
		return nil
	})
	err := g.Wait()
	s.work.Wait()
	if err != nil {
		return fmt.Errorf("serving dns: %w", err)
	}
	return nil
}

// Close releases the sockets of a Server that is not going to be served. After Serve it does nothing.
func (s *Server) Close() {
	if !s.started.Swap(true) {
		s.close()
	}
}

func (s *Server) close() {
	for _, l := range s.udp {
		l.close()
	}
	if s.tcp != nil {
		s.tcp.close()
	}
}
