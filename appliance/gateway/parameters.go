package gateway

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sidegate/appliance/netstate"
	"sidegate/appliance/sysctl"
)

// Parameters are the kernel parameters that a box with this configuration needs, with the values that they have.
func Parameters(p *Plan) ([]sysctl.Setting, error) {
	snapshot, err := netstate.Read()
	if err != nil {
		return nil, err
	}
	return sysctl.Read(surround(lanInterfaces(p.Config.Interfaces.LAN, snapshot, nil), snapshot))
}

// surround is what of the box decides which kernel parameters it needs.
func surround(lans []lan, s *netstate.Snapshot) sysctl.Surroundings {
	var of sysctl.Surroundings
	for _, l := range lans {
		link, ok := s.Link(l.index)
		if !ok {
			continue
		}
		of.LAN = append(of.LAN, link.Name)
		if link.Bridge {
			of.Bridges = append(of.Bridges, link.Name)
		}
		for _, a := range s.AddressesOf(link.Index) {
			of.IPv6 = of.IPv6 || a.Prefix.Addr().Is6() && !a.Prefix.Addr().IsLinkLocalUnicast()
		}
	}
	of.Uplinks = advertisedUplinks(s)
	return of
}

// advertisedUplinks are the interfaces that the box takes its own IPv6 route from: by an advertisement that it has taken, or, where it
// has no route, one that it took before, for that has given it an address too.
func advertisedUplinks(s *netstate.Snapshot) (names []string) {
	route, ok := s.Default(true)
	for _, link := range s.Links {
		leased := slices.ContainsFunc(s.AddressesOf(link.Index), func(a netstate.Address) bool {
			return a.Leased && a.Prefix.Addr().Is6() && a.Prefix.Addr().IsGlobalUnicast()
		})
		if ok && route.Advertised && route.LinkIndex == link.Index || !ok && leased {
			names = append(names, link.Name)
		}
	}
	return names
}

// newKeeper makes the keeper of what the parameters were before. Its record lies beside the admin socket: a successor of a daemon that
// crashed finds it there, and a reboot, which resets the parameters, removes it.
func newKeeper(socket string) (*sysctl.Keeper, error) {
	namespace, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("finding the network namespace: %w", err)
	}
	return sysctl.NewKeeper(strings.TrimSuffix(socket, filepath.Ext(socket))+".sysctls.json", namespace)
}

// settleParameters sets the kernel parameters where it is asked to, and says which are wrong. It comes after the programs: a box that
// begins to forward before they are there sends direct what is to be proxied.
func (g *gateway) settleParameters(f inForce, s *netstate.Snapshot) {
	of := surround(f.lan, s)
	var failed error
	if g.options.ApplySysctls {
		var changes []sysctl.Change
		changes, failed = g.parameters.Apply(of)
		for _, c := range changes {
			g.log.Info("kernel parameter set", "what", c.String())
		}
	}
	wrong, err := sysctl.Check(of)
	errs := []error{failed, err}
	for _, w := range wrong {
		errs = append(errs, errors.New(w.String()))
	}
	g.report("kernel parameters", errors.Join(errs...))
}

// restoreParameters puts back what was there before, if the gateway ends because it was stopped: a successor goes on with them.
func (g *gateway) restoreParameters(cause error) error {
	if cause != nil {
		return nil
	}
	changes, err := g.parameters.Restore()
	for _, c := range changes {
		g.log.Info("kernel parameter put back", "what", c.String())
	}
	return err
}
