package exchange

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

const (
	// udpSize is what we offer to take by UDP, in bytes: it crosses any path without fragments, which
	// an off-path attacker could replace (RFC 9715).
	udpSize = 1232
	// padBlock is the multiple to which encrypted questions are padded, in bytes (RFC 8467 section 4.1).
	padBlock   = 128
	headerSize = 12
)

// shape is what a transport wants of its questions.
type shape struct {
	randomCase bool // draft-vixie-dnsext-dns0x20: 1 more random bit for each letter
	padded     bool
	bare       bool // without EDNS, for servers that do not know it
}

// question is a query on its way to an upstream.
type question struct {
	shape
	asked *dns.Msg // the caller's
	name  string   // the name as sent
	wire  []byte   // with the id 0
}

// reply is what answers a question.
type reply struct {
	*dns.Msg
	keepsCase bool // the server repeated the name as it was sent, byte for byte
}

// What a message that does not answer a question is. Such errors do not speak against the connection.
var (
	errTruncated = &badAnswer{"the answer is truncated"}
	errNotOurs   = &badAnswer{"the answer is to another question"}
)

type badAnswer struct{ reason string }

func (e *badAnswer) Error() string { return e.reason }

func isBadAnswer(err error) bool {
	var bad *badAnswer
	return errors.As(err, &bad)
}

// oneHop are the EDNS options that concern a client and the server that it talks to, and nobody behind.
var oneHop = []uint16{dns.EDNS0COOKIE, dns.EDNS0TCPKEEPALIVE, dns.EDNS0PADDING}

func newQuestion(asked *dns.Msg, s shape) (*question, error) {
	q := &question{shape: s, asked: asked, name: asked.Question[0].Name}
	if s.randomCase {
		q.name = randomCase(q.name)
	}
	m := &dns.Msg{MsgHdr: dns.MsgHdr{
		RecursionDesired:  asked.RecursionDesired,
		AuthenticatedData: asked.AuthenticatedData,
		CheckingDisabled:  asked.CheckingDisabled,
	}}
	m.Question = []dns.Question{{Name: q.name, Qtype: asked.Question[0].Qtype, Qclass: asked.Question[0].Qclass}}
	if !s.bare {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(udpSize)
		if theirs := asked.IsEdns0(); theirs != nil {
			opt.SetDo(theirs.Do())
			opt.Option = passedOn(theirs.Option)
		}
		m.Extra = []dns.RR{opt}
		if s.padded {
			padding := &dns.EDNS0_PADDING{}
			opt.Option = append(opt.Option, padding)
			padding.Padding = make([]byte, (padBlock-m.Len()%padBlock)%padBlock)
		}
	}
	var err error
	if q.wire, err = m.Pack(); err != nil {
		return nil, fmt.Errorf("packing the question: %w", err)
	}
	return q, nil
}

// passedOn is the options that are for whoever answers.
func passedOn(options []dns.EDNS0) []dns.EDNS0 {
	return slices.DeleteFunc(slices.Clone(options), func(o dns.EDNS0) bool { return slices.Contains(oneHop, o.Option()) })
}

// packet is the question with an id, after room bytes of something else.
func (q *question) packet(room int, id uint16) []byte {
	b := append(make([]byte, room, room+len(q.wire)), q.wire...)
	binary.BigEndian.PutUint16(b[room:], id)
	return b
}

// read takes a message that came for the question with that id. The error is a *badAnswer.
func (q *question) read(wire []byte, id uint16) (reply, error) {
	if len(wire) < headerSize {
		return reply{}, &badAnswer{"the answer is shorter than a header"}
	}
	flags := binary.BigEndian.Uint16(wire[2:])
	const response, opcode, truncated = 1 << 15, 0xf << 11, 1 << 9
	if binary.BigEndian.Uint16(wire) != id || flags&response == 0 || flags&opcode != 0 || binary.BigEndian.Uint16(wire[4:]) != 1 {
		return reply{}, errNotOurs
	}
	// The question is looked at before the rest, since what is truncated need not be complete.
	name, end, err := dns.UnpackDomainName(wire, headerSize)
	if err != nil || len(wire) < end+4 || !strings.EqualFold(name, q.name) ||
		binary.BigEndian.Uint16(wire[end:]) != q.asked.Question[0].Qtype ||
		binary.BigEndian.Uint16(wire[end+2:]) != q.asked.Question[0].Qclass {
		return reply{}, errNotOurs
	}
	r := reply{new(dns.Msg), name == q.name}
	if flags&truncated != 0 {
		return r, errTruncated
	}
	if err := r.Unpack(wire); err != nil {
		return reply{}, &badAnswer{"the answer is malformed: " + err.Error()}
	}
	// The library takes a message that ends after any section for a whole one: an answer that is cut
	// off would be one without records, which means that the name has none.
	for i, section := range [][]dns.RR{r.Answer, r.Ns, r.Extra} {
		if len(section) != int(binary.BigEndian.Uint16(wire[6+2*i:])) {
			return reply{}, &badAnswer{"the answer is cut off"}
		}
	}
	return r, q.present(r)
}

// present turns an upstream's answer into one to the caller's message.
func (q *question) present(r reply) error {
	r.Id = q.asked.Id
	r.Question = slices.Clone(q.asked.Question)
	for _, section := range [][]dns.RR{r.Answer, r.Ns, r.Extra} {
		for _, rr := range section {
			rr.Header().Name = q.respell(rr.Header().Name)
			if c, ok := rr.(*dns.CNAME); ok {
				c.Target = q.respell(c.Target)
			}
		}
	}
	opt := r.IsEdns0()
	if opt == nil {
		return nil
	}
	if q.asked.IsEdns0() != nil {
		opt.Option = passedOn(opt.Option)
		return nil
	}
	if r.Rcode > 0xf { // its upper bits are in the OPT record, which the caller could not read
		return &badAnswer{fmt.Sprintf("the answer has the response code %d", r.Rcode)}
	}
	r.Extra = slices.DeleteFunc(r.Extra, func(rr dns.RR) bool { return rr == opt })
	return nil
}

// respell gives a name back the case that the caller wrote: servers compress names to pointers into the
// question, where the case is random.
func (q *question) respell(name string) string {
	if q.name == q.asked.Question[0].Name {
		return name
	}
	// The longest common ending, on a label's boundary.
	same := 0
	for i, j := len(name), len(q.name); i > 0 && j > 0 && name[i-1] == q.name[j-1]; i, j = i-1, j-1 {
		same++
	}
	for same > 0 && same < len(name) && name[len(name)-same-1] != '.' {
		same--
	}
	return name[:len(name)-same] + q.asked.Question[0].Name[len(q.name)-same:]
}

// randomCase makes each letter upper or lower case by chance.
func randomCase(name string) string {
	b := []byte(name)
	coins := make([]byte, len(b))
	rand.Read(coins)
	for i, c := range b {
		if c|0x20 >= 'a' && c|0x20 <= 'z' {
			b[i] = c ^ coins[i]&0x20
		}
	}
	return string(b)
}

func randomID() uint16 {
	var b [2]byte
	rand.Read(b[:])
	return binary.BigEndian.Uint16(b[:])
}

// knowsNoEDNS is how servers from before RFC 6891 refuse a question with an OPT record.
func (r reply) knowsNoEDNS() bool {
	return (r.Rcode == dns.RcodeFormatError || r.Rcode == dns.RcodeNotImplemented) && r.IsEdns0() == nil
}
