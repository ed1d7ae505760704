package endtoend

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// udpVerdicts are the ports and what must become of a datagram to each.
var udpVerdicts = []struct {
	port    uint16
	verdict string
	err     error // of the system call
}{
	{proxiedPort, "proxied", nil},
	{directPort, "direct", nil},
	{blockedPort, "blocked", unix.EPERM},
	{rejectPort, "rejected", unix.ECONNREFUSED},
}

// asks sends a datagram, and wants what the verdict says.
func (s *boxSocket) asks(t *testing.T, f family, port uint16, size int) {
	t.Helper()
	for _, v := range udpVerdicts {
		if v.port != port {
			continue
		}
		saw, err := s.ask(f.at(port), size)
		switch {
		case v.err != nil && !errors.Is(err, v.err):
			t.Errorf("%s: %v, want %v", v.verdict, err, v.err)
		case v.err == nil && err != nil:
			t.Errorf("%s: %v", v.verdict, err)
		case v.verdict == "proxied" && saw.Addr() != f.upstream, v.verdict == "direct" && saw.Addr() != f.box:
			t.Errorf("%s: the server saw %s", v.verdict, saw)
		}
	}
}

// udpBindings are ways to bind a UDP socket, or not to.
func udpBindings(f family) map[string]netip.AddrPort {
	return map[string]netip.AddrPort{
		"unbound":               {},
		"with an address":       netip.AddrPortFrom(f.box, 0),
		"with a port":           netip.AddrPortFrom(unspecified(f), 9998),
		"with address and port": netip.AddrPortFrom(f.box, 9997),
	}
}

func unspecified(f family) netip.Addr {
	if f.box.Is6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified() // mapped, too
}

// TestOwnUDP: a UDP socket of the box, bound or not, that sends to many in turn without being connected, has each datagram go as
// its own rule says and gets each answer from whom it asked; so has a connected one. What breaks it is a source that is not found
// again, a decision that is the socket's and not the datagram's, or a mark that comes a datagram late.
func TestOwnUDP(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	for _, f := range w.families() {
		for how, binding := range udpBindings(f) {
			open := func(t *testing.T) *boxSocket {
				s := w.udp(t, f)
				if binding.IsValid() {
					s.bind(t, binding)
				}
				return s
			}
			t.Run(fmt.Sprintf("%s to many, %s", f.name, how), func(t *testing.T) {
				for first := range udpVerdicts { // the first one is special: only from then on a socket has a port
					s := open(t)
					for i := range 3 * len(udpVerdicts) {
						s.asks(t, f, udpVerdicts[(first+i)%len(udpVerdicts)].port, 100+i)
					}
					s.close()
				}
			})
			t.Run(fmt.Sprintf("%s connected, %s", f.name, how), func(t *testing.T) {
				for _, v := range udpVerdicts {
					s := open(t)
					err := s.connect(f.at(v.port))
					if v.err != nil {
						if !errors.Is(err, v.err) {
							t.Errorf("connecting to what is %s: %v, want %v", v.verdict, err, v.err)
						}
						s.close()
						continue
					}
					need(t, err)
					for range 3 {
						saw, err := s.ask(netip.AddrPort{}, 100)
						need(t, err)
						f.saw(t, v.verdict, saw, s)
					}
					if name := s.name(t); name.Addr() != f.box {
						t.Errorf("%s: getsockname says %s", v.verdict, name)
					}
					if peer := s.peer(t); peer != f.at(v.port) {
						t.Errorf("%s: getpeername says %s", v.verdict, peer)
					}
					s.close()
				}
			})
		}
	}
}

// TestOwnUDPSharedPort: two sockets with one port and different addresses of the box's, and two with all in common, each get the
// answers to what they sent. What breaks it is a source that stands for the wrong address, or for none.
func TestOwnUDPSharedPort(t *testing.T) {
	w := newSocketWorld(t)
	second4, second6 := netip.MustParseAddr("192.168.0.77"), netip.MustParseAddr("fd00:c0a8::77")
	run(t, w.sidegate(), "ip addr add 192.168.0.77/24 dev eth0; ip addr add fd00:c0a8::77/64 dev eth0 nodad preferred_lft 0")
	w.startPorts(t)
	for _, f := range w.families() {
		second := second4
		if f.box.Is6() {
			second = second6
		}
		t.Run("two addresses "+f.name, func(t *testing.T) {
			var sockets []*boxSocket
			for _, a := range []netip.Addr{f.box, second} {
				s := w.udp(t, f)
				s.bind(t, netip.AddrPortFrom(a, 9990))
				sockets = append(sockets, s)
			}
			for i := range 4 {
				for j, s := range sockets {
					s.asks(t, f, proxiedPort, 100+10*i+j)
				}
			}
			saw, err := sockets[1].ask(f.at(directPort), 100)
			if err != nil || saw != netip.AddrPortFrom(second, 9990) {
				t.Errorf("direct from the second address: the server saw %s, %v", saw, err)
			}
		})
		t.Run("a shared port "+f.name, func(t *testing.T) {
			reuse := option{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1}
			for _, address := range []netip.Addr{f.box, unspecified(f)} {
				one, two := w.udp(t, f, reuse), w.udp(t, f, reuse)
				one.bind(t, netip.AddrPortFrom(address, 9991))
				two.bind(t, netip.AddrPortFrom(address, 9991))
				need(t, one.connect(f.at(proxiedPort)))
				need(t, two.connect(f.at(directPort)))
				for range 3 {
					saw, err := one.ask(netip.AddrPort{}, 100)
					need(t, err)
					f.saw(t, "proxied", saw, one)
					saw, err = two.ask(netip.AddrPort{}, 100)
					need(t, err)
					f.saw(t, "direct", saw, two)
				}
				one.close()
				two.close()
			}
		})
	}
}

// TestOwnUDPSizes: datagrams of all sizes arrive whole, also those that the program has the kernel cut (UDP_SEGMENT). What breaks
// it is a checksum that is not right behind a source that was put back, or a packet that is taken for one datagram.
func TestOwnUDPSizes(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	for _, f := range w.families() {
		for how, binding := range udpBindings(f) {
			t.Run(fmt.Sprintf("%s %s", f.name, how), func(t *testing.T) {
				s := w.udp(t, f)
				if binding.IsValid() {
					s.bind(t, binding)
				}
				for _, size := range []int{0, 1, 1200, 1472, 1473, 9000, 32768, 60000} {
					s.asks(t, f, directPort, size)
					if size > 0 && size < 60000 { // dante's own limit of a datagram
						s.asks(t, f, proxiedPort, size)
					}
				}
				need(t, unix.SetsockoptInt(s.fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000))
				for _, port := range []uint16{proxiedPort, directPort} {
					need(t, s.sendTo(f.at(port), 4500))
					counts := map[int]int{}
					for range 5 {
						_, saw, n, err := s.answer()
						need(t, err)
						counts[n]++
						if proxied := saw.Addr() == f.upstream; proxied != (port == proxiedPort) {
							t.Errorf("port %d: the server saw %s", port, saw)
						}
					}
					if counts[1000] != 4 || counts[500] != 1 {
						t.Errorf("port %d: these lengths arrived: %v", port, counts)
					}
				}
			})
		}
	}
}

// TestOwnUDPControl: what a program says of a single datagram, its source address, its interface, its mark, does not lead it past
// the policy. What breaks it is a source that is not steered, or an interface or mark that the route is chosen by before us.
func TestOwnUDPControl(t *testing.T) {
	w := newSocketWorld(t)
	run(t, w.sidegate(), "ip addr add 192.168.0.77/24 dev eth0; ip addr add fd00:c0a8::77/64 dev eth0 nodad preferred_lft 0")
	w.startPorts(t)
	index := w.sidegate().Interface().Index
	for _, f := range w.families() {
		second := netip.MustParseAddr("192.168.0.77")
		if f.box.Is6() {
			second = netip.MustParseAddr("fd00:c0a8::77")
		}
		ipv6 := f.domain == unix.AF_INET6
		for _, c := range []struct {
			name    string
			control []byte
			refused bool // what is to be proxied, by the kernel: it does not leave by an interface that the route does not name
		}{
			{"a source", packetInfo(ipv6, second, 0), false},
			{"an interface", packetInfo(ipv6, unspecified(f), index), f.box.Is4()},
			{"a source and an interface", packetInfo(ipv6, second, index), f.box.Is4()},
			{"a mark", markControl(0x10), false},
			{"the daemon's mark", markControl(0x02000000), false},
			{"the mark of what is direct", markControl(0x04000000), false},
		} {
			for how, binding := range udpBindings(f) {
				if binding.Addr() == f.box {
					continue // where the answer to another source would not be the socket's
				}
				t.Run(fmt.Sprintf("%s %s, %s", f.name, c.name, how), func(t *testing.T) {
					s := w.udp(t, f)
					defer s.close()
					if binding.IsValid() {
						s.bind(t, binding)
					}
					for i := range 3 * len(udpVerdicts) {
						v := udpVerdicts[i%len(udpVerdicts)]
						err := unix.Sendmsg(s.fd, make([]byte, 100+i), c.control, s.sockaddr(f.at(v.port)), 0)
						if v.verdict == "proxied" && c.refused && err != nil {
							continue
						}
						if !errors.Is(err, v.err) {
							t.Errorf("%s: %v, want %v", v.verdict, err, v.err)
						}
						if v.err != nil || err != nil {
							continue
						}
						from, saw, _, err := s.answer()
						if err != nil || from != f.at(v.port) || (v.verdict == "proxied") != (saw.Addr() == f.upstream) {
							t.Errorf("%s: the server saw %s, %s answered, %v", v.verdict, saw, from, err)
						}
					}
				})
			}
		}
	}
}

// packetInfo is a control message that says from where a datagram is to be sent (ip(7), ipv6(7)).
func packetInfo(v6 bool, source netip.Addr, index int) []byte {
	if v6 {
		return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: source.As16(), Ifindex: uint32(index)})
	}
	return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: source.As4(), Ifindex: int32(index)})
}

// TestOwnUDPReconnected: a socket that connects to one after the other, with and without being disconnected in between, has what the
// last one's rule says; and one that is connected sends elsewhere by that one's rule. What breaks it is a mark that stays.
func TestOwnUDPReconnected(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	for _, disconnected := range []bool{false, true} {
		how := map[bool]string{false: "at once", true: "by way of none"}[disconnected]
		w.inAll(t, how, func(t *testing.T, f family) {
			s := w.udp(t, f)
			for _, i := range []int{0, 1, 2, 0, 1, 0, 3, 1, 2, 1, 0} {
				v := udpVerdicts[i]
				err := s.connect(f.at(v.port))
				if v.err != nil {
					if !errors.Is(err, v.err) {
						t.Errorf("connecting to what is %s: %v, want %v", v.verdict, err, v.err)
					}
				} else {
					need(t, err)
					saw, err := s.ask(netip.AddrPort{}, 100)
					need(t, err)
					if v.verdict == "direct" && !disconnected && saw.Addr() == f.box {
						continue // it has the steered one's source still, and is relayed
					}
					f.saw(t, v.verdict, saw, s)
				}
				if disconnected {
					s.disconnect(t)
				}
			}
		})
	}
	w.inAll(t, "disconnected, then to many", func(t *testing.T, f family) {
		for _, port := range []uint16{proxiedPort, directPort} {
			s := w.udp(t, f)
			need(t, s.connect(f.at(port)))
			_, err := s.ask(netip.AddrPort{}, 100)
			need(t, err)
			s.disconnect(t)
			for i := range 2 * len(udpVerdicts) {
				s.asks(t, f, udpVerdicts[i%len(udpVerdicts)].port, 200+i)
			}
			saw, err := s.ask(f.at(directPort), 100)
			need(t, err)
			if want := s.name(t).Port(); saw.Port() != want {
				t.Errorf("once connected to %d: the server saw %s, want port %d: it is steered still", port, saw, want)
			}
		}
	})
	w.inAll(t, "connected, and to others", func(t *testing.T, f family) {
		for _, port := range []uint16{proxiedPort, directPort} {
			s := w.udp(t, f)
			need(t, s.connect(f.at(port)))
			// Answers of others do not reach a connected socket: what arrives there is seen at the server.
			for i := range 2 * len(udpVerdicts) {
				v := udpVerdicts[i%len(udpVerdicts)]
				seen := len(w.witnessed(v.port))
				err := s.sendTo(f.at(v.port), 300+i)
				if !errors.Is(err, v.err) {
					t.Errorf("sending to what is %s: %v, want %v", v.verdict, err, v.err)
				}
				if v.err == nil {
					saw := w.awaitWitness(t, v.port, seen)
					if proxied := saw.Addr() == f.upstream; proxied != (v.verdict == "proxied") {
						t.Errorf("connected to port %d, sending to %d: the server saw %s", port, v.port, saw)
					}
				}
			}
		}
	})
}

// TestOwnUDPThreads: threads that send by one socket to different destinations at once do not take each other's verdicts. What
// breaks it is anything that the hook leaves at the socket for the datagram.
func TestOwnUDPThreads(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	w.inAll(t, "one socket", func(t *testing.T, f family) {
		const rounds = 300
		s := w.udp(t, f)
		for i := range rounds {
			var senders sync.WaitGroup
			for _, v := range udpVerdicts {
				senders.Go(func() {
					if err := s.sendTo(f.at(v.port), 1+i); !errors.Is(err, v.err) {
						t.Errorf("%s: %v, want %v", v.verdict, err, v.err)
					}
				})
			}
			senders.Wait()
			for range 2 {
				from, saw, _, err := s.answer()
				if err != nil || (saw.Addr() == f.upstream) != (from.Port() == proxiedPort) || from.Port() > directPort {
					t.Fatalf("round %d: %s answered, and saw %s, %v", i, from, saw, err)
				}
			}
		}
	})
}

// TestOwnUDPGone: an answer through the proxy to a socket that is closed causes no ICMP error that leaves for the server. What breaks it
// is the kernel's own, which it sends without a mark.
func TestOwnUDPGone(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	for _, f := range w.families() {
		for how, binding := range udpBindings(f) {
			t.Run(f.name+" "+how, func(t *testing.T) {
				before := w.status(t).Proxy.Outbounds["hk"].PacketsDown
				const count = 10
				for i := range count {
					s := w.udp(t, f)
					if binding.IsValid() {
						s.bind(t, binding)
					}
					seen := len(w.witnessed(proxiedPort))
					need(t, s.sendTo(f.at(proxiedPort), 100+i))
					s.close()
					w.awaitWitness(t, proxiedPort, seen)
				}
				need(t, lab.Wait(t.Context(), "the proxy to pass the answers on", func() error {
					if n := w.status(t).Proxy.Outbounds["hk"].PacketsDown - before; n < count {
						return fmt.Errorf("%d of %d", n, count)
					}
					return nil
				}))
			})
		}
	}
	never(t, w.leaving, "an ICMP error about a proxied flow left", func(p lab.Packet) bool {
		return p.Out && (p.Protocol == lab.ICMP && p.ICMPType == 3 || p.Protocol == lab.ICMPv6 && p.ICMPType == 1)
	})
	drops := w.status(t).Drops
	if drops["own_gone"] == 0 || drops["own_unknown"] > 0 {
		t.Errorf("drops: %v", drops)
	}
}
