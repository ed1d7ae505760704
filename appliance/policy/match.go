package policy

import "net/netip"

// Match is the specification of what sidegate decides; everything else is tested against it.
//
// A flow with several names is decided once for each: the lowest rule of those decisions is the answer.
func (p *Policy) Match(f Flow) Decision {
	var answer Decision
	for i, facts := range f.facts() {
		d := p.decision(p.first(&facts))
		if i == 0 {
			answer = d
			continue
		}
		ambiguous := answer.Ambiguous || p.outcome(d.Rule) != p.outcome(answer.Rule)
		if d.before(answer) {
			answer = d
		}
		answer.Ambiguous = ambiguous
	}
	return answer
}

// first returns the index of the first rule that matches, or -1.
func (p *Policy) first(f *facts) int {
	for i := range p.Rules {
		if p.matches(&p.Rules[i], f) {
			return i
		}
	}
	return -1
}

// matches reports whether in each dimension that the rule asks about one condition holds, and of Not
// none does. An absent fact fails both.
func (p *Policy) matches(r *Rule, f *facts) bool {
	var asked, held [dimensions]bool
	for _, c := range r.Is {
		asked[c.Field.Dimension] = true
		held[c.Field.Dimension] = held[c.Field.Dimension] || c.known(f) && c.holds(f, p.Geo)
	}
	for _, c := range r.Not {
		if !c.known(f) || c.holds(f, p.Geo) {
			return false
		}
	}
	return asked == held
}

func (c *Condition) known(f *facts) bool { return dimensionTable[c.Field.Dimension].known(f) }

// holds reports whether any of the values matches a known fact.
func (c *Condition) holds(f *facts, geo GeoData) bool {
	for _, v := range c.Values {
		if c.Field.matches(v, f, geo) {
			return true
		}
	}
	return false
}

func (p *Policy) decision(rule int) Decision {
	outbound := p.Default
	if rule >= 0 {
		outbound = p.Rules[rule].Outbound
	}
	return Decision{Verdict: verdictOf(outbound), Outbound: outbound, Rule: rule}
}

// outcome is what makes a difference to where a flow goes.
type outcome struct {
	outbound     string
	mark         uint32
	snat, asSaid bool // translated, if it is said
}

func (p *Policy) outcome(rule int) outcome {
	if rule < 0 {
		return outcome{outbound: p.Default}
	}
	r := &p.Rules[rule]
	o := outcome{outbound: r.Outbound, mark: r.Mark, asSaid: r.SNAT != nil}
	if o.asSaid {
		o.snat = *r.SNAT
	}
	return o
}

// Translated reports whether a direct flow that the rule decides, or for -1 the default, leaves with the gateway's own
// address. A rule that does not say does as the configuration's return path, symmetric or not, and so does a flow that
// goes direct because its proxy is not there.
func (p *Policy) Translated(rule int, symmetric bool) bool {
	if rule < 0 || p.Rules[rule].SNAT == nil {
		return symmetric
	}
	return *p.Rules[rule].SNAT
}

// before reports whether d comes from an earlier rule; the default comes after all rules.
func (d Decision) before(e Decision) bool { return d.Rule >= 0 && (e.Rule < 0 || d.Rule < e.Rule) }

func verdictOf(outbound string) Verdict {
	switch outbound {
	case OutboundDirect:
		return Direct
	case OutboundBlock:
		return Block
	}
	return Proxy
}

// normal returns the flow in the form that values are compared with.
func (f Flow) normal() Flow {
	if f.Network != TCP && f.Network != UDP {
		f.Network = 0
		f.Source = netip.AddrPortFrom(f.Source.Addr(), 0)
		f.Destination = netip.AddrPortFrom(f.Destination.Addr(), 0)
	}
	f.Source = normalAddr(f.Source)
	f.Destination = normalAddr(f.Destination)
	f.DSCP &= 63
	return f
}

func normalAddr(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

// NameSets returns each name with its aliases, in normal form; nil if none is known.
func (f *Flow) NameSets() [][]string {
	var sets [][]string
	for _, name := range f.Names {
		if normalName(name) == "" {
			continue
		}
		set := []string{normalName(name)}
		for _, alias := range f.Aliases[name] {
			if alias = normalName(alias); alias != "" {
				set = append(set, alias)
			}
		}
		sets = append(sets, set)
	}
	return sets
}

// facts returns the flow with each of its names, or once without one.
func (f Flow) facts() []facts {
	f = f.normal()
	var all []facts
	for _, set := range f.NameSets() {
		all = append(all, facts{f, set})
	}
	if all == nil {
		all = []facts{{f, nil}}
	}
	return all
}

// version is the IP version, or 0 if the flow has no addresses.
func (f *Flow) version() version {
	addr := f.Destination.Addr()
	if !addr.IsValid() {
		addr = f.Source.Addr()
	}
	switch {
	case !addr.IsValid():
		return 0
	case addr.Is4():
		return 4
	}
	return 6
}
