package sniff

import "encoding/binary"

const (
	maxConnectionID = 20 // RFC 9000 section 17.2
	minInitial      = 1200
)

// quicVersion is what differs between RFC 9000 with 9001 and RFC 9369 section 3.
type quicVersion struct {
	number         uint32
	initial, retry byte // types of long headers
	salt           []byte
	label          string // the common beginning of the keys' labels
}

var quicVersions = [...]quicVersion{
	{
		number: 0x00000001, initial: 0, retry: 3, label: "quic",
		salt: []byte("\x38\x76\x2c\xf7\xf5\x59\x34\xb3\x4d\x17\x9a\xe6\xa4\xc8\x0c\xad\xcc\xbb\x7f\x0a"),
	},
	{
		number: 0x6b3343cf, initial: 1, retry: 0, label: "quicv2",
		salt: []byte("\x0d\xed\xe3\xde\xf7\x00\xa6\xdb\x81\x93\x81\xbe\x6e\x26\x9d\xcb\xf9\xbd\x2e\xd9"),
	},
}

func versionOf(number uint32) *quicVersion {
	for i := range quicVersions {
		if quicVersions[i].number == number {
			return &quicVersions[i]
		}
	}
	return nil
}

// Datagram is what a client's datagram begins with, as far as it shows without keys.
type Datagram uint8

const (
	OtherDatagram     Datagram = iota // past the handshake, of an unknown version, or no QUIC at all
	HandshakeDatagram                 // a long header of a version that is known here
	InitialDatagram                   // and an Initial, in at least 1200 bytes: RFC 9000 sections 14.1 and 17.2.2, RFC 9369 section 3.2
)

// QUICDatagram looks at a datagram's first packet. A client that has sent something after its handshake sends no more Initials
// (RFC 9001 section 4.9.1), so one that comes then begins another connection. bpf/quic.h says the same.
func QUICDatagram(b []byte) Datagram {
	if len(b) < 5 || !isLong(b[0]) {
		return OtherDatagram
	}
	v := versionOf(binary.BigEndian.Uint32(b[1:]))
	switch {
	case v == nil:
		return OtherDatagram
	case longType(b[0]) == v.initial && len(b) >= minInitial:
		return InitialDatagram
	}
	return HandshakeDatagram
}

func isLong(first byte) bool   { return first&0xc0 == 0xc0 } // form and fixed bit
func longType(first byte) byte { return first >> 4 & 3 }

// packet is one with a long header: RFC 9000 section 17.2.
type packet struct {
	version     *quicVersion
	kind        byte
	destination []byte // connection ID
	number      int    // where in bytes the packet number is
	bytes       []byte
}

// parsePacket reads a datagram's first packet, and says how long it is; nil if that cannot be said.
func parsePacket(b []byte) (*packet, int) {
	r := newReader(b)
	first := r.peek()
	r.take(1)
	version := versionOf(uint32(r.number(4)))
	if !isLong(first) || version == nil || longType(first) == version.retry {
		return nil, 0 // 1-RTT has no version, and Retry and Version Negotiation are a server's
	}
	p := packet{version: version, kind: longType(first)}
	p.destination = r.take(r.number(1))
	source := r.take(r.number(1))
	if len(p.destination) > maxConnectionID || len(source) > maxConnectionID {
		return nil, 0
	}
	if p.kind == version.initial {
		r.take(r.length()) // token
	}
	length := r.length()
	p.number = r.at
	r.take(length)
	if !r.ok() {
		return nil, 0
	}
	p.bytes = b[:r.at]
	return &p, r.at
}
