package dns

import (
	"context"
	"errors"
	"net/netip"
	"syscall"
)

// Sockets are what the datapath assigns packets to. The IPv6 ones are nil on a box without IPv6.
type Sockets struct {
	TCP4, TCP6, UDP4, UDP6 syscall.Conn
}

// Server is the listener. Listen makes it, Use gives it a Resolver, Serve runs it.
type Server struct{}

// Listen opens the listening sockets, transparent and bound to addresses that only assigned packets and
// this box reach: UDP to port 53 of 127.83.71.53 and of 100::5347:35 (in the discard-only prefix,
// RFC 6666), because replies carry the port, and TCP to a free port of the loopback address. Nothing is
// answered before Serve; from now on either Serve or Close must be called. It needs CAP_NET_ADMIN.
func Listen(o Options) (*Server, error) { return nil, errors.ErrUnsupported }

// Sockets returns the listening sockets. They live until Serve or Close returns.
func (s *Server) Sockets() Sockets { return Sockets{} }

// Use makes r answer from now on. Before the first Use the answer is SERVFAIL. The caller then closes the
// one before, which waits for what it has under way.
func (s *Server) Use(r *Resolver) {}

// Serve answers until ctx ends, then closes every descriptor and waits for every goroutine and thread of
// its own. It returns nil after ctx ended, and what failed otherwise. It can be called once.
func (s *Server) Serve(ctx context.Context) error { return errors.ErrUnsupported }

// Close releases the sockets of a Server that is not going to be served. After Serve it does nothing.
func (s *Server) Close() {}

// Stats returns the counters.
func (s *Server) Stats() Stats { return Stats{} }

// Resolver answers questions as Settings say.
type Resolver struct{}

// NewResolver checks and compiles the settings. Its error has a line for each defect.
func NewResolver(s Settings) (*Resolver, error) { return nil, errors.ErrUnsupported }

// Lookup returns the addresses of a name, IPv4 first, for the gateway's own use: by the rules for a client
// of which nothing is known, through the cache, and taught to nobody. A name without addresses is an error.
func (r *Resolver) Lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	return nil, errors.ErrUnsupported
}

// Close ends the exchanges under way and waits for them. Questions that come later fail.
func (r *Resolver) Close() {}

// Stats is a snapshot. Its parts are read one after the other, not at one instant.
type Stats struct {
	Queries   uint64 // that came
	Cached    uint64 // answered from the cache
	Stale     uint64 // of those: past their end, because the upstream did not answer
	Failed    uint64 // answered SERVFAIL
	Truncated uint64 // too long for UDP: the client asks again by TCP
	Taught    uint64 // calls of Learn
	Filtered  uint64 // answers of which the rebinding filter took something

	Connections int                 // TCP
	Entries     int                 // in the cache
	Upstreams   map[string]Upstream // by name
	Dropped     map[Reason]uint64   // queries without an answer; has every reason
}

// Upstream is what became of the questions to one upstream since the start.
type Upstream struct {
	Queries, Failures uint64
}

// Reason is why a query got no answer. The zero value is invalid.
type Reason uint8
