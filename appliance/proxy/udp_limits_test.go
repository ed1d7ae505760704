package proxy

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

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
	for _, n := range []int{6, 10} { // 6 is used again, so 7 goes for 10
		if err := many.exchange(to(n), []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	for n, want := range map[int]bool{6: true, 7: false, 8: true, 9: true, 10: true} {
		if got := r.hasFlow(udpAddr(many.UDPConn), to(n)); got != want {
			t.Errorf("flow %d: %v, want %v", n, got, want)
		}
	}
	var all []*udpClientSocket
	for i := range 4 {
		if i == 2 { // many's session was the oldest, and now is not
			if err := many.exchange(to(9), []byte("hello")); err != nil {
				t.Fatal(err)
			}
		}
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
	for what, c := range map[string]*udpClientSocket{"the youngest": all[3], "the one in use": many, "the neighbour's": neighbour} {
		if err := c.exchange(to(9), []byte("hello")); err != nil {
			t.Error(err)
		}
		if n := upstream.accepted.Load(); n != associations {
			t.Fatalf("%s had been ended", what)
		}
	}
	if err := all[0].exchange(to(0), []byte("old")); err != nil {
		t.Error(err)
	}
	if n := upstream.accepted.Load(); n != associations+1 {
		t.Error("the least recently used session had not been ended")
	}
}

func (r *rig) hasFlow(client, remote netip.AddrPort) bool {
	key := flowKey{endpointOf(client), endpointOf(remote)}
	s := r.server.udp.shardOf(key.client)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows[key] != nil
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
