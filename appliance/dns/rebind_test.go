package dns

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
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
