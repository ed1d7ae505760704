package gateway

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sidegate/appliance/admin"
	"sidegate/appliance/datapath"
	"sidegate/appliance/policy"
)

// upstream is the proxy that an outbound talks to.
type upstream struct {
	outbound string
	host     string // address or name
	port     uint16
}

// combined is the policy that the datapath is given: first the implicit rules, then those of the file.
// People count from the file: this type translates.
//
// The implicit rules leave the traffic to an upstream proxy direct, and that from it, lest a client's
// connection to the proxy, or a proxy that has this gateway as its own, go in circles; and what the box itself
// sends to its neighbours, which no client would send by a gateway either.
type combined struct {
	policy   *policy.Policy
	implicit int            // leading rules that are not in the file
	file     *policy.Policy // as it was written
	made     string         // what the implicit rules were made of
}

// combine makes the policy. Addresses gives those of a host; a host without any has no rule yet. A nil
// function knows literal addresses only. Subnets are those that the box is in.
func (p *Plan) combine(addresses func(host string) []netip.Addr, subnets []netip.Prefix) *combined {
	if addresses == nil {
		addresses = literal
	}
	c := &combined{file: p.Config.Policy}
	taken := map[string]bool{}
	for _, r := range c.file.Rules {
		taken[r.Name] = true
	}
	var rules []policy.Rule
	add := func(name string, conditions ...policy.Condition) {
		rules = append(rules, policy.Rule{Name: unused(taken, name), Is: conditions, Outbound: policy.OutboundDirect})
	}
	all := map[netip.Addr]bool{}
	for _, u := range p.upstreams {
		found := addresses(u.host)
		if len(found) == 0 {
			continue
		}
		for _, a := range found {
			all[a] = true
		}
		c.made += fmt.Sprintln(u, found)
		add("upstream "+u.outbound, condition("ip_cidr", texts(found)...), condition("port", strconv.Itoa(int(u.port))))
	}
	if len(all) > 0 {
		sources := slices.SortedFunc(maps.Keys(all), netip.Addr.Compare)
		add("from upstreams", condition("source_ip_cidr", texts(sources)...))
	}
	if p.Config.Gateway.Local && len(subnets) > 0 {
		c.made += fmt.Sprintln(subnets)
		add("neighbours", condition("inbound_interface", "lo"), condition("ip_cidr", texts(subnets)...))
	}
	c.implicit = len(rules)
	for i, r := range c.file.Rules {
		if r.Name == "" {
			r.Name = unused(taken, ordinal(i))
		}
		rules = append(rules, r)
	}
	c.policy = &policy.Policy{Rules: rules, Default: c.file.Default, Geo: c.file.Geo}
	return c
}

func literal(host string) []netip.Addr {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap().WithZone("")}
	}
	return nil
}

// ordinal names the rule of the file that has no name.
func ordinal(index int) string { return fmt.Sprintf("#%d", index+1) }

// unused makes a name that no rule of the file has.
func unused(taken map[string]bool, name string) string {
	for taken[name] {
		name += " (implicit)"
	}
	taken[name] = true
	return name
}

// condition is one of a fixed field with values that are well-formed by construction.
func condition(key string, texts ...string) policy.Condition {
	field, ok := policy.LookupField(key)
	if !ok {
		panic("the policy has no field " + key)
	}
	c, err := field.Parse(texts...)
	if err != nil {
		panic(fmt.Sprintf("%s: %v", key, err))
	}
	return c
}

func texts[T fmt.Stringer](values []T) []string {
	out := make([]string, len(values))
	for i, a := range values {
		out[i] = a.String()
	}
	return out
}

// same reports whether two policies differ in nothing but their pointers: of one file, with the same
// addresses of upstreams.
func (c *combined) same(other *combined) bool {
	return c.file == other.file && c.made == other.made
}

// index translates from the datapath's counting to that of the file.
func (c *combined) index(rule int) (index int, implicit bool) {
	switch {
	case rule < 0:
		return -1, false
	case rule < c.implicit:
		return -1, true
	}
	return rule - c.implicit, false
}

// translated reports whether what the rule decides, by the datapath's counting, is direct and masqueraded.
func (c *combined) translated(rule int, path datapath.ReturnPath) bool {
	outbound := c.policy.Default
	if rule >= 0 {
		outbound = c.policy.Rules[rule].Outbound
	}
	return outbound == policy.OutboundDirect && c.policy.Translated(rule, path == datapath.Symmetric)
}

func (c *combined) answer(d policy.Decision, translated bool) admin.Answer {
	a := admin.Answer{Verdict: d.Verdict, Translated: translated, Outbound: d.Outbound}
	a.Index, a.Implicit = c.index(d.Rule)
	if d.Rule >= 0 {
		a.Rule = &c.policy.Rules[d.Rule].Name
	}
	return a
}

// explain decides a flow, with reasons.
func (c *combined) explain(f policy.Flow, path datapath.ReturnPath) admin.Explanation {
	e := c.policy.Explain(f)
	out := admin.Explanation{
		Answer:    c.answer(policy.Decision{Verdict: e.Verdict, Outbound: e.Outbound, Rule: e.Index}, c.translated(e.Index, path)),
		Ambiguous: e.Ambiguous,
		Skipped:   []admin.Skipped{},
	}
	for _, s := range e.Skipped {
		skipped := admin.Skipped{Rule: s.Rule, Field: s.Field, Reason: s.Reason}
		skipped.Index, skipped.Implicit = c.index(s.Index)
		out.Skipped = append(out.Skipped, skipped)
	}
	looked := c.policy.Rules
	if e.Index >= 0 {
		looked = looked[:e.Index+1]
	}
	out.Sources.Lists = lists(looked, c.policy.Geo)
	return out
}

// lists are those that the rules name, with the files that they were read from.
func lists(rules []policy.Rule, geo policy.GeoData) (all []admin.List) {
	data, ok := geo.(interface {
		Origin(kind, name string) string
	})
	if !ok {
		return nil
	}
	sites, codes := policy.ListsOf(rules)
	for _, name := range sites {
		all = append(all, admin.List{Kind: "geosite", Name: name, File: data.Origin("geosite", name)})
	}
	for _, name := range codes {
		all = append(all, admin.List{Kind: "geoip", Name: name, File: data.Origin("geoip", name)})
	}
	return all
}

// Explain decides a flow as the gateway would with this configuration, except that upstreams which are
// given by name are not looked up.
func (p *Plan) Explain(f policy.Flow) admin.Explanation {
	return p.combine(nil, nil).explain(f, returnPath(p.Config, nil))
}

// matches is what a rule asks for, in the words of the file.
func matches(r policy.Rule) string {
	var all []string
	for _, c := range r.Is {
		all = append(all, c.String())
	}
	for _, c := range r.Not {
		all = append(all, "not "+c.String())
	}
	return cmp.Or(strings.Join(all, ", "), "everything")
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
