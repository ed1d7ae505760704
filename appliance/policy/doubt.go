package policy

import (
	"iter"
	"math/bits"
	"slices"
)

// Matching yields the index of every rule that the flow satisfies, the deciding one first. It is for
// those who ask more of a flow than a policy can.
func (t *Tables) Matching(f Flow) iter.Seq[int] {
	f = f.normal()
	row := t.row(&f)
	names := t.Name.Bits(f.Names)
	return func(yield func(int) bool) {
		for w := range t.Words {
			for left := row[w] & names[w]; left != 0; left &= left - 1 {
				if !yield(w*64 + bits.TrailingZeros64(left)) {
					return
				}
			}
		}
	}
}

// Doubtful reports whether the flow's one true name might lead it to another outbound than Match says:
// its names disagree, or it has none and some rule that would come first looks at names. It may doubt where
// there is nothing to doubt, but never the other way round.
//
// Mirrored by bpf/doubt.h.
func (t *Tables) Doubtful(f Flow) bool {
	f = f.normal()
	possible, certain := t.all, t.Name.Unknown
	if f.named() {
		var each [][]string
		for _, name := range f.Names {
			each = append(each, []string{name})
		}
		possible, certain = t.Name.Bits(f.Names), t.Name.Common(each)
	}
	row := t.row(&f)
	return t.doubtful(&row, &possible, &certain)
}

// doubtful: whatever the name, the deciding rule is one of those that some name permits, and does not come
// after the first that every name permits. So these must have one outbound.
func (t *Tables) doubtful(row, possible, certain *Bits) bool {
	first := t.decide(*row, *possible)
	if first.Rule < 0 {
		return false
	}
	alike := t.Alike(first.Rule)
	for w := range t.Words {
		candidates := row[w] & possible[w]
		sure := candidates & certain[w]
		if sure != 0 {
			candidates &= sure ^ (sure - 1) // up to the lowest bit of sure
		}
		if candidates&^alike[w] != 0 {
			return true
		}
		if sure != 0 {
			return false
		}
	}
	return t.Default.Outbound != first.Outbound
}

// Alike are the rules that have the outbound of a rule.
func (t *Tables) Alike(rule int) Bits { return t.alike[t.Rules[rule].Outbound] }

// Common returns the rules that each of these sets of names permits, where Bits returns those that any name does. A set
// is a name with its aliases: it permits what one of them does. Without names it is Unknown.
func (t *NameTable) Common(sets [][]string) Bits {
	common, known := Bits{}, false
	for _, names := range sets {
		row := t.Bits(names)
		switch {
		case !slices.ContainsFunc(names, func(name string) bool { return normalName(name) != "" }):
		case known:
			common.and(&row)
		default:
			common, known = row, true
		}
	}
	if !known {
		return t.Unknown
	}
	return common
}
