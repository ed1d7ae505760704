package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

// verdicts answers as a test says.
type verdicts struct {
	answer atomic.Pointer[verdictFunc]
	asked  atomic.Int64
}

type verdictFunc func(n policy.Network, client, destination netip.AddrPort) (string, bool)

func (v *verdicts) set(f verdictFunc) { v.answer.Store(&f) }

func (v *verdicts) Flow(n policy.Network, client, destination netip.AddrPort) (Route, bool) {
	v.asked.Add(1)
	name, ok := (*v.answer.Load())(n, client, destination)
	return Route{Outbound: name}, ok
}

func (v *verdicts) Decide(_ context.Context, n policy.Network, client, destination netip.AddrPort, _ string) (Route, bool) {
	return v.Flow(n, client, destination)
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
