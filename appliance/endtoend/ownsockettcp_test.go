package endtoend

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// TestOwnTCP: connections of the box itself go as their rules say, and what the program sees of them is true: the peer is
// whom it connected to, its own name the box's address. Blocked ones fail at once, where they are made. What breaks it is a
// hook that does not decide, a socket that is not steered, or an address of the inside that shows.
func TestOwnTCP(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	for port, verdict := range map[uint16]string{proxiedPort: "proxied", directPort: "direct"} {
		w.inAll(t, verdict, func(t *testing.T, f family) {
			s := w.tcp(t, f)
			need(t, s.connect(f.at(port)))
			saw, err := s.greeting()
			need(t, err)
			f.saw(t, verdict, saw, s)
			if name := s.name(t); name.Addr() != f.box {
				t.Errorf("getsockname says %s, want %s", name, f.box)
			}
			if peer := s.peer(t); peer != f.at(port) {
				t.Errorf("getpeername says %s, want %s", peer, f.at(port))
			}
			need(t, s.mirror(1<<20))
		})
	}
	for port, want := range map[uint16]error{blockedPort: unix.EPERM, rejectPort: unix.ECONNREFUSED} {
		w.inAll(t, want.Error(), func(t *testing.T, f family) {
			if err := w.tcp(t, f).connect(f.at(port)); !errors.Is(err, want) {
				t.Errorf("connecting: %v, want %v", err, want)
			}
		})
	}
	for port, verdict := range map[uint16]string{proxiedPort: "proxied", directPort: "direct"} {
		w.inAll(t, verdict+" without waiting", func(t *testing.T, f family) {
			s := w.tcp(t, f)
			need(t, unix.SetNonblock(s.fd, true))
			if err := s.connect(f.at(port)); !errors.Is(err, unix.EINPROGRESS) {
				t.Fatalf("connecting: %v, want %v", err, unix.EINPROGRESS)
			}
			poll := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}
			if n, err := unix.Poll(poll, 3000); n != 1 {
				t.Fatalf("it does not become writable: %v", err)
			}
			if code, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
				t.Fatalf("connecting: %v, %v", unix.Errno(code), err)
			}
			need(t, unix.SetNonblock(s.fd, false))
			saw, err := s.greeting()
			need(t, err)
			f.saw(t, verdict, saw, s)
		})
		w.inAll(t, verdict+", bound", func(t *testing.T, f family) {
			noPort := option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1}
			reuse := option{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}
			for _, bound := range []struct {
				to      netip.AddrPort
				options []option
			}{
				{netip.AddrPortFrom(f.box, 0), nil},
				{netip.AddrPortFrom(f.box, 0), []option{noPort}},
				{netip.AddrPortFrom(f.box, port+1000), []option{reuse}},
				{netip.AddrPortFrom(unspecified(f), port+2000), []option{reuse}},
			} {
				s := w.tcp(t, f, bound.options...)
				s.bind(t, bound.to)
				need(t, s.connect(f.at(port)))
				saw, err := s.greeting()
				if err != nil {
					t.Fatalf("bound to %s: %v", bound.to, err)
				}
				f.saw(t, verdict, saw, s)
				name := s.name(t)
				if name.Addr() != f.box || bound.to.Port() != 0 && name.Port() != bound.to.Port() {
					t.Errorf("bound to %s its name is %s", bound.to, name)
				}
				need(t, s.mirror(100_000))
			}
		})
	}
}

// TestOwnTCPPortsAgain: a program that takes the same port for each of its connections, to one server or to several, gets what the
// rule of each says, whoever ended the one before and however. What breaks it is a verdict that stays with the port, or a socket
// of the last one, the proxy's or the program's, that takes the next one's packets.
func TestOwnTCPPortsAgain(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	verdicts := []struct {
		port    uint16
		verdict string
	}{{proxiedPort, "proxied"}, {directPort, "direct"}, {rejectPort, "rejected"}, {blockedPort, "blocked"}}
	for name, end := range map[string]func(t *testing.T, s *boxSocket){
		"reset by the client": func(t *testing.T, s *boxSocket) {
			need(t, unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
			s.close()
		},
		"ended by the server": func(t *testing.T, s *boxSocket) {
			_, err := s.Write([]byte(leave))
			need(t, err)
			n, err := s.Read(make([]byte, 16))
			if n != 0 || err != nil {
				t.Fatalf("the server does not close: %d, %v", n, err)
			}
			s.close()
		},
	} {
		w.inAll(t, name, func(t *testing.T, f family) {
			for range 5 {
				for _, v := range verdicts {
					s := w.tcp(t, f, option{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1})
					s.bind(t, netip.AddrPortFrom(f.box, 9999))
					err := s.connect(f.at(v.port))
					if v.verdict == "rejected" && errors.Is(err, unix.ECONNREFUSED) || v.verdict == "blocked" && errors.Is(err, unix.EPERM) {
						s.close()
						continue
					}
					if err != nil {
						t.Fatalf("what is to be %s: %v", v.verdict, err)
					}
					saw, err := s.greeting()
					need(t, err)
					f.saw(t, v.verdict, saw, s)
					end(t, s)
				}
			}
		})
	}
}

// TestOwnTCPAbruptEnd: a program that is killed, or closes what it has not read, while the server goes on sending, takes its
// proxied connection with it: the proxy's ends soon, and no reset, of which the kernel sends some in the name of no socket, leaves
// for the server that the program meant. What breaks it is a reset without a mark, or one that does not find the proxy.
func TestOwnTCPAbruptEnd(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	begin := func(t *testing.T, f family, bound bool) *boxSocket {
		t.Helper()
		s := w.tcp(t, f)
		if bound {
			s.bind(t, netip.AddrPortFrom(f.box, 0))
		}
		need(t, s.connect(f.at(proxiedPort)))
		saw, err := s.greeting()
		need(t, err)
		f.saw(t, "proxied", saw, s)
		return s
	}
	over := func(t *testing.T) {
		t.Helper()
		need(t, lab.Wait(t.Context(), "the proxy's connections to end", func() error {
			if n := w.status(t).Proxy.Connections; n != 0 {
				return fmt.Errorf("%d are left", n)
			}
			return nil
		}))
	}
	for _, bound := range []bool{false, true} {
		how := map[bool]string{false: "unbound", true: "bound"}[bound]
		w.inAll(t, "with bytes unread, "+how, func(t *testing.T, f family) {
			for range 10 {
				s := begin(t, f, bound)
				_, err := s.Write([]byte(pour))
				need(t, err)
				_, err = s.Read(make([]byte, 1))
				need(t, err)
				s.close()
			}
			over(t)
		})
		w.inAll(t, "half closed, "+how, func(t *testing.T, f family) {
			s := begin(t, f, bound)
			_, err := s.Write([]byte(pour))
			need(t, err)
			need(t, unix.Shutdown(s.fd, unix.SHUT_RDWR))
			s.close()
			over(t)
		})
		w.inAll(t, "killed, "+how, func(t *testing.T, f family) {
			order := holdOrder{Server: f.at(proxiedPort)}
			if bound {
				order.Bind = netip.AddrPortFrom(f.box, 0)
			}
			p := w.startInClient(t, w.sidegate(), "hold", order)
			need(t, lab.Wait(t.Context(), "the program's connection", func() error {
				if w.status(t).Proxy.Connections == 0 {
					return errors.New("there is none")
				}
				return nil
			}))
			need(t, p.Kill())
			over(t)
		})
	}
}

// holdOrder is what a client is told that holds a connection, over which the server pours, until it is killed.
type holdOrder struct{ Bind, Server netip.AddrPort }

func runHold(text []byte) (any, error) {
	var order holdOrder
	if err := json.Unmarshal(text, &order); err != nil {
		return nil, err
	}
	d := net.Dialer{}
	if order.Bind.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(order.Bind)
	}
	c, err := d.Dial("tcp", order.Server.String())
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, pour); err != nil {
		return nil, err
	}
	n, err := io.Copy(io.Discard, c)
	return n, err
}
