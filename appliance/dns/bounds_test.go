package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// looked is a record that counts how often it is looked at.
type looked struct {
	*dns.A
	times *int
}

func (l looked) Header() *dns.RR_Header { *l.times++; return l.A.Header() }

// crowd is an answer with as many addresses as a message can have, or so.
func crowd(q *dns.Msg, records int) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	for i := range records {
		m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: net.IPv4(8, byte(i>>16), byte(i>>8), byte(i))})
	}
	return m
}

// An attacker's answer costs work in proportion to its length.
func TestCrowdedAnswerCostsNoMoreThanItsLength(t *testing.T) {
	const records = 4000
	times := 0
	m := crowd(question("n.evil.example", dns.TypeA), records)
	for i, record := range m.Answer {
		m.Answer[i] = looked{record.(*dns.A), &times}
	}
	got, err := accept(&ask{name: "n.evil.example.", host: "n.evil.example", qtype: dns.TypeA}, m)
	if err != nil || len(got.records) != maxRecords {
		t.Fatalf("%d records, %v", len(got.records), err)
	}
	if times > 10*records {
		t.Errorf("%d records were looked at %d times", records, times)
	}
}

// What is given of an answer of thousands of addresses is what is taught, and bounded.
func TestCrowdedAnswersAreCut(t *testing.T) {
	for _, c := range []struct {
		what   string
		qtype  uint16
		answer func(q *dns.Msg) *dns.Msg
	}{
		{"addresses", dns.TypeA, func(q *dns.Msg) *dns.Msg { return crowd(q, 4000) }},
		{"hints", dns.TypeHTTPS, func(q *dns.Msg) *dns.Msg {
			m := new(dns.Msg)
			m.SetReply(q)
			for i := range 20 {
				s := dns.SVCB{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeHTTPS, Class: dns.ClassINET, Ttl: 3600}, Priority: uint16(i + 1), Target: "."}
				hint := new(dns.SVCBIPv4Hint)
				for j := range 200 {
					hint.Hint = append(hint.Hint, net.IPv4(8, 0, byte(i), byte(j)))
				}
				s.Value = []dns.SVCBKeyValue{hint}
				m.Answer = append(m.Answer, &dns.HTTPS{SVCB: s})
			}
			return m
		}},
	} {
		d := over(t, exchangeFunc(func(q *dns.Msg) *dns.Msg {
			m := c.answer(q)
			m.AuthenticatedData = true
			m.Answer = append(m.Answer, &dns.RRSIG{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeRRSIG, Class: dns.ClassINET, Ttl: 60}, TypeCovered: c.qtype, SignerName: "example.", Signature: "AAAA"})
			return m
		}), nil)
		q := question("n.evil.example", c.qtype)
		q.SetEdns0(maxReply, true)
		packet, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(d.server.respond(t.Context(), arrival{packet: packet, client: client4.As16(), limit: wholeFrame})); err != nil {
			t.Fatal(err)
		}
		given := (&answer{records: m.Answer}).addresses()
		var learned []netip.Addr
		for _, l := range d.pupil.all() {
			learned = append(learned, l.addrs...)
		}
		slices.SortFunc(given, netip.Addr.Compare)
		slices.SortFunc(learned, netip.Addr.Compare)
		if len(given) != maxAddresses || !slices.Equal(given, learned) {
			t.Errorf("%s: %d given, %d learned, want %d", c.what, len(given), len(learned), maxAddresses)
		}
		if m.AuthenticatedData || slices.ContainsFunc(m.Answer, func(r dns.RR) bool { return r.Header().Rrtype == dns.TypeRRSIG }) {
			t.Errorf("%s: signed as if it were whole", c.what)
		}
	}
}

// Close does not wait for answers to be read that nobody will get.
func TestCloseAmidCrowdedAnswers(t *testing.T) {
	const asks = 30
	arrived := make(chan bool, asks)
	r, err := NewResolver(Settings{Default: "up", Upstreams: map[string]Exchanger{"up": exchangeFunc(func(q *dns.Msg) *dns.Msg {
		m := crowd(q, 4000)
		arrived <- true
		return m
	})}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range asks {
		wire := make([]byte, maxName)
		n, err := dns.PackDomainName(fmt.Sprintf("n%d.evil.example.", i), wire, 0, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		a, err := newAsk(wire[:n], dns.TypeA, false, false, r.gateway)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.join(a); err != nil {
			t.Fatal(err)
		}
	}
	for range asks {
		<-arrived
	}
	begun := time.Now()
	r.Close()
	if took := time.Since(begun); took > time.Second {
		t.Errorf("Close took %v", took)
	}
}

func TestSeconds(t *testing.T) {
	for ttl, want := range map[uint32]time.Duration{
		0: 0, 1: time.Second, 1<<31 - 1: (1<<31 - 1) * time.Second,
		1 << 31: 0, 1<<32 - 1: 0, // RFC 2181 section 8
	} {
		if got := seconds(ttl); got != want {
			t.Errorf("%d: %v, want %v", ttl, got, want)
		}
	}
}

// A full cache takes no more memory than it says, whatever the answers in it are, and when every client knows them. What
// breaks it is anything that an entry refers to and does not count.
func TestCacheTakesNoMoreThanItsMemory(t *testing.T) {
	const entries = 8192
	long := strings.Repeat(strings.Repeat("x", 50)+".", 4)
	for what, records := range map[string]func(name string) []string{
		"one address": func(name string) []string { return []string{name + " 3600 A 203.0.113.1"} },
		"some addresses": func(name string) (all []string) {
			for i := range 8 {
				all = append(all, fmt.Sprintf("%s 3600 A 203.0.113.%d", name, i))
			}
			return all
		},
		"many addresses": func(name string) (all []string) {
			for i := range maxAddresses {
				all = append(all, fmt.Sprintf("%s 3600 AAAA 2001:db8::%x", name, i))
			}
			return all
		},
		"a long chain": func(name string) (all []string) {
			from := name
			for i := range maxChain {
				to := fmt.Sprintf("%s%d.%s", long, i, name)
				all, from = append(all, from+" 3600 CNAME "+to), to
			}
			return append(all, from+" 3600 A 203.0.113.1")
		},
		"many services": func(name string) (all []string) {
			for i := range 32 {
				all = append(all, fmt.Sprintf("%s 3600 HTTPS %d s%d.%s ipv4hint=203.0.113.%d", name, i+1, i, name, i))
			}
			return all
		},
		"nothing": func(name string) []string { return []string{"example. 3600 SOA ns.example. x.example. 1 2 3 4 3600"} },
	} {
		t.Run(what, func(t *testing.T) {
			d := newDesk(t, Options{Learner: ignorant{}}, Settings{
				Cache: Cache{Entries: entries}, Default: "up", Upstreams: map[string]Exchanger{"up": exchangeFunc(func(q *dns.Msg) *dns.Msg {
					z := newZone(t, records(q.Question[0].Name)...)
					wire, err := z.answer(q).Pack()
					m := new(dns.Msg)
					if err == nil {
						err = m.Unpack(wire) // as one comes from an upstream
					}
					if err != nil {
						t.Error(err)
					}
					return m
				})},
			})
			c := d.server.resolver.Load().cache
			inUse := func() int {
				runtime.GC()
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return int(m.HeapAlloc)
			}
			types := map[string]uint16{"many addresses": dns.TypeAAAA, "many services": dns.TypeHTTPS}
			qtype := max(types[what], dns.TypeA)
			before, most := inUse(), 0
			for i := 0; ; i++ {
				name := fmt.Sprintf("n%d.example", i)
				for client := range maxTaught {
					d.send(netip.AddrFrom4([4]byte{192, 168, 7, byte(client)}), question(name, qtype))
				}
				if most = max(most, c.length()); i > 2*most { // it has been full for long
					break
				}
			}
			taken, bound := inUse()-before, entries*bytesPerEntry
			t.Logf("%d entries take %d of %d bytes", most, taken, bound)
			if taken > bound || taken < bound/3 {
				t.Errorf("%d entries take %d bytes, want at most %d, and more than a third", most, taken, bound)
			}
			runtime.KeepAlive(d)
		})
	}
}

// ignorant is a Learner that remembers nothing.
type ignorant struct{}

func (ignorant) Learn(context.Context, netip.Addr, []string, []netip.Addr, time.Duration) error {
	return nil
}
