package proxy

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// endpoint is an address and a port without pointers, so that maps keyed by it are neither scanned
// by the collector nor slow to hash. IPv4 is in its v4-mapped form.
type endpoint struct {
	addr [16]byte
	port uint16
}

func endpointOf(a netip.AddrPort) endpoint { return endpoint{a.Addr().As16(), a.Port()} }

func (e endpoint) addrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(e.addr).Unmap(), e.port)
}

func (e endpoint) is4() bool { return netip.AddrFrom16(e.addr).Is4In6() }

// flowKey is one flow: who the client is, and whom it talks to.
type flowKey struct{ client, remote endpoint }

// sockaddr is a socket address as the kernel reads and writes it, of either family.
type sockaddr = unix.RawSockaddrInet6

// readSockaddr returns the endpoint in a socket address that the kernel wrote.
func readSockaddr(a *sockaddr) (e endpoint, ok bool) {
	e.port = binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&a.Port))[:])
	switch a.Family {
	case unix.AF_INET:
		e.addr = netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(a)).Addr).As16()
	case unix.AF_INET6:
		e.addr = a.Addr
	default:
		return e, false
	}
	return e, true
}
