package sniff

import "math/bits"

// assembly is the beginning of a byte stream whose parts come in any order, may overlap, and are not all needed: MaxStream bytes
// are. Of two contradicting parts the first one holds.
type assembly struct {
	bytes  []byte
	come   []uint64 // a bit for each byte
	before int      // all words of come before this one are full
}

func (a *assembly) insert(offset int, part []byte) {
	if offset >= MaxStream {
		return
	}
	part = part[:min(len(part), MaxStream-offset)]
	a.grow(offset + len(part))
	for i, c := range part {
		at := offset + i
		if bit := uint64(1) << (at % 64); a.come[at/64]&bit == 0 {
			a.come[at/64] |= bit
			a.bytes[at] = c
		}
	}
}

// grow makes room for the first end bytes. It doubles what there is, for the parts may be small, up to what is needed at most.
func (a *assembly) grow(end int) {
	if end > cap(a.bytes) {
		size := min(max(end, 2*cap(a.bytes)), MaxStream)
		a.bytes = append(make([]byte, 0, size), a.bytes...)
		a.come = append(make([]uint64, 0, (size+63)/64), a.come...)
	}
	if end > len(a.bytes) {
		a.bytes = a.bytes[:end]
		a.come = a.come[:(end+63)/64]
	}
}

// beginning is what has come without a gap.
func (a *assembly) beginning() []byte {
	for a.before < len(a.come) && a.come[a.before] == ^uint64(0) {
		a.before++
	}
	n := a.before * 64
	if a.before < len(a.come) {
		n += bits.TrailingZeros64(^a.come[a.before])
	}
	return a.bytes[:n]
}
