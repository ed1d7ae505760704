package outbound

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Association is one UDP mapping. It is shaped for a relay that calls recvmmsg and sendmmsg itself.
//
// Only one side may own it: FD is a bare descriptor, so whoever reads and writes it is who calls
// Close, and nothing touches FD afterwards. The end of the association (Done) never closes FD by
// itself. An error of one send or receive, such as ECONNREFUSED, does not end it either.
type Association struct {
	// FD is a non-blocking UDP socket, marked, with large buffers. It is deliberately not registered
	// with the Go runtime's poller: there every packet would wake a thread of the runtime besides
	// the relay's own. Put it into an epoll set of your own.
	FD int
	// Connected says that FD is connected to the upstream's relay: send Header and payload, no
	// address. Otherwise (direct) each datagram is sent to its destination: see PutName and GetName.
	Connected bool
	// HeaderRoom is the greatest length of what Header returns, in bytes; 0 for direct.
	HeaderRoom int

	family  uint16       // of FD: AF_INET6 (dual-stack for direct) or AF_INET
	control *net.TCPConn // SOCKS5: the association lives as long as this; nil for direct
	done    chan struct{}

	once     sync.Once
	closeErr error
}

// udpBuffer is asked of the kernel for each direction of a UDP socket, in bytes (it reserves nothing
// and doubles the figure for its own bookkeeping). Default buffers lost 3–5% at 120,000 packets/s.
const udpBuffer = 2 << 20

// udpControl sets the buffers, then does what the options say.
func udpControl(o Options) func(network, address string, c syscall.RawConn) error {
	return func(network, address string, c syscall.RawConn) error {
		err := c.Control(func(fd uintptr) {
			growBuffer(int(fd), unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
			growBuffer(int(fd), unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
		})
		if err != nil || o.Control == nil {
			return err
		}
		return o.Control(network, address, c)
	}
}

// growBuffer passes the limit of net.core.[rw]mem_max where CAP_NET_ADMIN allows, and goes up to it
// otherwise. A small buffer loses packets under load but is no reason to fail.
func growBuffer(fd, force, polite int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, udpBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, polite, udpBuffer)
	}
}

// connectRelay opens the socket towards a SOCKS5 server's UDP relay. It comes from the address that
// the server knows us by, because servers accept datagrams from nobody else.
func connectRelay(ctx context.Context, d net.Dialer, o Options, from, relay netip.AddrPort) (*Association, error) {
	d.Control = udpControl(o)
	source := netip.AddrPort{}
	if from.Addr().Is4() == relay.Addr().Is4() {
		source = netip.AddrPortFrom(from.Addr(), 0)
	}
	c, err := d.DialUDP(ctx, "udp", source, relay)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", relay, bare(err))
	}
	a, err := newAssociation(c)
	if err != nil {
		return nil, err
	}
	a.Connected = true
	a.HeaderRoom = udpHeaderRoom
	return a, nil
}

// newAssociation takes the descriptor of c out of the runtime's poller, into an association.
func newAssociation(c *net.UDPConn) (*Association, error) {
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	a := &Association{done: make(chan struct{})}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var family int
		if family, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); failed == nil {
			a.family = uint16(family)
			a.FD, failed = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		}
	})
	if err = errors.Join(err, failed); err != nil {
		return nil, fmt.Errorf("duplicating a udp socket: %w", err)
	}
	return a, nil
}

// Mark adds bits to the firewall mark that Options.Control gave FD, before anything is sent by it: see
// Destination.Mark. It is for direct associations.
func (a *Association) Mark(bits uint32) error { return addMark(a.FD, bits) }

// follow ends the association when the control connection ends.
func (a *Association) follow(control *net.TCPConn) {
	a.control = control
	go func() {
		defer close(a.done)
		var ignored [64]byte // a server has nothing to say here; only the end counts
		for {
			if _, err := control.Read(ignored[:]); err != nil {
				return
			}
		}
	}()
}

// Done is closed when the association has ended: the upstream closed it, or Close was called. The
// owner then calls Close.
func (a *Association) Done() <-chan struct{} { return a.done }

// Close ends the association, here and at the upstream, and waits until nothing of it is left.
// Further calls do nothing but return the first one's error.
func (a *Association) Close() error {
	a.once.Do(func() {
		if a.control == nil {
			close(a.done)
		} else {
			a.closeErr = a.control.Close()
			<-a.done
		}
		a.closeErr = errors.Join(a.closeErr, unix.Close(a.FD))
	})
	return a.closeErr
}

// Header returns what must stand before the payload of each datagram to dst. It does not depend on
// the payload: build it once per flow. It is nil for direct.
func (a *Association) Header(dst netip.AddrPort) []byte {
	if !a.Connected {
		return nil
	}
	return appendUDPHeader(make([]byte, 0, udpHeaderRoom), dst)
}

// Parse finds the payload of a datagram that FD received, packet[offset:], and who sent it (IPv4 in
// its 4-byte form). It does not allocate. A datagram that it refuses is to be dropped. It is for
// Connected associations; otherwise the sender is the packet's own: see GetName.
func (a *Association) Parse(packet []byte) (src netip.AddrPort, offset int, err error) {
	return parseUDPHeader(packet)
}

// PutName writes dst as FD's address family wants it (IPv4 is v4-mapped on a dual-stack socket) and
// returns its length, for msg_name and msg_namelen of sendmmsg. The length is 0, which the kernel
// refuses, where dst is IPv6 and the box has none.
func (a *Association) PutName(name *unix.RawSockaddrInet6, dst netip.AddrPort) uint32 {
	*name = unix.RawSockaddrInet6{Family: a.family}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&name.Port))[:], dst.Port())
	if a.family == unix.AF_INET6 {
		name.Addr = dst.Addr().As16()
		return unix.SizeofSockaddrInet6
	}
	address := dst.Addr().Unmap()
	if !address.Is4() {
		return 0
	}
	(*unix.RawSockaddrInet4)(unsafe.Pointer(name)).Addr = address.As4()
	return unix.SizeofSockaddrInet4
}

// GetName reads an address that recvmmsg wrote: the opposite of PutName, IPv4 in its 4-byte form.
func (a *Association) GetName(name *unix.RawSockaddrInet6) netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&name.Port))[:])
	if name.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(name)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(name.Addr).Unmap(), port)
}
