package endtoend

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOwnTCP: connections of the box itself go as their rules say, and what the program sees of them is true: the peer is
// whom it connected to, its own name the box's address. Blocked ones fail at once, where they are made. What breaks it is a
// hook that does not decide, a socket that is not steered, or an address of the inside that shows.
func TestOwnTCP(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	for port, verdict := range map[uint16]string{proxiedPort: "proxied", directPort: "direct"} {
		w.inBoth(t, verdict, func(t *testing.T, f family) {
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
		w.inBoth(t, want.Error(), func(t *testing.T, f family) {
			if err := w.tcp(t, f).connect(f.at(port)); !errors.Is(err, want) {
				t.Errorf("connecting: %v, want %v", err, want)
			}
		})
	}
	for port, verdict := range map[uint16]string{proxiedPort: "proxied", directPort: "direct"} {
		w.inBoth(t, verdict+" without waiting", func(t *testing.T, f family) {
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
		w.inBoth(t, verdict+", bound", func(t *testing.T, f family) {
			noPort := option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1}
			reuse := option{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}
			any := netip.IPv4Unspecified()
			if f.domain == unix.AF_INET6 {
				any = netip.IPv6Unspecified()
			}
			for _, bound := range []struct {
				to      netip.AddrPort
				options []option
			}{
				{netip.AddrPortFrom(f.box, 0), nil},
				{netip.AddrPortFrom(f.box, 0), []option{noPort}},
				{netip.AddrPortFrom(f.box, port+1000), []option{reuse}},
				{netip.AddrPortFrom(any, port+2000), []option{reuse}},
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
