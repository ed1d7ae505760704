package policy

import (
	"hash/maphash"
	"slices"
)

// hits is what the values of one dimension that match a fact say together.
type hits struct{ is, not Bits }

func (h *hits) add(uses []use) {
	for _, u := range uses {
		if u.negated() {
			h.not.set(u.rule())
		} else {
			h.is.set(u.rule())
		}
	}
}

// have reports whether add would change nothing.
func (h *hits) have(uses []use) bool {
	for _, u := range uses {
		side := &h.is
		if u.negated() {
			side = &h.not
		}
		if side[u.rule()/64]>>(u.rule()%64)&1 == 0 {
			return false
		}
	}
	return true
}

func (h *hits) put(u use, on bool) {
	side := &h.is
	if u.negated() {
		side = &h.not
	}
	side[u.rule()/64] &^= 1 << (u.rule() % 64)
	if on {
		side.set(u.rule())
	}
}

// axis is what the rules ask of one dimension, whatever the values: all rules, those with a condition
// in it, and those with one under not.
type axis struct{ all, is, not Bits }

// row permits the rules that ask nothing, or something that hits, unless a negated value hits.
func (a *axis) row(h *hits) Bits {
	row := a.all
	row.andNot(&a.is)
	row.or(&h.is)
	row.andNot(&h.not)
	return row
}

// unknown permits the rules that ask nothing.
func (a *axis) unknown() Bits {
	row := a.all
	row.andNot(&a.is)
	row.andNot(&a.not)
	return row
}

// rows interns the rows of one table. A map keyed by the row itself would hold each row twice, and one
// growing slice would leave several copies of them to the garbage collector.
type rows struct {
	slabs [][]Bits // full but the last
	index map[uint64]Class
	seed  maphash.Seed
}

const slabRows = 256

// newRows begins a table with the rows of ClassUnknown and ClassOther. Only ClassOther is shared with
// values: a known value must never be taken for an unknown one.
func newRows(unknown, other Bits) *rows {
	r := &rows{index: map[uint64]Class{}, seed: maphash.MakeSeed()}
	r.add(unknown)
	r.class(other)
	return r
}

func (r *rows) class(row Bits) Class {
	for h := maphash.Comparable(r.seed, row); ; h++ { // the next hash where two rows share one
		c, ok := r.index[h]
		if !ok {
			r.index[h] = r.add(row)
			return r.index[h]
		}
		if r.slabs[c/slabRows][c%slabRows] == row {
			return c
		}
	}
}

func (r *rows) add(row Bits) Class {
	last := len(r.slabs) - 1
	if last < 0 || len(r.slabs[last]) == slabRows {
		r.slabs = append(r.slabs, nil)
		last++
	}
	r.slabs[last] = append(r.slabs[last], row)
	return Class(last*slabRows + len(r.slabs[last]) - 1)
}

func (r *rows) bits() []Bits { return slices.Concat(r.slabs...) }

func (a *axis) rows() *rows { return newRows(a.unknown(), a.row(&hits{})) }

func (b *Bits) set(i int) { b[i/64] |= 1 << (i % 64) }

func (b *Bits) and(c *Bits) {
	for i := range b {
		b[i] &= c[i]
	}
}

func (b *Bits) andNot(c *Bits) {
	for i := range b {
		b[i] &^= c[i]
	}
}

func (b *Bits) or(c *Bits) {
	for i := range b {
		b[i] |= c[i]
	}
}
