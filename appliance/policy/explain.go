package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Explanation says why a flow is decided as it is.
type Explanation struct {
	Verdict   Verdict   `json:"verdict"`
	Outbound  string    `json:"outbound"`
	Rule      *string   `json:"rule"`  // the deciding rule's name, or #N for the Nth rule if it has none; null: the default
	Index     int       `json:"index"` // in Policy.Rules; -1: the default
	Ambiguous bool      `json:"ambiguous,omitempty"`
	Skipped   []Skipped `json:"skipped"` // every earlier rule, in order
}

// Skipped is a rule that did not match, and the first of its fields that failed.
type Skipped struct {
	Rule   string `json:"rule"` // as Explanation.Rule
	Index  int    `json:"index"`
	Field  string `json:"field"`  // its key; not.KEY for one under not
	Reason string `json:"reason"` // in words
}

// Explain decides as Match does, and says why each earlier rule did not match.
func (p *Policy) Explain(f Flow) Explanation {
	d := p.Match(f)
	e := Explanation{Verdict: d.Verdict, Outbound: d.Outbound, Index: d.Rule, Ambiguous: d.Ambiguous, Skipped: []Skipped{}}
	earlier := p.Rules
	if d.Rule >= 0 {
		earlier = p.Rules[:d.Rule]
		e.Rule = new(p.shortLabel(d.Rule))
	}
	all := f.facts()
	for i := range earlier {
		s := Skipped{Rule: p.shortLabel(i), Index: i}
		var reasons []string // one for each name that makes a difference
		for k := range all {
			key, reason := p.failure(&p.Rules[i], &all[k])
			if k == 0 {
				s.Field = key
			}
			if !slices.Contains(reasons, reason) {
				reasons = append(reasons, reason)
			}
		}
		s.Reason = strings.Join(reasons, "; ")
		e.Skipped = append(e.Skipped, s)
	}
	return e
}

func (p *Policy) shortLabel(rule int) string {
	if name := p.Rules[rule].Name; name != "" {
		return name
	}
	return fmt.Sprintf("#%d", rule+1)
}

// failure returns the key of the first condition that fails, and why.
func (p *Policy) failure(r *Rule, f *facts) (key, reason string) {
	for _, c := range r.Is {
		d := c.Field.Dimension
		alternatives := sameDimension(r.Is, d)
		holds := func(c Condition) bool { return c.known(f) && c.holds(f, p.Geo) }
		if slices.ContainsFunc(alternatives, holds) {
			continue
		}
		if !c.known(f) {
			return c.Field.Key, dimensionTable[d].absent
		}
		return c.Field.Key, dimensionTable[d].subject(f) + d.verb(" is not in ", " matches none of ") + describe(alternatives)
	}
	for _, c := range r.Not {
		d := c.Field.Dimension
		if !c.known(f) {
			return "not." + c.Field.Key, dimensionTable[d].absent
		}
		if c.holds(f, p.Geo) {
			return "not." + c.Field.Key, dimensionTable[d].subject(f) + d.verb(" is in ", " matches ") + describe([]Condition{c}) + ", which the rule excludes"
		}
	}
	return "", ""
}

func sameDimension(conditions []Condition, d Dimension) []Condition {
	var same []Condition
	for _, c := range conditions {
		if c.Field.Dimension == d {
			same = append(same, c)
		}
	}
	return same
}

// describe lists values. Where several fields ask about one fact, it says which one has them.
func describe(conditions []Condition) string {
	var texts []string
	for _, c := range conditions {
		text := list(c.Values)
		if c.Field.Dimension.shared() {
			text = c.Field.Key + " " + text
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, ", ")
}

func (d Dimension) verb(alone, shared string) string {
	if d.shared() {
		return shared
	}
	return alone
}

// shared reports whether several fields ask about the dimension.
func (d Dimension) shared() bool {
	n := 0
	for _, f := range fields {
		if f.Dimension == d {
			n++
		}
	}
	return n > 1
}
