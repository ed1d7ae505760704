package gateway

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"sidegate/appliance/advertise"
	"sidegate/appliance/config"
	"sidegate/appliance/netstate"
)

// routed are the LAN interfaces on which the box is to be the IPv6 router, and why it cannot be on others. A box that
// forwards no IPv6 must not call itself a router. One without a default route does not begin to, but goes on: its
// clients would take the main router, past the policy, whenever its own route is away for a moment.
func routed(c *config.Config, lans []lan, s *netstate.Snapshot, before []advertise.Interface) (all []advertise.Interface, problem error) {
	if c.IPv6 != config.IPv6Advertise {
		return nil, nil
	}
	if !forwardsIPv6() {
		return nil, errors.New("ipv6: the box does not forward IPv6, so it is not advertised as router: sysctl -w net.ipv6.conf.all.forwarding=1")
	}
	_, route := s.Default(true)
	var errs []error
	for _, l := range lans {
		link, ok := s.Link(l.index)
		if !ok || !link.Up {
			continue // said already
		}
		address, ok := linkLocal(s.AddressesOf(l.index))
		switch {
		case !l.ethernet:
			errs = append(errs, fmt.Errorf("ipv6: %s has no link layer to advertise on: tell its clients by hand to send IPv6 to the box", l.device))
			continue
		case !ok && address.Prefix.IsValid() && address.DADFailed:
			errs = append(errs, fmt.Errorf("ipv6: another host of %s has the box's %s, so the box is not advertised: give one of them another address", l.device, address.Prefix.Addr()))
			continue
		case !ok && address.Prefix.IsValid():
			continue // the kernel asks whether somebody else has it: a second
		case !ok:
			errs = append(errs, fmt.Errorf("ipv6: %s has no IPv6 link-local address, so the box is not advertised: sysctl -w net.ipv6.conf.%s.disable_ipv6=0, or write ipv6: unmanaged", l.device, l.device))
			continue
		case !route:
			errs = append(errs, fmt.Errorf("ipv6: the box has no IPv6 default route: sysctl -w net.ipv6.conf.%s.accept_ra=2, so that it takes the main router's, or write ipv6: unmanaged", l.device))
			if !slices.ContainsFunc(before, func(i advertise.Interface) bool { return i.Index == l.index }) {
				continue
			}
		}
		all = append(all, advertise.Interface{
			Name: l.device, Index: l.index, MAC: link.MAC, Address: address.Prefix.Addr(), DNS: c.DNS != nil,
		})
	}
	return all, errors.Join(errs...)
}

// linkLocal is the first link-local address that can be used, or else, and false, one that cannot.
func linkLocal(all []netstate.Address) (found netstate.Address, ok bool) {
	for _, a := range all {
		if !a.Prefix.Addr().Is6() || !a.Prefix.Addr().IsLinkLocalUnicast() {
			continue
		}
		if found = a; !a.Tentative && !a.DADFailed {
			return a, true
		}
	}
	return found, false
}

// forwardsIPv6 reads the kernel's own switch. A box without IPv6 has none.
func forwardsIPv6() bool {
	value, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/forwarding")
	return err == nil && strings.TrimSpace(string(value)) != "0"
}
