package gateway

import (
	"context"
	"net/netip"

	"sidegate/appliance/datapath"
	"sidegate/appliance/firewall"
	"sidegate/appliance/netstate"
)

// exemption decides whether direct flows are to be kept from the box's connection tracking: where its firewall drops them because the
// box sees one half of them, and would not if they were not tracked.
type exemption struct {
	generation uint32            // of the rules that were read
	rules      *firewall.Ruleset // without the gateway's own; nil: none were read
}

// needed reads the rules when they have changed. Where they cannot be read those from before count: doctor says why.
func (e *exemption) needed(ctx context.Context, way datapath.ReturnPath, lans []lan, s *netstate.Snapshot) bool {
	if way != datapath.Asymmetric {
		return false
	}
	if generation, err := firewall.Generation(); err == nil && (e.rules == nil || generation != e.generation) {
		if rules, err := firewall.Read(ctx); err == nil {
			e.generation, e.rules = generation, rules.Without(datapath.OwnTable)
		}
	}
	if e.rules == nil {
		return false
	}
	for _, l := range lans {
		link, ok := s.Link(l.index)
		if !ok {
			continue
		}
		for _, a := range s.AddressesOf(link.Index) {
			if !a.Prefix.Addr().IsLinkLocalUnicast() && spared(e.rules, link, a.Prefix.Addr()) {
				return true
			}
		}
	}
	return false
}

// spared reports whether what follows the first packet of a client beside this address is dropped if it is tracked, and not otherwise.
func spared(rules *firewall.Ruleset, link netstate.Link, beside netip.Addr) bool {
	port := firewall.Interface{Name: link.Name, Index: link.Index}
	tracked, spared := rules.HalfSeen(firewall.FromClient(beside, port, port, datapath.MarkDirect))
	return tracked.Verdict == firewall.Dropped && tracked.Certain && spared
}
