package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

// verdicts answers as a test says. It stands for the policy and, like the datapath, remembers what was
// decided.
type verdicts struct {
	answer atomic.Pointer[verdictFunc]
	asked  atomic.Int64

	mu      sync.Mutex
	own     map[netip.Addr]bool // addresses of the box itself
	decide  decideFunc
	decided map[decision]Route
	names   []string                                                   // that Decide was asked with
	forward func(n policy.Network, client, destination netip.AddrPort) // has the kernel forward a flow
}

type decision struct {
	network             policy.Network
	client, destination netip.AddrPort
}

type (
	verdictFunc func(n policy.Network, client, destination netip.AddrPort) (string, bool)
	decideFunc  func(ctx context.Context, n policy.Network, client, destination netip.AddrPort, name string) (Route, bool)
)

func (v *verdicts) set(f verdictFunc) { v.answer.Store(&f) }

// sniff has every new flow sniffed.
func (v *verdicts) sniff(f decideFunc) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.decide, v.decided, v.names = f, make(map[decision]Route), nil
}

// sniffTo has every new flow sniffed, and then go one way.
func (v *verdicts) sniffTo(route Route) {
	v.sniff(func(context.Context, policy.Network, netip.AddrPort, netip.AddrPort, string) (Route, bool) {
		return route, true
	})
}

// asks are the names that Decide was asked with since sniff was called.
func (v *verdicts) asks() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.names)
}

func (v *verdicts) Flow(n policy.Network, client, destination netip.AddrPort) (Route, bool) {
	v.asked.Add(1)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.decide != nil {
		route, ok := v.decided[decision{n, client, destination}]
		if !ok {
			route.Sniff, route.Own = true, v.own[client.Addr()]
		}
		return route, true
	}
	name, ok := (*v.answer.Load())(n, client, destination)
	return Route{Outbound: name, Own: v.own[client.Addr()]}, ok
}

func (v *verdicts) Decide(ctx context.Context, n policy.Network, client, destination netip.AddrPort, told Told) (Route, bool) {
	name := told.Name
	v.mu.Lock()
	v.names = append(v.names, name)
	decide := v.decide
	v.mu.Unlock()
	route, ok := decide(ctx, n, client, destination, name)
	if !ok {
		return route, false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	route.Own = v.own[client.Addr()]
	if n == policy.UDP && route.forwarded() {
		v.forward(n, client, destination)
	}
	v.decided[decision{n, client, destination}] = route
	return route, true
}

// outbounds holds what a test puts in.
type outbounds struct{ m sync.Map }

func (o *outbounds) set(name string, out outbound.Outbound) { o.m.Store(name, out) }

func (o *outbounds) Outbound(name string) (outbound.Outbound, bool) {
	out, ok := o.m.Load(name)
	if !ok {
		return nil, false
	}
	return out.(outbound.Outbound), true
}

// socksServer is a SOCKS5 server for what real ones cannot be made to do. It associates UDP without
// authentication, and its relay sends each datagram back as it came: its header then says that the
// destination answered.
type socksServer struct {
	listener net.Listener
	relay    *net.UDPConn
	mu       sync.Mutex
	controls map[net.Conn]bool
	accepted atomic.Int64
	hold     atomic.Pointer[chan struct{}] // closed when UDP ASSOCIATE may be answered
	lastFrom atomic.Pointer[sockaddr]      // where the last datagram came from: a mapping
	wg       sync.WaitGroup
}

func (r *rig) socksServer(address netip.AddrPort) *socksServer {
	t := r.t
	t.Helper()
	s := &socksServer{controls: make(map[net.Conn]bool)}
	var err1, err2 error
	r.internet.do(t, func() {
		config := net.ListenConfig{}
		config.SetMultipathTCP(false)
		s.listener, err1 = config.Listen(context.Background(), "tcp", address.String())
		s.relay, err2 = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(address.Addr(), 0)))
	})
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	s.relay.SetReadBuffer(16 << 20)
	s.wg.Go(s.serve)
	s.wg.Go(func() { s.echoBatches(t) })
	t.Cleanup(func() {
		s.listener.Close()
		s.relay.Close()
		s.hangUp()
		s.wg.Wait()
	})
	return s
}

func (s *socksServer) serve() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.accepted.Add(1)
		s.mu.Lock()
		s.controls[c] = true
		s.mu.Unlock()
		s.wg.Go(func() {
			s.associate(c)
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.controls, c)
		})
	}
}

func (s *socksServer) associate(c net.Conn) {
	defer c.Close()
	var b [512]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return
	}
	io.ReadFull(c, b[:b[1]])
	c.Write([]byte{5, 0})
	if _, err := io.ReadFull(c, b[:10]); err != nil {
		return
	}
	if hold := s.hold.Load(); hold != nil {
		<-*hold
	}
	relay := s.relay.LocalAddr().(*net.UDPAddr).AddrPort()
	ip := relay.Addr().Unmap().As4()
	c.Write(append(append([]byte{5, 0, 0, 1}, ip[:]...), byte(relay.Port()>>8), byte(relay.Port())))
	io.Copy(io.Discard, c)
}

// hangUp closes every control connection.
func (s *socksServer) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.controls {
		c.Close()
	}
}

// open is how many control connections there are.
func (s *socksServer) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.controls)
}

func (s *socksServer) address() netip.AddrPort { return s.listener.Addr().(*net.TCPAddr).AddrPort() }

// echoBatches sends back what arrives, fast, until the relay is closed.
func (s *socksServer) echoBatches(t testing.TB) {
	in, err := newBatch()
	if err != nil {
		t.Error(err)
		return
	}
	defer in.close()
	out := new(sender)
	raw, err := s.relay.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	for {
		if raw.Read(func(fd uintptr) bool {
			in.empty()
			_, n := in.receive(int(fd))
			socket := udpSocket{registration: registration{fd: int(fd)}}
			out.begin(&socket)
			for i := range n {
				out.add(nil, in.payload(i), &in.names[i], in.messages[i].Namelen)
			}
			if n > 0 {
				from := in.names[n-1]
				s.lastFrom.Store(&from)
			}
			if out.end().lost > 0 {
				t.Error("the echo lost datagrams")
			}
			return n > 0
		}) != nil {
			return
		}
	}
}
