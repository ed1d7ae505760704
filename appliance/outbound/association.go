package outbound

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// Association is one UDP mapping. It is shaped for a relay that calls recvmmsg and sendmmsg itself.
//
// Only one side may own it: FD is a bare descriptor, so whoever reads and writes it is who calls
// Close, and nothing touches FD afterwards. Done never closes FD by itself.
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

	family int // of FD: unix.AF_INET6 (dual-stack for direct) or unix.AF_INET
	done   chan struct{}
	close  func() error
}

// Header returns what must stand before the payload of each datagram to dst. It does not depend on
// the payload: build it once per flow. It is nil for direct.
func (a *Association) Header(dst netip.AddrPort) []byte { return nil }

// Parse finds the payload of a datagram that FD received, packet[offset:], and who sent it (IPv4 in
// its 4-byte form). It does not allocate. A datagram that it refuses is to be dropped. It is for
// Connected associations; otherwise the sender is the packet's own: see GetName.
func (a *Association) Parse(packet []byte) (src netip.AddrPort, offset int, err error) {
	return netip.AddrPort{}, 0, nil
}

// PutName writes dst as FD's address family wants it (IPv4 is v4-mapped on a dual-stack socket) and
// returns its length, for msg_name and msg_namelen of sendmmsg.
func (a *Association) PutName(name *unix.RawSockaddrInet6, dst netip.AddrPort) uint32 { return 0 }

// GetName reads an address that recvmmsg wrote: the opposite of PutName, IPv4 in its 4-byte form.
func (a *Association) GetName(name *unix.RawSockaddrInet6) netip.AddrPort { return netip.AddrPort{} }

// Done is closed when the association has ended: the upstream closed it, or Close was called. The
// owner then calls Close.
func (a *Association) Done() <-chan struct{} { return a.done }

// Close ends the association, here and at the upstream, and waits until nothing of it is left.
// Further calls do nothing.
func (a *Association) Close() error { return a.close() }
