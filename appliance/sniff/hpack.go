package sniff

// HPACK (RFC 7541), as much of it as the first block of a connection needs. golang.org/x/net has a decoder, but this package
// sees only the standard library, which keeps its own to itself.
//
// There is no dynamic table. It holds fields that came before, and the search ends with the first that has the name; so an
// index into it stands for one that was looked at already, and only has to be stepped over.

// requestAuthority is what a request's fields call its authority: ":authority", or "host" of a client that translates from
// HTTP/1 (RFC 9113 section 8.3.1). The block may be cut off anywhere unless it is whole.
func requestAuthority(block []byte, whole bool) (string, Status) {
	r := newReader(block)
	if !whole {
		r.end = MaxStream // nobody waits for more than that
	}
	regular := false // pseudo-header fields come before all others
	for r.more() {
		name, value, known := nextField(&r)
		switch {
		case !r.ok():
			return "", r.stopped
		case !known:
		case name == ":authority" && !regular, name == "host":
			return value, Found
		case name == "" || name[0] == ':' && regular:
			return "", Nothing
		case name[0] != ':':
			regular = true
		}
	}
	return "", Nothing
}

// nextField reads one representation: RFC 7541 section 6. It is not known what a field of the dynamic table is; nor is a change of
// that table's size any field.
func nextField(r *reader) (name, value string, known bool) {
	index := 0
	switch first := r.peek(); {
	case first&0x80 != 0: // indexed
		if index = integer(r, 7); index == 0 {
			r.refuse()
		}
		name, known = staticName(index)
		return name, "", known // none of the static values is a host's
	case first&0x40 != 0: // literal, to be put into the table
		index = integer(r, 6)
	case first&0x20 != 0: // the table's size
		integer(r, 5)
		return "", "", false
	default: // literal
		index = integer(r, 4)
	}
	if index == 0 {
		name, known = text(r), true
	} else {
		name, known = staticName(index)
	}
	return name, text(r), known
}

func staticName(index int) (string, bool) {
	if index < 1 || index > len(staticNames) {
		return "", false
	}
	return staticNames[index-1], true
}

// integer is RFC 7541 section 5.1. Nothing that it counts here is large.
func integer(r *reader, prefix int) int {
	most := 1<<prefix - 1
	n := r.number(1) & most
	if n < most {
		return n
	}
	for shift := 0; shift < 28; shift += 7 {
		c := r.number(1)
		n += c & 0x7f << shift
		if c&0x80 == 0 {
			return n
		}
	}
	r.refuse()
	return 0
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
