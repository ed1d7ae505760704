package policy

import (
	"maps"
	"slices"
	"strings"
)

// NameTable classifies sets of names. Names have no fixed classes: whoever learns a set of names
// stores its row, so that the kernel needs no strings.
type NameTable struct {
	Unknown Bits // the row of a flow without a name, as ClassUnknown elsewhere
	Other   Bits // the row of a name that no rule names, as ClassOther elsewhere

	axis        axis
	groups      [][]use
	listed      map[string]nameGroups // domains and suffixes, by name without a leading dot
	keywords    []scanned
	expressions []scanned
}

// nameGroups are the uses of one listed name: for the name itself and for the names below it.
type nameGroups struct{ at, below group }

// scanned is a pattern that no index finds.
type scanned struct {
	pattern pattern
	group   group
}

// Bits returns the row of a flow that has any of these names: the union of the names' rows, because
// the lowest rule that one of them leads to decides. Without names it is Unknown.
func (t *NameTable) Bits(names []string) Bits {
	var union Bits
	known := false
	for _, name := range names {
		if name = normalName(name); name != "" {
			row := t.row(name)
			union.or(&row)
			known = true
		}
	}
	if !known {
		return t.Unknown
	}
	return union
}

// row is the row of one name in normal form.
func (t *NameTable) row(name string) Bits {
	var h hits
	h.add(t.groups[t.listed[name].at])
	for rest := name; ; {
		dot := strings.IndexByte(rest, '.')
		if dot < 0 {
			break
		}
		rest = rest[dot+1:]
		h.add(t.groups[t.listed[rest].below])
	}
	for _, patterns := range [][]scanned{t.keywords, t.expressions} {
		for _, p := range patterns {
			if p.pattern.matches(name) {
				h.add(t.groups[p.group])
			}
		}
	}
	return t.axis.row(&h)
}

func nameTable(a axis, occurrences []occurrence[Value], groups [][]use) NameTable {
	m := merger{groups: groups, merged: map[[2]group]group{}}
	listed := make(map[string]nameGroups, len(occurrences))
	keywords, expressions := map[string]scanned{}, map[string]scanned{}
	for _, o := range occurrences {
		switch p := o.value.(type) {
		case exactName:
			g := listed[string(p)]
			g.at = m.merge(g.at, o.group)
			listed[string(p)] = g
		case suffixName:
			name, onlyBelow := strings.CutPrefix(string(p), ".")
			g := listed[name]
			g.below = m.merge(g.below, o.group)
			if !onlyBelow {
				g.at = m.merge(g.at, o.group)
			}
			listed[name] = g
		case keywordName:
			keywords[string(p)] = scanned{p, m.merge(keywords[string(p)].group, o.group)}
		case regexName:
			expressions[p.source] = scanned{p, m.merge(expressions[p.source].group, o.group)}
		}
	}
	return NameTable{
		Unknown:     a.unknown(),
		Other:       a.row(&hits{}),
		axis:        a,
		groups:      m.groups,
		listed:      listed,
		keywords:    slices.Collect(maps.Values(keywords)),
		expressions: slices.Collect(maps.Values(expressions)),
	}
}

// merger makes groups of groups, each pair once.
type merger struct {
	groups [][]use
	merged map[[2]group]group
}

func (m *merger) merge(a, b group) group {
	if a == noGroup || a == b {
		return b
	}
	g, ok := m.merged[[2]group{a, b}]
	if !ok {
		uses := slices.Concat(m.groups[a], m.groups[b])
		slices.Sort(uses)
		g = group(len(m.groups))
		m.groups = append(m.groups, slices.Compact(uses))
		m.merged[[2]group{a, b}] = g
	}
	return g
}
