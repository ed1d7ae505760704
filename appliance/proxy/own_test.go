package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
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

// The box itself is a client here. In the product a program marks its sockets where they connect or send; here they
// are marked when they are made. The rest is the same: what is marked for the proxy is routed to the loopback
// device, by a route that gives it, where it has no source yet, an address that leads there; and what comes from that
// address goes there too, marked or not.

const markProxy = 0x01000000 // as in newNetwork

var (
	loopback4 = netip.MustParseAddr("127.83.0.1")
	loopback6 = netip.IPv6Loopback()
	wan4      = netip.MustParseAddr("203.0.113.2")
	wan6      = netip.MustParseAddr("2001:db8:113::2")
)

// own makes the box a client. In the end nothing may have left it but what the daemon sent.
func (r *rig) own() {
	t := r.t
	t.Helper()
	r.verdicts.mu.Lock()
	r.verdicts.own = map[netip.Addr]bool{loopback4: true, loopback6: true, wan4: true, wan6: true}
	r.verdicts.mu.Unlock()
	s := r.server.Sockets()
	(*namespace)(nil).run(t, fmt.Sprintf(`
ip -4 route replace local default dev lo src 127.83.0.1 table 77
ip -6 route replace local default dev lo src ::1 table 77
ip -4 rule add iif lo from 127.83.0.0/16 lookup 77
ip -6 rule add iif lo from ::1 lookup 77
nft -f - <<END
table inet own {
	counter strays { }
	chain take {
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:%d accept
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:%d accept
		meta nfproto ipv4 meta l4proto udp tproxy ip to 127.0.0.1:%d accept
		meta nfproto ipv6 meta l4proto udp tproxy ip6 to [::1]:%d accept
	}
	chain prerouting {
		type filter hook prerouting priority mangle
		iifname != "lo" return
		meta mark & 0x0f000000 == %#x goto take
		ip saddr 127.83.0.0/16 goto take
		ip6 saddr ::1 ip6 daddr != ::1 goto take
	}
	chain postrouting {
		type filter hook postrouting priority 0
		oifname "lo" return
		meta mark & 0x0f000000 == %#x return
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } return
		# the kernel, to what is late for a socket that the daemon has closed
		ip saddr 203.0.113.2 tcp flags & rst == rst return
		ip6 saddr 2001:db8:113::2 tcp flags & rst == rst return
		ip saddr 203.0.113.2 icmp type destination-unreachable return
		ip6 saddr 2001:db8:113::2 icmpv6 type destination-unreachable return
		counter name strays
	}
}
END`, port(t, s.TCP4), port(t, s.TCP6), port(t, s.UDP4), port(t, s.UDP6), markProxy, testMark))
	r.stopped = func() {
		out, err := exec.Command("nft", "list", "counter", "inet", "own", "strays").CombinedOutput()
		if packets := regexp.MustCompile(`packets (\d+)`).FindSubmatch(out); err != nil || packets == nil || string(packets[1]) != "0" {
			t.Errorf("more has left the box than the daemon sent: %v, %s", err, out)
		}
	}
	t.Cleanup(func() {
		(*namespace)(nil).run(t, `
ip -4 rule del from 127.83.0.0/16
ip -6 rule del from ::1`)
	})
}

// newOwnRig is a rig whose outbounds are "up", a SOCKS5 server, and direct.
func newOwnRig(t *testing.T, o Options) *rig {
	t.Helper()
	r := newNetwork(t)
	r.serve(o, map[string]outbound.Outbound{"up": r.dante(), policy.OutboundDirect: directly(t)["up"]})
	r.own()
	return r
}

// ways are how a flow is decided, and where it is to come from for its server.
var ways = []struct {
	name    string
	through string
	sniffed bool
}{
	{"proxied", "up", false},
	{"direct", policy.OutboundDirect, false},
	{"sniffed, then proxied", "up", true},
	{"sniffed, then direct", policy.OutboundDirect, true},
}

// decide makes all flows go one way.
func (r *rig) decide(through string, sniffed bool) {
	if sniffed {
		r.verdicts.sniffTo(Route{Outbound: through})
		return
	}
	r.verdicts.sniff(nil) // not
	r.verdicts.set(func(policy.Network, netip.AddrPort, netip.AddrPort) (string, bool) { return through, true })
}

// seenAs reports whether a server that sees somebody is to see him: the box itself, if the flow is direct.
func seenAs(through string, from netip.Addr) bool {
	return (from == wan4 || from == wan6) == (through == policy.OutboundDirect)
}

// ownDialer makes sockets of the box that are steered, bound to an address if it is valid.
func ownDialer(network string, from netip.Addr) *net.Dialer {
	d := &net.Dialer{Control: markSocket(markProxy), Timeout: 20 * time.Second}
	d.SetMultipathTCP(false)
	switch {
	case !from.IsValid():
	case strings.HasPrefix(network, "tcp"):
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	default:
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	return d
}

func (r *rig) ownDial(to netip.AddrPort, from netip.Addr) *net.TCPConn {
	r.t.Helper()
	c, err := ownDialer("tcp", from).Dial("tcp", to.String())
	if err != nil {
		r.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	r.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// ownUDP opens a socket of the box that is not connected, bound to an address if it is valid.
func (r *rig) ownUDP(family netip.Addr, from netip.Addr) *udpClientSocket {
	r.t.Helper()
	if !from.IsValid() {
		from = netip.IPv4Unspecified()
		if family.Is6() {
			from = netip.IPv6Unspecified()
		}
	}
	config := net.ListenConfig{Control: markSocket(markProxy)}
	network := "udp4"
	if family.Is6() {
		network = "udp6"
	}
	c, err := config.ListenPacket(r.t.Context(), network, netip.AddrPortFrom(from, 0).String())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return &udpClientSocket{c.(*net.UDPConn)}
}

// A program of the box reaches its server over TCP whichever way the policy chose, byte for byte in both directions,
// whether its socket is bound to an address of the box or not; and it takes the proxy for its server.
func TestOwnTCP(t *testing.T) {
	r := newOwnRig(t, Options{})
	const size = 300_000
	for _, way := range ways {
		for _, at := range []netip.Addr{server4, server6} {
			for _, from := range []netip.Addr{{}, sameBox(at)} {
				t.Run(fmt.Sprint(way.name, " ", at, " from ", from), func(t *testing.T) {
					r.decide(way.through, way.sniffed)
					seen := make(chan netip.Addr, 1)
					failed := make(chan error, 1)
					server := r.tcpServer(netip.AddrPortFrom(at, 0), func(c *net.TCPConn) {
						seen <- addrPort(c.RemoteAddr()).Addr()
						failed <- exchange(c, size, 2, 1)
					})
					c := r.ownDial(server, from)
					if err := exchange(c, size, 1, 2); err != nil {
						t.Error("client: ", err)
					}
					if got := addrPort(c.RemoteAddr()); got != server {
						t.Errorf("the client sees %s", got)
					}
					if from := <-seen; !seenAs(way.through, from) {
						t.Errorf("the server saw %s", from)
					}
					if err := <-failed; err != nil {
						t.Error("server: ", err)
					}
					eventually(t, "the connection is gone", func() bool { return r.server.Stats().Connections == 0 })
				})
			}
		}
	}
}

// sameBox is the box's address that servers of a family see.
func sameBox(server netip.Addr) netip.Addr {
	if server.Is4() {
		return wan4
	}
	return wan6
}

// Over UDP, too: connected and not, bound and not; of any length; and what was held for its name arrives once, in order. What is direct
// cannot be handed to the kernel, nor sent on in the client's name.
func TestOwnUDP(t *testing.T) {
	r := newOwnRig(t, Options{})
	for _, way := range ways {
		for _, at := range []netip.Addr{server4, server6} {
			for _, kind := range []struct {
				name      string
				from      netip.Addr
				connected bool
			}{
				{"connected", netip.Addr{}, true},
				{"not connected", netip.Addr{}, false},
				{"bound and connected", sameBox(at), true},
				{"bound", sameBox(at), false},
			} {
				t.Run(fmt.Sprint(way.name, " ", at, " ", kind.name), func(t *testing.T) {
					r.decide(way.through, way.sniffed)
					before := r.server.Stats()
					seen := make(chan netip.Addr, 100)
					server := r.udpServer(netip.AddrPortFrom(at, 0), func(c *net.UDPConn, from netip.AddrPort, payload []byte) {
						seen <- from.Addr()
						c.WriteToUDPAddrPort(payload, from)
					})
					var send func(payload []byte)
					var c *udpClientSocket
					if kind.connected {
						dialed, err := ownDialer("udp", kind.from).Dial("udp", server.String())
						if err != nil {
							t.Fatal(err)
						}
						defer dialed.Close()
						c = &udpClientSocket{dialed.(*net.UDPConn)}
						send = func(payload []byte) { c.Write(payload) }
					} else {
						c = r.ownUDP(at, kind.from)
						defer c.Close()
						send = func(payload []byte) { c.send(server, payload) }
					}
					hello := initials(t, "own.example.com") // the name is told by the second
					for _, batch := range [][][]byte{hello, {pattern(1, 1)}, {pattern(1473, 2)}, {pattern(60000, 3)}} {
						for _, d := range batch {
							send(d)
						}
						for _, want := range batch {
							got, from, err := c.receive()
							if err != nil || from != server || !bytes.Equal(got, want) {
								t.Fatalf("%d bytes came from %s, %v; want %d (refused: %v)", len(got), from, err, len(want), r.server.Stats().Refused)
							}
							if from := <-seen; !seenAs(way.through, from) {
								t.Errorf("the server saw %s", from)
							}
						}
					}
					if way.sniffed {
						if asked := r.verdicts.asks(); !slices.Equal(asked, []string{"own.example.com"}) {
							t.Errorf("the policy was asked with %q", asked)
						}
					}
					eventually(t, "one session has carried all", func() bool {
						up, old := r.server.Stats().Outbounds[way.through], before.Outbounds[way.through]
						return up.Sessions-old.Sessions == 1 && up.PacketsUp-old.PacketsUp == 5 && up.PacketsDown-old.PacketsDown == 5
					})
				})
			}
		}
	}
}

// Real QUIC of the box goes where the policy sends its name, with nothing lost: quic-go would repeat what was, and count it.
func TestOwnQUIC(t *testing.T) {
	r := newOwnRig(t, Options{})
	for _, through := range []string{"up", policy.OutboundDirect} {
		for _, at := range []netip.Addr{server4, server6} {
			t.Run(fmt.Sprint(through, " ", at), func(t *testing.T) {
				r.decide(through, true)
				before := r.server.Stats()
				server := r.quicServer(t, at)
				seen, err := r.quicExchangeFrom(t, r.ownUDP(at, netip.Addr{}), server, quic.Version1, "quic.example.com")
				if err != nil {
					t.Fatal(err)
				}
				if from, err := netip.ParseAddrPort(seen); err != nil || !seenAs(through, from.Addr()) {
					t.Errorf("the server saw %s", seen)
				}
				if asked := r.verdicts.asks(); !slices.Equal(asked, []string{"quic.example.com"}) {
					t.Errorf("the policy was asked with %q", asked)
				}
				for reason, n := range r.server.Stats().Refused {
					if n != before.Refused[reason] {
						t.Errorf("%d datagrams were refused: %v", n-before.Refused[reason], reason)
					}
				}
			})
		}
	}
}

// A program that ends, or is killed, with something unread resets its connection, and one whose socket is gone without a word is found
// out by what is sent to it next: the kernel's answer, which bears no mark, reaches the proxy. Either way the server learns it,
// and nothing is left.
func TestOwnTCPAbruptEnd(t *testing.T) {
	r := newOwnRig(t, Options{})
	for _, through := range []string{"up", policy.OutboundDirect} {
		for _, at := range []netip.Addr{server4, server6} {
			for _, end := range []struct {
				name string
				end  func(t *testing.T, c *net.TCPConn)
			}{
				{"killed with unread bytes", func(t *testing.T, c *net.TCPConn) {
					eventually(t, "something is unread", func() bool { return unread(t, c) > 0 })
					c.Close()
				}},
				{"gone", vanish},
			} {
				t.Run(fmt.Sprint(through, " ", at, " ", end.name), func(t *testing.T) {
					r.decide(through, false)
					ended := make(chan error, 1)
					server := r.tcpServer(netip.AddrPortFrom(at, 0), func(c *net.TCPConn) {
						var err error
						for err == nil {
							c.SetDeadline(time.Now().Add(20 * time.Second))
							_, err = c.Write([]byte("talkative"))
							time.Sleep(time.Millisecond)
						}
						ended <- err
					})
					c := r.ownDial(server, netip.Addr{})
					eventually(t, "the connection is open", func() bool { return r.server.Stats().Connections == 1 })
					end.end(t, c)
					eventually(t, "the connection is gone", func() bool { return r.server.Stats().Connections == 0 })
					if err := <-ended; errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("the server learned nothing: %v", err)
					}
				})
			}
		}
	}
}

// unread is how many bytes wait in a socket.
func unread(t *testing.T, c *net.TCPConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// vanish closes a socket without a packet (TCP_REPAIR).
func vanish(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_REPAIR, 1) })
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// Answers that find their program gone are refused by the kernel. Neither does that leave the box, nor does it disturb others.
func TestOwnUDPAbruptEnd(t *testing.T) {
	r := newOwnRig(t, Options{})
	for _, through := range []string{"up", policy.OutboundDirect} {
		for _, at := range []netip.Addr{server4, server6} {
			t.Run(fmt.Sprint(through, " ", at), func(t *testing.T) {
				r.decide(through, false)
				mappings, sockets := make(chan netip.AddrPort, 1000), make(chan *net.UDPConn, 1000)
				server := r.udpServer(netip.AddrPortFrom(at, 0), func(c *net.UDPConn, from netip.AddrPort, payload []byte) {
					mappings <- from
					sockets <- c
					c.WriteToUDPAddrPort(payload, from)
				})
				gone, stays := r.ownUDP(at, netip.Addr{}), r.ownUDP(at, netip.Addr{})
				for _, c := range []*udpClientSocket{gone, stays} {
					if err := c.exchange(server, []byte("hello")); err != nil {
						t.Fatal(err)
					}
				}
				down := func() uint64 { return r.server.Stats().Outbounds[through].PacketsDown }
				mapping, socket, before := <-mappings, <-sockets, down()
				gone.Close()
				const late = 50
				for range late {
					socket.WriteToUDPAddrPort([]byte("too late"), mapping)
				}
				eventually(t, "they were sent to the program", func() bool { return down()-before >= late/2 })
				for range 10 {
					if err := stays.exchange(server, []byte("still there")); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

// A remote that the program has not sent to answers the mapping of its direct flow, as any program's unconnected socket is answered, and
// what the program sends there then is asked of the policy, and has the same mapping.
func TestOwnUDPAnswer(t *testing.T) {
	r := newOwnRig(t, Options{})
	for _, sniffed := range []bool{false, true} {
		t.Run(fmt.Sprint("sniffed ", sniffed), func(t *testing.T) {
			r.decide(policy.OutboundDirect, false)
			third := r.udpSocket(r.internet, netip.AddrPortFrom(third4, 0))
			mappings := make(chan netip.AddrPort, 1)
			server := r.udpServer(netip.AddrPortFrom(server4, 0), func(_ *net.UDPConn, from netip.AddrPort, _ []byte) {
				mappings <- from
				third.WriteToUDPAddrPort([]byte("unasked"), from)
			})
			c := r.ownUDP(server4, netip.Addr{})
			c.send(server, []byte("hello"))
			if payload, from, err := c.receive(); err != nil || string(payload) != "unasked" || from != udpAddr(third) {
				t.Fatalf("received %q from %s, %v (refused: %v)", payload, from, err, r.server.Stats().Refused)
			}
			r.decide(policy.OutboundDirect, sniffed)
			c.send(udpAddr(third), []byte("answer"))
			b := make([]byte, 100)
			third.SetReadDeadline(time.Now().Add(10 * time.Second))
			n, from, err := third.ReadFromUDPAddrPort(b)
			if mapping := <-mappings; err != nil || string(b[:n]) != "answer" || from != mapping {
				t.Errorf("received %q from %s, %v; the mapping is %s", b[:n], from, err, mapping)
			}
		})
	}
}

// What waits at a flow that its remote began, another connection among it, is more than is read at once: all of it goes on, once.
func TestOwnUDPAnswerInBulk(t *testing.T) {
	r := newOwnRig(t, Options{})
	r.decide(policy.OutboundDirect, false)
	third := r.udpSocket(r.internet, netip.AddrPortFrom(third4, 0))
	server := r.udpServer(netip.AddrPortFrom(server4, 0), func(_ *net.UDPConn, from netip.AddrPort, _ []byte) {
		third.WriteToUDPAddrPort([]byte("unasked"), from)
	})
	c := r.ownUDP(server4, netip.Addr{})
	c.send(server, []byte("hello"))
	if payload, _, err := c.receive(); err != nil || string(payload) != "unasked" {
		t.Fatalf("received %q, %v", payload, err)
	}
	r.decide(policy.OutboundDirect, true)
	sent := [][]byte{[]byte("answer"), initials(t, "another.example.com")[0]}
	for i := range 2 * batchSize {
		sent = append(sent, fmt.Appendf(nil, "answer %d", i))
	}
	s := r.server.udp.shardOf(endpointOf(udpAddr(c.UDPConn)))
	s.mu.Lock() // until all lies in the flow's socket
	for _, d := range sent {
		c.send(udpAddr(third), d)
	}
	s.mu.Unlock()
	missing := make(map[string]bool)
	for _, d := range sent {
		missing[string(d)] = true
	}
	third.SetReadDeadline(time.Now().Add(10 * time.Second))
	for b := make([]byte, 2000); len(missing) > 0; {
		n, _, err := third.ReadFromUDPAddrPort(b)
		if err != nil || !missing[string(b[:n])] {
			t.Fatalf("received %q, %v; %d are missing", b[:n], err, len(missing))
		}
		delete(missing, string(b[:n]))
	}
}

// The bits of the mark that rules choose are on what the box sends for direct flows, and each mark has a mapping of its own, for it may go
// another way; what the datapath put there beside them is not.
func TestOwnMark(t *testing.T) {
	r := newOwnRig(t, Options{RuleMarks: 0xf0ffffff})
	r.outbounds.set("up", r.socks5(netip.AddrPortFrom(proxy4, 1080)))
	(*namespace)(nil).run(t, `nft -f - <<END
table inet look {
	set seen { type inet_proto . mark; flags dynamic; }
	chain output { type filter hook output priority 0; oifname "wan" add @seen { meta l4proto . meta mark }; }
}
END`)
	c := r.ownUDP(server4, netip.Addr{})
	seen := make(map[netip.AddrPort]bool)
	var mu sync.Mutex
	note := func(s *net.UDPConn, from netip.AddrPort, payload []byte) {
		mu.Lock()
		defer mu.Unlock()
		seen[from] = true
		s.WriteToUDPAddrPort(payload, from)
	}
	for _, mark := range []uint32{0x04000007, 0x0c000008, 0x04000007} {
		r.verdicts.sniffTo(Route{Outbound: policy.OutboundDirect, Mark: mark})
		if err := c.exchange(r.udpServer(netip.AddrPortFrom(server4, 0), note), []byte("hello")); err != nil {
			t.Error(err)
		}
		if err := roundTrip(r.ownDial(r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { io.Copy(c, onlyReader{c}) }), netip.Addr{}), "hello"); err != nil {
			t.Error(err)
		}
	}
	r.verdicts.sniffTo(Route{Outbound: "up", Mark: 0x04000009})
	if err := c.exchange(r.udpServer(netip.AddrPortFrom(server4, 0), echo), []byte("hello")); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 2 {
		t.Errorf("the servers saw %v, want two mappings", seen)
	}
	out, err := exec.Command("nft", "list", "set", "inet", "look", "seen").Output()
	if err != nil {
		t.Fatal(err)
	}
	got := regexp.MustCompile(`(tcp|udp) \. (0x[0-9a-f]+)`).FindAllString(string(out), -1)
	slices.Sort(got)
	want := []string{"tcp . 0x02000000", "tcp . 0x02000007", "tcp . 0x02000008", "udp . 0x02000000", "udp . 0x02000007", "udp . 0x02000008"}
	if !slices.Equal(got, want) {
		t.Errorf("what left the box had the marks %v, want %v", got, want)
	}
}

// The box may have more of UDP than a client of the LAN, for all of its programs are one; and no more than that, which costs others nothing.
func TestOwnShare(t *testing.T) {
	r := newNetwork(t)
	r.serve(Options{Limits: Limits{Sessions: 3, Flows: 4}}, nil)
	r.own()
	upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
	r.outbounds.set("up", r.socks5(upstream.address()))
	to := func(n int) netip.AddrPort { return netip.AddrPortFrom(server4, uint16(5000+n)) }
	neighbour := r.udpClient(client4, 0)
	if err := neighbour.exchange(to(0), []byte("hello")); err != nil {
		t.Fatal(err)
	}
	many := r.ownUDP(server4, netip.Addr{})
	for i := range 4*ownShare + 10 {
		if err := many.exchange(to(i), []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	if s := r.server.Stats(); s.Flows != 1+4*ownShare || s.Sessions != 2 {
		t.Errorf("%d flows and %d sessions, want %d and 2", s.Flows, s.Sessions, 1+4*ownShare)
	}
	for range 3*ownShare + 10 {
		if err := r.ownUDP(server4, netip.Addr{}).exchange(to(0), []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.server.Stats().Sessions; n != 1+3*ownShare {
		t.Errorf("%d sessions, want %d", n, 1+3*ownShare)
	}
	if !r.hasFlow(udpAddr(neighbour.UDPConn), to(0)) {
		t.Error("the neighbour's flow is gone")
	}
}

// Whatever the policy says, nothing is relayed to a loopback address: neither to what serves only this box, nor to the
// proxy itself, nor to where own clients seem to be.
func TestOwnLoopbackIsNoDestination(t *testing.T) {
	r := newOwnRig(t, Options{})
	r.decide(policy.OutboundDirect, false)
	sockets := r.server.Sockets()
	for _, address := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), loopback4, loopback6} {
		t.Run(address.String(), func(t *testing.T) {
			tcpListener, err := net.Listen("tcp", netip.AddrPortFrom(address, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer tcpListener.Close()
			udpListener, err := net.ListenPacket("udp", netip.AddrPortFrom(address, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer udpListener.Close()
			ports := map[string][]int{
				"tcp": {tcpListener.Addr().(*net.TCPAddr).Port, port(t, sockets.TCP4), port(t, sockets.TCP6)},
				"udp": {udpListener.LocalAddr().(*net.UDPAddr).Port, port(t, sockets.UDP4), port(t, sockets.UDP6)},
			}
			for _, p := range ports["tcp"] {
				before := r.server.Stats().Refused[NotProxied]
				c, err := ownDialer("tcp", netip.Addr{}).Dial("tcp", netip.AddrPortFrom(address, uint16(p)).String())
				opened, _ := c.(*net.TCPConn)
				if opened != nil {
					opened.SetDeadline(time.Now().Add(10 * time.Second))
				}
				expectReset(t, opened, err)
				if n := r.server.Stats().Refused[NotProxied] - before; n != 1 {
					t.Errorf("refused %d times", n)
				}
			}
			for _, p := range ports["udp"] {
				before := r.server.Stats().Refused[NotProxied]
				r.ownUDP(address, netip.Addr{}).send(netip.AddrPortFrom(address, uint16(p)), []byte("hello"))
				eventually(t, "it is refused", func() bool { return r.server.Stats().Refused[NotProxied] == before+1 })
			}
		})
	}
	if s := r.server.Stats(); s.Outbounds[policy.OutboundDirect] != (Traffic{}) {
		t.Errorf("relayed: %+v", s.Outbounds[policy.OutboundDirect])
	}
}
