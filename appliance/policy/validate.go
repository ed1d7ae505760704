package policy

import (
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
)

// OutboundID is how the kernel names an outbound: the 32-bit FNV-1a hash of its name, so that it is
// the same in every generation. Validate refuses the collisions that are possible.
func OutboundID(name string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(name))
	return h.Sum32()
}

// String is `rule "nas"`, or for a rule without a name what it says: `rule {port: 443, not network: udp} → hk`.
// Policy.RuleLabel knows the position too.
func (r *Rule) String() string {
	if r.Name != "" {
		return fmt.Sprintf("rule %q", r.Name)
	}
	var conditions []string
	for _, c := range r.Is {
		conditions = append(conditions, c.String())
	}
	for _, c := range r.Not {
		conditions = append(conditions, "not "+c.String())
	}
	return fmt.Sprintf("rule {%s} → %s", strings.Join(conditions, ", "), r.Outbound)
}

// String is the condition as in the configuration; long lists are cut.
func (c Condition) String() string { return c.Field.Key + ": " + list(c.Values) }

// list joins values; the reader of a long one is told how much is missing.
func list(values []Value) string {
	const most = 6
	var texts []string
	for i, v := range values {
		if i == most && len(values) > most+1 {
			texts = append(texts, fmt.Sprintf("… (%d more)", len(values)-most))
			break
		}
		texts = append(texts, v.String())
	}
	return strings.Join(texts, ", ")
}

// RuleLabel names a rule in messages: `rule "nas"`, `rule #3` for the third one if it has no name, or
// `the default` for -1.
func (p *Policy) RuleLabel(index int) string {
	switch {
	case index < 0:
		return "the default"
	case p.Rules[index].Name != "":
		return p.Rules[index].String()
	}
	return fmt.Sprintf("rule #%d", index+1)
}

// Validate reports everything that Compile would refuse, one line for each defect, joined. It does not
// know which outbounds exist.
func (p *Policy) Validate() error {
	var errs []error
	if len(p.Rules) > MaxRules {
		errs = append(errs, fmt.Errorf("%s is one too many: a policy has at most %d rules; join rules that have the same outbound",
			p.RuleLabel(MaxRules), MaxRules))
	}
	if p.Default == "" {
		errs = append(errs, errors.New("default is missing: name the outbound for everything that no rule matches, such as direct"))
	}
	names := map[string]int{}
	ids := map[uint32]string{OutboundID(p.Default): p.Default}
	for i := range p.Rules {
		r := &p.Rules[i]
		bad := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("%s: "+format, append([]any{p.RuleLabel(i)}, args...)...))
		}
		if first, taken := names[r.Name]; taken && r.Name != "" {
			bad("rule #%d has the same name: rename one", first+1)
		} else {
			names[r.Name] = i
		}
		for _, defect := range r.defects(p.Geo) {
			bad("%s", defect)
		}
		id := OutboundID(r.Outbound)
		if other, taken := ids[id]; taken && other != r.Outbound {
			bad("outbound %q has the same 32-bit hash as %q: rename one", r.Outbound, other)
		}
		ids[id] = r.Outbound
	}
	return errors.Join(errs...)
}

// defects are the reasons why a rule is refused, whatever the other rules say.
func (r *Rule) defects(geo GeoData) []string {
	var defects []string
	add := func(format string, args ...any) { defects = append(defects, fmt.Sprintf(format, args...)) }
	if r.Outbound == "" {
		add("outbound is missing: name one, such as direct or block")
	}
	if r.Reject && r.Outbound != OutboundBlock {
		add("reject needs outbound: block, not %q", r.Outbound)
	}
	if r.Mark != 0 && r.Outbound != OutboundDirect {
		add("mark needs outbound: direct, not %q", r.Outbound)
	}
	if r.SNAT != nil && r.Outbound != OutboundDirect {
		add("snat needs outbound: direct, not %q", r.Outbound)
	}
	for _, conditions := range [][]Condition{r.Is, r.Not} {
		for _, c := range conditions {
			if len(c.Values) == 0 {
				add("%s has no values: remove it or give it one", c.Field.Key)
			}
			for _, v := range c.Values {
				if defect := geoDefect(v, geo); defect != "" {
					add("%s", defect)
				}
			}
		}
	}
	return defects
}

func geoDefect(v Value, geo GeoData) string {
	var key string
	var known bool
	switch v := v.(type) {
	case siteName:
		key = "geosite"
		if geo != nil {
			_, known = geo.Site(string(v))
		}
	case country:
		key = "geoip"
		if geo != nil {
			_, known = geo.IP(string(v))
		}
	default:
		return ""
	}
	switch {
	case geo == nil:
		return fmt.Sprintf("%s %q: there is no geo data in this gateway: write the names or prefixes themselves", key, v)
	case !known:
		return fmt.Sprintf("%s %q: the geo data has no such list", key, v)
	}
	return ""
}

// action is what a decision for this outbound does.
func action(outbound string, r Rule) RuleAction {
	return RuleAction{
		Verdict:    verdictOf(outbound),
		Outbound:   outbound,
		OutboundID: OutboundID(outbound),
		Mark:       r.Mark,
		SNAT:       r.SNAT,
		Reject:     r.Reject,
	}
}
