package dns

import (
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// localTTL is the TTL of answers that come from the configuration: a reload reaches clients within it.
const localTTL = 60 * time.Second

// canary is the name by which Firefox asks whether a network wants its DNS over HTTPS left off.
// https://support.mozilla.org/kb/canary-domain-use-application-dnsnet
const canary = "use-application-dns.net"

// local answers what needs neither rules nor upstreams; nil if the question is not such.
func (r *Resolver) local(a *ask) *entry {
	if a.qtype == dns.TypeANY { // RFC 8482 section 4.2
		return r.entry(a, &answer{ttl: localTTL, records: []dns.RR{
			&dns.HINFO{Hdr: header(a.name, dns.TypeHINFO), Cpu: "RFC8482"},
		}})
	}
	if addrs, ok := r.hosts[a.host]; ok {
		return r.fixed(a, addrs)
	}
	switch {
	case a.host == canary, isBelow(a.host, "invalid"): // RFC 6761 section 6.4
		return r.rejected(a, NXDomain, localTTL)
	case isBelow(a.host, "onion"): // RFC 7686 section 2
		return r.rejected(a, NXDomain, localTTL)
	case isBelow(a.host, "localhost"): // RFC 6761 section 6.3
		return r.fixed(a, []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()})
	case isBelow(a.host, "resolver.arpa"):
		// RFC 9462 section 6.4: clients would be told of an upstream's encrypted service, and leave us.
		return r.rejected(a, Empty, localTTL)
	}
	return nil
}

func isBelow(name, zone string) bool {
	return name == zone || strings.HasSuffix(name, "."+zone)
}

func header(name string, rtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rtype, Class: dns.ClassINET}
}

// fixed answers with given addresses, those of the family that was asked for.
func (r *Resolver) fixed(a *ask, addrs []netip.Addr) *entry {
	got := &answer{ttl: localTTL, names: []string{a.host}, qtype: a.qtype}
	for _, addr := range addrs {
		addr = addr.Unmap()
		switch {
		case a.qtype == dns.TypeA && addr.Is4():
			got.records = append(got.records, &dns.A{Hdr: header(a.name, dns.TypeA), A: addr.AsSlice()})
		case a.qtype == dns.TypeAAAA && addr.Is6():
			got.records = append(got.records, &dns.AAAA{Hdr: header(a.name, dns.TypeAAAA), AAAA: addr.AsSlice()})
		}
	}
	if len(got.records) == 0 {
		return r.rejected(a, Empty, localTTL)
	}
	return r.entry(a, got)
}

// rejected is a refusal. It is kept like an answer, so that the next one costs no rule.
func (r *Resolver) rejected(a *ask, how Reject, ttl time.Duration) *entry {
	got := &answer{ttl: ttl}
	switch how {
	case Refused:
		got.rcode = dns.RcodeRefused
	case NXDomain:
		got.rcode = dns.RcodeNameError
		got.authority = []dns.RR{apex(a.name)}
	case Empty:
		got.authority = []dns.RR{apex(a.name)}
	case Drop:
		return &entry{key: string(a.key), stored: monotonic(), life: int64(ttl)}
	}
	return r.entry(a, got)
}

// apex is the SOA record without which clients do not keep a negative answer (RFC 2308 section 5). The zone
// that it tells of is the name itself.
func apex(name string) dns.RR {
	return &dns.SOA{
		Hdr: header(name, dns.TypeSOA), Ns: "sidegate.invalid.", Mbox: "nobody.invalid.",
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: uint32(localTTL / time.Second),
	}
}
