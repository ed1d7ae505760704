package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

// Every length passes both ways, through a real SOCKS5 server and directly: fragmented on the way in
// from 1,472 bytes on, and the longest that SOCKS5 leaves room for.
func TestUDPLengths(t *testing.T) {
	needsRoot(t)
	for _, through := range []string{"dante", "direct"} {
		for _, to := range []netip.Addr{server4, server6} {
			t.Run(through+" "+to.String(), func(t *testing.T) {
				r := newNetwork(t)
				if through == "dante" {
					r.serve(Options{}, map[string]outbound.Outbound{"up": r.dante()})
				} else {
					r.serve(Options{}, directly(t))
				}
				server := r.udpServer(netip.AddrPortFrom(to, 0), echo)
				c := r.udpClient(to, 0)
				for _, size := range []int{1, 64, 1200, 1472, 1473, 3000, 9000, 60000, 65000} {
					if err := c.exchange(server, pattern(size, byte(size))); err != nil {
						t.Errorf("%d bytes: %v", size, err)
					}
				}
				eventually(t, "all is counted", func() bool {
					up := r.server.Stats().Outbounds["up"]
					const packets, bytes = 9, 1 + 64 + 1200 + 1472 + 1473 + 3000 + 9000 + 60000 + 65000
					return up.PacketsUp == packets && up.PacketsDown == packets && up.BytesUp == bytes && up.BytesDown == bytes
				})
			})
		}
	}
}

// One endpoint of a client has one mapping, whomever it talks to, and whoever answers there reaches
// it, also from an address that it never heard of (RFC 4787 REQ-1, REQ-8).
func TestUDPFullCone(t *testing.T) {
	r := newNetwork(t)
	r.serve(Options{}, map[string]outbound.Outbound{"up": r.dante()})
	var mu sync.Mutex
	seen := make(map[string]bool)
	third := r.udpSocket(r.internet, netip.AddrPortFrom(third4, 0))
	note := func(c *net.UDPConn, from netip.AddrPort, payload []byte) {
		mu.Lock()
		defer mu.Unlock()
		seen[from.String()] = true
		third.WriteToUDPAddrPort(append([]byte("third "), payload...), from)
	}
	a := r.udpServer(netip.AddrPortFrom(server4, 0), note)
	b := r.udpServer(netip.AddrPortFrom(proxy4, 0), note)
	c := r.udpClient(client4, 0)
	for _, to := range []netip.AddrPort{a, b} {
		c.send(to, []byte("hello"))
		payload, from, err := c.receive()
		if err != nil || string(payload) != "third hello" || from != udpAddr(third) {
			t.Fatalf("received %q from %s, %v", payload, from, err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 1 {
		t.Errorf("two destinations saw the mappings %v, want one", seen)
	}
	if n := r.server.Stats().Sessions; n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
}

// After its first datagrams a flow has a socket of its own, and bursts go through whole, in runs of
// equal lengths and not.
func TestUDPBurst(t *testing.T) {
	r := newRig(t, Options{}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	if err := c.exchange(to, []byte("first")); err != nil {
		t.Fatal(err)
	}
	for _, lengths := range [][]int{{64}, {1400}, {64, 64, 64, 20}, {1, 2, 3, 4}, {1472, 1500, 64}, {3000}} {
		const count = 300
		want := make(map[string]int)
		for i := range count {
			payload := pattern(max(lengths[i%len(lengths)], 1), byte(i))
			want[string(payload)]++
			c.send(to, payload)
		}
		for i := range count {
			payload, from, err := c.receive()
			if err != nil || from != to {
				t.Fatalf("lengths %v: datagram %d from %s: %v (lost: %v)", lengths, i, from, err, r.server.Stats().Refused)
			}
			want[string(payload)]--
		}
		for payload, n := range want {
			if n != 0 {
				t.Fatalf("lengths %v: %d copies too few of a datagram of %d bytes", lengths, n, len(payload))
			}
		}
	}
	if n := r.server.Stats().Flows; n != 1 {
		t.Errorf("%d flows, want 1", n)
	}
}

// Where the kernel cannot cut messages up, datagrams are sent one by one.
func TestUDPSegmentationRefused(t *testing.T) {
	r := newRig(t, Options{Threads: 1}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	(*namespace)(nil).run(t, "ip link set wan mtu 1300")
	r.internet.run(t, "ip link set eth0 mtu 1300")
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	if err := c.exchange(to, []byte("first")); err != nil {
		t.Fatal(err)
	}
	const count = 200
	for i := range count {
		c.send(to, pattern(1400, byte(i)))
	}
	for i := range count {
		payload, _, err := c.receive()
		if err != nil || !bytes.Equal(payload, pattern(1400, payload[0])) {
			t.Fatalf("datagram %d: %d bytes, %v", i, len(payload), err)
		}
	}
}

func TestUDPIdleExpires(t *testing.T) {
	r := newRig(t, Options{UDPIdle: 300 * time.Millisecond}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	for round := range 2 {
		if err := c.exchange(to, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		if s := r.server.Stats(); s.Sessions != 1 || s.Flows != 1 {
			t.Fatalf("%d sessions and %d flows", s.Sessions, s.Flows)
		}
		eventually(t, "session and flow are gone", func() bool {
			s := r.server.Stats()
			return s.Sessions == 0 && s.Flows == 0
		})
		eventually(t, "the upstream was told", func() bool { return upstream.open() == 0 })
		if n := upstream.accepted.Load(); n != int64(round+1) {
			t.Fatalf("%d associations", n)
		}
	}
	// Traffic keeps both alive.
	for range 20 {
		if err := c.exchange(to, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if n := upstream.accepted.Load(); n != 3 {
		t.Errorf("%d associations, want 3: one in use expired", n)
	}
}

// The upstream ends an association; the client's next datagram makes another one.
func TestUDPUpstreamEndsAssociation(t *testing.T) {
	r := newRig(t, Options{}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	if err := c.exchange(to, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	upstream.hangUp()
	eventually(t, "the session is gone", func() bool { return r.server.Stats().Sessions == 0 })
	if err := c.exchange(to, []byte("again")); err != nil {
		t.Fatal(err)
	}
	if n := upstream.accepted.Load(); n != 2 {
		t.Errorf("%d associations, want 2", n)
	}
}

// While the association is being opened some datagrams wait, and the rest are counted.
func TestUDPQueue(t *testing.T) {
	r := newRig(t, Options{}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	answer := make(chan struct{})
	upstream.hold.Store(&answer)
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	const surplus = 10
	for i := range maxQueue + surplus {
		c.send(to, pattern(100, byte(i)))
	}
	eventually(t, "the surplus is refused", func() bool { return r.server.Stats().Refused[QueueFull] == surplus })
	close(answer)
	for i := range maxQueue {
		payload, _, err := c.receive()
		if err != nil || !bytes.Equal(payload, pattern(100, byte(i))) {
			t.Fatalf("datagram %d of the queue: %d bytes, %v", i, len(payload), err)
		}
	}
}

func TestUDPRefusals(t *testing.T) {
	r := newRig(t, Options{}, nil)
	noUDP, err := outbound.New("up", "http://"+netip.AddrPortFrom(proxy4, 3128).String(), outbound.Credentials{}, outbound.Options{})
	if err != nil {
		t.Fatal(err)
	}
	received := make(chan netip.AddrPort, 100)
	server := r.udpServer(netip.AddrPortFrom(server4, 0), func(_ *net.UDPConn, from netip.AddrPort, _ []byte) { received <- from })
	through := func(name string, ok bool) verdictFunc {
		return func(policy.Network, netip.AddrPort, netip.AddrPort) (string, bool) { return name, ok }
	}
	for _, refusal := range []struct {
		reason  Reason
		verdict verdictFunc
		up      outbound.Outbound
	}{
		{NotProxied, through("", false), noUDP},
		{NoOutbound, through("gone", true), noUDP},
		{NoUDP, through("up", true), noUDP},
		{UpstreamFailed, through("up", true), r.socks5(netip.AddrPortFrom(proxy4, 9))},
	} {
		t.Run(refusal.reason.String(), func(t *testing.T) {
			r.verdicts.set(refusal.verdict)
			r.outbounds.set("up", refusal.up)
			c := r.udpClient(client4, 0)
			for range 3 {
				c.send(server, []byte("hello"))
			}
			eventually(t, "all are counted", func() bool { return r.server.Stats().Refused[refusal.reason] == 3 })
		})
	}
	t.Run("sent to the listener itself", func(t *testing.T) {
		before := r.server.Stats().Refused[NotProxied]
		r.verdicts.set(through("up", true))
		c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port(t, r.server.Sockets().UDP4)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte("hello"))
		eventually(t, "it is counted", func() bool { return r.server.Stats().Refused[NotProxied] == before+1 })
	})
	select {
	case from := <-received:
		t.Errorf("a refused datagram reached the server, from %s", from)
	default:
	}
	eventually(t, "no session is left", func() bool { return r.server.Stats().Sessions == 0 })
	if n := r.server.Stats().Flows; n != 0 {
		t.Errorf("%d flows are left", n)
	}
}

// A client at its limits gives up its own, the least recently used first, and nobody else's.
func TestUDPClientLimits(t *testing.T) {
	r := newRig(t, Options{Limits: Limits{Sessions: 3, Flows: 4}}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	to := func(n int) netip.AddrPort { return netip.AddrPortFrom(server4, uint16(5000+n)) }

	neighbour := r.udpClient(other4, 0)
	if err := neighbour.exchange(to(0), []byte("hello")); err != nil {
		t.Fatal(err)
	}
	many := r.udpClient(client4, 0)
	for i := range 10 {
		if err := many.exchange(to(i), []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	if s := r.server.Stats(); s.Sessions != 2 || s.Flows != 1+4 {
		t.Errorf("%d sessions and %d flows, want 2 and 5", s.Sessions, s.Flows)
	}
	var all []*udpClientSocket
	for range 5 {
		c := r.udpClient(client4, 0)
		if err := c.exchange(to(0), []byte("hello")); err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	if s := r.server.Stats(); s.Sessions != 1+3 {
		t.Errorf("%d sessions, want 4", s.Sessions)
	}
	associations := upstream.accepted.Load()
	if err := errors.Join(all[4].exchange(to(0), []byte("young")), neighbour.exchange(to(0), []byte("hello"))); err != nil {
		t.Error(err)
	}
	if n := upstream.accepted.Load(); n != associations {
		t.Error("the youngest or the neighbour's session had been ended")
	}
	if err := all[0].exchange(to(0), []byte("old")); err != nil {
		t.Error(err)
	}
	if n := upstream.accepted.Load(); n != associations+1 {
		t.Error("the oldest session had not been ended")
	}
}

// When the process may open no more, the client that has most gives up its own.
func TestUDPDescriptors(t *testing.T) {
	r := newNetwork(t)
	r.descriptors = 2*sessionDescriptors + 11
	r.serve(Options{Threads: 1}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	to := func(n int) netip.AddrPort { return netip.AddrPortFrom(server4, uint16(5000+n)) }
	greedy, modest := r.udpClient(client4, 0), r.udpClient(other4, 0)
	for i := range 20 {
		if err := greedy.exchange(to(i), []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		if err := modest.exchange(to(i), []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		if err := greedy.exchange(to(i), []byte("more")); err != nil {
			t.Fatal(err)
		}
	}
	s := r.server.udp.shards[0]
	s.mu.Lock()
	defer s.mu.Unlock()
	for client, want := range map[netip.Addr]int{client4: 8, other4: 3} {
		if n := s.clients[client.As16()].flows.length; n != want {
			t.Errorf("%s has %d flows, want %d", client, n, want)
		}
	}
}

// What an upstream says is believed only as far as it can be true.
func TestUDPMalformedReplies(t *testing.T) {
	r := newRig(t, Options{}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	if err := c.exchange(to, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	mapping, _ := readSockaddr(upstream.lastFrom.Load())
	replies := [][]byte{
		{},
		{0, 0, 0, 1, 203, 0, 113}, // cut
		{0, 0, 1, 1, 203, 0, 113, 10, 19, 136, 'x'},                         // a fragment
		{0, 0, 0, 3, 1, 'a', 0, 53, 'x'},                                    // from a name
		{0, 0, 0, 1, 127, 0, 0, 1, 0, 53, 'x'},                              // from the client's own loopback
		append([]byte{0, 0, 0, 4, 0x20, 1, 0xd, 0xb8}, make([]byte, 16)...), // IPv6 to an IPv4 client
	}
	for _, reply := range replies {
		if _, err := upstream.relay.WriteToUDPAddrPort(reply, mapping.addrPort()); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are refused", func() bool { return r.server.Stats().Refused[Malformed] == uint64(len(replies)) })
	if err := c.exchange(to, []byte("still there")); err != nil {
		t.Error(err)
	}
}

// A remote that answered unasked has a flow. What the client sends there still goes where the policy
// says, and nowhere if it does not say so.
func TestUDPPolicyOnUnaskedFlows(t *testing.T) {
	r := newRig(t, Options{}, directly(t))
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("other", r.socks5(upstream.address()))
	third := r.udpSocket(r.internet, netip.AddrPortFrom(third4, 0))
	server := r.udpServer(netip.AddrPortFrom(server4, 0), func(_ *net.UDPConn, from netip.AddrPort, _ []byte) {
		third.WriteToUDPAddrPort([]byte("unasked"), from)
	})
	for _, v := range []struct {
		verdict string
		ok      bool
	}{{"other", true}, {"", false}} {
		r.verdicts.set(func(_ policy.Network, _, destination netip.AddrPort) (string, bool) {
			if destination == udpAddr(third) {
				return v.verdict, v.ok
			}
			return "up", true
		})
		c := r.udpClient(client4, 0)
		c.send(server, []byte("hello"))
		if payload, from, err := c.receive(); err != nil || string(payload) != "unasked" || from != udpAddr(third) {
			t.Fatalf("received %q from %s, %v", payload, from, err)
		}
		before := r.server.Stats()
		if v.ok {
			// The fake upstream echoes by itself: third would not.
			if err := c.exchange(udpAddr(third), []byte("through the other")); err != nil {
				t.Error(err)
			}
			continue
		}
		c.send(udpAddr(third), []byte("refused"))
		eventually(t, "it is refused", func() bool { return r.server.Stats().Refused[NotProxied] == before.Refused[NotProxied]+1 })
	}
}

// One client opens 300,000 flows as fast as it can; another one's old and new flows lose nothing.
func TestUDPFlood(t *testing.T) {
	if testing.Short() {
		t.Skip("short: it takes a few seconds")
	}
	r := newRig(t, Options{}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	live := r.udpClient(other4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	if err := live.exchange(to, []byte("before")); err != nil {
		t.Fatal(err)
	}
	flood := r.udpSocket(r.client, netip.AddrPortFrom(client4, 0))
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		sent := 0
		defer func() { done <- sent }()
		for {
			for i := range 300_000 {
				if i%100 == 0 {
					select {
					case <-stop:
						if sent >= 300_000 {
							return
						}
					default:
					}
				}
				ip := [4]byte{198, 18, byte(i >> 8), byte(i)}
				flood.WriteToUDPAddrPort([]byte("flood"), netip.AddrPortFrom(netip.AddrFrom4(ip), uint16(1000+i>>16)))
				sent++
			}
		}
	}()
	var slowest time.Duration
	for i := range 200 {
		c := live
		if i%2 == 0 {
			c = r.udpClient(other4, 0) // a new session
		}
		start := time.Now()
		if err := c.exchange(to, []byte("during")); err != nil {
			t.Errorf("exchange %d: %v", i, err)
		}
		slowest = max(slowest, time.Since(start))
	}
	close(stop)
	sent := <-done
	s := r.server.Stats()
	t.Logf("%d datagrams to as many flows; the other client's slowest exchange took %v; %d flows are left; refused: %v", sent, slowest, s.Flows, s.Refused)
	if s.Refused[ClientRate] == 0 {
		t.Error("the flood was not limited")
	}
	if limit := r.server.options.Limits.Flows + 200; s.Flows > limit {
		t.Errorf("%d flows, want at most %d", s.Flows, limit)
	}
}

// Serve leaves no descriptor and no goroutine behind.
func TestServeLeavesNothing(t *testing.T) {
	r := newNetwork(t)
	up := map[string]outbound.Outbound{"up": r.dante()}
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { c.Read(make([]byte, 1)) })
	server := r.udpServer(netip.AddrPortFrom(server4, 0), echo)
	round := func() {
		r.serve(Options{}, up)
		c := r.dial(address)
		defer c.Close()
		u := r.udpClient(client4, 0)
		defer u.Close()
		if err := u.exchange(server, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the connection is open", func() bool { return r.server.Stats().Outbounds["up"].Connections == 1 })
		r.stop()
		if s := r.server.Stats(); s.Connections+s.Sessions+s.Flows != 0 || r.server.descriptors.used.Load() != 0 {
			t.Errorf("left: %+v, %d descriptors", s, r.server.descriptors.used.Load())
		}
	}
	round() // the runtime opens what it keeps
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	for range 3 {
		round()
	}
	eventually(t, "goroutines and descriptors are as before", func() bool {
		return runtime.NumGoroutine() <= goroutines && openFiles(t) <= files
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range list {
		// The runtime's own poller may appear between two looks.
		if target, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && !strings.Contains(target, "/proc/") {
			n++
		}
	}
	return n
}

func TestCloseWithoutServe(t *testing.T) {
	newNetwork(t)
	files := openFiles(t)
	s, err := Listen(Options{Verdicts: &verdicts{}, Outbounds: &outbounds{}})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if n := openFiles(t); n != files {
		t.Errorf("%d descriptors, %d before", n, files)
	}
	if err := s.Serve(t.Context()); err == nil {
		t.Error("Serve after Close succeeded")
	}
}

func pattern(size int, seed byte) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = seed + byte(i*7)
	}
	return p
}

func udpAddr(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

func echo(c *net.UDPConn, from netip.AddrPort, payload []byte) { c.WriteToUDPAddrPort(payload, from) }

func (r *rig) udpSocket(ns *namespace, at netip.AddrPort) *net.UDPConn {
	t := r.t
	t.Helper()
	var c *net.UDPConn
	var err error
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	ns.do(t, func() { c, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(at)) })
	if err != nil {
		t.Fatal(err)
	}
	c.SetReadBuffer(8 << 20)
	t.Cleanup(func() { c.Close() })
	return c
}

// udpServer hands each datagram to an address of the internet to a function.
func (r *rig) udpServer(at netip.AddrPort, handle func(c *net.UDPConn, from netip.AddrPort, payload []byte)) netip.AddrPort {
	t := r.t
	t.Helper()
	c := r.udpSocket(r.internet, at)
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			handle(c, from, b[:n])
		}
	})
	t.Cleanup(func() {
		c.Close()
		wg.Wait()
	})
	return udpAddr(c)
}

// udpClientSocket is one endpoint of the client.
type udpClientSocket struct{ *net.UDPConn }

// udpClient opens one, at an address of the client or of the family of the address given.
func (r *rig) udpClient(at netip.Addr, port uint16) *udpClientSocket {
	r.t.Helper()
	switch {
	case at == client4, at == other4, at == client6:
	case at.Is4():
		at = client4
	default:
		at = client6
	}
	return &udpClientSocket{r.udpSocket(r.client, netip.AddrPortFrom(at, port))}
}

func (c *udpClientSocket) send(to netip.AddrPort, payload []byte) {
	if _, err := c.WriteToUDPAddrPort(payload, to); err != nil {
		panic(err)
	}
}

func (c *udpClientSocket) receive() (payload []byte, from netip.AddrPort, err error) {
	b := make([]byte, 65536)
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, from, err := c.ReadFromUDPAddrPort(b)
	return b[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), err
}

// exchange sends and waits for the same to come back from there.
func (c *udpClientSocket) exchange(to netip.AddrPort, payload []byte) error {
	c.send(to, payload)
	got, from, err := c.receive()
	switch {
	case err != nil:
		return err
	case from != to:
		return fmt.Errorf("the answer came from %s, not from %s", from, to)
	case !bytes.Equal(got, payload):
		return fmt.Errorf("%d bytes came back, or others than the %d that were sent", len(got), len(payload))
	}
	return nil
}
