package dns

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// FuzzQuery compares our reading of queries with miekg's, and tries what the answers to them look like.
func FuzzQuery(f *testing.F) {
	for _, change := range []func(*dns.Msg){
		func(*dns.Msg) {},
		func(m *dns.Msg) { m.SetEdns0(4096, true) },
		func(m *dns.Msg) { m.Question = nil },
		func(m *dns.Msg) { m.Question[0].Name = "." },
		func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate },
		func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		func(m *dns.Msg) {
			m.SetEdns0(512, false)
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}}
		},
		func(m *dns.Msg) {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "www.example.", Rrtype: 1, Class: 1}, A: []byte{1, 2, 3, 4}}}
			m.Compress = true
		},
	} {
		m := question("WWW.example", dns.TypeA)
		change(m)
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	d := over(f, exchangeFunc(func(q *dns.Msg) *dns.Msg {
		m := new(dns.Msg)
		m.SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			m.Answer = anyAnswer(q).Answer
		}
		return m
	}), nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxMessage {
			return
		}
		var q query
		rcode, ok := q.parse(b)
		theirs := new(dns.Msg)
		err := theirs.Unpack(b)
		if ok && rcode == dns.RcodeSuccess && err == nil {
			compareQuery(t, &q, theirs)
		}
		if wellFormed := err == nil && !theirs.Response && theirs.Opcode == dns.OpcodeQuery && len(theirs.Question) == 1 && repacks(theirs, b); wellFormed && (!ok || rcode != dns.RcodeSuccess) {
			t.Errorf("refused (%v, rcode %d):\n%v", ok, rcode, theirs)
		}
		for range 2 { // asked, then cached
			answer, _ := d.wire(client4, slices.Clone(b))
			if len(answer) == 0 {
				if ok {
					t.Fatal("no answer")
				}
				return
			}
			if len(answer) > max(q.limit(), len(b)+optSize) {
				t.Fatalf("%d bytes of answer, at most %d", len(answer), q.limit())
			}
			if !bytes.Equal(answer[:2], b[:2]) || answer[2]&0x80 == 0 || answer[2]&0x78 != b[2]&0x78 {
				t.Fatalf("the header %x is no answer to %x", answer[:12], b[:12])
			}
			if binary.BigEndian.Uint16(answer[4:]) == 1 && !bytes.HasPrefix(answer[12:], b[12:12+len(q.question)]) {
				t.Fatal("the question is another")
			}
			if err := new(dns.Msg).Unpack(answer); err != nil {
				t.Fatalf("the answer %x: %v", answer, err)
			}
		}
	})
}

// repacks reports whether a message is what its reading would be written as: nothing follows it, and
// nothing in it is read with indulgence.
func repacks(m *dns.Msg, b []byte) bool {
	again, err := m.Pack()
	return err == nil && bytes.Equal(again, b)
}

func compareQuery(t *testing.T, q *query, theirs *dns.Msg) {
	if len(theirs.Question) != 1 {
		return // miekg's package stops reading where a question is cut off
	}
	name, _, err := dns.UnpackDomainName(q.name(), 0)
	if err != nil || name != theirs.Question[0].Name || q.qtype != theirs.Question[0].Qtype || q.class != theirs.Question[0].Qclass {
		t.Errorf("question %q %d %d (%v), theirs %v", name, q.qtype, q.class, err, theirs.Question[0])
	}
	opt := theirs.IsEdns0()
	if q.edns != (opt != nil) {
		t.Fatalf("EDNS %v, theirs %v", q.edns, opt)
	}
	if opt != nil && (q.do != opt.Do() || q.version != opt.Version() || q.size != opt.UDPSize()) {
		t.Errorf("EDNS %v %d %d, theirs %v", q.do, q.version, q.size, opt)
	}
}

// FuzzAnswer gives upstreams' messages to everything that reads them: what clients get is well-formed, has
// the question's chain only, and no address that was not taught.
func FuzzAnswer(f *testing.F) {
	z := newZone(f, "www.example. 60 CNAME b.example.", "b.example. 60 A 192.0.2.1", "b.example. 60 AAAA 2001:db8::1",
		"b.example. 60 HTTPS 1 . alpn=h2 ipv4hint=127.0.0.1,192.0.2.1 ech=AAAA", "b.example. 60 TXT x", "example. 60 SOA a. b. 1 2 3 4 5")
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeTXT, dns.TypeMX} {
		b, err := z.answer(question("www.example", qtype)).Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, qtype)
	}
	var m *dns.Msg
	d := over(f, exchangeFunc(func(*dns.Msg) *dns.Msg { return m }), func(s *Settings) { s.StripECH, s.IPVersion = true, Only4 })
	f.Fuzz(func(t *testing.T, b []byte, qtype uint16) {
		m = new(dns.Msg)
		if m.Unpack(b) != nil {
			return
		}
		if qtype == dns.TypeANY || qtype == dns.TypeOPT || qtype >= 128 && qtype < 255 || qtype == 0 {
			return
		}
		d.pupil.forget()
		d.age(1000 * time.Hour)
		q := question("www.example", qtype)
		q.SetEdns0(maxReply, true)
		packet, err := q.Pack()
		if err != nil {
			return
		}
		packet = d.server.respond(t.Context(), arrival{packet: packet, client: client4.As16(), limit: wholeFrame})
		got := new(dns.Msg)
		if err := got.Unpack(packet); err != nil {
			t.Fatalf("the answer %x: %v", packet, err)
		}
		for _, record := range got.Answer {
			if s := service(record); s != nil && slices.ContainsFunc(s.Value, func(v dns.SVCBKeyValue) bool { return v.Key() == dns.SVCB_ECHCONFIG }) {
				t.Errorf("not stripped:\n%v", got)
			}
		}
		for _, a := range (&answer{records: got.Answer}).addresses() {
			if isPrivate(a) {
				t.Errorf("%s passed:\n%v", a, got)
			}
			if !slices.ContainsFunc(d.pupil.all(), func(l taughtLesson) bool { return slices.Contains(l.addrs, a) }) {
				t.Errorf("%s was not taught:\n%v", a, got)
			}
		}
	})
}
