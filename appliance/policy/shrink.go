package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
)

// Case is a policy and a flow on which two renderings of the policy disagree. It marshals to JSON, so
// that a failure found once is replayed for ever.
type Case struct {
	Policy *Policy
	Flow   Flow
}

// Shrink returns a smaller case that still fails: without the rules, conditions, values and facts that
// do not matter. The given case must fail; it is not changed.
func Shrink(c Case, fails func(Case) bool) Case {
	s := shrinker{c, fails, true}
	for s.progress {
		s.progress = false
		s.dropRules()
		for i := range s.Policy.Rules {
			s.dropConditions(func(c *Case) *[]Condition { return &c.Policy.Rules[i].Is })
			s.dropConditions(func(c *Case) *[]Condition { return &c.Policy.Rules[i].Not })
			s.attempt(func(c *Case) bool {
				old := c.Policy.Rules[i]
				c.Policy.Rules[i] = Rule{Is: old.Is, Not: old.Not, Outbound: old.Outbound}
				return old.Name != "" || old.Mark != 0 || old.SNAT != nil || old.Reject
			})
		}
		for _, simplify := range simplerFlows {
			s.attempt(func(c *Case) bool { return simplify(&c.Flow) })
		}
	}
	return s.Case
}

// simplerFlows take facts from a flow, and report whether there was something to take.
var simplerFlows = []func(*Flow) bool{
	func(f *Flow) (had bool) { had, f.Aliases = len(f.Aliases) > 0, nil; return },
	func(f *Flow) (had bool) { had, f.Names = len(f.Names) > 0, nil; return },
	func(f *Flow) (had bool) { had, f.Process.Name = f.Process.Name != "", ""; return },
	func(f *Flow) (had bool) { had, f.Process.Path = f.Process.Path != "", ""; return },
	func(f *Flow) (had bool) { had, f.Process.Unit = f.Process.Unit != "", ""; return },
	func(f *Flow) (had bool) { had, f.Interface = f.Interface != "", ""; return },
	func(f *Flow) (had bool) { had, f.SourceMAC = f.SourceMAC != MAC{}, MAC{}; return },
	func(f *Flow) (had bool) { had, f.DSCP = f.DSCP != 0, 0; return },
	func(f *Flow) bool {
		many := len(f.Names) > 1
		if many {
			f.Names = f.Names[1:]
		}
		return many
	},
	func(f *Flow) bool {
		many := len(f.Names) > 1
		if many {
			f.Names = f.Names[:len(f.Names)-1]
		}
		return many
	},
}

type shrinker struct {
	Case
	fails    func(Case) bool
	progress bool
}

// attempt keeps what change does if it does something and the case still fails.
func (s *shrinker) attempt(change func(*Case) bool) {
	smaller := Case{s.Policy.clone(), s.Flow}
	if change(&smaller) && smaller.Policy.Validate() == nil && s.fails(smaller) {
		s.Case, s.progress = smaller, true
	}
}

// dropRules tries halves before single rules: a long policy needs few attempts.
func (s *shrinker) dropRules() {
	for size := len(s.Policy.Rules); size > 0; size /= 2 {
		for i := len(s.Policy.Rules) - size; i >= 0; i -= size {
			s.attempt(func(c *Case) bool {
				c.Policy.Rules = slices.Delete(c.Policy.Rules, i, i+size)
				return true
			})
		}
	}
}

func (s *shrinker) dropConditions(of func(*Case) *[]Condition) {
	for k := len(*of(&s.Case)) - 1; k >= 0; k-- {
		s.attempt(func(c *Case) bool {
			*of(c) = slices.Delete(*of(c), k, k+1)
			return true
		})
	}
	for k := range *of(&s.Case) {
		for v := len((*of(&s.Case))[k].Values) - 1; v >= 0; v-- {
			s.attempt(func(c *Case) bool {
				values := &(*of(c))[k].Values
				*values = slices.Delete(*values, v, v+1)
				return true // without a value it is no valid policy
			})
		}
	}
}

// clone copies the rules as deep as Shrink changes them.
func (p *Policy) clone() *Policy {
	q := *p
	q.Rules = slices.Clone(p.Rules)
	for i := range q.Rules {
		for _, conditions := range []*[]Condition{&q.Rules[i].Is, &q.Rules[i].Not} {
			*conditions = slices.Clone(*conditions)
			for k := range *conditions {
				(*conditions)[k].Values = slices.Clone((*conditions)[k].Values)
			}
		}
	}
	return &q
}

// The JSON of a case; conditions are lists, because a rule of a case may name a field twice.
type (
	caseText struct {
		Rules   []ruleText                 `json:"rules"`
		Default string                     `json:"default"`
		Sites   map[string][]conditionText `json:"geosite,omitempty"`
		Codes   map[string][]netip.Prefix  `json:"geoip,omitempty"`
		Flow    flowText                   `json:"flow"`
	}
	ruleText struct {
		Name     string          `json:"name,omitempty"`
		Is       []conditionText `json:"is,omitempty"`
		Not      []conditionText `json:"not,omitempty"`
		Outbound string          `json:"outbound"`
		Mark     uint32          `json:"mark,omitempty"`
		SNAT     *bool           `json:"snat,omitempty"`
		Reject   bool            `json:"reject,omitempty"`
	}
	conditionText struct {
		Field  string   `json:"field"`
		Values []string `json:"values"`
	}
	flowText struct {
		Network         Network             `json:"network"`
		Source          netip.Addr          `json:"source"`
		SourcePort      uint16              `json:"source_port"`
		Destination     netip.Addr          `json:"destination"`
		DestinationPort uint16              `json:"destination_port"`
		DSCP            uint8               `json:"dscp,omitempty"`
		SourceMAC       MAC                 `json:"source_mac,omitzero"`
		Interface       string              `json:"interface,omitempty"`
		Names           []string            `json:"names,omitempty"`
		Aliases         map[string][]string `json:"aliases,omitempty"`
		ProcessName     string              `json:"process,omitempty"`
		ProcessPath     string              `json:"process_path,omitempty"`
		ProcessUnit     string              `json:"unit,omitempty"`
	}
)

// MarshalJSON writes the case with the geo lists that its policy uses.
func (c Case) MarshalJSON() ([]byte, error) {
	out := caseText{Default: c.Policy.Default, Rules: []ruleText{}, Sites: map[string][]conditionText{}, Codes: map[string][]netip.Prefix{}}
	texts := func(conditions []Condition) []conditionText {
		var all []conditionText
		for _, cond := range conditions {
			t := conditionText{Field: cond.Field.Key}
			for _, v := range cond.Values {
				t.Values = append(t.Values, v.String())
				switch v := v.(type) {
				case siteName:
					out.Sites[string(v)] = patternTexts(sitePatterns(c.Policy.Geo, v))
				case country:
					out.Codes[string(v)] = countryPrefixes(c.Policy.Geo, v)
				}
			}
			all = append(all, t)
		}
		return all
	}
	for _, r := range c.Policy.Rules {
		out.Rules = append(out.Rules, ruleText{r.Name, texts(r.Is), texts(r.Not), r.Outbound, r.Mark, r.SNAT, r.Reject})
	}
	f := c.Flow
	out.Flow = flowText{
		f.Network, f.Source.Addr(), f.Source.Port(), f.Destination.Addr(), f.Destination.Port(),
		f.DSCP, f.SourceMAC, f.Interface, f.Names, f.Aliases, f.Process.Name, f.Process.Path, f.Process.Unit,
	}
	return json.Marshal(out)
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (c *Case) UnmarshalJSON(data []byte) error {
	var in caseText
	if err := json.Unmarshal(data, &in); err != nil {
		return err
	}
	geo := &lists{map[string][]Value{}, in.Codes}
	for category, texts := range in.Sites {
		conditions, err := conditionsOf(texts)
		if err != nil {
			return fmt.Errorf("geosite %s: %w", category, err)
		}
		geo.sites[category] = []Value{}
		for _, cond := range conditions {
			geo.sites[category] = append(geo.sites[category], cond.Values...)
		}
	}
	p := &Policy{Default: in.Default, Geo: geo}
	for i, r := range in.Rules {
		is, err := conditionsOf(r.Is)
		if err != nil {
			return fmt.Errorf("rule #%d: %w", i+1, err)
		}
		not, err := conditionsOf(r.Not)
		if err != nil {
			return fmt.Errorf("rule #%d: not: %w", i+1, err)
		}
		p.Rules = append(p.Rules, Rule{r.Name, is, not, r.Outbound, r.Mark, r.SNAT, r.Reject})
	}
	f := in.Flow
	*c = Case{p, Flow{
		f.Network, netip.AddrPortFrom(f.Source, f.SourcePort), netip.AddrPortFrom(f.Destination, f.DestinationPort),
		f.DSCP, f.SourceMAC, f.Interface, f.Names, f.Aliases,
		Process{f.ProcessName, f.ProcessPath, f.ProcessUnit},
	}}
	return nil
}

func patternTexts(patterns []Value) []conditionText {
	texts := []conditionText{}
	for _, v := range patterns {
		var key string
		switch v.(type) {
		case exactName:
			key = "domain"
		case suffixName:
			key = "domain_suffix"
		case keywordName:
			key = "domain_keyword"
		case regexName:
			key = "domain_regex"
		}
		texts = append(texts, conditionText{key, []string{v.String()}})
	}
	return texts
}

func conditionsOf(texts []conditionText) ([]Condition, error) {
	var conditions []Condition
	for _, t := range texts {
		f, ok := LookupField(t.Field)
		if !ok {
			return nil, fmt.Errorf("no field %q", t.Field)
		}
		c, err := f.Parse(t.Values...)
		if err != nil {
			return nil, err
		}
		conditions = append(conditions, c)
	}
	return conditions, nil
}
