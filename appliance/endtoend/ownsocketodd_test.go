package endtoend

import (
	bytes "encoding/binary" // binary is the program
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// device is the interface that a socket is bound to; 0: none.
func (s *boxSocket) device(t *testing.T) int {
	t.Helper()
	index, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	need(t, err)
	return index
}

func (s *boxSocket) bindDevice(t *testing.T, index int) {
	t.Helper()
	need(t, unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, index))
}

// TestOwnSocketOfADevice: the policy holds for a socket that is bound to an interface, which the way into the proxy is not by. A
// connection is proxied all the same, and bound again where it connects to what is direct; a datagram to be proxied is refused, for its way
// is chosen already; a direct one goes by its interface. Without a privilege nobody may unbind: then a connection is refused, too. What
// breaks it is anything that leaves by the interface because it is bound to it.
func TestOwnSocketOfADevice(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	index := w.sidegate().Interface().Index
	w.inAll(t, "TCP", func(t *testing.T, f family) {
		for port, verdict := range map[uint16]string{proxiedPort: "proxied", directPort: "direct"} {
			s := w.tcp(t, f)
			s.bindDevice(t, index)
			need(t, s.connect(f.at(port)))
			saw, err := s.greeting()
			need(t, err)
			f.saw(t, verdict, saw, s)
			if got := s.device(t); verdict == "direct" && got != index {
				t.Errorf("a direct connection is bound to %d, want %d", got, index)
			}
		}
	})
	w.inAll(t, "UDP, connected", func(t *testing.T, f family) {
		s := w.udp(t, f)
		s.bind(t, netip.AddrPortFrom(f.box, 0)) // else it keeps the source of the first, which may be the steered ones'
		s.bindDevice(t, index)
		for _, i := range []int{1, 0, 1, 0, 2, 1} {
			v := udpVerdicts[i]
			err := s.connect(f.at(v.port))
			if !errors.Is(err, v.err) {
				t.Fatalf("%s: %v, want %v", v.verdict, err, v.err)
			}
			if err != nil {
				continue
			}
			saw, err := s.ask(netip.AddrPort{}, 100)
			need(t, err)
			f.saw(t, v.verdict, saw, s)
			if got := s.device(t); v.verdict == "direct" && got != index {
				t.Errorf("connected to what is direct it is bound to %d, want %d", got, index)
			}
		}
	})
	w.inAll(t, "UDP, to many", func(t *testing.T, f family) {
		for how, binding := range udpBindings(f) {
			s := w.udp(t, f)
			if binding.IsValid() {
				s.bind(t, binding)
			}
			s.bindDevice(t, index)
			for range 3 {
				if err := s.sendTo(f.at(proxiedPort), 100); !errors.Is(err, unix.EPERM) {
					t.Errorf("%s, to be proxied: %v, want %v", how, err, unix.EPERM)
				}
				s.asks(t, f, directPort, 100)
				s.asks(t, f, blockedPort, 100)
				if got := s.device(t); got != index {
					t.Fatalf("%s: it is bound to %d, want %d", how, got, index)
				}
			}
			s.close()
		}
	})
	w.inAll(t, "bound afterwards", func(t *testing.T, f family) {
		c, u, b := w.tcp(t, f), w.udp(t, f), w.tcp(t, f)
		b.bind(t, netip.AddrPortFrom(f.box, 0))
		for _, s := range []*boxSocket{c, u, b} {
			need(t, s.connect(f.at(proxiedPort)))
			s.bindDevice(t, index)
			for range 3 {
				s.Write([]byte("to whom?")) // an error, or lost: nothingLeaks says that it does not leave
			}
		}
	})
	w.inAll(t, "without privilege", func(t *testing.T, f family) {
		before := w.status(t).Drops["own_device"]
		c, u := w.tcp(t, f), w.udp(t, f)
		c.bindDevice(t, index)
		u.bindDevice(t, index)
		var asNobody [3]error
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // and never unlocked: the thread ends with this
			const nobody = 65534
			if _, _, err := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); err != 0 {
				asNobody[0] = err
				return
			}
			asNobody[1], asNobody[2] = c.connect(f.at(proxiedPort)), u.connect(f.at(proxiedPort))
		}()
		<-done
		if asNobody[0] != nil || !errors.Is(asNobody[1], unix.EPERM) || !errors.Is(asNobody[2], unix.EPERM) {
			t.Errorf("connecting as nobody: %v, want %v", asNobody, unix.EPERM)
		}
		if n := w.status(t).Drops["own_device"] - before; n != 2 {
			t.Errorf("own_device counts %d, want 2", n)
		}
	})
}

// seen is as whom the server sees a connected socket.
func (s *boxSocket) seen(kind int) (netip.AddrPort, error) {
	if kind == unix.SOCK_STREAM {
		return s.greeting()
	}
	return s.ask(netip.AddrPort{}, 100)
}

// TestOwnSocketMarks: what a program marks its sockets with for its own ends stays with them, and what it sets of our bits does not lead
// it past the policy. (The daemon's own mark does: it takes the privilege to mark, by which anybody gets past.)
func TestOwnSocketMarks(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	w.inAll(t, "kept", func(t *testing.T, f family) {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			for port, verdict := range map[uint16]string{proxiedPort: "proxied", directPort: "direct"} {
				for _, ours := range []int{0, 0x01000000, 0x04000000, 0x08000000, 0x0c000000} {
					s := w.socket(t, f.domain, kind, 0, option{unix.SOL_SOCKET, unix.SO_MARK, ours | 0x12})
					need(t, s.connect(f.at(port)))
					saw, err := s.seen(kind)
					if err != nil {
						t.Fatalf("mark %#x, %s: %v", ours, verdict, err)
					}
					f.saw(t, verdict, saw, s)
					if mark := s.mark(t); mark&^0x0f000000 != 0x12 || verdict == "direct" && mark != 0x12 {
						t.Errorf("the mark %#x of a socket that is %s has become %#x", ours|0x12, verdict, mark)
					}
				}
			}
		}
	})
	w.inAll(t, "to many", func(t *testing.T, f family) {
		for _, ours := range []int{0x12, 0x01000000, 0x04000000, 0x0c000000} { // 0x08000000 is refused by a rule, before anybody asks
			for _, binding := range udpBindings(f) {
				s := w.udp(t, f, option{unix.SOL_SOCKET, unix.SO_MARK, ours})
				if binding.IsValid() {
					s.bind(t, binding)
				}
				for i := range 2 * len(udpVerdicts) {
					s.asks(t, f, udpVerdicts[i%len(udpVerdicts)].port, 100)
				}
				s.close()
			}
		}
	})
}

// TestOwnMultipathTCP: MPTCP, which programs use without knowing, is proxied as the TCP that it can always be; direct it stays what it is.
func TestOwnMultipathTCP(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	for _, port := range []uint16{proxiedPort, directPort, blockedPort, rejectPort} {
		w.inAll(t, fmt.Sprint(port), func(t *testing.T, f family) {
			s := w.socket(t, f.domain, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
			err := s.connect(f.at(port))
			switch port {
			case blockedPort:
				if !errors.Is(err, unix.EPERM) {
					t.Errorf("blocked: %v", err)
				}
				return
			case rejectPort:
				if !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("rejected: %v", err)
				}
				return
			}
			need(t, err)
			saw, err := s.greeting()
			need(t, err)
			f.saw(t, map[uint16]string{proxiedPort: "proxied", directPort: "direct"}[port], saw, s)
			if name := s.name(t); name.Addr() != f.box {
				t.Errorf("getsockname says %s, want %s", name, f.box)
			}
			need(t, s.mirror(300_000))
		})
	}
}

// TestOwnFastOpen: data in the SYN arrives, and is decided on like all else.
func TestOwnFastOpen(t *testing.T) {
	w := newSocketWorld(t)
	for _, h := range []*lab.Host{w.sidegate(), w.server(), w.upstream()} {
		need(t, h.SetSysctl("net.ipv4.tcp_fastopen", "0x607")) // everywhere, without a cookie too
	}
	w.startPorts(t)
	for _, v := range udpVerdicts {
		w.inAll(t, v.verdict, func(t *testing.T, f family) {
			for range 3 {
				for how, first := range map[string]func(*boxSocket) error{
					"sendto": func(s *boxSocket) error {
						return unix.Sendto(s.fd, []byte("first"), unix.MSG_FASTOPEN, s.sockaddr(f.at(v.port)))
					},
					"connect": func(s *boxSocket) error {
						need(t, unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1))
						if err := s.connect(f.at(v.port)); err != nil {
							return err
						}
						_, err := s.Write([]byte("first"))
						return err
					},
				} {
					s := w.tcp(t, f)
					err := first(s)
					if !errors.Is(err, v.err) {
						t.Fatalf("%s: %v, want %v", how, err, v.err)
					}
					if err != nil {
						continue
					}
					saw, err := s.greeting()
					need(t, err)
					f.saw(t, v.verdict, saw, s)
					b := make([]byte, len("first"))
					if _, err := s.Read(b); err != nil || string(b) != "first" {
						t.Errorf("%s: %q came back, %v", how, b, err)
					}
					s.close()
				}
			}
		})
	}
}

// TestOwnFlowLabel: an IPv6 flow label that a program chose is no reason to miss its packets.
func TestOwnFlowLabel(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	f := w.families()[2]
	for port, verdict := range map[uint16]string{proxiedPort: "proxied", directPort: "direct"} {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			s := w.socket(t, f.domain, kind, 0)
			request := struct {
				destination            [16]byte
				label                  uint32 // network byte order
				action, share          uint8
				flags, expires, linger uint16
				pad                    uint32
			}{destination: f.server.As16(), action: 0 /* get */, share: 255 /* any */, flags: 1 /* create */}
			const label = 0x12345
			bytes.BigEndian.PutUint32((*[4]byte)(unsafe.Pointer(&request.label))[:], label)
			need(t, unix.SetsockoptString(s.fd, unix.SOL_IPV6, 32, // IPV6_FLOWLABEL_MGR, linux/in6.h
				string((*[unsafe.Sizeof(request)]byte)(unsafe.Pointer(&request))[:])))
			need(t, unix.SetsockoptInt(s.fd, unix.SOL_IPV6, 33 /* IPV6_FLOWINFO_SEND */, 1))
			to := make([]byte, unix.SizeofSockaddrInet6)
			bytes.NativeEndian.PutUint16(to, unix.AF_INET6)
			bytes.BigEndian.PutUint16(to[2:], port)
			bytes.BigEndian.PutUint32(to[4:], label)
			copy(to[8:], f.server.AsSlice())
			need(t, rawConnect(s.fd, to))
			saw, err := s.seen(kind)
			need(t, err)
			f.saw(t, verdict, saw, s)
		}
	}
}

// TestOwnDualStack: one socket that sends by IPv4 and IPv6 in turn, bound to no family's address, gets each answer.
func TestOwnDualStack(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	all := w.families()
	for _, bound := range []bool{false, true} {
		s := w.socket(t, unix.AF_INET6, unix.SOCK_DGRAM, 0, option{unix.SOL_IPV6, unix.IPV6_V6ONLY, 0})
		if bound {
			s.bind(t, netip.AddrPortFrom(netip.IPv6Unspecified(), 9996))
		}
		for i := range 3 * len(udpVerdicts) {
			for _, f := range all[1:] {
				s.asks(t, f, udpVerdicts[i%len(udpVerdicts)].port, 100+i)
			}
		}
	}
}
