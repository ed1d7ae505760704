package firewall

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// outside are addresses of documentation (RFC 5737, RFC 3849): no firewall has rules about them.
var outside = map[bool]netip.Addr{false: netip.MustParseAddr("198.51.100.1"), true: netip.MustParseAddr("2001:db8::1")}

// FromClient describes the first packet of a TCP connection from a client that has the address beside the given one to a server of
// the internet, as the box forwards it.
func FromClient(beside netip.Addr, in, out Interface, mark uint32) Packet {
	return Packet{
		Source: netip.AddrPortFrom(beside.Next(), 40000), Destination: netip.AddrPortFrom(outside[beside.Is6()], 443),
		Protocol: unix.IPPROTO_TCP, In: in, Out: out, Mark: mark, State: New,
	}
}

// HalfSeen is what becomes of the packets that follow a forwarded one, where the replies go past the box: its connection tracking
// calls them invalid. Spared tells that they would not be dropped if they were not tracked.
func (r *Ruleset) HalfSeen(first Packet) (j Judgement, spared bool) {
	tracked, untracked := first, first
	tracked.State, untracked.State = Invalid, Untracked
	return r.Forwarded(tracked), r.Forwarded(untracked).Verdict != Dropped
}
