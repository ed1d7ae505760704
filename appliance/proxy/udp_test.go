package proxy

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"sidegate/appliance/outbound"
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

// Answers of many remotes arrive together; each comes from where it was sent to.
func TestUDPInterleaved(t *testing.T) {
	r := newRig(t, Options{Threads: 1}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	c := r.udpClient(client4, 0)
	const remotes, rounds = 40, 20
	to := func(n int) netip.AddrPort { return netip.AddrPortFrom(server4, uint16(5000+n)) }
	if err := c.exchange(to(0), []byte("first")); err != nil {
		t.Fatal(err)
	}
	for i := range remotes * rounds {
		c.send(to(i%remotes), pattern(64, byte(i%remotes)))
	}
	for range remotes * rounds {
		payload, from, err := c.receive()
		if err != nil {
			t.Fatalf("%v (%v)", err, r.server.Stats().Refused)
		}
		if want := pattern(64, byte(from.Port()-5000)); !bytes.Equal(payload, want) {
			t.Fatalf("from %s came what was sent to another", from)
		}
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
	r := newRig(t, Options{UDPIdle: time.Second}, nil)
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
		time.Sleep(100 * time.Millisecond)
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
	release := sync.OnceFunc(func() { close(answer) })
	t.Cleanup(release)
	upstream.hold.Store(&answer)
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 5000)
	const surplus = 10
	for i := range maxQueue + surplus {
		c.send(to, pattern(100, byte(i)))
	}
	eventually(t, "the surplus is refused", func() bool { return r.server.Stats().Refused[QueueFull] == surplus })
	release()
	for i := range maxQueue {
		payload, _, err := c.receive()
		if err != nil || !bytes.Equal(payload, pattern(100, byte(i))) {
			t.Fatalf("datagram %d of the queue: %d bytes, %v", i, len(payload), err)
		}
	}
	held := make(chan struct{})
	release = sync.OnceFunc(func() { close(held) })
	t.Cleanup(release)
	upstream.hold.Store(&held)
	c = r.udpClient(client4, 0)
	for range 5 { // two fit
		c.send(to, pattern(60000, 1))
	}
	eventually(t, "the long ones are refused", func() bool { return r.server.Stats().Refused[QueueFull] == surplus+3 })
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
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { growBuffers(int(fd), 8<<20) })
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
