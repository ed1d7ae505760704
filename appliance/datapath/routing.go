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
	rulePriority = 500   // and those after it
	maxRules     = 16
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
// proxy that comes all the same is refused: it must not leave. What the box itself sends is steered by its source too, and what
// does not follow the route, for it is bound to a device, is refused as well.
func (f family) rules(own bool) []*netlink.Rule {
	mask := uint32(gatewayMarkMARK_MASK)
	var rules []*netlink.Rule
	add := func(table int, fill func(*netlink.Rule)) {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = f.number, rulePriority+len(rules), table
		if table < 0 {
			r.Type = unix.RTN_PROHIBIT
		}
		fill(r)
		rules = append(rules, r)
	}
	marked := func(mark gatewayMark) func(*netlink.Rule) {
		return func(r *netlink.Rule) { r.Mark, r.Mask = uint32(mark), &mask }
	}
	const prohibit = -1
	steered := routeTable
	if !f.local {
		steered = prohibit
	}
	add(steered, marked(gatewayMarkMARK_PROXY))
	add(prohibit, marked(gatewayMarkMARK_REJECT))
	if !own || !f.local {
		return rules
	}
	for _, table := range []int{steered, prohibit} {
		for _, source := range ownPrefixes(f.number) {
			add(table, func(r *netlink.Rule) { r.Src = &source })
		}
	}
	add(prohibit, marked(gatewayMarkMARK_PROXY))
	return rules
}

// isOurs reports whether a rule can only be one of rules'.
func (f family) isOurs(r netlink.Rule) bool {
	if r.Mask != nil && *r.Mask == uint32(gatewayMarkMARK_MASK) {
		return true
	}
	return r.Src != nil && r.Priority >= rulePriority && r.Priority < rulePriority+maxRules &&
		slices.ContainsFunc(ownPrefixes(f.number), func(p net.IPNet) bool { return p.String() == r.Src.String() })
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
	source := net.IP(ownSource4().AsSlice()) // of what the box itself sends; it needs one that is local
	if f.number == netlink.FAMILY_V6 {
		source = net.IPv6loopback
	}
	return []netlink.Route{{
		Family: f.number, Dst: &f.any, Table: routeTable, LinkIndex: lo.Attrs().Index,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Src: source,
	}}, nil
}

// applyRouting adds what is missing, and says what that was; what is in our table or under our mask and is not
// wanted goes. What is there is left alone: a route that is replaced by itself is still news to everybody who
// follows the network.
func applyRouting(own bool) (added []string, err error) {
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
		fresh, err = f.setRules(f.rules(own))
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
		return everything && a.Type == b.Type && a.LinkIndex == b.LinkIndex && a.Src.Equal(b.Src)
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
	have = slices.DeleteFunc(have, func(r netlink.Rule) bool { return !f.isOurs(r) })
	// The library does not read a rule's type; one that prohibits names no table.
	same := func(a *netlink.Rule, b netlink.Rule) bool {
		return a.Mark == b.Mark && a.Priority == b.Priority && max(a.Table, 0) == b.Table && sourceText(a) == sourceText(&b)
	}
	for _, r := range want {
		if slices.ContainsFunc(have, func(b netlink.Rule) bool { return same(r, b) }) {
			continue
		}
		if err := netlink.RuleAdd(r); err != nil {
			return added, fmt.Errorf("adding the %s rule of %s: %w", f.name, selector(r), err)
		}
		added = append(added, fmt.Sprintf("the %s rule of %s", f.name, selector(r)))
	}
	for i := range have {
		if slices.ContainsFunc(want, func(r *netlink.Rule) bool { return same(r, have[i]) }) {
			continue
		}
		if err := netlink.RuleDel(&have[i]); err != nil && !errors.Is(err, syscall.ENOENT) {
			return added, fmt.Errorf("removing the %s rule of %s: %w", f.name, selector(&have[i]), err)
		}
	}
	return added, nil
}

// selector is what a rule is for, in words.
func selector(r *netlink.Rule) string {
	if r.Src != nil {
		return "the source " + r.Src.String()
	}
	return fmt.Sprintf("mark %#x", r.Mark)
}

func sourceText(r *netlink.Rule) string {
	if r.Src == nil {
		return ""
	}
	return r.Src.String()
}
