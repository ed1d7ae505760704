// Package netstate follows the machine's links, addresses and default routes through rtnetlink. A Watcher holds an
// immutable Snapshot of the present state and tells every change as a Delta with named reasons.
package netstate

import (
	"net"
	"net/netip"
	"slices"
)

// Snapshot is the state at one time. It never changes; its slices must not be modified.
type Snapshot struct {
	Links     []Link    // by index
	Addresses []Address // by link, then address
	Defaults  []Route   // the one that the kernel prefers first: by family, then metric
}

// Link is a network interface.
type Link struct {
	Index       int
	Name        string
	MAC         MAC    // zero if the link has none
	MTU         int    // bytes, without the link header
	Up          bool   // switched on, and the other side is there (IFF_UP and IFF_RUNNING)
	Ethernet    bool   // ARPHRD_ETHER: packets have an Ethernet header; false for PPP, WireGuard, loopback
	MasterIndex int    // of the bridge or bond that the link is a port of; 0 for none
	Kind        string // as ip-link(8) has it: bridge, bond, vlan, …; empty or "device" is hardware
}

// MAC is an Ethernet address as a comparable value.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Address is one of the machine's own addresses with the length of its subnet's prefix.
type Address struct {
	Prefix    netip.Prefix // not masked
	LinkIndex int
	// Tentative addresses cannot be used yet, because the kernel still asks whether somebody else has them (RFC 4862),
	// or DADFailed: somebody has.
	Tentative, DADFailed bool
	// Deprecated addresses still receive, but new connections do not begin from them.
	Deprecated bool
	// Temporary addresses are for privacy and soon replaced (RFC 8981).
	Temporary bool
	// Leased addresses have an end, unless it is put off: they come from a DHCP server or a router advertisement.
	Leased bool
}

// Route is a default route of the main table. A route over several next hops counts as several.
type Route struct {
	IPv6      bool       // of the destinations; an IPv4 route may have an IPv6 gateway (RFC 5549)
	Gateway   netip.Addr // the zero Addr: all is on the link, as with PPP
	LinkIndex int
	Metric    int
	// Advertised routes come from router advertisements, whether the kernel takes these or another program does.
	Advertised bool
}

// Link returns the link of that index.
func (s *Snapshot) Link(index int) (Link, bool) {
	return find(s.Links, func(l Link) bool { return l.Index == index })
}

// Master returns the link to which a link's packets are delivered, if it is a port of a bridge, bond or team; else the link itself.
// What is in a VRF is no port.
func (s *Snapshot) Master(l Link) Link {
	for range len(s.Links) { // no longer than a chain can be
		master, ok := s.Link(l.MasterIndex)
		if !ok || !slices.Contains([]string{"bridge", "bond", "team", "openvswitch"}, master.Kind) {
			break
		}
		l = master
	}
	return l
}

// LinkByName returns the link of that name.
func (s *Snapshot) LinkByName(name string) (Link, bool) {
	return find(s.Links, func(l Link) bool { return l.Name == name })
}

// OwnAddresses returns every address of the machine once, in order. It includes those that are tentative or
// deprecated: packets for them are for the machine.
func (s *Snapshot) OwnAddresses() []netip.Addr {
	own := make([]netip.Addr, 0, len(s.Addresses))
	for _, a := range s.Addresses {
		own = append(own, a.Prefix.Addr())
	}
	slices.SortFunc(own, netip.Addr.Compare)
	return slices.Compact(own)
}

// AddressesOf returns the addresses of a link.
func (s *Snapshot) AddressesOf(index int) []Address {
	var of []Address
	for _, a := range s.Addresses {
		if a.LinkIndex == index {
			of = append(of, a)
		}
	}
	return of
}

// Default returns the preferred default route of a family.
func (s *Snapshot) Default(ipv6 bool) (Route, bool) {
	return find(s.Defaults, func(r Route) bool { return r.IPv6 == ipv6 })
}

// DefaultLink returns the link of the preferred default route: of IPv4, or of IPv6 if IPv4 has none.
func (s *Snapshot) DefaultLink() (Link, bool) {
	for _, ipv6 := range []bool{false, true} {
		if r, ok := s.Default(ipv6); ok {
			return s.Link(r.LinkIndex)
		}
	}
	return Link{}, false
}

// Equal reports whether both describe the same state.
func (s *Snapshot) Equal(o *Snapshot) bool {
	return slices.Equal(s.Links, o.Links) && slices.Equal(s.Addresses, o.Addresses) && slices.Equal(s.Defaults, o.Defaults)
}

func find[T any](in []T, is func(T) bool) (T, bool) {
	if i := slices.IndexFunc(in, is); i >= 0 {
		return in[i], true
	}
	var none T
	return none, false
}
