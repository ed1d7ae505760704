package dns

import (
	"net"
	"net/netip"
	"slices"

	"github.com/miekg/dns"
)

// filter takes out addresses: records of them, and hints. It reports whether there were any.
func (got *answer) filter(forbidden func(netip.Addr) bool) bool {
	before := len(got.records)
	changed := false
	got.records = slices.DeleteFunc(got.records, func(record dns.RR) bool {
		if s := service(record); s != nil {
			changed = filterHints(s, forbidden) || changed
			return false
		}
		if t := record.Header().Rrtype; t != dns.TypeA && t != dns.TypeAAAA {
			return false
		}
		addr, ok := recordAddress(record)
		return !ok || forbidden(addr)
	})
	changed = changed || len(got.records) != before
	if changed {
		got.unsign()
	}
	return changed
}

// excuse makes an answer negative if the filter left it none of the records that were asked for: without a SOA record
// clients do not keep it, and ask again at once (RFC 2308 section 5).
func (got *answer) excuse() {
	if !slices.ContainsFunc(got.records, func(record dns.RR) bool { return record.Header().Rrtype == got.qtype }) {
		got.authority = []dns.RR{apex(dns.Fqdn(got.names[len(got.names)-1]))}
	}
}

func filterHints(record *dns.SVCB, forbidden func(netip.Addr) bool) (changed bool) {
	keep := func(ips []net.IP, v4 bool) []net.IP {
		return slices.DeleteFunc(slices.Clone(ips), func(ip net.IP) bool {
			addr, ok := addrOf(ip, v4)
			bad := !ok || forbidden(addr)
			changed = changed || bad
			return bad
		})
	}
	var empty []dns.SVCBKey
	for _, value := range record.Value {
		switch value := value.(type) {
		case *dns.SVCBIPv4Hint:
			if value.Hint = keep(value.Hint, true); len(value.Hint) == 0 {
				empty = append(empty, value.Key())
			}
		case *dns.SVCBIPv6Hint:
			if value.Hint = keep(value.Hint, false); len(value.Hint) == 0 {
				empty = append(empty, value.Key())
			}
		}
	}
	return removeKeys(record, empty...) || changed
}

// trim takes out what a rule wants clients not to see of services: hints of a family that is not to be
// used, and the keys of encrypted client hello. Without hints clients ask for the addresses (RFC 9460 section 7.3), and are
// told of a family that is only not preferred if there is no other.
func (got *answer) trim(version Preference, stripECH bool) {
	changed := false
	for _, record := range got.records {
		s := service(record)
		if s == nil {
			continue
		}
		if stripECH {
			changed = removeKeys(s, dns.SVCB_ECHCONFIG) || changed
		}
		switch {
		case version == Only4, version == Prefer4:
			changed = removeKeys(s, dns.SVCB_IPV6HINT) || changed
		case version == Only6, version == Prefer6:
			changed = removeKeys(s, dns.SVCB_IPV4HINT) || changed
		}
	}
	if changed {
		got.unsign()
	}
}

// removeKeys takes parameters out of a service's record, and out of the list of those that a client must
// understand: it would not use the record otherwise (RFC 9460 section 8).
func removeKeys(record *dns.SVCB, keys ...dns.SVCBKey) bool {
	before := len(record.Value)
	record.Value = slices.DeleteFunc(record.Value, func(value dns.SVCBKeyValue) bool {
		return slices.Contains(keys, value.Key())
	})
	if len(record.Value) == before {
		return false
	}
	record.Value = slices.DeleteFunc(record.Value, func(value dns.SVCBKeyValue) bool {
		mandatory, ok := value.(*dns.SVCBMandatory)
		if !ok {
			return false
		}
		mandatory.Code = slices.DeleteFunc(slices.Clone(mandatory.Code), func(key dns.SVCBKey) bool { return slices.Contains(keys, key) })
		return len(mandatory.Code) == 0
	})
	return true
}

// unsign drops the claim that an answer is authentic, and signatures of what is no longer what was signed.
func (got *answer) unsign() {
	got.authentic = false
	got.records = slices.DeleteFunc(got.records, func(record dns.RR) bool {
		s, ok := record.(*dns.RRSIG)
		return ok && s.TypeCovered == got.qtype
	})
}
