package firewall

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Loopback is the interface by which the box speaks to itself.
var Loopback = Interface{Name: "lo", Index: 1}

// FromBox describes the first packet of a connection of the box itself that is steered to a proxy by lo, with the source that it
// has there, and the proxy's answer, in the name of a server of the internet.
func FromBox(source netip.Addr, protocol uint8) (first, answer Packet) {
	first = Packet{
		Source: netip.AddrPortFrom(source, 40000), Destination: netip.AddrPortFrom(outside[source.Is6()], 443),
		Protocol: protocol, Out: Loopback, State: New, Steered: true,
	}
	answer = Packet{Source: first.Destination, Destination: first.Source, Protocol: protocol, Out: Loopback, State: Established}
	return first, answer
}

// Looped is what becomes of a packet that the box sends by lo, where it is given the mark. Connection tracking does not look at it a
// second time there (net/netfilter/nf_conntrack_core.c, nf_conntrack_in: "previously seen").
func (r *Ruleset) Looped(p Packet, mark uint32) Judgement {
	w := &walk{Ruleset: r, packet: p, markKnown: true}
	if w.pass(nftables.ChainHookOutput, nftables.ChainHookPostrouting) {
		w.packet.In, w.packet.Out, w.packet.Mark = Loopback, Interface{}, mark
		w.markKnown = true
		w.pass(nftables.ChainHookPrerouting, nftables.ChainHookInput)
	}
	return w.judgement()
}

// destinationType is what the kernel's routes say of the packet's destination (RTN_LOCAL, RTN_UNICAST).
func (w *walk) destinationType() uint32 {
	ends := w.packet.Out.Index == 0 || w.packet.Out == Loopback
	if ends && !w.packet.Steered {
		return unix.RTN_LOCAL
	}
	return unix.RTN_UNICAST
}

// foundOnLoopback is whether a reverse path filter finds a way back to the source of what has come by lo. It takes one for granted, but
// looks if the packet has its socket already, as a steered one has; and its source, an own address, is no way back
// (net/ipv4/netfilter/nft_fib_ipv4.c: "should not see RTN_LOCAL here").
func (w *walk) foundOnLoopback() (found, known bool) {
	switch {
	case w.fibAsksSockets:
		return !w.packet.Steered, true
	case w.hook == *nftables.ChainHookPrerouting && !w.packet.Steered:
		return true, true
	}
	return false, false // as old as the kernel is, or as much as its distribution has changed it
}

// fibAsksSockets reports whether this kernel's reverse path filters (nftables, fib) look at the socket of a packet before they look by
// which interface it came (commit eaaff9b6702e, "netfilter: fib: avoid lookup if socket is available", Linux 6.15 and 6.12.26).
func fibAsksSockets() bool {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return false
	}
	var version [3]int
	fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d.%d", &version[0], &version[1], &version[2]) // what is missing is 0
	return slices.Compare(version[:], []int{6, 12, 26}) >= 0
}
