package gateway

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
	"sidegate/appliance/sysctl"
)

// parametersOf is what of the network decides which kernel parameters the box needs.
func parametersOf(lans []lan, s *netstate.Snapshot) sysctl.Surroundings {
	var of sysctl.Surroundings
	for _, l := range lans {
		link, ok := s.Link(l.index)
		if !ok {
			continue
		}
		of.LAN = append(of.LAN, link.Name)
		if link.Kind == "bridge" {
			of.Bridges = append(of.Bridges, link.Name)
		}
		of.IPv6 = of.IPv6 || slices.ContainsFunc(s.AddressesOf(link.Index), func(a netstate.Address) bool { return a.Prefix.Addr().Is6() })
	}
	for _, r := range s.Defaults {
		if link, ok := s.Link(r.LinkIndex); ok && r.Advertised && !slices.Contains(of.Uplinks, link.Name) {
			of.Uplinks = append(of.Uplinks, link.Name)
		}
	}
	return of
}

// newKeeper makes who sets kernel parameters, with a record that lasts as long as the parameters do. It is named as the lock of the
// network namespace is, but numbers of namespaces are used again, so that its owner is the cookie, which is not.
func newKeeper() (*sysctl.Keeper, error) {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &ns); err != nil {
		return nil, fmt.Errorf("telling the network namespace: %w", err)
	}
	cookie, err := namespaceCookie()
	if err != nil {
		return nil, fmt.Errorf("telling the network namespace: %w", err)
	}
	return sysctl.NewKeeper(filepath.Join("/run/sidegate", fmt.Sprintf("netns-%d.sysctls", ns.Ino)), fmt.Sprint(cookie))
}

// namespaceCookie is a number that no other network namespace has until the next boot.
func namespaceCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

// followParameters applies the kernel parameters, if that was asked for, and tells those that are not as they should be.
func (g *gateway) followParameters(of sysctl.Surroundings) {
	var errs []error
	if g.options.ApplySysctls {
		changes, err := g.parameters.Apply(of)
		for _, c := range changes {
			g.log.Info("a kernel parameter is set, until the gateway is stopped", "parameter", c.Name, "before", c.Before, "now", c.After)
		}
		errs = append(errs, err)
	}
	wrong, err := sysctl.Check(of)
	errs = append(errs, err)
	for _, s := range wrong {
		errs = append(errs, errors.New(s.String()))
	}
	g.report("kernel parameters", errors.Join(errs...))
}

// restoreParameters puts back what this daemon, or one before it that crashed or left, has set.
func (g *gateway) restoreParameters(cause error) error {
	if cause != nil {
		return nil
	}
	changes, err := g.parameters.Restore()
	if len(changes) > 0 {
		names := make([]string, len(changes))
		for i, c := range changes {
			names[i] = c.Name + "=" + c.After
		}
		g.log.Info("kernel parameters are what they were before: " + strings.Join(names, " "))
	}
	return err
}

// sayStopped says what the box does now that it is without the gateway. It forwards plainly only if its kernel parameters say so,
// and those that the gateway had set are put back by now.
func (g *gateway) sayStopped() error {
	wrong, err := sysctl.Check(parametersOf(g.current().lan, g.watcher.Snapshot()))
	if err != nil {
		return fmt.Errorf("telling whether the box forwards without the gateway: %w", err)
	}
	var why []string
	for _, s := range wrong {
		if s.Plain {
			why = append(why, s.String())
		}
	}
	const stopped = "stopped; everything that sidegate owned is removed, and the box "
	if len(why) == 0 {
		g.log.Info(stopped + "forwards plainly")
		return nil
	}
	g.log.Warn(stopped+"does not forward plainly: "+strings.Join(why, "; "), "keep", "sidegate sysctls --conf >"+sysctl.ConfFile)
	return nil
}

// Parameters returns the kernel parameters that this box needs for a configuration, with their present values.
func Parameters(plan *Plan) ([]sysctl.Setting, error) {
	network, err := netstate.Read()
	if err != nil {
		return nil, err
	}
	return sysctl.Read(parametersOf(lanInterfaces(plan.Config.Interfaces.LAN, network, nil), network))
}
