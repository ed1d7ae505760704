package policy

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
)

// use is one side of one rule: rule<<1, plus 1 where the value stands under not.
type use uint32

func (u use) rule() int     { return int(u >> 1) }
func (u use) negated() bool { return u&1 != 0 }

// group is an index into compiler.groups: the uses that a value or a whole geo list serves. Groups keep
// a list of 100,000 prefixes that ten rules share from being expanded ten times.
type group uint32

// noGroup is empty; rule i has the groups 2i+1 and, for what stands under not, 2i+2.
const noGroup group = 0

func (u use) group() group { return group(u + 1) }

// occurrence is a value of some dimension in some rules.
type occurrence[V any] struct {
	value V
	group group
}

// compiler collects, per dimension, which values serve which rules. Field.encode fills it.
type compiler struct {
	groups [][]use

	destination, source         []occurrence[netip.Prefix]
	destinationPort, sourcePort []occurrence[Span]
	network                     []occurrence[Network]
	version                     []occurrence[version]
	codePoint                   []occurrence[codePoint]
	mac                         []occurrence[MAC]
	inbound                     []occurrence[string]
	processName, processPath    []occurrence[string]
	processUnit                 []occurrence[string]
	name                        []occurrence[Value]

	sites     map[siteName][]use
	countries map[country][]use
}

func (c *compiler) addName(v Value, g group)        { c.name = append(c.name, occurrence[Value]{v, g}) }
func (c *compiler) addDestination(v Value, g group) { appendValue(&c.destination, v, g) }
func (c *compiler) addSource(v Value, g group)      { appendValue(&c.source, v, g) }
func (c *compiler) addPort(v Value, g group)        { appendValue(&c.destinationPort, v, g) }
func (c *compiler) addSourcePort(v Value, g group)  { appendValue(&c.sourcePort, v, g) }
func (c *compiler) addNetwork(v Value, g group)     { appendValue(&c.network, v, g) }
func (c *compiler) addVersion(v Value, g group)     { appendValue(&c.version, v, g) }
func (c *compiler) addCodePoint(v Value, g group)   { appendValue(&c.codePoint, v, g) }
func (c *compiler) addMAC(v Value, g group)         { appendValue(&c.mac, v, g) }
func (c *compiler) addInterface(v Value, g group)   { appendValue(&c.inbound, v.String(), g) }
func (c *compiler) addProcess(v Value, g group)     { appendValue(&c.processName, v.String(), g) }
func (c *compiler) addPath(v Value, g group)        { appendValue(&c.processPath, v.String(), g) }
func (c *compiler) addUnit(v Value, g group)        { appendValue(&c.processUnit, v.String(), g) }

func (c *compiler) addSite(v Value, g group) {
	c.sites[v.(siteName)] = append(c.sites[v.(siteName)], c.groups[g]...)
}

func (c *compiler) addCountry(v Value, g group) {
	c.countries[v.(country)] = append(c.countries[v.(country)], c.groups[g]...)
}

func (c *compiler) addPrivate(_ Value, g group) {
	for _, p := range privatePrefixes {
		c.addDestination(p, g)
	}
}

func appendValue[V any](to *[]occurrence[V], v any, g group) {
	*to = append(*to, occurrence[V]{v.(V), g})
}

// Compile turns a policy into tables. Its error has a line for each defect and names the rule.
func Compile(p *Policy) (*Tables, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	n := len(p.Rules)
	c := &compiler{
		groups:    make([][]use, 2*n+1),
		sites:     map[siteName][]use{},
		countries: map[country][]use{},
	}
	uses := make([]use, 2*n)
	for i := range uses {
		uses[i] = use(i)
		c.groups[use(i).group()] = uses[i : i+1 : i+1]
	}
	values := p.values()
	c.destination = slices.Grow(c.destination, values[DestinationAddress])
	c.source = slices.Grow(c.source, values[SourceAddress])
	var all Bits
	var axes [dimensions]axis
	for i := range n {
		all.set(i)
		for _, cond := range p.Rules[i].Is {
			axes[cond.Field.Dimension].is.set(i)
			c.addCondition(cond, use(i<<1))
		}
		for _, cond := range p.Rules[i].Not {
			axes[cond.Field.Dimension].not.set(i)
			c.addCondition(cond, use(i<<1|1))
		}
	}
	for d := range axes {
		axes[d].all = all
	}
	c.expandLists(p.Geo)

	t := &Tables{
		Words:       max(1, (n+63)/64),
		Default:     action(p.Default, Rule{}),
		Destination: prefixTable(axes[DestinationAddress], c.destination, c.groups),
		Source:      prefixTable(axes[SourceAddress], c.source, c.groups),
		Header:      headerTable(axes[Protocol], axes[IPVersion], axes[DSCP], c),
		MAC:         keyTable(axes[SourceMAC], c.mac, c.groups),
		Interface:   keyTable(axes[InboundInterface], c.inbound, c.groups),
		ProcessName: keyTable(axes[ProcessName], c.processName, c.groups),
		ProcessPath: keyTable(axes[ProcessPath], c.processPath, c.groups),
		ProcessUnit: keyTable(axes[ProcessUnit], c.processUnit, c.groups),
		Name:        nameTable(axes[DestinationName], c.name, c.groups),
		unversioned: axes[IPVersion].unknown(),
		all:         all,
		alike:       map[outcome]Bits{},
	}
	for i := range p.Rules {
		t.Rules = append(t.Rules, action(p.Rules[i].Outbound, p.Rules[i]))
		o := p.outcome(i)
		t.outcomes = append(t.outcomes, o)
		row := t.alike[o]
		row.set(i)
		t.alike[o] = row
	}
	return t, errors.Join(
		t.DestinationPort.fill(axes[DestinationPort], c.destinationPort, c.groups),
		t.SourcePort.fill(axes[SourcePort], c.sourcePort, c.groups),
	)
}

// values counts the values in each dimension.
func (p *Policy) values() [dimensions]int {
	var n [dimensions]int
	for i := range p.Rules {
		for _, conditions := range [][]Condition{p.Rules[i].Is, p.Rules[i].Not} {
			for _, c := range conditions {
				n[c.Field.Dimension] += len(c.Values)
			}
		}
	}
	return n
}

func (c *compiler) addCondition(cond Condition, u use) {
	for _, v := range cond.Values {
		cond.Field.encode(c, v, u.group())
	}
}

// expandLists replaces geo lists by their content, each once.
func (c *compiler) expandLists(geo GeoData) {
	newGroup := func(uses []use) group {
		slices.Sort(uses)
		c.groups = append(c.groups, slices.Compact(uses))
		return group(len(c.groups) - 1)
	}
	// In order, so that a policy always compiles to the same tables.
	for _, category := range slices.Sorted(maps.Keys(c.sites)) {
		g := newGroup(c.sites[category])
		for _, v := range sitePatterns(geo, category) {
			c.addName(v, g)
		}
	}
	for _, code := range slices.Sorted(maps.Keys(c.countries)) {
		g := newGroup(c.countries[code])
		prefixes := countryPrefixes(geo, code)
		c.destination = slices.Grow(c.destination, len(prefixes))
		for _, p := range prefixes {
			c.addDestination(p.Masked(), g)
		}
	}
}

// keyTable gives each named value its class; one whose class is that of unnamed values needs no entry.
func keyTable[K comparable](a axis, occurrences []occurrence[K], groups [][]use) KeyTable[K] {
	r := a.rows()
	all := map[K]*hits{}
	var keys []K
	for _, o := range occurrences {
		if all[o.value] == nil {
			all[o.value] = new(hits)
			keys = append(keys, o.value)
		}
		all[o.value].add(groups[o.group])
	}
	t := KeyTable[K]{Class: make(map[K]Class, len(all))}
	for _, key := range keys {
		if class := r.class(a.row(all[key])); class != ClassOther {
			t.Class[key] = class
		}
	}
	t.Bits = r.bits()
	return t
}

// headerTable folds three small dimensions into one: 512 entries are cheaper than two more look-ups.
func headerTable(network, ipVersion, dscp axis, c *compiler) HeaderTable {
	var networks [256]hits
	for _, o := range c.network {
		networks[o.value].add(c.groups[o.group])
	}
	var versions [7]hits
	for _, o := range c.version {
		versions[o.value].add(c.groups[o.group])
	}
	var points [64]hits
	for _, o := range c.codePoint {
		points[o.value].add(c.groups[o.group])
	}
	var t HeaderTable
	r := newRows(network.all, network.all) // no header is unknown or other; the rows exist for uniformity
	for _, n := range []Network{0, TCP, UDP} {
		for _, v := range []version{4, 6} {
			for d := range points {
				row := network.row(&networks[n])
				byVersion, byPoint := ipVersion.row(&versions[v]), dscp.row(&points[d])
				row.and(&byVersion)
				row.and(&byPoint)
				t.Class[HeaderIndex(uint8(d), n, v == 6)] = uint16(r.class(row))
			}
		}
	}
	t.Bits = r.bits()
	return t
}
