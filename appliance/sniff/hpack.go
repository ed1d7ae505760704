package sniff

// HPACK (RFC 7541), as much of it as the first block of a connection needs. golang.org/x/net has a decoder, but this
// package sees only the standard library, which keeps its own to itself.

const (
	// tableLimit is SETTINGS_HEADER_TABLE_SIZE until the server has said another, and what it says comes later.
	tableLimit    = 4096
	entryOverhead = 32 // RFC 7541 section 4.1
)

type field struct{ name, value string }

func (f field) size() int { return len(f.name) + len(f.value) + entryOverhead }

// fieldTable is the dynamic table, the newest entry last: RFC 7541 section 2.3.2.
type fieldTable struct {
	entries     []field
	size, limit int
}

func (t *fieldTable) add(f field) {
	t.entries = append(t.entries, f)
	t.size += f.size()
	t.evict() // an entry that is larger than the table empties it: section 4.4
}

func (t *fieldTable) evict() {
	for t.size > t.limit {
		t.size -= t.entries[0].size()
		t.entries = t.entries[1:]
	}
}

// at is the entry of an index, which counts from 1, through the static table and then from the newest entry on.
func (t *fieldTable) at(index int) (field, bool) {
	if index < 1 {
		return field{}, false
	}
	if index <= len(staticNames) {
		return field{name: staticNames[index-1]}, true
	}
	if index -= len(staticNames); index > len(t.entries) {
		return field{}, false
	}
	return t.entries[len(t.entries)-index], true
}

// requestAuthority is what the request's fields call its authority: ":authority", or "host" of a client that translates from
// HTTP/1 (RFC 9113 section 8.3.1). The block may be cut off anywhere unless it is whole.
func requestAuthority(block []byte, whole bool) (string, Status) {
	r := newReader(block)
	if !whole {
		r.end = MaxStream // more may come than there is; nobody waits for more than that
	}
	table := fieldTable{limit: tableLimit}
	regular := false // pseudo-header fields come before all others
	for r.more() {
		f, isField := table.next(&r)
		switch {
		case !r.ok():
			return "", r.stopped
		case !isField:
		case f.name == ":authority" && !regular:
			return f.value, Found
		case f.name == "":
			return "", Nothing
		case f.name[0] != ':':
			if regular = true; f.name == "host" {
				return f.value, Found
			}
		case regular:
			return "", Nothing
		}
	}
	return "", Nothing
}

// next reads one representation (RFC 7541 section 6), which is a field or a change of the table's size.
func (t *fieldTable) next(r *reader) (f field, isField bool) {
	first := r.peek()
	switch {
	case first&0x80 != 0: // indexed
		f, ok := t.at(integer(r, 7))
		if !ok {
			r.refuse()
		}
		return f, true
	case first&0x40 != 0: // literal, to be indexed
		f = t.literal(r, 6)
		if r.ok() {
			t.add(f)
		}
		return f, true
	case first&0x20 != 0: // the table's size
		size := integer(r, 5)
		if size > tableLimit {
			r.refuse()
			return field{}, false
		}
		t.limit = size
		t.evict()
		return field{}, false
	}
	return t.literal(r, 4), true // not to be indexed, or never
}

func (t *fieldTable) literal(r *reader, prefix int) (f field) {
	if index := integer(r, prefix); index != 0 {
		indexed, ok := t.at(index)
		if !ok {
			r.refuse()
		}
		f.name = indexed.name
	} else {
		f.name = text(r)
	}
	f.value = text(r)
	return f
}

// integer is RFC 7541 section 5.1. Nothing that it counts here is large.
func integer(r *reader, prefix int) int {
	most := 1<<prefix - 1
	n := r.number(1) & most
	if n < most {
		return n
	}
	for shift := 0; ; shift += 7 {
		c := r.number(1)
		n += c & 0x7f << shift
		if c&0x80 == 0 {
			return n
		}
		if shift == 21 {
			r.refuse()
			return 0
		}
	}
}

// text is a string literal: RFC 7541 section 5.2.
func text(r *reader) string {
	huffman := r.peek()&0x80 != 0
	b := r.take(integer(r, 7))
	if !huffman {
		return string(b)
	}
	decoded, ok := unhuffman(b)
	if !ok {
		r.refuse()
	}
	return string(decoded)
}
