package gateway

import (
	"fmt"
	"net/netip"
	"slices"

	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/netstate"
	"sidegate/appliance/policy"
)

// own is how the box's own connections are treated; nil: they are left alone.
func own(plan *Plan, s *netstate.Snapshot) *datapath.Own {
	if !plan.Config.Gateway.Local {
		return nil
	}
	return &datapath.Own{
		Cgroup:  plan.Config.Gateway.Cgroup,
		Source4: knownBy(s, false),
		Source6: knownBy(s, true),
		DNS:     plan.resolution != nil && len(asksHere(plan, s)) == 0,
	}
}

// ownQuestions is why the gateway does not answer what the box's own programs ask by DNS, although it answers the LAN; nil if it does, or
// is not meant to.
func ownQuestions(plan *Plan, s *netstate.Snapshot) error {
	here := asksHere(plan, s)
	if !plan.Config.Gateway.Local || len(here) == 0 {
		return nil
	}
	return fmt.Errorf("DNS of the box's own programs is left alone, and teaches no names: the upstream %s is on this box, and its own questions would "+
		"come back to it (dns.upstreams: name those that it asks)", here[0])
}

// undecided says what an obstacle to the hooks means; nil where there is none.
func undecided(obstacle error) error {
	if obstacle == nil {
		return nil
	}
	return fmt.Errorf("the box's own connections are not decided (gateway.local): %w", obstacle)
}

// knownBy is the address that the box would send by if nobody chose: of the interface of the default route.
func knownBy(s *netstate.Snapshot, ipv6 bool) netip.Addr {
	route, ok := s.Default(ipv6)
	if !ok {
		return netip.Addr{}
	}
	for _, a := range s.AddressesOf(route.LinkIndex) {
		addr := a.Prefix.Addr()
		if addr.Is6() == ipv6 && addr.IsGlobalUnicast() && !a.Tentative && !a.DADFailed && !a.Deprecated && !a.Temporary {
			return addr
		}
	}
	return netip.Addr{}
}

// asksHere are the DNS servers that we ask and that are on this box: their own questions would come back to us.
func asksHere(plan *Plan, s *netstate.Snapshot) []netip.Addr {
	return slices.DeleteFunc(plan.resolution.addresses(), func(a netip.Addr) bool {
		return !a.IsLoopback() && !slices.Contains(s.OwnAddresses(), a)
	})
}

// subnets are those that the box is in.
func subnets(c *config.Config, s *netstate.Snapshot) []netip.Prefix {
	if !c.Gateway.Local {
		return nil
	}
	var all []netip.Prefix
	for _, a := range s.Addresses {
		if p := a.Prefix.Masked(); !p.IsSingleIP() && p.Addr().IsGlobalUnicast() && !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// sentByTheBox adds the source of a flow that a process of the box opens, as the kernel takes it.
func sentByTheBox(f policy.Flow, own *datapath.Own) policy.Flow {
	if own == nil || f.Process == (policy.Process{}) || f.Source.Addr().IsValid() {
		return f
	}
	source := own.Source4
	if f.Destination.Addr().Is6() {
		source = own.Source6
	}
	f.Source = netip.AddrPortFrom(source, f.Source.Port())
	return f
}
