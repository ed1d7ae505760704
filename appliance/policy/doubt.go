package policy

import (
	"iter"
	"math/bits"
)

// Matching yields the index of every rule that the flow satisfies, the deciding one first. It is for
// those who ask more of a flow than a policy can.
func (t *Tables) Matching(f Flow) iter.Seq[int] {
	f = f.normal()
	row := t.row(&f)
	names := t.Name.Bits(f.NameSets()...)
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

// Doubtful reports whether the flow's one true name might lead it elsewhere than Match says:
// its names disagree, or it has none and some rule that would come first looks at names. It may doubt where
// there is nothing to doubt, but never the other way round.
//
// Mirrored by is_doubtful in bpf/policy.h.
func (t *Tables) Doubtful(f Flow) bool {
	f = f.normal()
	possible, certain := t.all, t.Name.Unknown
	if names := f.NameSets(); names != nil {
		possible, certain = t.Name.Bits(names...), t.Name.Common(names...)
	}
	row := t.row(&f)
	return t.doubtful(&row, &possible, &certain)
}

// doubtful: whatever the name, the deciding rule is one of those that some name permits, and does not come
// after the first that every name permits. So these must lead to one place.
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
	return !t.sameOutcome(first.Rule, -1)
}

// Alike are the rules that lead a flow where a rule does, or for -1 the default: to the same outbound, with the same
// mark and translation.
func (t *Tables) Alike(rule int) Bits { return t.alike[t.outcome(rule)] }

// Common returns the rules that each of these names permits, where Bits returns those that any does.
func (t *NameTable) Common(names ...[]string) Bits {
	if len(names) == 0 {
		return t.Unknown
	}
	common := t.row(names[0])
	for _, name := range names[1:] {
		row := t.row(name)
		common.and(&row)
	}
	return common
}
