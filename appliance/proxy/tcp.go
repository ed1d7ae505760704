package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
	"sidegate/appliance/sniff"
)

// tcp accepts connections, dials for them, and hands each pair of sockets to a relay loop.
type tcp struct {
	server    *Server
	listeners []*net.TCPListener // IPv4, then IPv6 where the box has it
	loops     []*relayLoop
	next      atomic.Uint32 // the loop for the next connection

	mu      sync.Mutex
	clients map[netip.Addr]int // connections per client

	firstBytes sync.Pool // of *[sniff.MaxStream]byte: held only while they are looked at

	opening sync.WaitGroup // goroutines of connections
}

// clientKeepAlive finds clients that vanished, within about a quarter of an hour: no faster, because
// each probe wakes a sleeping phone.
var clientKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 10 * time.Minute, Interval: time.Minute, Count: 5}

func listenTCP(s *Server) (_ *tcp, err error) {
	t := &tcp{server: s, clients: make(map[netip.Addr]int)}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	for _, f := range families {
		l, err := t.listen(f)
		if errors.Is(err, unix.EAFNOSUPPORT) && f.optional {
			continue
		}
		if err != nil {
			return nil, err
		}
		t.listeners = append(t.listeners, l)
	}
	for i := range s.options.Threads {
		l, err := newLoop(fmt.Sprintf("relay-tcp-%d", i))
		if err != nil {
			return nil, err
		}
		t.loops = append(t.loops, newRelayLoop(l, s))
	}
	return t, nil
}

func (t *tcp) listen(f family) (*net.TCPListener, error) {
	config := net.ListenConfig{
		KeepAliveConfig: clientKeepAlive,
		Control: func(_, _ string, c syscall.RawConn) error {
			var failed error
			err := c.Control(func(fd uintptr) { failed = f.setTransparent(int(fd), t.server.options.Mark) })
			return errors.Join(err, failed)
		},
	}
	config.SetMultipathTCP(false) // a sockmap takes no MPTCP listener
	l, err := config.Listen(context.Background(), "tcp"+f.suffix, netip.AddrPortFrom(f.loopback, 0).String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func (t *tcp) sockets() (v4, v6 syscall.Conn) {
	v4 = t.listeners[0]
	if len(t.listeners) > 1 {
		v6 = t.listeners[1]
	}
	return v4, v6
}

// close closes what serve would, had it run.
func (t *tcp) close() {
	for _, l := range t.listeners {
		l.Close()
	}
	for _, l := range t.loops {
		l.close()
	}
}

func (t *tcp) serve(ctx context.Context) error {
	defer t.close()
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range t.loops {
		g.Go(l.run)
	}
	var accepting sync.WaitGroup
	for _, l := range t.listeners {
		accepting.Add(1)
		g.Go(func() error {
			defer accepting.Done()
			return t.accept(ctx, l)
		})
	}
	g.Go(func() error {
		t.sweep(ctx)
		for _, l := range t.listeners {
			l.Close()
		}
		// Dials end with ctx; whoever got through hands over before the loops are emptied.
		accepting.Wait()
		t.opening.Wait()
		for _, l := range t.loops {
			l.stop()
		}
		return nil
	})
	err := g.Wait()
	for _, l := range t.loops {
		l.resetAll()
	}
	return err
}

// sweep resets half-closed connections that have been silent for too long, until ctx ends.
func (t *tcp) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepInterval(t.server.options.HalfClosed))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, l := range t.loops {
				l.expire(monotonic() - int64(t.server.options.HalfClosed))
			}
		}
	}
}

// sweepInterval is how often to look for what is idle for longer than a limit.
func sweepInterval(limit time.Duration) time.Duration {
	return min(max(limit/8, 10*time.Millisecond), 30*time.Second)
}

// acceptPause is how long to wait after accept failed, mostly for want of descriptors.
const acceptPause = 50 * time.Millisecond

func (t *tcp) accept(ctx context.Context, l *net.TCPListener) error {
	for {
		c, err := l.AcceptTCP()
		switch {
		case err == nil:
			t.accepted(ctx, c)
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accepting on %s: %w", l.Addr(), err)
		default:
			t.server.refuse(Descriptors, 1)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
		}
	}
}

// connection is one proxied TCP connection, from accept to its end.
type connection struct {
	tcp                 *tcp
	client, destination netip.AddrPort
	traffic             *traffic
	start               int64 // monotonic
	up, down            int64 // bytes; written by whoever relays
}

func (t *tcp) accepted(ctx context.Context, c *net.TCPConn) {
	// A transparent socket's local address is where the client wanted to go.
	client, destination := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	route, ok := t.server.flow(policy.TCP, client, destination)
	if !ok {
		t.refuse(c, NotProxied)
		return
	}
	if reason := t.admit(client.Addr()); reason != 0 {
		t.refuse(c, reason)
		return
	}
	conn := &connection{tcp: t, client: client, destination: destination, start: monotonic()}
	t.opening.Go(func() { conn.open(ctx, c, route) })
}

// admit takes what a connection needs; released gives it back.
func (t *tcp) admit(client netip.Addr) Reason {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.clients[client] >= t.server.options.Limits.Connections {
		return ClientLimit
	}
	if !t.server.descriptors.take(connectionDescriptors) {
		return Descriptors
	}
	t.clients[client]++
	t.server.connections.Add(1)
	return 0
}

func (t *tcp) released(client netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.clients[client]--; t.clients[client] == 0 {
		delete(t.clients, client)
	}
	t.server.descriptors.give(connectionDescriptors)
	t.server.connections.Add(-1)
}

func (t *tcp) refuse(c *net.TCPConn, r Reason) {
	t.server.refuse(r, 1)
	reset(c)
}

// reset closes a connection by a RST: the client sees a failure and not an empty success.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// open finds out where the connection is to go, dials and starts the relay.
func (c *connection) open(ctx context.Context, client *net.TCPConn, route Route) {
	server := c.tcp.server
	upstream, reason := c.dial(ctx, client, route)
	if upstream == nil {
		if reason != 0 {
			server.refuse(reason, 1)
		}
		reset(client)
		c.tcp.released(c.client.Addr())
		return
	}
	c.traffic.connections.Add(1)
	server.log.Debug("connection opened", "client", c.client, "destination", c.destination, "outbound", c.traffic.outbound)
	if plain, ok := upstream.(*net.TCPConn); ok {
		loop := c.tcp.loops[c.tcp.next.Add(1)%uint32(len(c.tcp.loops))]
		if err := loop.start(c, client, plain); err != nil {
			c.tcp.refuse(client, SocketFailed)
			reset(plain)
			c.ended()
		}
		return
	}
	c.copyStream(ctx, client, upstream)
	c.ended()
}

// dial reaches the outbound of the route. Without a connection the client is to be refused, and 0 means
// that it ended by itself.
func (c *connection) dial(ctx context.Context, client *net.TCPConn, route Route) (net.Conn, Reason) {
	server := c.tcp.server
	var first sniff.Result
	if route.Sniff {
		var alive bool
		if first, alive = c.sniff(ctx, client); !alive {
			return nil, 0
		}
	}
	within, cancel := context.WithTimeout(ctx, server.options.DialTimeout)
	defer cancel()
	if route.Sniff {
		var ok bool
		if route, ok = server.decide(within, policy.TCP, c.client, c.destination, first); !ok {
			return nil, NotProxied
		}
	}
	if route.Outbound == policy.OutboundBlock {
		return nil, Blocked
	}
	out, ok := server.options.Outbounds.Outbound(route.Outbound)
	if !ok {
		return nil, NoOutbound
	}
	c.traffic = server.traffic(route.Outbound)
	upstream, err := out.DialTCP(within, outbound.Destination{
		Addr: c.destination, Name: route.Name, Mark: server.directMark(route),
	})
	if err != nil {
		if ctx.Err() == nil {
			c.traffic.failed(server.log, err)
			server.log.Debug("connection refused", "client", c.client, "destination", c.destination, "outbound", route.Outbound, "error", err)
		}
		return nil, UpstreamFailed
	}
	return upstream, 0
}

// ended accounts for the end of an opened connection.
func (c *connection) ended() {
	c.tcp.released(c.client.Addr())
	c.tcp.server.log.Debug("connection ended", "client", c.client, "destination", c.destination, "outbound", c.traffic.outbound,
		"bytes_up", c.up, "bytes_down", c.down, "duration", time.Duration(monotonic()-c.start))
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
