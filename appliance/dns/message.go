package dns

import (
	"encoding/binary"

	"github.com/miekg/dns"
)

// Sizes of the wire format (RFC 1035 section 4.1).
const (
	headerSize = 12
	maxName    = 255
	maxMessage = 1<<16 - 1
	minReply   = 512  // what every client takes by UDP
	maxReply   = 1232 // what passes every path in one piece (DNS Flag Day 2020)
	optSize    = 11   // an OPT record without options
)

// Bits of the header's second pair of bytes.
const (
	flagResponse  = 1 << 15
	flagTruncated = 1 << 9
	flagDesired   = 1 << 8 // recursion
	flagAvailable = 1 << 7 // recursion
	flagAuthentic = 1 << 5
	flagUnchecked = 1 << 4
)

// query is a query as far as an answer depends on it. Its slices are parts of the datagram.
type query struct {
	id, flags uint16
	question  []byte // name, type and class as the client wrote them, case included; nil if it is unreadable
	qtype     uint16
	class     uint16
	edns      bool
	version   uint8 // of EDNS
	size      uint16
	do        bool // DNSSEC records are wanted
}

// parse reads a query. An rcode other than success is the answer it deserves; ok is false if it deserves
// none: it is an answer itself, or not even a header.
func (q *query) parse(b []byte) (rcode int, ok bool) {
	*q = query{}
	if len(b) < headerSize {
		return 0, false
	}
	q.id = binary.BigEndian.Uint16(b)
	q.flags = binary.BigEndian.Uint16(b[2:])
	if q.flags&flagResponse != 0 {
		return 0, false
	}
	if q.opcode() != dns.OpcodeQuery {
		return dns.RcodeNotImplemented, true
	}
	if binary.BigEndian.Uint16(b[4:]) != 1 {
		return dns.RcodeFormatError, true
	}
	end := plainName(b, headerSize)
	if end < 0 || end+4 > len(b) {
		return dns.RcodeFormatError, true
	}
	q.qtype = binary.BigEndian.Uint16(b[end:])
	q.class = binary.BigEndian.Uint16(b[end+2:])
	q.question = b[headerSize : end+4]
	if !q.parseRecords(b, end+4) {
		return dns.RcodeFormatError, true
	}
	return dns.RcodeSuccess, true
}

// parseRecords looks for OPT among the records after the question. Queries have other ones (TSIG) rarely,
// and answers do not depend on them.
func (q *query) parseRecords(b []byte, at int) bool {
	others := int(binary.BigEndian.Uint16(b[6:])) + int(binary.BigEndian.Uint16(b[8:]))
	additional := int(binary.BigEndian.Uint16(b[10:]))
	for i := range others + additional {
		r, next, ok := readRecord(b, at)
		if !ok {
			return false
		}
		if r.rtype == dns.TypeOPT {
			if i < others || q.edns || b[at] != 0 {
				return false // RFC 6891 section 6.1.1: one, in the additional section, owned by the root
			}
			q.edns = true
			q.size = r.class
			q.version = uint8(r.ttl >> 16)
			q.do = r.ttl&(1<<15) != 0
		}
		at = next
	}
	return at == len(b)
}

func (q *query) unchecked() bool { return q.flags&flagUnchecked != 0 }

func (q *query) opcode() int { return int(q.flags >> 11 & 15) }

// name is the question's name in wire form.
func (q *query) name() []byte { return q.question[:len(q.question)-4] }

// limit is how long an answer by UDP may be.
func (q *query) limit() int {
	if !q.edns {
		return minReply
	}
	return int(min(max(q.size, minReply), maxReply))
}

// replyFlags are the flags of an answer to the query.
func (q *query) replyFlags(rcode int, authentic bool) uint16 {
	const echoed = 15<<11 | flagDesired | flagUnchecked
	flags := flagResponse | flagAvailable | q.flags&echoed | uint16(rcode&15)
	if authentic && (q.do || q.flags&flagAuthentic != 0) { // RFC 6840 section 5.8
		flags |= flagAuthentic
	}
	return flags
}

// appendOPT answers EDNS with EDNS. The rcode's upper bits are in it.
func (q *query) appendOPT(b []byte, rcode int) []byte {
	if !q.edns {
		return b
	}
	var do byte
	if q.do {
		do = 1 << 7
	}
	return append(b, 0, 0, byte(dns.TypeOPT), maxReply>>8, maxReply&255, byte(rcode>>4), 0, do, 0, 0, 0)
}

// appendBare appends an answer without records.
func (q *query) appendBare(b []byte, rcode int, flags uint16) []byte {
	flags |= q.replyFlags(rcode, false)
	var questions, additional byte
	if q.question != nil {
		questions = 1
	}
	if q.edns {
		additional = 1
	}
	b = append(b, byte(q.id>>8), byte(q.id), byte(flags>>8), byte(flags), 0, questions, 0, 0, 0, 0, 0, additional)
	b = append(b, q.question...)
	return q.appendOPT(b, rcode)
}

// record is the fixed part of a resource record.
type record struct {
	rtype, class uint16
	ttl          uint32
	ttlAt        int // where the TTL is
}

// readRecord reads the record at an offset and returns where the next one begins.
func readRecord(b []byte, at int) (r record, next int, ok bool) {
	at = skipName(b, at)
	if at < 0 || at+10 > len(b) {
		return r, 0, false
	}
	r.rtype = binary.BigEndian.Uint16(b[at:])
	r.class = binary.BigEndian.Uint16(b[at+2:])
	r.ttlAt = at + 4
	r.ttl = binary.BigEndian.Uint32(b[at+4:])
	next = at + 10 + int(binary.BigEndian.Uint16(b[at+8:]))
	return r, next, next <= len(b)
}

// plainName returns the end of a name without compression, or -1. The first name of a message can be no
// other: there is nothing before it to point to.
func plainName(b []byte, at int) int {
	start := at
	for at < len(b) && at-start < maxName {
		length := int(b[at])
		at++
		if length == 0 {
			return at
		}
		if length > 63 {
			return -1
		}
		at += length
	}
	return -1
}

// skipName returns the end of a name, compressed or not, or -1. It does not follow pointers.
func skipName(b []byte, at int) int {
	start := at
	for at < len(b) && at-start < maxName {
		length := int(b[at])
		switch {
		case length == 0:
			return at + 1
		case length >= 192:
			if at+2 > len(b) {
				return -1
			}
			return at + 2
		case length > 63:
			return -1
		}
		at += 1 + length
	}
	return -1
}

// findTTLs returns where the TTLs of a message's records are, OPT's not among them.
func findTTLs(b []byte) (offsets []uint16, ok bool) {
	if len(b) < headerSize || len(b) > maxMessage-optSize {
		return nil, false
	}
	at := headerSize
	for range binary.BigEndian.Uint16(b[4:]) {
		if at = skipName(b, at); at < 0 || at+4 > len(b) {
			return nil, false
		}
		at += 4
	}
	records := int(binary.BigEndian.Uint16(b[6:])) + int(binary.BigEndian.Uint16(b[8:])) + int(binary.BigEndian.Uint16(b[10:]))
	for range records {
		r, next, ok := readRecord(b, at)
		if !ok {
			return nil, false
		}
		if r.rtype != dns.TypeOPT {
			offsets = append(offsets, uint16(r.ttlAt))
		}
		at = next
	}
	return offsets, at == len(b)
}

// appendLower appends a name in wire form in lower case. The lengths of labels are below 'A'.
func appendLower(b, name []byte) []byte {
	for _, c := range name {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		b = append(b, c)
	}
	return b
}

// appendWire appends a kept message as the answer to the query: with its id, flags, case and EDNS, and the
// time that is left. If it is longer than limit only the question is appended, marked as truncated.
func (q *query) appendWire(b []byte, e *entry, left uint32, limit int) (_ []byte, whole bool) {
	size := len(e.wire)
	if q.edns {
		size += optSize
	}
	if size > limit {
		return q.appendBare(b, e.rcode, flagTruncated), false
	}
	start := len(b)
	b = append(b, e.wire...)
	m := b[start:]
	binary.BigEndian.PutUint16(m, q.id)
	binary.BigEndian.PutUint16(m[2:], q.replyFlags(e.rcode, e.authentic))
	if q.edns {
		m[11] = 1 // additional records: a kept message has none
	}
	copy(m[headerSize:], q.question)
	for _, at := range e.ttls {
		binary.BigEndian.PutUint32(m[at:], left)
	}
	return q.appendOPT(b, e.rcode), true
}
