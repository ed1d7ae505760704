package policy

import (
	"slices"
	"strings"
)

// NameTable classifies sets of names. Names have no fixed classes: whoever learns a set of names
// stores its row, so that the kernel needs no strings.
type NameTable struct {
	Unknown Bits // the row of a flow without a name, as ClassUnknown elsewhere
	Other   Bits // the row of a name that no rule names, as ClassOther elsewhere

	axis     axis
	groups   [][]use
	listed   map[string]nameGroups // domains and suffixes, by name without a leading dot
	scanned  []scanned             // keywords, then expressions
	keywords int                   // how many of scanned
	index    automaton             // the keywords, and texts that the expressions require; owners are in scanned
	always   []uint32              // the expressions that require no text
}

// nameGroups are the uses of one listed name: for the name itself and for the names below it.
type nameGroups struct{ at, below group }

// scanned is a pattern that may be found anywhere in a name.
type scanned struct {
	pattern pattern
	group   group
}

// Bits returns the row of a flow that has any of these names, each with its aliases: the union of the names' rows,
// because the lowest rule that one of them leads to decides. Without names it is Unknown.
func (t *NameTable) Bits(names ...[]string) Bits {
	if len(names) == 0 {
		return t.Unknown
	}
	var union Bits
	for _, name := range names {
		row := t.row(name)
		union.or(&row)
	}
	return union
}

// row is the row of one name with its aliases.
func (t *NameTable) row(name []string) Bits {
	var h hits
	for _, alias := range name {
		t.find(normalName(alias), &h)
	}
	return t.axis.row(&h)
}

// find takes the uses of all values that match one name.
func (t *NameTable) find(name string, h *hits) {
	h.add(t.groups[t.listed[name].at])
	for rest := name; ; {
		dot := strings.IndexByte(rest, '.')
		if dot < 0 {
			break
		}
		rest = rest[dot+1:]
		h.add(t.groups[t.listed[rest].below])
	}
	t.scan(name, h)
}

// scan asks the keywords and expressions. Lists have hundreds of them, so only those whose text is in the name are tried,
// and each once however often a client repeats it.
func (t *NameTable) scan(name string, h *hits) {
	if len(t.scanned) == 0 {
		return
	}
	if !isASCII(name) { // no host's name: what expressions require was worked out for ASCII, where k is not also the kelvin sign
		for _, p := range t.scanned {
			if p.pattern.matches(name) {
				h.add(t.groups[p.group])
			}
		}
		return
	}
	for _, i := range t.always {
		t.try(i, name, h)
	}
	var few [16]uint64 // of most configurations; more are allocated when the first text is found
	tried := few[:]
	t.index.owners(name, func(i uint32) {
		if n := (len(t.scanned) + 63) / 64; n > len(tried) {
			tried = make([]uint64, n)
		}
		if bit := uint64(1) << (i % 64); tried[i/64]&bit == 0 {
			tried[i/64] |= bit
			t.try(i, name, h)
		}
	})
}

// try takes a keyword that the index found for matching: it is made of the index's symbols. An expression
// that would say nothing new, in a list of which something else matched, is not asked.
func (t *NameTable) try(i uint32, name string, h *hits) {
	p := &t.scanned[i]
	uses := t.groups[p.group]
	if int(i) < t.keywords || !h.have(uses) && p.pattern.matches(name) {
		h.add(uses)
	}
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
	t := NameTable{
		Unknown: a.unknown(),
		Other:   a.row(&hits{}),
		axis:    a,
		groups:  m.groups,
		listed:  listed,
	}
	var texts []wanted
	for keyword, p := range keywords {
		texts = append(texts, wanted{keyword, uint32(len(t.scanned))})
		t.scanned = append(t.scanned, p)
	}
	t.keywords = len(keywords)
	for _, p := range expressions {
		owner := uint32(len(t.scanned))
		required, ok := requiredTexts(p.pattern.(regexName).re.String())
		if !ok {
			t.always = append(t.always, owner)
		}
		for _, text := range required {
			texts = append(texts, wanted{text, owner})
		}
		t.scanned = append(t.scanned, p)
	}
	t.index = newAutomaton(texts)
	return t
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
