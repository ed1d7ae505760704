package netstate

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// groups are the multicast groups of rtnetlink(7) whose messages mean that a Snapshot may be out of date.
var groups = []int{
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
}

// subscribe opens a socket on which the kernel tells changes, in the network namespace of the calling thread.
// receiveBuffer is in bytes; 0 means the system's default.
func subscribe(groups []int, receiveBuffer int) (_ *os.File, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening an rtnetlink socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "rtnetlink")
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if receiveBuffer > 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer); err != nil {
			return nil, fmt.Errorf("setting the receive buffer to %d bytes: %w", receiveBuffer, err)
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("binding the rtnetlink socket: %w", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return nil, fmt.Errorf("subscribing to rtnetlink group %d: %w", g, err)
		}
	}
	return f, nil
}

// awaitMessage blocks until the kernel has told something. What it told does not matter, so the buffer may be too
// small for it. ENOBUFS is returned once if messages were lost.
func awaitMessage(f *os.File, buffer []byte) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var received error
	err = raw.Read(func(fd uintptr) bool {
		_, _, received = unix.Recvfrom(int(fd), buffer, unix.MSG_TRUNC)
		return !errors.Is(received, unix.EAGAIN)
	})
	return cmp.Or(err, received)
}

// Read takes one Snapshot of the network namespace that the calling thread is in.
func Read() (*Snapshot, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("reading the network: %w", err)
	}
	defer h.Close()
	s, err := dump(h)
	if err != nil {
		return nil, fmt.Errorf("reading the network: %w", err)
	}
	return s, nil
}

// dumpAttempts bounds how often a dump is repeated that the kernel calls inconsistent because of a change meanwhile.
const dumpAttempts = 10

// dump asks the kernel for everything.
func dump(h *netlink.Handle) (*Snapshot, error) {
	for range dumpAttempts - 1 {
		s, err := dumpOnce(h)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return s, err
		}
	}
	return dumpOnce(h)
}

func dumpOnce(h *netlink.Handle) (*Snapshot, error) {
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	addresses, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	s := new(Snapshot)
	for _, l := range links {
		s.Links = append(s.Links, newLink(l))
	}
	for _, a := range addresses {
		if address, ok := newAddress(a); ok {
			s.Addresses = append(s.Addresses, address)
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("listing routes: %w", err)
		}
		for _, r := range routes {
			s.Defaults = append(s.Defaults, newDefaults(r, family == netlink.FAMILY_V6)...)
		}
	}
	s.sort()
	return s, nil
}

// sort makes equal states equal snapshots. Routes of the same metric keep the kernel's order, which is its preference.
func (s *Snapshot) sort() {
	slices.SortFunc(s.Links, func(a, b Link) int { return cmp.Compare(a.Index, b.Index) })
	slices.SortFunc(s.Addresses, func(a, b Address) int {
		return cmp.Or(cmp.Compare(a.LinkIndex, b.LinkIndex), a.Prefix.Addr().Compare(b.Prefix.Addr()),
			cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	slices.SortStableFunc(s.Defaults, func(a, b Route) int {
		if a.IPv6 != b.IPv6 {
			return map[bool]int{false: -1, true: 1}[a.IPv6]
		}
		return cmp.Compare(a.Metric, b.Metric)
	})
}

func newLink(link netlink.Link) Link {
	a := link.Attrs()
	const running = unix.IFF_UP | unix.IFF_RUNNING
	l := Link{
		Index: a.Index, Name: a.Name, MTU: a.MTU, MasterIndex: a.MasterIndex,
		Up: a.RawFlags&running == running, Ethernet: a.EncapType == "ether",
		Kind: link.Type(),
	}
	if len(a.HardwareAddr) == len(l.MAC) {
		l.MAC = MAC(a.HardwareAddr)
	}
	return l
}

func newAddress(a netlink.Addr) (Address, bool) {
	prefix, ok := newPrefix(a.IPNet)
	return Address{
		Prefix: prefix, LinkIndex: a.LinkIndex,
		Tentative:  a.Flags&unix.IFA_F_TENTATIVE != 0,
		DADFailed:  a.Flags&unix.IFA_F_DADFAILED != 0,
		Deprecated: a.Flags&unix.IFA_F_DEPRECATED != 0,
		// The same bit means "secondary" for IPv4, which is of no interest.
		Temporary: prefix.Addr().Is6() && a.Flags&unix.IFA_F_TEMPORARY != 0,
		Leased:    a.Flags&unix.IFA_F_PERMANENT == 0,
	}, ok
}

// newDefaults returns a route's next hops if it is a default route that carries packets; an "unreachable" or
// "blackhole" default carries none.
func newDefaults(r netlink.Route, ipv6 bool) []Route {
	if prefix, ok := newPrefix(r.Dst); ok && prefix.Bits() > 0 || r.Type != unix.RTN_UNICAST {
		return nil
	}
	advertised := r.Protocol == unix.RTPROT_RA
	if len(r.MultiPath) == 0 {
		return []Route{{ipv6, gateway(r.Gw, r.Via), r.LinkIndex, r.Priority, advertised}}
	}
	var hops []Route
	for _, hop := range r.MultiPath {
		hops = append(hops, Route{ipv6, gateway(hop.Gw, hop.Via), hop.LinkIndex, r.Priority, advertised})
	}
	return hops
}

func gateway(ip net.IP, via netlink.Destination) netip.Addr {
	if v, ok := via.(*netlink.Via); ok && ip == nil {
		ip = v.Addr
	}
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func newPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), ok
}
