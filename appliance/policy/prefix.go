package policy

import (
	"net/netip"
	"slices"
	"sort"
)

// prefixTable flattens nested prefixes: in sorted order a prefix follows those around it, so a stack of
// the open ones has what the current one inherits.
func prefixTable(a axis, occurrences []occurrence[netip.Prefix], groups [][]use) PrefixTable {
	slices.SortFunc(occurrences, func(x, y occurrence[netip.Prefix]) int { return x.value.Compare(y.value) })

	type open struct {
		prefix netip.Prefix
		class  Class
		entry  int32 // index of the nearest entry, -1: none
		hits   hits
	}
	stack := []open{{class: ClassOther, entry: -1}} // the bottom is every address, and no prefix
	r := a.rows()
	t := PrefixTable{Prefixes: make([]PrefixClass, 0, len(occurrences))}
	for len(occurrences) > 0 {
		prefix := occurrences[0].value
		for len(stack) > 1 && !stack[len(stack)-1].prefix.Overlaps(prefix) {
			stack = stack[:len(stack)-1]
		}
		parent := &stack[len(stack)-1]
		current := open{prefix, parent.class, parent.entry, parent.hits}
		for ; len(occurrences) > 0 && occurrences[0].value == prefix; occurrences = occurrences[1:] {
			current.hits.add(groups[occurrences[0].group])
		}
		// An entry that says what the one around it says is left out.
		if current.class = r.class(a.row(&current.hits)); current.class != parent.class {
			current.entry = int32(len(t.Prefixes))
			t.Prefixes = append(t.Prefixes, PrefixClass{prefix, current.class})
			t.around = append(t.around, parent.entry)
		}
		stack = append(stack, current)
	}
	t.Bits = r.bits()
	return t
}

// class is the longest-prefix match: the last entry that begins at or before the address, or the
// nearest entry around that one.
func (t *PrefixTable) class(addr netip.Addr) Class {
	if !addr.IsValid() {
		return ClassUnknown
	}
	i := sort.Search(len(t.Prefixes), func(i int) bool { return t.Prefixes[i].Prefix.Addr().Compare(addr) > 0 }) - 1
	for ; i >= 0; i = int(t.around[i]) {
		if t.Prefixes[i].Prefix.Contains(addr) {
			return t.Prefixes[i].Class
		}
	}
	return ClassOther
}
