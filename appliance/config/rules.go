package config

import (
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// OwnedMarks are the bits of the firewall mark that sidegate itself uses.
const OwnedMarks = 0x0f000000

// rule is a policy.Rule on the way.
type rule struct {
	policy.Rule
	line     int
	outbound reference
	// Lines of the keys that fit only some outbounds; 0 where they are absent.
	mark, snat, reject int
}

// label is what messages call a rule.
func label(what, name string, index int) string {
	if name == "" {
		return numbered(what, index)
	}
	return what + " " + quote(name)
}

// ruleList reads a list of rules, of which messages call one what. Those with the same end can be joined.
func (d *decoder) ruleList(what, end string, n *yaml.Node, each func(at, name string, item *yaml.Node)) {
	names := map[string]int{}
	for i, item := range d.list(what, n) {
		name := nameOf(follow(item))
		at := label(what, name, i)
		if i == policy.MaxRules {
			d.errorf(item.Line, "%s: it is number %d, and there can be %d; join rules with the same %s", at, i+1, policy.MaxRules, end)
			return
		}
		if first, taken := names[name]; taken && name != "" {
			d.errorf(item.Line, "%s: the name is taken by the %s on line %d; choose another", at, what, first)
		}
		names[name] = item.Line
		each(at, name, item)
	}
}

func (d *decoder) rules(at string, n *yaml.Node, c *draft) {
	d.ruleList("rule", "outbound", n, func(at, name string, item *yaml.Node) {
		r := rule{line: item.Line}
		r.Name = name
		entries := d.entries(at, item)
		seen := decode(d, at, entries, ruleKeys, nil, &r)
		d.require(at, item, entries, seen, "outbound")
		c.rules = append(c.rules, r)
	})
}

// nameOf looks ahead in a rule, because messages about the other keys want its name.
func nameOf(n *yaml.Node) string {
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if value := follow(n.Content[i+1]); n.Content[i].Value == "name" && value.Kind == yaml.ScalarNode && !isNull(value) {
			return value.Value
		}
	}
	return ""
}

// conditionKeys are the policy's fields, for a rule's own conditions and for those under not.
var conditionKeys = func() keys[[]policy.Condition] {
	table := keys[[]policy.Condition]{}
	for _, field := range policy.Fields() {
		table[field.Key] = func(d *decoder, at string, n *yaml.Node, into *[]policy.Condition) {
			if condition, ok := d.condition(at, field, n); ok {
				*into = append(*into, condition)
			}
		}
	}
	return table
}()

// ruleKeys are the policy's fields and what a rule has besides.
var ruleKeys = func() keys[rule] {
	table := keys[rule]{
		"name": func(d *decoder, at string, n *yaml.Node, r *rule) { d.ruleName(at, n) },
		"not": func(d *decoder, at string, n *yaml.Node, r *rule) {
			d.not(at, n, conditionKeys, nil, &r.Not)
		},
		"outbound": func(d *decoder, at string, n *yaml.Node, r *rule) {
			r.outbound = d.reference(at, n)
			r.Outbound = r.outbound.name
		},
		"mark": func(d *decoder, at string, n *yaml.Node, r *rule) {
			mark, ok := d.number(at, n, 1, 1<<32-1)
			if ok && mark&OwnedMarks != 0 {
				d.errorf(n.Line, "%s: 0x%08x touches 0x%08x, the bits that sidegate itself uses; choose other bits", at, mark, OwnedMarks)
			}
			r.Mark, r.mark = mark, n.Line
		},
		"snat": func(d *decoder, at string, n *yaml.Node, r *rule) {
			r.SNAT, r.snat = new(bool), n.Line
			d.boolean(at, n, r.SNAT)
		},
		"reject": func(d *decoder, at string, n *yaml.Node, r *rule) {
			d.boolean(at, n, &r.Reject)
			r.reject = n.Line
		},
	}
	for key, read := range conditionKeys {
		table[key] = func(d *decoder, at string, n *yaml.Node, r *rule) { read(d, at, n, &r.Is) }
	}
	return table
}()

// ruleName checks a name, which nameOf has read.
func (d *decoder) ruleName(at string, n *yaml.Node) {
	if name, ok := d.scalar(at, n); ok && !printable(name) {
		d.errorf(n.Line, "%s: a name is 1 to %d bytes of printable text; choose another", at, maxNameLength)
	}
}

// not reads the conditions that exclude.
func (d *decoder) not(at string, n *yaml.Node, table keys[[]policy.Condition], refused refusals, into *[]policy.Condition) {
	entries := d.entries(at, n)
	if entries != nil && len(entries) == 0 {
		d.errorf(n.Line, "%s: it holds no condition; add one or remove the key", at)
	}
	decode(d, at, entries, table, refused, into)
}

// condition parses the values of one field. When the field refuses them, each is asked alone, so that
// all that are wrong are reported with their own lines.
func (d *decoder) condition(at string, field *policy.Field, n *yaml.Node) (policy.Condition, bool) {
	values, lines := d.texts(at, n)
	if len(values) == 0 {
		return policy.Condition{}, false // reported
	}
	condition, err := field.Parse(values...)
	if err == nil {
		d.noteLists(at, condition, lines)
		return condition, true
	}
	object := strings.TrimSuffix(at, field.Key) // the field's own message begins with its key
	alone := false
	for i, value := range values {
		if _, err := field.Parse(value); err != nil {
			d.errorf(lines[i], "%s%w", object, err)
			alone = true
		}
	}
	if !alone {
		d.errorf(n.Line, "%s%w", object, err)
	}
	return policy.Condition{}, false
}

func printable(text string) bool {
	return text != "" && len(text) <= maxNameLength && utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) })
}

// link resolves what refers to other parts of the file, and completes the Config.
func (d *decoder) link(c *draft) {
	c.Policy = &policy.Policy{Rules: make([]policy.Rule, 0, len(c.rules)), Default: c.fallback.name}
	c.ruleLines = make([]int, 0, len(c.rules))
	conditions := make([]conditional, 0, len(c.rules))
	for i, r := range c.rules {
		at := label("rule", r.Name, i)
		if d.known(at, r.outbound, c) {
			d.fits(at, r)
		}
		c.Policy.Rules = append(c.Policy.Rules, r.Rule)
		c.ruleLines = append(c.ruleLines, r.line)
		conditions = append(conditions, conditional{at: at, line: r.line, rule: r.Rule})
	}
	d.known("default", c.fallback, c)
	d.unreachable(conditions)
	d.nameless(conditions, c)
	d.linkDNS(c)
	d.linkTests(c)
	d.linkGeodata(c)
	if len(d.errs) > 0 {
		return
	}
	if c.DNS != nil {
		d.dnsCircles(c)
	}
	d.ownCircles(c)
	// What the policy itself refuses has a line above. This is for the case that it learns to refuse more.
	if err := c.Policy.Validate(); err != nil {
		d.errorf(0, "%w", err)
	}
}

// known says whether a reference leads to an outbound, and reports it if not. One that could not be
// read was reported before.
func (d *decoder) known(at string, to reference, c *draft) bool {
	if to.name == "" {
		return false
	}
	if _, ok := c.Outbounds[to.name]; ok || to.name == policy.OutboundDirect || to.name == policy.OutboundBlock {
		return true
	}
	names := slices.Collect(maps.Keys(c.Outbounds))
	hint := have(names)
	if len(names) == 0 {
		hint = "(have: none; define it under outbounds, or write direct or block)"
	}
	if likely, ok := nearest(to.name, append(names, policy.OutboundDirect, policy.OutboundBlock)); ok {
		hint = fmt.Sprintf("; did you mean %q? %s", likely, hint)
	} else {
		hint = " " + hint
	}
	d.errorf(to.line, "%s: unknown outbound %s%s", at, quote(to.name), hint)
	return false
}

// fits reports options that mean nothing with the rule's outbound.
func (d *decoder) fits(at string, r rule) {
	options := []struct {
		key  string
		line int
		with string
	}{
		{"mark", r.mark, policy.OutboundDirect},
		{"snat", r.snat, policy.OutboundDirect},
		{"reject", r.reject, policy.OutboundBlock},
	}
	for _, o := range options {
		if o.line != 0 && r.outbound.name != o.with {
			d.errorf(o.line, "%s: %s goes with outbound %s only, not with %s; remove it", at, o.key, o.with, quote(r.outbound.name))
		}
	}
}

// conditional is what can make a rule match.
type conditional struct {
	at     string
	line   int
	rule   policy.Rule
	beside string // conditions that are no fields of the policy; "" and "[]": none
}

// unreachable warns of rules that nothing reaches: those after a rule without conditions, and those
// with the same conditions as an earlier one.
func (d *decoder) unreachable(rules []conditional) {
	earlier := map[uint64]int{}
	seed := maphash.MakeSeed()
	for i, r := range rules {
		conditions := signature(seed, r)
		if first, same := earlier[conditions]; same {
			d.warnf(r.line, "%s: it never matches: %s (line %d) has the same conditions; remove one", r.at, rules[first].at, rules[first].line)
			continue
		}
		earlier[conditions] = i
		if len(r.rule.Is)+len(r.rule.Not) == 0 && (r.beside == "" || r.beside == "[]") && i+1 < len(rules) {
			next := rules[i+1]
			d.warnf(next.line, "%s: it never matches, nor does any rule after it: %s (line %d) has no condition and takes everything; move that to the end",
				next.at, r.at, r.line)
			return
		}
	}
}

// nameless warns of the first rule that asks for names where nothing tells them.
func (d *decoder) nameless(rules []conditional, c *draft) {
	if c.DNS != nil || c.Sniff == SniffUnknown {
		return
	}
	asks := func(c policy.Condition) bool { return c.Field.Dimension == policy.DestinationName }
	for _, r := range rules {
		if slices.ContainsFunc(r.rule.Is, asks) || slices.ContainsFunc(r.rule.Not, asks) {
			d.warnf(r.line, "%s: it asks for a name, and nothing tells the names of connections; add dns, or sniff: unknown", r.at)
			return
		}
	}
}

// signature is a hash of a rule's conditions. The order of its keys does not matter, that of the values
// in a list does.
func signature(seed maphash.Seed, r conditional) uint64 {
	sum := maphash.String(seed, r.beside)
	for not, conditions := range [][]policy.Condition{r.rule.Is, r.rule.Not} {
		for _, c := range conditions {
			var h maphash.Hash
			h.SetSeed(seed)
			h.WriteByte(byte(not))
			h.WriteString(c.Field.Key)
			for _, v := range c.Values {
				h.WriteByte(0)
				h.WriteString(v.String())
			}
			sum += h.Sum64()
		}
	}
	return sum
}
