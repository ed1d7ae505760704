package netstate

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Kind is what sort of change happened.
type Kind string

// Kinds of changes. A link that is removed or added tells its addresses and routes as well.
const (
	LinkAdded           Kind = "link added"
	LinkRemoved         Kind = "link removed"
	LinkRecreated       Kind = "link recreated" // same name, other index: what was attached to the old one is gone
	LinkRenamed         Kind = "link renamed"
	LinkUp              Kind = "link up"
	LinkDown            Kind = "link down"
	LinkTypeChanged     Kind = "link type changed" // Ethernet or not
	MasterChanged       Kind = "master changed"    // joined or left a bridge or bond
	MACChanged          Kind = "MAC address changed"
	MTUChanged          Kind = "MTU changed"
	AddressAdded        Kind = "address added"
	AddressRemoved      Kind = "address removed"
	AddressChanged      Kind = "address changed" // its flags: tentative, deprecated…
	DefaultRouteChanged Kind = "default route changed"
)

// Reason is one change, for decisions (Kind, Link) and for logs (String).
type Reason struct {
	Kind   Kind
	Link   string // name of the link that it concerns
	Detail string // what there was and is, for people; empty where Kind says all
}

func (r Reason) String() string {
	text := string(r.Kind) + " on " + r.Link
	if r.Detail != "" {
		text += ": " + r.Detail
	}
	return text
}

// Delta is a change from one Snapshot to another.
type Delta struct {
	Reasons  []Reason // links first, then addresses, then routes; never empty
	Snapshot *Snapshot
}

// Has reports whether any reason is of one of the kinds.
func (d Delta) Has(kinds ...Kind) bool {
	return slices.ContainsFunc(d.Reasons, func(r Reason) bool { return slices.Contains(kinds, r.Kind) })
}

// Diff names everything in which two snapshots differ; no reasons mean that they are equal. Addresses and routes are
// compared by the name of their link, so that of a recreated link with the same addresses only the link is told.
func Diff(before, after *Snapshot) []Reason {
	return slices.Concat(diffLinks(before, after), diffAddresses(before, after), diffDefaults(before, after))
}

func diffLinks(before, after *Snapshot) (reasons []Reason) {
	kept := make(map[int]bool) // indices before that have a successor
	for _, now := range after.Links {
		old, ok := before.LinkByName(now.Name)
		if !ok {
			// The index tells a renamed link, unless another one has the old name.
			if old, ok = before.Link(now.Index); ok {
				_, taken := after.LinkByName(old.Name)
				ok = !taken
			}
		}
		if !ok {
			reasons = append(reasons, Reason{LinkAdded, now.Name, ""})
			continue
		}
		kept[old.Index] = true
		reasons = append(reasons, diffLink(old, now)...)
	}
	for _, old := range before.Links {
		if !kept[old.Index] {
			reasons = append(reasons, Reason{LinkRemoved, old.Name, ""})
		}
	}
	return reasons
}

func diffLink(old, now Link) (reasons []Reason) {
	tell := func(differs bool, kind Kind, was, is any) {
		if differs {
			reasons = append(reasons, Reason{kind, now.Name, fmt.Sprintf("%v → %v", was, is)})
		}
	}
	state := map[bool]Kind{true: LinkUp, false: LinkDown}
	tell(old.Index != now.Index, LinkRecreated, fmt.Sprintf("index %d", old.Index), now.Index)
	tell(old.Name != now.Name, LinkRenamed, old.Name, now.Name)
	tell(old.Ethernet != now.Ethernet, LinkTypeChanged, linkType(old), linkType(now))
	if old.Up != now.Up {
		reasons = append(reasons, Reason{state[now.Up], now.Name, ""})
	}
	tell(old.MasterIndex != now.MasterIndex, MasterChanged, fmt.Sprintf("index %d", old.MasterIndex), now.MasterIndex)
	tell(old.MAC != now.MAC, MACChanged, old.MAC, now.MAC)
	tell(old.MTU != now.MTU, MTUChanged, old.MTU, now.MTU)
	return reasons
}

func linkType(l Link) string {
	if l.Ethernet {
		return "Ethernet"
	}
	return "other"
}

func diffAddresses(before, after *Snapshot) (reasons []Reason) {
	type place struct {
		link   string
		prefix netip.Prefix
	}
	index := func(s *Snapshot) map[place]Address {
		all := make(map[place]Address)
		for _, a := range s.Addresses {
			all[place{s.name(a.LinkIndex), a.Prefix}] = a
		}
		return all
	}
	old, now := index(before), index(after)
	for p, a := range now {
		was, ok := old[p]
		a.LinkIndex = was.LinkIndex
		switch {
		case !ok:
			reasons = append(reasons, Reason{AddressAdded, p.link, p.prefix.String()})
		case was != a:
			reasons = append(reasons, Reason{AddressChanged, p.link, fmt.Sprintf("%s: %s → %s", p.prefix, was.flags(), a.flags())})
		}
	}
	for p := range old {
		if _, ok := now[p]; !ok {
			reasons = append(reasons, Reason{AddressRemoved, p.link, p.prefix.String()})
		}
	}
	slices.SortFunc(reasons, func(a, b Reason) int {
		return cmp.Or(cmp.Compare(a.Link, b.Link), cmp.Compare(a.Detail, b.Detail))
	})
	return reasons
}

func (a Address) flags() string {
	var names []string
	for _, f := range []struct {
		set  bool
		name string
	}{{a.Tentative, "tentative"}, {a.DADFailed, "duplicate"}, {a.Deprecated, "deprecated"}, {a.Temporary, "temporary"}, {a.Leased, "leased"}} {
		if f.set {
			names = append(names, f.name)
		}
	}
	if names == nil {
		return "usable"
	}
	return strings.Join(names, ", ")
}

// diffDefaults compares each family as a whole: which of several routes is preferred is part of it.
func diffDefaults(before, after *Snapshot) (reasons []Reason) {
	for _, ipv6 := range []bool{false, true} {
		was, is := before.defaults(ipv6), after.defaults(ipv6)
		if was == is {
			continue
		}
		r, ok := after.Default(ipv6)
		link := after.name(r.LinkIndex)
		if !ok {
			r, _ = before.Default(ipv6)
			link = before.name(r.LinkIndex)
		}
		reasons = append(reasons, Reason{DefaultRouteChanged, link, was + " → " + is})
	}
	return reasons
}

// defaults writes the default routes of a family.
func (s *Snapshot) defaults(ipv6 bool) string {
	var routes []string
	for _, r := range s.Defaults {
		if r.IPv6 != ipv6 {
			continue
		}
		via := "on link"
		if r.Gateway.IsValid() {
			via = "via " + r.Gateway.String()
		}
		route := fmt.Sprintf("%s dev %s metric %d", via, s.name(r.LinkIndex), r.Metric)
		if r.Advertised {
			route += " (advertised)"
		}
		routes = append(routes, route)
	}
	if routes == nil {
		return map[bool]string{false: "no IPv4 default", true: "no IPv6 default"}[ipv6]
	}
	return strings.Join(routes, ", ")
}

// name is the link's name, or its number if the snapshot was taken while it vanished.
func (s *Snapshot) name(index int) string {
	if l, ok := s.Link(index); ok {
		return l.Name
	}
	return fmt.Sprintf("link %d", index)
}
