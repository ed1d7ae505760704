package dns

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/policy"
)

func TestLocalAnswers(t *testing.T) {
	z := newZone(t)
	d := over(t, z, func(s *Settings) {
		s.Hosts = map[string][]netip.Addr{"NAS.lan.": addrs("192.168.0.9", "fd00::9"), "four.example": addrs("192.168.0.4")}
		s.Rules = []Rule{{Match: match(t, "domain_keyword: nas four localhost"), Reject: Refused}}
	})
	for _, q := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"nas.LAN", dns.TypeA, "NOERROR 192.168.0.9"},
		{"nas.lan", dns.TypeAAAA, "NOERROR fd00::9"},
		{"nas.lan", dns.TypeHTTPS, "NOERROR"},
		{"nas.lan", dns.TypeTXT, "NOERROR"},
		{"four.example", dns.TypeAAAA, "NOERROR"},
		{"localhost", dns.TypeA, "NOERROR 127.0.0.1"},
		{"a.localhost", dns.TypeAAAA, "NOERROR ::1"},
		{"x.invalid", dns.TypeA, "NXDOMAIN"},
		{"x.onion", dns.TypeA, "NXDOMAIN"},
		{"use-application-dns.net", dns.TypeA, "NXDOMAIN"},
		{"_dns.resolver.arpa", dns.TypeSVCB, "NOERROR"},
		{"www.example.com", dns.TypeANY, "NOERROR RFC8482 "},
	} {
		d.expect(q.name, q.qtype, q.want)
		d.expect(q.name, q.qtype, q.want)
	}
	if q := z.questions(); len(q) != 0 {
		t.Errorf("the upstream was asked %q", q)
	}
	want := []string{"192.168.7.3 four.example 192.168.0.4", "192.168.7.3 nas.lan 192.168.0.9", "192.168.7.3 nas.lan fd00::9"}
	if got := d.pupil.taughtPairs(); !slices.Equal(got, want[1:]) {
		t.Errorf("taught %q, want %q", got, want[1:])
	}
}

func TestQuestionRules(t *testing.T) {
	up, other := newZone(t, "a.example.com. 60 A 192.0.2.1", "b.example.org. 60 A 192.0.2.2", "b.example.org. 60 TXT up"),
		newZone(t, "a.example.com. 60 A 198.51.100.1", "b.example.org. 60 A 198.51.100.2", "b.example.org. 60 TXT other")
	only4 := Only4
	d := newDesk(t, Options{ClientFacts: func(a netip.Addr) (policy.MAC, string) {
		if a == other4 {
			return policy.MAC{2, 0, 0, 0, 0, 4}, "lan"
		}
		return policy.MAC{}, ""
	}}, Settings{
		Upstreams: map[string]Exchanger{"up": up, "other": other}, Default: "up",
		Rules: []Rule{
			{Match: match(t, "domain_suffix: refused.test"), Reject: Refused},
			{Match: match(t, "domain_suffix: nx.test"), Reject: NXDomain},
			{Match: match(t, "domain_suffix: empty.test"), Reject: Empty},
			{Match: match(t, "domain_suffix: drop.test"), Reject: Drop},
			{Match: match(t, "domain_suffix: fixed.test"), Answer: addrs("203.0.113.5", "203.0.113.6", "2001:db8::5")},
			{Match: match(t, "source_mac_address: 02:00:00:00:00:04", "not domain: b.example.org"), Upstream: "other"},
			{Match: match(t, "source_ip_cidr: fd07::/64", "domain: a.example.com"), Reject: NXDomain},
			{Match: match(t, "domain_suffix: org"), QueryTypes: []uint16{dns.TypeTXT}, Upstream: "other"},
			{Match: match(t, "domain_suffix: org"), IPVersion: &only4},
		},
	})
	for range 2 {
		d.expect("x.refused.test", dns.TypeA, "REFUSED")
		d.expect("x.nx.test", dns.TypeA, "NXDOMAIN")
		d.expect("x.empty.test", dns.TypeA, "NOERROR")
		d.expect("x.drop.test", dns.TypeA, "silence")
		d.expect("x.fixed.test", dns.TypeA, "NOERROR 203.0.113.5 203.0.113.6")
		d.expect("x.fixed.test", dns.TypeAAAA, "NOERROR 2001:db8::5")
		d.expect("x.fixed.test", dns.TypeMX, "NOERROR")
		d.expect("A.example.com", dns.TypeA, "NOERROR 192.0.2.1")
		d.expect("b.example.org", dns.TypeA, "NOERROR 192.0.2.2")
		d.expect("b.example.org", dns.TypeTXT, "NOERROR other")
		d.expect("b.example.org", dns.TypeAAAA, "NOERROR")
		for client, want := range map[netip.Addr]string{other4: "NOERROR 198.51.100.1", client6: "NXDOMAIN", client4: "NOERROR 192.0.2.1"} {
			if got := brief(d.send(client, question("a.example.com", dns.TypeA))); got != want {
				t.Errorf("%s: %s, want %s", client, got, want)
			}
		}
		if got := brief(d.send(other4, question("b.example.org", dns.TypeA))); got != "NOERROR 192.0.2.2" {
			t.Errorf("excluded from the rule: %s", got)
		}
	}
	for _, name := range []string{"x.nx.test", "x.empty.test"} { // clients keep what has a SOA record
		if m := d.ask(name, dns.TypeA); len(m.Ns) != 1 || m.Ns[0].Header().Rrtype != dns.TypeSOA || m.Ns[0].Header().Ttl == 0 {
			t.Errorf("%s:\n%v", name, m)
		}
	}
	if n := d.server.Stats().Dropped[Rejected]; n != 2 {
		t.Errorf("%d counted as dropped, want 2", n)
	}
}

func TestResponseRules(t *testing.T) {
	isp := newZone(t,
		"poisoned.example. 60 A 198.51.100.66", "good.example. 60 A 192.0.2.1", "both.example. 60 A 192.0.2.2", "both.example. 60 A 198.51.100.66",
		"cloaked.example. 60 CNAME x.tracker.test.", "x.tracker.test. 60 A 192.0.2.3", "elsewhere.example. 60 A 203.0.113.1",
		"hinted.example. 60 HTTPS 1 . ipv4hint=198.51.100.66", "circle.example. 60 A 100.0.0.1",
		"kept.example. 60 A 198.51.100.67", "silent.example. 60 A 203.0.113.200")
	doh := newZone(t, "poisoned.example. 60 A 192.0.2.10", "both.example. 60 A 192.0.2.11", "hinted.example. 60 HTTPS 1 . ipv4hint=192.0.2.12", "circle.example. 60 A 100.0.0.2")
	d := newDesk(t, Options{}, Settings{
		Upstreams: map[string]Exchanger{"isp": isp, "doh": doh}, Default: "isp",
		Responses: []Response{
			{Match: match(t, "domain: kept.example"), Accept: true},
			{Match: match(t, "ip_cidr: 198.51.100.0/24"), From: []string{"isp"}, Upstream: "doh"},
			{Match: match(t, "ip_cidr: 198.51.100.0/24"), From: []string{"doh"}, Reject: Refused},
			{Match: match(t, "ip_cidr: 192.0.2.1"), From: []string{"doh"}, Reject: Refused},
			{Match: match(t, "domain_suffix: tracker.test"), Reject: NXDomain},
			{Match: match(t, "ip_cidr: 100.0.0.0/8"), Upstream: "doh"},
			{Match: match(t, "ip_cidr: 100.0.0.2"), Upstream: "isp"},
			{Match: match(t, "ip_cidr: 203.0.113.0/25"), Reject: Empty},
			{Match: match(t, "ip_cidr: 203.0.113.128/25", "source_ip_cidr: 192.168.7.4"), Reject: Drop},
		},
	})
	for range 2 {
		d.expect("poisoned.example", dns.TypeA, "NOERROR 192.0.2.10")
		d.expect("good.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.expect("both.example", dns.TypeA, "NOERROR 192.0.2.11")
		d.expect("cloaked.example", dns.TypeA, "NXDOMAIN")
		d.expect("elsewhere.example", dns.TypeA, "NOERROR")
		d.expect("hinted.example", dns.TypeHTTPS, "NOERROR 1 . ipv4hint=192.0.2.12")
		d.expect("circle.example", dns.TypeA, "NOERROR 100.0.0.2")
		d.expect("kept.example", dns.TypeA, "NOERROR 198.51.100.67")
		d.expect("silent.example", dns.TypeA, "NOERROR 203.0.113.200")
		if got := brief(d.send(other4, question("silent.example", dns.TypeA))); got != "silence" {
			t.Errorf("the other client got %s", got)
		}
	}
	if got := d.pupil.taughtPairs(); slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, "198.51.100.66") }) {
		t.Errorf("taught what was not answered: %q", got)
	}
}

func TestIPVersion(t *testing.T) {
	records := []string{
		"two.example. 60 A 192.0.2.1", "two.example. 60 AAAA 2001:db8::1", "two.example. 60 HTTPS 1 . alpn=h2 ipv4hint=192.0.2.1 ipv6hint=2001:db8::1",
		"four.example. 60 A 192.0.2.4", "six.example. 60 AAAA 2001:db8::6", "six.example. 60 HTTPS 1 . ipv6hint=2001:db8::6",
		"rebound.example. 60 A 127.0.0.1", "rebound.example. 60 AAAA 2001:db8::7",
	}
	const four, six = "NOERROR 192.0.2.1", "NOERROR 2001:db8::1"
	for _, c := range []struct {
		version                  Preference
		a, aaaa, https           string
		only4, only6, only6https string
		rebound                  string
	}{
		{AnyVersion, four, six, "NOERROR 1 . alpn=h2 ipv4hint=192.0.2.1 ipv6hint=2001:db8::1", "NOERROR 192.0.2.4", "NOERROR 2001:db8::6", "NOERROR 1 . ipv6hint=2001:db8::6", "NOERROR 2001:db8::7"},
		{Prefer4, four, "NOERROR", "NOERROR 1 . alpn=h2 ipv4hint=192.0.2.1", "NOERROR 192.0.2.4", "NOERROR 2001:db8::6", "NOERROR 1 .", "NOERROR 2001:db8::7"},
		{Prefer6, "NOERROR", six, "NOERROR 1 . alpn=h2 ipv6hint=2001:db8::1", "NOERROR 192.0.2.4", "NOERROR 2001:db8::6", "NOERROR 1 . ipv6hint=2001:db8::6", "NOERROR 2001:db8::7"},
		{Only4, four, "NOERROR", "NOERROR 1 . alpn=h2 ipv4hint=192.0.2.1", "NOERROR 192.0.2.4", "NOERROR", "NOERROR 1 .", "NOERROR"},
		{Only6, "NOERROR", six, "NOERROR 1 . alpn=h2 ipv6hint=2001:db8::1", "NOERROR", "NOERROR 2001:db8::6", "NOERROR 1 . ipv6hint=2001:db8::6", "NOERROR 2001:db8::7"},
	} {
		d := over(t, newZone(t, records...), func(s *Settings) { s.IPVersion = c.version })
		d.expect("two.example", dns.TypeAAAA, c.aaaa)
		d.expect("two.example", dns.TypeA, c.a)
		d.expect("two.example", dns.TypeHTTPS, c.https)
		d.expect("four.example", dns.TypeA, c.only4)
		d.expect("six.example", dns.TypeAAAA, c.only6)
		d.expect("six.example", dns.TypeHTTPS, c.only6https)
		d.expect("rebound.example", dns.TypeAAAA, c.rebound)
	}
}

// Rules by type may make each family wait for the other. They do not.
func TestPreferencesInACircle(t *testing.T) {
	four, six := Prefer4, Prefer6
	d := over(t, newZone(t, "two.example. 60 A 192.0.2.1", "two.example. 60 AAAA 2001:db8::1"), func(s *Settings) {
		s.Rules = []Rule{{QueryTypes: []uint16{dns.TypeA}, IPVersion: &six}, {QueryTypes: []uint16{dns.TypeAAAA}, IPVersion: &four}}
	})
	start := time.Now()
	d.expect("two.example", dns.TypeA, "NOERROR 192.0.2.1")
	d.expect("two.example", dns.TypeAAAA, "NOERROR 2001:db8::1")
	if took := time.Since(start); took > exchangeTime*3/4 {
		t.Errorf("it took %v", took)
	}
}

func TestStripECH(t *testing.T) {
	z := newZone(t, `www.example. 60 HTTPS 1 . mandatory=alpn,ech alpn=h2 ech=AAAA`, `raw.example. 60 HTTPS 1 . alpn=h2 ech=AAAA`)
	no := false
	d := over(t, z, func(s *Settings) {
		s.StripECH = true
		s.Rules = []Rule{{Match: match(t, "domain: raw.example"), StripECH: &no}}
	})
	d.expect("www.example", dns.TypeHTTPS, "NOERROR 1 . mandatory=alpn alpn=h2")
	d.expect("raw.example", dns.TypeHTTPS, "NOERROR 1 . alpn=h2 ech=AAAA")
}

// Only what is said of the question's own chain is believed.
func TestOnlyTheChain(t *testing.T) {
	for _, c := range []struct {
		what    string
		records []string // of the answer, whatever was asked
		rewrite func(*dns.Msg)
		want    string
		taught  []string
	}{
		{
			what: "other names beside", want: "NOERROR 192.0.2.1", taught: []string{"192.168.7.3 www.example 192.0.2.1"},
			records: []string{"www.example. 60 A 192.0.2.1", "bank.example. 60 A 198.51.100.66", "www.example. 60 AAAA 2001:db8::66"},
		}, {
			what: "a chain", want: "NOERROR b.example. c.example. 192.0.2.1",
			records: []string{"c.example. 60 A 192.0.2.1", "B.example. 60 CNAME C.example.", "www.EXAMPLE. 60 CNAME b.example.", "d.example. 60 A 198.51.100.66"},
			taught:  []string{"192.168.7.3 b.example 192.0.2.1", "192.168.7.3 c.example 192.0.2.1", "192.168.7.3 www.example 192.0.2.1"},
		}, {
			what: "two aliases of one name", want: "NOERROR b.example. 192.0.2.1",
			records: []string{"www.example. 60 CNAME b.example.", "www.example. 60 CNAME c.example.", "b.example. 60 A 192.0.2.1", "c.example. 60 A 198.51.100.66"},
			taught:  []string{"192.168.7.3 b.example 192.0.2.1", "192.168.7.3 www.example 192.0.2.1"},
		}, {
			what: "a circle", want: "SERVFAIL",
			records: []string{"www.example. 60 CNAME b.example.", "b.example. 60 CNAME www.example."},
		}, {
			what: "DNAME", want: "NOERROR b.test. www.b.test. 192.0.2.1",
			records: []string{"example. 60 DNAME b.test.", "www.example. 60 CNAME www.b.test.", "www.b.test. 60 A 192.0.2.1"},
			taught:  []string{"192.168.7.3 www.b.test 192.0.2.1", "192.168.7.3 www.example 192.0.2.1"},
		}, {
			what: "another class", want: "NOERROR", records: []string{"www.example. 60 CH A 198.51.100.66"},
		}, {
			what: "duplicates", want: "NOERROR 192.0.2.1", records: []string{"www.example. 60 A 192.0.2.1", "WWW.example. 61 A 192.0.2.1"},
			taught: []string{"192.168.7.3 www.example 192.0.2.1"},
		}, {
			what: "another question", want: "SERVFAIL", records: []string{"www.example. 60 A 192.0.2.1"},
			rewrite: func(m *dns.Msg) { m.Question[0].Name = "bank.example." },
		}, {
			what: "no question", want: "SERVFAIL", records: []string{"www.example. 60 A 192.0.2.1"},
			rewrite: func(m *dns.Msg) { m.Question = nil },
		}, {
			what: "another type", want: "SERVFAIL", records: []string{"www.example. 60 A 192.0.2.1"},
			rewrite: func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
		}, {
			what: "no answer", want: "SERVFAIL", records: []string{"www.example. 60 A 192.0.2.1"},
			rewrite: func(m *dns.Msg) { m.Response = false },
		}, {
			what: "truncated", want: "SERVFAIL", records: []string{"www.example. 60 A 192.0.2.1"},
			rewrite: func(m *dns.Msg) { m.Truncated = true },
		}, {
			what: "refused", want: "SERVFAIL", rewrite: func(m *dns.Msg) { m.Rcode = dns.RcodeRefused },
		}, {
			what: "neither nor", want: "SERVFAIL", records: []string{"www.example. 60 A 192.0.2.1"},
			rewrite: func(m *dns.Msg) { m.Rcode = dns.RcodeNameError },
		}, {
			what: "additional records", want: "NOERROR 192.0.2.1", records: []string{"www.example. 60 A 192.0.2.1"},
			rewrite: func(m *dns.Msg) {
				m.Extra = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "bank.example.", Rrtype: 1, Class: 1, Ttl: 60}, A: []byte{198, 51, 100, 66}}}
				m.Ns = []dns.RR{&dns.NS{Hdr: dns.RR_Header{Name: "example.", Rrtype: 2, Class: 1, Ttl: 60}, Ns: "evil.test."}}
			},
			taught: []string{"192.168.7.3 www.example 192.0.2.1"},
		},
	} {
		t.Run(c.what, func(t *testing.T) {
			records := newZone(t, c.records...).records
			d := over(t, exchangeFunc(func(q *dns.Msg) *dns.Msg {
				m := new(dns.Msg)
				m.SetReply(q)
				m.Answer = records
				if c.rewrite != nil {
					c.rewrite(m)
				}
				return m
			}), nil)
			d.expect("www.example", dns.TypeA, c.want)
			m := d.ask("www.example", dns.TypeA)
			if got := brief(m); got != c.want {
				t.Errorf("from the cache: %s, want %s", got, c.want)
			}
			if len(m.Ns)+len(m.Extra) > 0 {
				t.Errorf("passed on:\n%v", m)
			}
			if got := d.pupil.taughtPairs(); !slices.Equal(got, c.taught) {
				t.Errorf("taught %q, want %q", got, c.taught)
			}
		})
	}
}

// What is learned of a service is its host's name.
func TestServicesAreTaught(t *testing.T) {
	d := over(t, newZone(t,
		"_8443._https.www.example. 60 HTTPS 1 . ipv4hint=192.0.2.1",
		"www.example. 60 HTTPS 1 svc.example. ipv4hint=192.0.2.2,192.0.2.3 ipv6hint=2001:db8::2",
		"alias.example. 60 HTTPS 0 www.example."), nil)
	d.ask("_8443._https.www.example", dns.TypeHTTPS)
	d.ask("www.example", dns.TypeHTTPS)
	d.ask("alias.example", dns.TypeHTTPS)
	want := []string{
		"192.168.7.3 svc.example 192.0.2.2", "192.168.7.3 svc.example 192.0.2.3", "192.168.7.3 svc.example 2001:db8::2",
		"192.168.7.3 www.example 192.0.2.1", "192.168.7.3 www.example 192.0.2.2", "192.168.7.3 www.example 192.0.2.3", "192.168.7.3 www.example 2001:db8::2",
	}
	if got := d.pupil.taughtPairs(); !slices.Equal(got, want) {
		t.Errorf("taught\n%q, want\n%q", got, want)
	}
}

func TestLookup(t *testing.T) {
	z := newZone(t, "up.example. 60 A 203.0.113.1", "up.example. 60 AAAA 2001:db8::1", "none.example. 60 TXT x")
	d := over(t, z, nil)
	r := d.server.resolver.Load()
	for range 2 {
		got, err := r.Lookup(t.Context(), "UP.example")
		if err != nil || !slices.Equal(got, addrs("203.0.113.1", "2001:db8::1")) {
			t.Errorf("%v, %v", got, err)
		}
	}
	if n := len(z.questions()); n != 2 {
		t.Errorf("%d questions, want 2", n)
	}
	for _, name := range []string{"none.example", "gone.example", "bad..name"} {
		if got, err := r.Lookup(t.Context(), name); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
	if got, err := r.Lookup(t.Context(), "192.0.2.7"); err != nil || !slices.Equal(got, addrs("192.0.2.7")) {
		t.Errorf("%v, %v", got, err)
	}
	z.set(func(z *zone) { z.err = errors.New("down") })
	if got, err := r.Lookup(t.Context(), "new.example"); err == nil || !strings.Contains(err.Error(), "no upstream answered") {
		t.Errorf("%v, %v", got, err)
	}
	if len(d.pupil.all()) > 0 {
		t.Errorf("taught %v", d.pupil.all())
	}
}

func TestSettingsAreChecked(t *testing.T) {
	z := newZone(t)
	good := func() Settings {
		return Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}
	}
	for want, change := range map[string]func(*Settings){
		`dns default: unknown dns upstream "doh" (have: up)`:                                                   func(s *Settings) { s.Default = "doh" },
		`dns rule "x": unknown dns upstream "doh" (have: up)`:                                                  func(s *Settings) { s.Rules = []Rule{{Match: policy.Rule{Name: "x"}, Upstream: "doh"}} },
		`dns rule #1: upstream, answer and reject exclude each other: keep one`:                                func(s *Settings) { s.Rules = []Rule{{Upstream: "up", Reject: Drop}} },
		`dns response #1: unknown dns upstream "isp" (have: up)`:                                               func(s *Settings) { s.Responses = []Response{{From: []string{"isp"}, Accept: true}} },
		`dns response #1: it needs one of upstream, reject and accept`:                                         func(s *Settings) { s.Responses = []Response{{}} },
		`dns rule #1: ip_cidr is not known of a DNS rule: remove it`:                                           func(s *Settings) { s.Rules = []Rule{{Match: match(t, "ip_cidr: 192.0.2.1")}} },
		`dns response #1: port is not known of a DNS response: remove it`:                                      func(s *Settings) { s.Responses = []Response{{Match: match(t, "not port: 53"), Accept: true}} },
		`rule #1: geosite "ads": there is no geo data in this gateway: write the names or prefixes themselves`: func(s *Settings) { s.Rules = []Rule{{Match: match(t, "geosite: ads")}} },
	} {
		s := good()
		change(&s)
		if r, err := NewResolver(s); err == nil {
			r.Close()
			t.Errorf("accepted, want: %s", want)
		} else if !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
