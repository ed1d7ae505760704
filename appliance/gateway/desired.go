package gateway

import (
	"fmt"
	"slices"

	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/netstate"
)

// lan is a LAN interface of the configuration as it is at present.
type lan struct {
	name     string // as configured: a name, or auto
	port     string // the name of the port that stands for it; empty: it stands for itself
	device   string // the link's name; empty: there is none
	index    int    // 0: there is none
	ethernet bool
	problem  error // what to tell the owner
}

// lanInterfaces finds the configured interfaces. One that is missing is a problem, not an error: it may
// come later, as a bridge, a USB adapter or the default route of a slow DHCP server does. Where auto has no
// default route to follow it stays what it was before: detaching while a lease is renewed would send direct what
// is to be proxied as soon as the route is back. A port stands for its bridge or bond.
func lanInterfaces(configured []string, s *netstate.Snapshot, before []lan) []lan {
	var all []lan
	for _, name := range configured {
		l := lan{name: name}
		link, ok := s.LinkByName(name)
		if name == config.Auto {
			if link, ok = s.DefaultLink(); !ok {
				link, ok = stillThere(before, s)
			}
		}
		switch {
		case !ok && name == config.Auto:
			l.problem = fmt.Errorf("there is no default route, and so no LAN interface: add one, or name the interface (interfaces: {lan: [eth0]})")
		case !ok:
			l.problem = fmt.Errorf("there is no interface %s: nothing is decided for its clients until it appears", name)
		default:
			if master := s.Master(link); master.Index != link.Index { // where its clients' packets are delivered
				l.port, link = link.Name, master
			}
			l.device, l.index, l.ethernet = link.Name, link.Index, link.Ethernet
			l.problem = linkProblem(link)
		}
		if l.index != 0 && slices.ContainsFunc(all, func(o lan) bool { return o.index == l.index }) {
			continue // another port of the same bridge
		}
		all = append(all, l)
	}
	return all
}

// stillThere is the link that auto meant before.
func stillThere(before []lan, s *netstate.Snapshot) (netstate.Link, bool) {
	for _, l := range before {
		if l.name == config.Auto {
			return s.Link(l.index)
		}
	}
	return netstate.Link{}, false
}

func linkProblem(link netstate.Link) error {
	if !link.Up {
		return fmt.Errorf("%s is down: ip link set %s up, or connect it", link.Name, link.Name)
	}
	return nil
}

func containsLAN(all []lan, name string) bool {
	return slices.ContainsFunc(all, func(l lan) bool { return l.name == name })
}

var sniffModes = map[config.Sniff]datapath.Sniff{
	config.SniffOff: datapath.SniffOff, config.SniffAmbiguous: datapath.SniffAmbiguous, config.SniffUnknown: datapath.SniffUnknown,
}

// desire is the whole state that the datapath should have, apart from the sockets.
func desire(c *config.Config, p *combined, way datapath.ReturnPath, lans []lan, s *netstate.Snapshot) datapath.Desired {
	d := datapath.Desired{
		Policy:       p.policy,
		OnFailure:    c.OnFailure,
		ReturnPath:   way,
		OwnAddresses: s.OwnAddresses(),
		ClientFlows:  c.PerClient.Flows,
		ClientAsks:   c.PerClient.DNSQueries,
		Sniff:        sniffModes[c.Sniff],
		TrustSniffed: c.TrustSniffed,
	}
	for _, l := range lans {
		if l.index != 0 {
			d.Interfaces = append(d.Interfaces, datapath.Interface{Name: l.device, Index: l.index, Ethernet: l.ethernet})
		}
	}
	for _, p := range c.Published {
		d.Published = append(d.Published, datapath.Service{Address: p.Address, Port: p.Port, Network: p.Network})
	}
	return d
}
