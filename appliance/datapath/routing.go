package datapath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Policy routing gives the marks their meaning: what is marked for the proxy is delivered locally whatever
// its destination, what is marked as rejected is answered with an ICMP error by the kernel.
const (
	routeTable   = 21319 // 0x5347, "SG"
	rulePriority = 500
)

type family struct {
	name   string
	number int
	any    net.IPNet
}

func families() []family {
	all := []family{{"IPv4", netlink.FAMILY_V4, net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}}}
	if haveIPv6() {
		all = append(all, family{"IPv6", netlink.FAMILY_V6, net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}})
	}
	return all
}

func haveIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

func steeringRules(f family) []*netlink.Rule {
	mask := uint32(gatewayMarkMARK_MASK)
	toTable := netlink.NewRule()
	toTable.Mark, toTable.Table = uint32(gatewayMarkMARK_PROXY), routeTable
	prohibit := netlink.NewRule()
	prohibit.Mark, prohibit.Type = uint32(gatewayMarkMARK_REJECT), unix.RTN_PROHIBIT
	rules := []*netlink.Rule{toTable, prohibit}
	for i, r := range rules {
		r.Family, r.Mask, r.Priority = f.number, &mask, rulePriority+i
	}
	return rules
}

func steeringRoute(f family) (*netlink.Route, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("finding the loopback interface: %w", err)
	}
	return &netlink.Route{
		Family: f.number, Dst: &f.any, Table: routeTable, LinkIndex: lo.Attrs().Index,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
	}, nil
}

// applyRouting adds what is missing, and says what that was. What is there is left alone: a route that is
// replaced by itself is still news to everybody who follows the network.
func applyRouting() (added []string, err error) {
	for _, f := range families() {
		route, err := steeringRoute(f)
		if err != nil {
			return added, err
		}
		there, err := hasRoute(route)
		if err != nil {
			return added, err
		}
		if !there {
			if err := netlink.RouteReplace(route); err != nil {
				return added, fmt.Errorf("adding the local route of table %d: %w", routeTable, err)
			}
			added = append(added, fmt.Sprintf("the %s route of table %d", f.name, routeTable))
		}
		for _, r := range steeringRules(f) {
			err := netlink.RuleAdd(r)
			if errors.Is(err, syscall.EEXIST) {
				continue
			}
			if err != nil {
				return added, fmt.Errorf("adding the rule of mark %#x: %w", r.Mark, err)
			}
			added = append(added, fmt.Sprintf("the %s rule of mark %#x", f.name, r.Mark))
		}
	}
	return added, nil
}

// hasRoute reports whether the route is there, and alone in its table.
func hasRoute(want *netlink.Route) (bool, error) {
	routes, err := netlink.RouteListFiltered(want.Family, &netlink.Route{Table: routeTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return false, fmt.Errorf("reading table %d: %w", routeTable, err)
	}
	return len(routes) == 1 && routes[0].Type == want.Type && routes[0].LinkIndex == want.LinkIndex &&
		(routes[0].Dst == nil || routes[0].Dst.String() == want.Dst.String()), nil
}

func removeRouting() error {
	var errs error
	for _, f := range families() {
		for _, r := range steeringRules(f) {
			if err := netlink.RuleDel(r); err != nil && !errors.Is(err, syscall.ENOENT) {
				errs = errors.Join(errs, fmt.Errorf("removing the rule of mark %#x: %w", r.Mark, err))
			}
		}
		route, err := steeringRoute(f)
		if err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		if err := netlink.RouteDel(route); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = errors.Join(errs, fmt.Errorf("removing the local route of table %d: %w", routeTable, err))
		}
	}
	return errs
}
