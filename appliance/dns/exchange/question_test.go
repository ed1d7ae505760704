package exchange

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func mustAsk(t testing.TB, asked *dns.Msg, s shape) *question {
	t.Helper()
	q, err := newQuestion(asked, s)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// TestQuestion looks at what is sent for what is asked.
func TestQuestion(t *testing.T) {
	asked := query("www.example.", dns.TypeHTTPS)
	asked.CheckingDisabled, asked.AuthenticatedData = true, true
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	opt.SetUDPSize(4096)
	opt.SetDo()
	opt.Option = []dns.EDNS0{
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"},
		&dns.EDNS0_NSID{Code: dns.EDNS0NSID},
		&dns.EDNS0_TCP_KEEPALIVE{Code: dns.EDNS0TCPKEEPALIVE},
		&dns.EDNS0_PADDING{Padding: make([]byte, 7)},
	}
	asked.Extra = []dns.RR{opt}
	before := asked.Copy()

	sent := unpack(mustAsk(t, asked, shape{}).packet(0, 0xabcd))
	got := sent.IsEdns0()
	if sent.Id != 0xabcd || !sent.RecursionDesired || !sent.CheckingDisabled || !sent.AuthenticatedData || !reflect.DeepEqual(sent.Question, asked.Question) {
		t.Errorf("sent %v", sent)
	}
	if got == nil || got.UDPSize() != udpSize || !got.Do() || len(got.Option) != 1 || got.Option[0].Option() != dns.EDNS0NSID {
		t.Errorf("sent the options %v", got)
	}
	if asked.String() != before.String() {
		t.Errorf("the question was changed to %v", asked)
	}
	if sent := unpack(mustAsk(t, asked, shape{bare: true, padded: true}).packet(0, 0)); sent.IsEdns0() != nil {
		t.Errorf("sent %v", sent)
	}
}

// TestPadding wants all questions to have one of few lengths.
func TestPadding(t *testing.T) {
	for n := 1; n < 200; n++ {
		name := strings.Repeat("a.", n/2) + strings.Repeat("a", n%2) + "b."
		for _, asked := range []*dns.Msg{query(name, dns.TypeA), query(name, dns.TypeA).SetEdns0(512, true)} {
			if q := mustAsk(t, asked, shape{padded: true}); len(q.wire)%padBlock != 0 || len(q.wire) > 3*padBlock {
				t.Errorf("a name of %d bytes makes a question of %d", len(name), len(q.wire))
			}
		}
		if q := mustAsk(t, query(name, dns.TypeA), shape{}); len(q.wire) > headerSize+len(name)+1+4+11 {
			t.Errorf("a name of %d bytes makes an unpadded question of %d", len(name), len(q.wire))
		}
	}
}

// TestPresent wants answers as if the caller's own message had been sent.
func TestPresent(t *testing.T) {
	asked := query("Www.Example.com.", dns.TypeA)
	asked.Id = 4711
	q := &question{asked: asked, name: "wWW.eXAMPLE.cOM."}
	m := new(dns.Msg).SetQuestion(q.name, dns.TypeA)
	m.Response = true
	for _, text := range []string{"wWW.eXAMPLE.cOM. 1 IN CNAME a.eXAMPLE.cOM.", "a.eXAMPLE.cOM. 1 IN CNAME b.Other.cOM.", "b.Other.cOM. 1 IN CNAME xeXAMPLE.cOM.", "xeXAMPLE.cOM. 1 IN A 192.0.2.1"} {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	m.SetEdns0(1232, false)
	r, err := q.read(pack(m), m.Id)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, rr := range r.Answer {
		got = append(got, strings.ReplaceAll(rr.String(), "\t", " "))
	}
	want := []string{"Www.Example.com. 1 IN CNAME a.Example.com.", "a.Example.com. 1 IN CNAME b.Other.com.", "b.Other.com. 1 IN CNAME xeXAMPLE.com.", "xeXAMPLE.com. 1 IN A 192.0.2.1"}
	if !reflect.DeepEqual(got, want) || r.Id != 4711 || r.Question[0].Name != "Www.Example.com." || !r.keepsCase {
		t.Errorf("got %v\nunder %d, for %v, case kept %v", got, r.Id, r.Question, r.keepsCase)
	}
	if r.IsEdns0() != nil {
		t.Errorf("EDNS for one who did not ask with it: %v", r)
	}

	asked.SetEdns0(4096, false)
	m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 9)}, &dns.EDNS0_EDE{InfoCode: 3}}
	if r, err = q.read(pack(m), m.Id); err != nil {
		t.Fatal(err)
	}
	if opt := r.IsEdns0(); opt == nil || len(opt.Option) != 1 || opt.Option[0].Option() != dns.EDNS0EDE {
		t.Errorf("the options are %v", opt)
	}
}

// TestExtendedCode is an answer that a caller without EDNS could not read.
func TestExtendedCode(t *testing.T) {
	q := mustAsk(t, query("www.example.", dns.TypeA), shape{})
	m := new(dns.Msg).SetRcode(unpack(q.wire), dns.RcodeBadVers)
	m.SetEdns0(1232, false)
	if _, err := q.read(pack(m), 0); err == nil || err.Error() != "the answer has the response code 16" {
		t.Errorf("read with %v", err)
	}
	q.asked.SetEdns0(1232, false)
	if r, err := q.read(pack(m), 0); err != nil || r.Rcode != dns.RcodeBadVers {
		t.Errorf("read %v, %v", r, err)
	}
}

// TestForgeriesAreNoAnswers reads each of them, and every beginning of an answer.
func TestForgeriesAreNoAnswers(t *testing.T) {
	q := mustAsk(t, query("www.example.", dns.TypeA), shape{randomCase: true})
	sent := unpack(q.wire)
	for _, f := range forgeries {
		if r, err := q.read(f.forge(sent), 0); !isBadAnswer(err) {
			t.Errorf("%s: read as %v, %v", f.name, r, err)
		}
	}
	whole := pack(honest(sent))
	for n := range whole {
		if r, err := q.read(whole[:n:n], 0); !isBadAnswer(err) {
			t.Errorf("%d bytes of %d: read as %v, %v", n, len(whole), r, err)
		}
	}
	if _, err := q.read(whole, 0); err != nil {
		t.Error(err)
	}
	sent.Truncated = true
	for n := headerSize + 17; n < len(whole); n++ {
		cut := bytes.Clone(whole[:n])
		cut[2] |= 2
		if _, err := q.read(cut, 0); !errors.Is(err, errTruncated) {
			t.Errorf("%d bytes of %d, truncated: %v", n, len(whole), err)
		}
	}
}

// FuzzRead holds that whatever is taken for an answer is one to the question, and can be passed on.
func FuzzRead(f *testing.F) {
	asked := query("WWW.example.", dns.TypeA)
	asked.Id = 4711
	q := &question{asked: asked, name: "wWw.eXample."}
	sent := new(dns.Msg).SetQuestion(q.name, dns.TypeA)
	sent.Id = 0
	f.Add(pack(honest(sent)))
	f.Add(pack(lowered(sent)))
	for _, forgery := range forgeries {
		f.Add(forgery.forge(sent))
	}
	large := honest(new(dns.Msg).SetQuestion(q.name, dns.TypeTXT))
	f.Add(pack(large))
	f.Fuzz(func(t *testing.T, wire []byte) {
		r, err := q.read(wire, 0)
		if err != nil {
			if !isBadAnswer(err) {
				t.Errorf("%v is not a bad answer", err)
			}
			return
		}
		if !r.Response || r.Id != asked.Id || !reflect.DeepEqual(r.Question, asked.Question) {
			t.Errorf("read %v", r)
		}
		if r.IsEdns0() != nil {
			t.Errorf("EDNS for one who did not ask with it: %v", r)
		}
	})
}
