package policy

import (
	"maps"
	"slices"
)

// ListsOf returns the geo lists that rules name, each once and in order: what GeoData has to have of sites and
// of codes before the rules can be compiled.
func ListsOf(rules []Rule) (sites, codes []string) {
	s, c := map[string]bool{}, map[string]bool{}
	for i := range rules {
		for _, conditions := range [][]Condition{rules[i].Is, rules[i].Not} {
			for _, condition := range conditions {
				for _, v := range condition.Values {
					switch v := v.(type) {
					case siteName:
						s[string(v)] = true
					case country:
						c[string(v)] = true
					}
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(s)), slices.Sorted(maps.Keys(c))
}
