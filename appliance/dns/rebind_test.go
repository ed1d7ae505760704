package dns

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
)

// dangerous are addresses that a public name must not lead to.
var dangerous = strings.Fields(`
	0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.83.71.53 127.255.255.255
	169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.170 192.168.0.1 192.168.255.255 224.0.0.251 255.255.255.255 240.0.0.1
	203.0.113.77
	:: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:192.168.0.1 ::ffff:10.0.0.1 ::ffff:0.0.0.0 ::ffff:8.8.8.8 ::192.168.0.1
	fc00::1 fd00::1 fdff:ffff::1 fe80::1 febf::1 fec0::1 ff02::1 64:ff9b::c0a8:1 64:ff9b::7f00:1 64:ff9b:1::1
	2002:c0a8:1::1 2002:7f00:1:: 2001:db8:77::77`)

// harmless are addresses near them.
var harmless = strings.Fields(`
	1.1.1.1 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1 169.253.255.255 172.15.255.255
	172.32.0.0 192.167.255.255 192.169.0.0 198.18.0.1 203.0.113.78
	2001:db8::1 2606:4700::1111 64:ff9b::101:101 2002:101:101::1 fbff::1 2001:db8:77::78`)

func own(a netip.Addr) bool {
	return a == netip.MustParseAddr("203.0.113.77") || a == netip.MustParseAddr("2001:db8:77::77")
}

// TestRebindingMatrix tries every address in every place where a client could find it.
func TestRebindingMatrix(t *testing.T) {
	z := newZone(t)
	places := map[string]func(name string, a netip.Addr) (dns.RR, uint16){
		"address": func(name string, a netip.Addr) (dns.RR, uint16) {
			if a.Is4() {
				return &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: 1, Ttl: 60}, A: a.AsSlice()}, dns.TypeA
			}
			return &dns.AAAA{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeAAAA, Class: 1, Ttl: 60}, AAAA: a.AsSlice()}, dns.TypeAAAA
		},
		"hint": func(name string, a netip.Addr) (dns.RR, uint16) {
			return &dns.HTTPS{SVCB: hinted(name, dns.TypeHTTPS, a)}, dns.TypeHTTPS
		},
		"svcb": func(name string, a netip.Addr) (dns.RR, uint16) {
			s := hinted(name, dns.TypeSVCB, a)
			return &s, dns.TypeSVCB
		},
	}
	d := over(t, z, func(s *Settings) { s.Own, s.RebindAllow = own, []string{"corp.example"} })
	n := 0
	for place, record := range places {
		for bad, list := range map[bool][]string{true: dangerous, false: harmless} {
			for _, text := range list {
				a := netip.MustParseAddr(text)
				for _, chain := range []bool{false, true} {
					for _, zoneName := range []string{"evil.example", "host.corp.example"} {
						n++
						name := fmt.Sprintf("n%d.%s.", n, zoneName)
						owner := name
						if chain {
							owner = fmt.Sprintf("n%d.lan.", n) // an alias of what may be private may not be
						}
						rr, qtype := record(owner, a)
						z.set(func(z *zone) { z.records = []dns.RR{rr} })
						if chain {
							z.add(t, fmt.Sprintf("%s 60 CNAME %s", name, owner))
						}
						for range 2 { // asked, then cached
							passed := shows(d.ask(name, qtype), a)
							want := !bad || zoneName == "host.corp.example"
							if a.Is4In6() && place != "address" {
								want = false // no hint can be written so
							}
							if passed != want {
								t.Errorf("%s %s at %s (alias: %v): passed %v, want %v", place, a, zoneName, chain, passed, want)
							}
						}
						if bad && zoneName == "evil.example" && len(d.pupil.all()) > 0 {
							t.Errorf("%s %s: taught %v", place, a, d.pupil.taughtPairs())
						}
						d.pupil.forget()
					}
				}
			}
		}
	}
}

func hinted(name string, rtype uint16, a netip.Addr) dns.SVCB {
	s := dns.SVCB{Hdr: dns.RR_Header{Name: name, Rrtype: rtype, Class: 1, Ttl: 60}, Priority: 1, Target: "."}
	ip := []net.IP{a.AsSlice()}
	if a.Is4() {
		s.Value = []dns.SVCBKeyValue{&dns.SVCBIPv4Hint{Hint: ip}}
	} else {
		s.Value = []dns.SVCBKeyValue{&dns.SVCBIPv6Hint{Hint: ip}}
	}
	return s
}

// shows reports whether an address is anywhere in an answer.
func shows(m *dns.Msg, a netip.Addr) bool {
	for _, record := range append(append(m.Answer, m.Ns...), m.Extra...) {
		if found, ok := recordAddress(record); ok && found == a {
			return true
		}
		if s := service(record); s != nil {
			for _, found := range hints(s) {
				if found == a {
					return true
				}
			}
		}
	}
	return false
}

// TestNAT64Discovery: hosts find a translator's prefix by a name whose addresses are special (RFC 7050). Nothing below
// that name is special.
func TestNAT64Discovery(t *testing.T) {
	z := newZone(t)
	z.add(t, "ipv4only.arpa. 60 A 192.0.0.170")
	z.add(t, "ipv4only.arpa. 60 A 192.0.0.171")
	z.add(t, "ipv4only.arpa. 60 AAAA 64:ff9b::c000:aa")
	z.add(t, "evil.ipv4only.arpa. 60 A 192.0.0.170")
	d := over(t, z, nil)
	d.expect("ipv4only.arpa.", dns.TypeA, "NOERROR 192.0.0.170 192.0.0.171")
	d.expect("ipv4only.arpa.", dns.TypeAAAA, "NOERROR 64:ff9b::c000:aa")
	d.expect("evil.ipv4only.arpa.", dns.TypeA, "NOERROR")
}

// TestRebindAllowDot: a suffix with a leading dot is only what is below it, as in domain_suffix.
func TestRebindAllowDot(t *testing.T) {
	r := newRebinding([]string{"corp.example", ".Below.example"}, nil)
	for name, want := range map[string]bool{
		"corp.example": true, "www.corp.example": true, "xcorp.example": false,
		"below.example": false, "www.below.example": true, "a.b.below.example": true, "xbelow.example": false,
	} {
		if got := r.exempt(name); got != want {
			t.Errorf("%s: exempt %v, want %v", name, got, want)
		}
	}
}

// TestFilteredIsNegative: an answer of which nothing is left tells for how long that holds (RFC 2308), of the name that
// has nothing: the end of the chain.
func TestFilteredIsNegative(t *testing.T) {
	z := newZone(t)
	z.add(t, "evil.example. 600 A 192.168.0.1")
	z.add(t, "alias.example. 600 CNAME evil.example.")
	z.add(t, "half.example. 600 A 192.168.0.1")
	z.add(t, "half.example. 600 A 203.0.113.1")
	d := over(t, z, nil)
	for name, owner := range map[string]string{"evil.example.": "evil.example.", "alias.example.": "evil.example.", "half.example.": ""} {
		m := d.ask(name, dns.TypeA)
		got := ""
		for _, record := range m.Ns {
			if soa, ok := record.(*dns.SOA); ok {
				got += soa.Hdr.Name
			}
		}
		if got != owner {
			t.Errorf("%s: SOA of %q, want %q:\n%v", name, got, owner, m)
		}
	}
}

// TestPreferredHints: hints are of the preferred family or none. Whoever gets none asks for addresses.
func TestPreferredHints(t *testing.T) {
	z := newZone(t)
	four, six := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::1")
	for name, a := range map[string]netip.Addr{"four.example.": four, "six.example.": six} {
		z.set(func(z *zone) { z.records = append(z.records, &dns.HTTPS{SVCB: hinted(name, dns.TypeHTTPS, a)}) })
	}
	for version, hidden := range map[Preference]netip.Addr{Prefer4: six, Prefer6: four} {
		d := over(t, z, func(s *Settings) { s.IPVersion = version })
		for name, a := range map[string]netip.Addr{"four.example.": four, "six.example.": six} {
			m := d.ask(name, dns.TypeHTTPS)
			if got := shows(m, a); got != (a != hidden) || len(m.Answer) != 1 {
				t.Errorf("preference %v, %s: its hint shows %v\n%v", version, name, got, m)
			}
		}
	}
}

// TestOwnAddressAppears: an address that becomes the gateway's own is kept from who asks from then on, also where the
// answer is in the cache and the client was taught it.
func TestOwnAddressAppears(t *testing.T) {
	z := newZone(t)
	z.add(t, "www.example. 600 A 203.0.113.5")
	z.add(t, "www.corp.example. 600 A 203.0.113.5")
	z.set(func(z *zone) {
		z.records = append(z.records, &dns.HTTPS{SVCB: hinted("www.example.", dns.TypeHTTPS, netip.MustParseAddr("203.0.113.5"))})
	})
	var appeared atomic.Bool
	d := over(t, z, func(s *Settings) {
		s.RebindAllow = []string{"corp.example"}
		s.Own = func(a netip.Addr) bool { return appeared.Load() && a == netip.MustParseAddr("203.0.113.5") }
	})
	for range 2 {
		d.expect("www.example.", dns.TypeA, "NOERROR 203.0.113.5")
		d.expect("www.corp.example.", dns.TypeA, "NOERROR 203.0.113.5")
		d.expect("www.example.", dns.TypeHTTPS, "NOERROR 1 . ipv4hint=203.0.113.5")
	}
	appeared.Store(true)
	for range 2 {
		d.expect("www.example.", dns.TypeA, "NOERROR")
		d.expect("www.corp.example.", dns.TypeA, "NOERROR 203.0.113.5")
		d.expect("www.example.", dns.TypeHTTPS, "NOERROR 1 .")
	}
}
