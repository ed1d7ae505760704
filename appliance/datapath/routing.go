package datapath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
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
	local  bool // lo has the family, so that packets can be delivered by it
}

func families() []family {
	all := []family{{"IPv4", netlink.FAMILY_V4, net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, true}}
	if haveIPv6() {
		all = append(all, family{"IPv6", netlink.FAMILY_V6, net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}, loHasIPv6()})
	}
	return all
}

func haveIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

func loHasIPv6() bool {
	disabled, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	return err != nil || strings.TrimSpace(string(disabled)) == "0"
}

// rules are the family's, by priority. Where IPv6 is disabled nothing can be delivered, and a packet for the
// proxy that comes all the same is refused: it must not leave.
func (f family) rules() []*netlink.Rule {
	mask := uint32(gatewayMarkMARK_MASK)
	steer := netlink.NewRule()
	steer.Mark, steer.Table = uint32(gatewayMarkMARK_PROXY), routeTable
	if !f.local {
		steer.Table, steer.Type = -1, unix.RTN_PROHIBIT
	}
	prohibit := netlink.NewRule()
	prohibit.Mark, prohibit.Type = uint32(gatewayMarkMARK_REJECT), unix.RTN_PROHIBIT
	rules := []*netlink.Rule{steer, prohibit}
	for i, r := range rules {
		r.Family, r.Mask, r.Priority = f.number, &mask, rulePriority+i
	}
	return rules
}

// routes are those of our table: the one that delivers everything locally, if the family can.
func (f family) routes() ([]netlink.Route, error) {
	if !f.local {
		return nil, nil
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("finding the loopback interface: %w", err)
	}
	return []netlink.Route{{
		Family: f.number, Dst: &f.any, Table: routeTable, LinkIndex: lo.Attrs().Index,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
	}}, nil
}

// applyRouting adds what is missing, and says what that was; what is in our table or under our mask and is not
// wanted goes. What is there is left alone: a route that is replaced by itself is still news to everybody who
// follows the network.
func applyRouting() (added []string, err error) {
	for _, f := range families() {
		routes, err := f.routes()
		if err != nil {
			return added, err
		}
		fresh, err := f.setRoutes(routes)
		added = append(added, fresh...)
		if err != nil {
			return added, err
		}
		fresh, err = f.setRules(f.rules())
		added = append(added, fresh...)
		if err != nil {
			return added, err
		}
	}
	return added, nil
}

func removeRouting() error {
	var errs error
	for _, f := range families() {
		_, rules := f.setRules(nil)
		_, routes := f.setRoutes(nil)
		errs = errors.Join(errs, rules, routes)
	}
	return errs
}

func (f family) setRoutes(want []netlink.Route) (added []string, err error) {
	have, err := netlink.RouteListFiltered(f.number, &netlink.Route{Table: routeTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("reading table %d: %w", routeTable, err)
	}
	same := func(a, b netlink.Route) bool {
		everything := b.Dst == nil || a.Dst != nil && b.Dst.String() == a.Dst.String()
		return everything && a.Type == b.Type && a.LinkIndex == b.LinkIndex
	}
	for i := range want {
		if slices.ContainsFunc(have, func(r netlink.Route) bool { return same(want[i], r) }) {
			continue
		}
		if err := netlink.RouteAppend(&want[i]); err != nil {
			return added, fmt.Errorf("adding the %s route of table %d: %w", f.name, routeTable, err)
		}
		added = append(added, fmt.Sprintf("the %s route of table %d", f.name, routeTable))
	}
	for i := range have {
		if slices.ContainsFunc(want, func(r netlink.Route) bool { return same(r, have[i]) }) {
			continue
		}
		if err := netlink.RouteDel(&have[i]); err != nil && !errors.Is(err, syscall.ESRCH) {
			return added, fmt.Errorf("removing a %s route of table %d: %w", f.name, routeTable, err)
		}
	}
	return added, nil
}

func (f family) setRules(want []*netlink.Rule) (added []string, err error) {
	have, err := netlink.RuleList(f.number)
	if err != nil {
		return nil, fmt.Errorf("reading the %s rules: %w", f.name, err)
	}
	have = slices.DeleteFunc(have, func(r netlink.Rule) bool {
		return r.Mask == nil || *r.Mask != uint32(gatewayMarkMARK_MASK)
	})
	// The library does not read a rule's type; one that prohibits names no table.
	same := func(a *netlink.Rule, b netlink.Rule) bool {
		return a.Mark == b.Mark && a.Priority == b.Priority && max(a.Table, 0) == b.Table
	}
	for _, r := range want {
		if slices.ContainsFunc(have, func(b netlink.Rule) bool { return same(r, b) }) {
			continue
		}
		if err := netlink.RuleAdd(r); err != nil {
			return added, fmt.Errorf("adding the %s rule of mark %#x: %w", f.name, r.Mark, err)
		}
		added = append(added, fmt.Sprintf("the %s rule of mark %#x", f.name, r.Mark))
	}
	for i := range have {
		if slices.ContainsFunc(want, func(r *netlink.Rule) bool { return same(r, have[i]) }) {
			continue
		}
		if err := netlink.RuleDel(&have[i]); err != nil && !errors.Is(err, syscall.ENOENT) {
			return added, fmt.Errorf("removing a %s rule of mark %#x: %w", f.name, have[i].Mark, err)
		}
	}
	return added, nil
}
