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
	if len(part) == 0 || offset >= MaxStream {
		return
	}
	part = part[:min(len(part), MaxStream-offset)]
	if end := offset + len(part); end > len(a.bytes) {
		a.bytes = append(a.bytes, make([]byte, end-len(a.bytes))...)
		if words := (end + 63) / 64; words > len(a.come) {
			a.come = append(a.come, make([]uint64, words-len(a.come))...)
		}
	}
	for i, c := range part {
		at := offset + i
		if bit := uint64(1) << (at % 64); a.come[at/64]&bit == 0 {
			a.come[at/64] |= bit
			a.bytes[at] = c
		}
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
