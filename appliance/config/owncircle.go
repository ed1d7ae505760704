package config

import (
	"maps"
	"net/netip"
	"net/url"
	"slices"

	"sidegate/appliance/policy"
)

// ownCircles reports an outbound that is a program on this box while the box's own connections follow the rules: what that program
// opens would come back to it, unless a rule leaves it direct. Which program it is only the owner knows.
func (d *decoder) ownCircles(c *draft) {
	if !c.Gateway.Local || slices.ContainsFunc(c.Policy.Rules, sparesProcess) {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(c.Outbounds)) {
		if o := c.Outbounds[name]; o.onThisBox() {
			d.errorf(o.Position.Line, "outbound %s: it is a program on this box, and with gateway.local its own connections would come back to it; "+
				"leave it direct by a rule before the others, such as { process_name: [NAME], outbound: direct }", quote(name))
		}
	}
}

// sparesProcess reports whether the rule leaves some program of the box direct.
func sparesProcess(r policy.Rule) bool {
	return r.Outbound == policy.OutboundDirect && slices.ContainsFunc(r.Is, func(c policy.Condition) bool {
		return slices.Contains([]policy.Dimension{policy.ProcessName, policy.ProcessPath, policy.ProcessUnit}, c.Field.Dimension)
	})
}

func (o Outbound) onThisBox() bool {
	u, err := url.Parse(o.URL)
	if err != nil {
		return false
	}
	address, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && address.Unmap().IsLoopback()
}
