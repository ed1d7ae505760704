package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// family is what differs between IPv4 and IPv6 in opening our sockets.
type family struct {
	suffix      string // of net's networks: "tcp4"
	domain      int
	loopback    netip.Addr
	optional    bool // the box may lack it
	level       int
	transparent int // option: bind to, and answer from, addresses that are not ours
	original    int // option: have each datagram's destination told in a control message
}

// families are IPv4 and IPv6, in this order. See ip(7), ipv6(7).
var families = [...]family{
	{"4", unix.AF_INET, netip.AddrFrom4([4]byte{127, 0, 0, 1}), false, unix.SOL_IP, unix.IP_TRANSPARENT, unix.IP_RECVORIGDSTADDR},
	{"6", unix.AF_INET6, netip.IPv6Loopback(), true, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, unix.IPV6_RECVORIGDSTADDR},
}

func familyOf(e endpoint) *family {
	if e.is4() {
		return &families[0]
	}
	return &families[1]
}

// setTransparent prepares a socket that stands for other people's addresses.
func (f *family) setTransparent(fd int, mark uint32) error {
	if err := unix.SetsockoptInt(fd, f.level, f.transparent, 1); err != nil {
		return fmt.Errorf("making a socket transparent (needs CAP_NET_ADMIN): %w", err)
	}
	if mark == 0 {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		return fmt.Errorf("marking a socket (needs CAP_NET_ADMIN): %w", err)
	}
	return nil
}

// Receive buffers, in bytes. The kernel reserves nothing and doubles the figures for its own
// bookkeeping. The listener's is the only queue that all clients share.
const (
	listenerBuffer = 16 << 20
	flowBuffer     = 1 << 20
)

// openUDP opens a non-blocking UDP socket; it is closed again if configure fails.
func (f *family) openUDP(configure func(fd int) error) (fd int, err error) {
	fd, err = unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("creating a udp socket: %w", err)
	}
	if err := configure(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openListener opens the socket that gets the datagrams of flows that have none of their own yet.
func (f *family) openListener(mark uint32) (fd int, err error) {
	return f.openUDP(func(fd int) error {
		if err := f.setTransparent(fd, mark); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, f.level, f.original, 1); err != nil {
			return fmt.Errorf("asking for original destinations: %w", err)
		}
		growBuffers(fd, listenerBuffer)
		if err := unix.Bind(fd, endpointOf(netip.AddrPortFrom(f.loopback, 0)).sockaddr()); err != nil {
			return fmt.Errorf("binding a udp socket to %s: %w", f.loopback, err)
		}
		return nil
	})
}

// openFlow opens the socket of one flow: bound to the remote's address, connected to the client. The
// kernel prefers it to every other socket for what the client sends there, and what is sent on it
// reaches the client from where the client expects it.
func openFlow(key flowKey, mark uint32) (fd int, err error) {
	f := familyOf(key.client)
	return f.openUDP(func(fd int) error {
		if err := f.setTransparent(fd, mark); err != nil {
			return err
		}
		// Many clients talk to one remote: their sockets are bound to the same address.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return fmt.Errorf("sharing a udp address: %w", err)
		}
		growBuffers(fd, flowBuffer)
		if err := unix.Bind(fd, key.remote.sockaddr()); err != nil {
			return fmt.Errorf("binding a udp socket to %s: %w", key.remote.addrPort(), err)
		}
		if err := unix.Connect(fd, key.client.sockaddr()); err != nil {
			return fmt.Errorf("connecting a udp socket to %s: %w", key.client.addrPort(), err)
		}
		return nil
	})
}

// disconnect leaves a socket bound, and without a peer (connect(2), AF_UNSPEC).
func disconnect(fd int) {
	var unspecified sockaddr // AF_UNSPEC is 0
	unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified))
}

// growBuffers passes the limits of net.core.[rw]mem_max where CAP_NET_ADMIN allows. A small buffer
// loses packets under load, but is no reason to fail.
func growBuffers(fd, size int) {
	for _, option := range [][2]int{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, option[0], size) != nil {
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, option[1], size)
		}
	}
}

// sockaddr is the address for bind and connect.
func (e endpoint) sockaddr() unix.Sockaddr {
	if e.is4() {
		return &unix.SockaddrInet4{Port: int(e.port), Addr: [4]byte(e.addr[12:])}
	}
	return &unix.SockaddrInet6{Port: int(e.port), Addr: e.addr}
}

// rawSocket shows a descriptor, which the runtime's poller does not know, as a syscall.Conn. It can
// only be controlled.
type rawSocket int

func (s rawSocket) SyscallConn() (syscall.RawConn, error) { return s, nil }

func (s rawSocket) Control(f func(fd uintptr)) error {
	f(uintptr(s))
	return nil
}

func (rawSocket) Read(func(fd uintptr) bool) error  { return errors.ErrUnsupported }
func (rawSocket) Write(func(fd uintptr) bool) error { return errors.ErrUnsupported }
