package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

// held is how many flows are held.
func (r *rig) held() (n int) {
	for _, s := range r.server.udp.shards {
		s.mu.Lock()
		n += s.holding.byAge.length
		s.mu.Unlock()
	}
	return n
}

// initials are the datagrams in which quic-go's client says hello, the first of which does not tell the
// name yet.
func initials(t testing.TB, name string) [][]byte {
	t.Helper()
	listener, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var dialed sync.WaitGroup
	defer dialed.Wait()
	defer cancel()
	dialed.Go(func() {
		quic.DialAddr(ctx, listener.LocalAddr().String(), &tls.Config{ServerName: name, NextProtos: []string{"test"}}, nil)
	})
	var datagrams [][]byte
	for range 2 {
		b := make([]byte, 2000)
		listener.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := listener.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		datagrams = append(datagrams, b[:n])
	}
	return datagrams
}

// Real QUIC goes where the policy sends its name, with nothing lost: quic-go would repeat what was, and
// count it.
func TestSniffQUIC(t *testing.T) {
	r := newNetwork(t)
	r.serve(Options{}, map[string]outbound.Outbound{"up": r.dante()})
	r.forwarding()
	for _, through := range []string{"up", policy.OutboundDirect} {
		for _, at := range []netip.Addr{server4, server6} {
			for _, version := range []quic.Version{quic.Version1, quic.Version2} {
				t.Run(fmt.Sprint(through, " ", at, " ", version), func(t *testing.T) {
					r.verdicts.sniffTo(Route{Outbound: through})
					before := r.server.Stats()
					server := r.quicServer(t, at)
					seen, err := r.quicExchange(t, server, version, "quic.example.com")
					if err != nil {
						t.Fatal(err)
					}
					client := sameFamily(at)
					if direct := strings.HasPrefix(seen, "["+client.String()+"]") || strings.HasPrefix(seen, client.String()+":"); direct != (through == policy.OutboundDirect) {
						t.Errorf("the server saw %s", seen)
					}
					if asked := r.verdicts.asks(); !slices.Equal(asked, []string{"quic.example.com"}) {
						t.Errorf("the policy was asked with %q", asked)
					}
					after := r.server.Stats()
					if n := after.Sniffed.QUIC - before.Sniffed.QUIC; n != 1 {
						t.Errorf("counted %d", n)
					}
					for reason, n := range after.Refused {
						if n != before.Refused[reason] {
							t.Errorf("%d datagrams were refused: %v", n-before.Refused[reason], reason)
						}
					}
				})
			}
		}
	}
	t.Run("blocked", func(t *testing.T) {
		r.verdicts.sniffTo(Route{Outbound: policy.OutboundBlock})
		c := r.udpClient(client4, 0)
		hello := initials(t, "blocked.example.com")
		for _, d := range hello {
			c.send(netip.AddrPortFrom(server4, 443), d)
		}
		eventually(t, "all are counted", func() bool { return r.server.Stats().Refused[Blocked] == uint64(len(hello)) })
	})
}

// quicServer answers each stream with whom it sees, and what it was sent.
func (r *rig) quicServer(t *testing.T, at netip.Addr) netip.AddrPort {
	t.Helper()
	socket := r.udpSocket(r.internet, netip.AddrPortFrom(at, 0))
	config := &tls.Config{Certificates: []tls.Certificate{certificate(t)}, NextProtos: []string{"test"}}
	l, err := quic.Listen(socket, config, &quic.Config{Versions: []quic.Version{quic.Version1, quic.Version2}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := l.Accept(ctx)
			if err != nil {
				return
			}
			served.Go(func() {
				s, err := c.AcceptStream(ctx)
				if err != nil {
					return
				}
				defer s.Close()
				fmt.Fprintln(s, c.RemoteAddr())
				io.Copy(s, s)
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		served.Wait()
	})
	return udpAddr(socket)
}

// quicExchange has a client send a megabyte there and back, and returns whom the server saw.
func (r *rig) quicExchange(t *testing.T, to netip.AddrPort, version quic.Version, name string) (seen string, err error) {
	return r.quicExchangeFrom(t, r.udpClient(to.Addr(), 0), to, version, name)
}

func (r *rig) quicExchangeFrom(t *testing.T, socket *udpClientSocket, to netip.AddrPort, version quic.Version, name string) (seen string, err error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	config := &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: []string{"test"}}
	c, err := quic.Dial(ctx, socket.UDPConn, net.UDPAddrFromAddrPort(to), config, &quic.Config{Versions: []quic.Version{version}})
	if err != nil {
		return "", err
	}
	defer c.CloseWithError(0, "")
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return "", err
	}
	body := pattern(1_000_000, 1)
	go func() {
		s.Write(body)
		s.Close()
	}()
	all, err := io.ReadAll(s)
	line, got, _ := bytes.Cut(all, []byte("\n"))
	if err == nil && !bytes.Equal(got, body) {
		err = fmt.Errorf("%d bytes came back, or others", len(got))
	}
	return string(line), err
}

// What is sent before, while and after the kernel takes the flow over arrives exactly once, in the
// client's name, and the answers reach the client; so too when the flow is relayed.
func TestSniffUDPHandsOver(t *testing.T) {
	r := newRig(t, Options{}, directly(t))
	r.forwarding()
	for _, through := range []string{policy.OutboundDirect, "up"} {
		for _, at := range []netip.Addr{server4, server6} {
			t.Run(fmt.Sprint(through, " ", at), func(t *testing.T) {
				count := uint32(20_000)
				if through == "up" {
					count = maxQueue - maxHeldDatagrams // more than a session takes while it is opened
				}
				var mu sync.Mutex
				seen := make(map[string]int)
				hello := initials(t, "race.example.com")
				c := r.udpClient(at, 0)
				server := r.udpServer(netip.AddrPortFrom(at, 0), func(s *net.UDPConn, from netip.AddrPort, payload []byte) {
					mu.Lock()
					defer mu.Unlock()
					seen[string(payload)]++
					if through == policy.OutboundDirect && from != udpAddr(c.UDPConn) {
						t.Errorf("the server saw %s", from)
					}
					if len(payload) == 4 && binary.BigEndian.Uint32(payload) == count-1 {
						s.WriteToUDPAddrPort([]byte("answer"), from)
					}
				})
				// Deciding takes a while in which more arrives.
				r.verdicts.sniff(func(context.Context, policy.Network, netip.AddrPort, netip.AddrPort, string) (Route, bool) {
					time.Sleep(5 * time.Millisecond)
					return Route{Outbound: through}, true
				})
				before := r.server.Stats()
				c.send(server, hello[0])
				eventually(t, "it is held", func() bool { return r.held() == 1 })
				for i := range count {
					if i == 3 {
						c.send(server, hello[1])
					}
					c.send(server, binary.BigEndian.AppendUint32(nil, i))
				}
				if payload, from, err := c.receive(); err != nil || string(payload) != "answer" || from != server {
					t.Errorf("received %q from %s, %v", payload, from, err)
				}
				arrived := func() int {
					mu.Lock()
					defer mu.Unlock()
					return len(seen)
				}
				want := int(count) + len(hello)
				for deadline := time.Now().Add(5 * time.Second); arrived() < want && time.Now().Before(deadline); {
					time.Sleep(time.Millisecond)
				}
				mu.Lock()
				defer mu.Unlock()
				after := r.server.Stats()
				if len(seen) != want {
					t.Errorf("%d of %d arrived; refused: %v, before: %v", len(seen), want, after.Refused, before.Refused)
				}
				for payload, n := range seen {
					if n != 1 {
						t.Errorf("%x arrived %d times", payload[:4], n)
					}
				}
				if asked := r.verdicts.asks(); !slices.Equal(asked, []string{"race.example.com"}) {
					t.Errorf("the policy was asked with %q", asked)
				}
				if n := after.Outbounds[policy.OutboundDirect].PacketsUp - before.Outbounds[policy.OutboundDirect].PacketsUp; through == policy.OutboundDirect {
					t.Logf("%d of %d were replayed", n, want)
				}
			})
		}
	}
}

// What is held is bounded in time, number and bytes, and whatever bound is met: all of it goes on, in
// order, as the policy says without a name.
func TestSniffUDPBounds(t *testing.T) {
	for _, c := range []struct {
		what    string
		after   [][]byte // the hello's first datagram
		timeout time.Duration
		counts  func(Sniffed) uint64
	}{
		{"time", repeat(3, 100), 300 * time.Millisecond, func(s Sniffed) uint64 { return s.TimedOut }},
		{"number", repeat(maxHeldDatagrams, 100), time.Hour, func(s Sniffed) uint64 { return s.Nothing }},
		{"bytes", repeat(4, maxHeldBytes/4), time.Hour, func(s Sniffed) uint64 { return s.Nothing }},
		{"a burst", repeat(maxHeldDatagrams+20, 100), time.Hour, func(s Sniffed) uint64 { return s.Nothing }},
	} {
		t.Run(c.what, func(t *testing.T) {
			r := newRig(t, Options{SniffTimeout: c.timeout}, nil)
			upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
			r.outbounds.set("up", r.socks5(upstream.address()))
			r.verdicts.sniffTo(Route{Outbound: "up"})
			client := r.udpClient(client4, 0)
			to := netip.AddrPortFrom(server4, 443)
			all := append([][]byte{initials(t, "bounds.example.com")[0]}, c.after...)
			for _, d := range all {
				client.send(to, d)
			}
			start := time.Now()
			for i, d := range all {
				payload, _, err := client.receive()
				if err != nil || !bytes.Equal(payload, d) {
					t.Fatalf("datagram %d of %d: %d bytes, %v (%v)", i, len(all), len(payload), err, r.server.Stats().Refused)
				}
			}
			if d := time.Since(start); c.timeout < time.Hour && d > 5*time.Second {
				t.Errorf("it took %v", d)
			}
			if asked := r.verdicts.asks(); !slices.Equal(asked, []string{""}) {
				t.Errorf("the policy was asked with %q", asked)
			}
			if s := r.server.Stats().Sniffed; c.counts(s) != 1 {
				t.Errorf("counted %+v", s)
			}
			for _, s := range r.server.udp.shards {
				s.mu.Lock()
				if n := len(s.holding.flows) + s.holding.byAge.length + s.holding.bytes; n != 0 {
					t.Errorf("%d are left", n)
				}
				s.mu.Unlock()
			}
		})
	}
}

func repeat(n, size int) (all [][]byte) {
	for i := range n {
		all = append(all, pattern(size, byte(i)))
	}
	return all
}

// What is no QUIC is not held at all, and not either once it is decided.
func TestSniffUDPNothing(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: time.Hour}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	r.verdicts.sniffTo(Route{Outbound: "up"})
	c := r.udpClient(client4, 0)
	to := netip.AddrPortFrom(server4, 443)
	for _, d := range [][]byte{pattern(1200, 0xc0), []byte("short"), initials(t, "late.example.com")[0]} {
		if err := c.exchange(to, d); err != nil {
			t.Error(err)
		}
	}
	if asked := r.verdicts.asks(); !slices.Equal(asked, []string{""}) {
		t.Errorf("the policy was asked with %q", asked)
	}
}

// One client's flood of beginnings is decided by the address, and another's hello is waited for.
func TestSniffUDPFlood(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: time.Hour, Threads: 1}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	r.verdicts.sniffTo(Route{Outbound: "up"})
	hello := initials(t, "flood.example.com")
	to := func(n int) netip.AddrPort { return netip.AddrPortFrom(server4, uint16(1000+n)) }
	modest := r.udpClient(other4, 0)
	modest.send(to(0), hello[0])
	eventually(t, "it is held", func() bool { return r.held() == 1 })
	greedy := r.udpClient(client4, 0)
	const surplus = maxQueue / 2 // all of one endpoint, they wait for one session
	for i := range maxClientHeld + surplus {
		greedy.send(to(i), hello[0])
	}
	for i := range surplus {
		if payload, from, err := greedy.receive(); err != nil || !bytes.Equal(payload, hello[0]) || from != to(i) {
			t.Fatalf("%d of the surplus: %d bytes from %s, %v", i, len(payload), from, err)
		}
	}
	if n := r.held(); n != 1+maxClientHeld {
		t.Errorf("%d are held", n)
	}
	s := r.server.udp.shards[0]
	s.mu.Lock()
	if want := (1 + maxClientHeld) * (heldState + len(hello[0])); s.holding.bytes != want {
		t.Errorf("%d bytes are held, want %d", s.holding.bytes, want)
	}
	s.mu.Unlock()
	modest.send(to(0), hello[1])
	for i, want := range hello {
		if payload, _, err := modest.receive(); err != nil || !bytes.Equal(payload, want) {
			t.Errorf("part %d of the hello: %d bytes, %v", i, len(payload), err)
		}
	}
	if asked := r.verdicts.asks(); asked[len(asked)-1] != "flood.example.com" {
		t.Errorf("asked last with %q", asked[len(asked)-1])
	}
}

// All clients together hold no more than there is memory for: the flow that waited longest goes on.
func TestSniffUDPHolding(t *testing.T) {
	server := &Server{options: Options{Threads: 1, SniffTimeout: time.Hour, Outbounds: &outbounds{}}}
	v := &verdicts{}
	v.sniffTo(Route{Outbound: policy.OutboundBlock})
	server.options.Verdicts = v
	u := &udp{server: server, ctx: t.Context()}
	s, err := newShard(u, "holding-test")
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	first := initials(t, "holding.example.com")[0]
	to := endpointOf(netip.AddrPortFrom(server4, 443))
	runtime.GC()
	before := heap()
	var now int64
	flood := maxHolding/(heldState+len(first)) + 1000
	for i := range flood {
		client := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		s.arrived(flowKey{endpointOf(netip.AddrPortFrom(client, 1)), to}, [][]byte{first}, now)
		now += 1000
	}
	if s.holding.bytes > maxHolding || s.holding.byAge.length != len(s.holding.flows) || len(s.holding.flows) < flood-1010 {
		t.Errorf("%d flows and %d bytes are held", len(s.holding.flows), s.holding.bytes)
	}
	if used := heap() - before; used > maxHolding {
		t.Errorf("which take %d bytes", used)
	}
	if n := len(v.asks()); n != flood-len(s.holding.flows) {
		t.Errorf("%d were decided of %d", n, flood)
	}
	if h, want := s.holding.byAge.oldest(), now-int64(len(s.holding.flows))*1000; h.deadline-int64(time.Hour) != want {
		t.Errorf("the oldest is from %d, want %d: others were decided than those who waited longest", h.deadline-int64(time.Hour), want)
	}
	s.holding.end()
	if n := len(s.holding.flows) + s.holding.byAge.length + s.holding.bytes; n != 0 {
		t.Errorf("%d are left", n)
	}
}

// The client answers a remote that began the flow, and the policy wants the name, then the kernel to
// forward it: the flow's own socket is given up before anything is decided, with nothing lost that waits there.
func TestSniffUDPUnasked(t *testing.T) {
	r := newRig(t, Options{}, directly(t))
	r.forwarding()
	third := r.udpSocket(r.internet, netip.AddrPortFrom(third4, 0))
	server := r.udpServer(netip.AddrPortFrom(server4, 0), func(_ *net.UDPConn, from netip.AddrPort, _ []byte) {
		third.WriteToUDPAddrPort([]byte("unasked"), from)
	})
	c := r.udpClient(client4, 0)
	c.send(server, []byte("hello"))
	if payload, from, err := c.receive(); err != nil || string(payload) != "unasked" || from != udpAddr(third) {
		t.Fatalf("received %q from %s, %v", payload, from, err)
	}
	s := r.server.udp.shardOf(endpointOf(udpAddr(c.UDPConn)))
	r.verdicts.sniff(func(_ context.Context, _ policy.Network, client, destination netip.AddrPort, _ string) (Route, bool) {
		if s.flows[flowKey{endpointOf(client), endpointOf(destination)}] != nil { // the shard asks: it is ours to look at
			t.Error("the flow is decided, and its socket takes packets from the kernel that is to forward them")
		}
		return Route{Outbound: policy.OutboundDirect}, true
	})
	s.mu.Lock() // until all lies in the flow's socket
	const count = 200
	for i := range count {
		c.send(udpAddr(third), pattern(500, byte(i)))
	}
	s.mu.Unlock()
	for i := range count {
		b := make([]byte, 2000)
		third.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, from, err := third.ReadFromUDPAddrPort(b)
		if err != nil || from != udpAddr(c.UDPConn) || !bytes.Equal(b[:n], pattern(500, byte(i))) {
			t.Fatalf("datagram %d: %d bytes from %s, %v", i, n, from, err)
		}
	}
	if asked := r.verdicts.asks(); !slices.Equal(asked, []string{""}) {
		t.Errorf("the policy was asked with %q", asked)
	}
	eventually(t, "the flow is gone", func() bool { return !r.hasFlow(udpAddr(c.UDPConn), udpAddr(third)) })
}

// A remote of another flow answers while the client's own flow to it is held: it is not known yet whether
// the client may talk to it, and the flow comes to no harm.
func TestSniffUDPAnswerWhileHeld(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: time.Hour}, directly(t))
	third := r.udpSocket(r.internet, netip.AddrPortFrom(third4, 0))
	mappings := make(chan netip.AddrPort, 1)
	server := r.udpServer(netip.AddrPortFrom(server4, 0), func(s *net.UDPConn, from netip.AddrPort, payload []byte) {
		mappings <- from
		s.WriteToUDPAddrPort(payload, from)
	})
	c := r.udpClient(client4, 0)
	if err := c.exchange(server, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	mapping := <-mappings
	r.verdicts.sniffTo(Route{Outbound: "up"})
	hello := initials(t, "held.example.com")
	c.send(udpAddr(third), hello[0])
	eventually(t, "it is held", func() bool { return r.held() == 1 })
	third.WriteToUDPAddrPort([]byte("too early"), mapping)
	eventually(t, "it is refused", func() bool { return r.server.Stats().Refused[NotProxied] == 1 })
	c.send(udpAddr(third), hello[1])
	for i, want := range hello {
		b := make([]byte, 2000)
		third.SetReadDeadline(time.Now().Add(10 * time.Second))
		if n, err := third.Read(b); err != nil || !bytes.Equal(b[:n], want) {
			t.Fatalf("part %d of the hello: %d bytes, %v", i, n, err)
		}
	}
	third.WriteToUDPAddrPort([]byte("in time"), mapping)
	if payload, from, err := c.receive(); err != nil || string(payload) != "in time" || from != udpAddr(third) {
		t.Errorf("received %q from %s, %v", payload, from, err)
	}
}

// Each held flow has its own deadline, whatever else is held.
func TestSniffUDPDeadlines(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: 500 * time.Millisecond, Threads: 1}, nil)
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	r.verdicts.sniffTo(Route{Outbound: "up"})
	first := initials(t, "deadline.example.com")[0]
	c := r.udpClient(client4, 0)
	start := time.Now()
	for i := range 3 {
		c.send(netip.AddrPortFrom(server4, uint16(1000+i)), first)
		eventually(t, "it is held", func() bool { return r.held() == i+1 })
		time.Sleep(100 * time.Millisecond)
	}
	for i := range 3 {
		_, from, err := c.receive()
		if err != nil || from.Port() != uint16(1000+i) {
			t.Fatalf("received from %s, %v", from, err)
		}
		due := 500*time.Millisecond + time.Duration(i)*100*time.Millisecond
		if after := time.Since(start); after < due {
			t.Errorf("flow %d went on after %v, want at least %v", i, after, due)
		}
	}
	if n := r.server.Stats().Sniffed.TimedOut; n != 3 {
		t.Errorf("%d timed out", n)
	}
}

// A client is not forgotten while a flow of his is held.
func TestSniffUDPKeepsClient(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: time.Hour}, directly(t))
	r.verdicts.sniffTo(Route{Outbound: "up"})
	c := r.udpClient(client4, 0)
	c.send(netip.AddrPortFrom(server4, 443), initials(t, "kept.example.com")[0])
	eventually(t, "it is held", func() bool { return r.held() == 1 })
	from := endpointOf(udpAddr(c.UDPConn))
	s := r.server.udp.shardOf(from)
	s.expire(monotonic() + int64(time.Hour))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clients[from.addr] == nil {
		t.Error("the client is forgotten")
	}
}

// What is replayed bears the mark that the kernel gives the rest of the flow, or else our own. The socket is marked as our own always, lest
// it be taken for a program's.
func TestSniffUDPMark(t *testing.T) {
	r := newRig(t, Options{}, nil)
	r.forwarding()
	(*namespace)(nil).run(t, `nft -f - <<END
table inet look {
	set seen { type mark; flags dynamic; }
	chain output { type filter hook output priority 0; meta l4proto udp oifname "wan" add @seen { meta mark }; }
}
END`)
	marks := map[netip.Addr][2]uint32{server4: {0, 0x04000007}, server6: {0, 0x04000008}}
	for at, both := range marks {
		for _, mark := range both {
			r.verdicts.sniffTo(Route{Outbound: policy.OutboundDirect, Mark: mark})
			server := r.udpServer(netip.AddrPortFrom(at, 0), echo)
			for _, payload := range []string{"hello", ""} {
				if err := r.udpClient(at, 0).exchange(server, []byte(payload)); err != nil {
					t.Error(err)
				}
			}
		}
		fd, err := openReplay(endpointOf(netip.AddrPortFrom(sameFamily(at), 0)), testMark)
		if err != nil {
			t.Fatal(err)
		}
		if mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK); err != nil || mark != int(testMark) {
			t.Errorf("the socket has the mark %#x, %v", mark, err)
		}
		unix.Close(fd)
	}
	out, err := exec.Command("nft", "list", "set", "inet", "look", "seen").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []uint32{testMark, 0x04000007, 0x04000008} {
		if !strings.Contains(string(out), fmt.Sprintf("%#08x", want)) {
			t.Errorf("no datagram had the mark %#08x: %s", want, out)
		}
	}
}

// While a replay is going on, answers pass through the box to the client. They would not if the socket
// were connected: then the kernel takes them for the socket's, and does not forward them.
func TestReplaySocketTakesNothing(t *testing.T) {
	r := newRig(t, Options{}, nil)
	r.forwarding()
	for _, at := range []netip.Addr{server4, server6} {
		server := r.udpServer(netip.AddrPortFrom(at, 0), echo)
		c := r.udpClient(at, 0)
		r.forward(policy.UDP, udpAddr(c.UDPConn), server)
		fd, err := openReplay(endpointOf(udpAddr(c.UDPConn)), testMark)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for range 3 {
			if err := c.exchange(server, []byte("hello")); err != nil {
				t.Errorf("%s: %v", at, err)
			}
		}
		if err := unix.Connect(fd, endpointOf(server).sockaddr()); err != nil {
			t.Fatal(err)
		}
		c.send(server, []byte("lost"))
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if n, _, err := c.ReadFromUDPAddrPort(make([]byte, 10)); err == nil {
			t.Errorf("%s: %d bytes passed a connected socket: why then not connect?", at, n)
		}
	}
}
