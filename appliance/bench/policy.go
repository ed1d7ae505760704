package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
)

// policySize says how large a generated policy is: rules in all, the last of which holds a set of prefixes.
type policySize struct{ rules, prefixes int }

func (s policySize) String() string {
	if s.prefixes < 1000 {
		return fmt.Sprintf("%d rules", s.rules)
	}
	return fmt.Sprintf("%d rules + %d,%03d prefixes", s.rules, s.prefixes/1000, s.prefixes%1000)
}

// ruleKinds are what people write, in turn, so that ten rules look at the same facts as nine hundred. None of them
// matches the traffic of the benchmark: all are walked past, and the last rule or the default decides.
var ruleKinds = []func(n int) string{
	func(n int) string {
		return fmt.Sprintf("ip_cidr: [10.%d.%d.0/24, \"2001:db8:%x::/48\"], port: [80, 443]", n/256, n%256, 0x1000+n)
	},
	func(n int) string {
		return fmt.Sprintf("source_ip_cidr: 172.16.%d.%d, network: udp, port: 3000-%d", n/256, n%256, 4000+n)
	},
	func(n int) string { return fmt.Sprintf("domain_suffix: [a%d.example, b%d.example]", n, n) },
	func(n int) string {
		return fmt.Sprintf("source_mac_address: \"06:00:00:00:%02x:%02x\", not: { port: %d }", n/256, n%256, 1000+n)
	},
	func(n int) string { return fmt.Sprintf("network: tcp, port: [%d, %d-%d]", 1+n, 10000+n, 10010+n) },
	func(n int) string { return fmt.Sprintf("source_port: %d, dscp: 46, ip_version: 6", 2000+n) },
}

// policyConfig writes the configuration file of a gateway with such a policy, whose traffic is all direct.
func policyConfig(size policySize) string {
	var b strings.Builder
	b.WriteString("interfaces: { lan: eth0 }\nper_client: { flows: 100000 }\nrules:\n")
	for n := range size.rules - 1 {
		fmt.Fprintf(&b, "  - { %s, outbound: block }\n", ruleKinds[n%len(ruleKinds)](n))
	}
	b.WriteString("  - name: set\n    outbound: direct\n    ip_cidr:\n")
	for _, p := range prefixes(size.prefixes) {
		fmt.Fprintf(&b, "      - \"%s\"\n", p)
	}
	b.WriteString("default: direct\n")
	return b.String()
}

// prefixes returns n distinct prefixes that are always the same, in the proportions of a list of a large country: two
// thirds IPv4, /14 to /24, the rest IPv6, /24 to /48. Of any two sizes, one list begins with the other.
func prefixes(n int) []netip.Prefix {
	r := rand.New(rand.NewPCG(1, 0))
	seen := map[netip.Prefix]bool{}
	list := make([]netip.Prefix, 0, n)
	for len(list) < n {
		p := netip.PrefixFrom(publicAddress(r), 14+r.IntN(11)).Masked()
		if r.IntN(3) == 0 {
			var a [16]byte
			binary.BigEndian.PutUint64(a[:], r.Uint64()>>3|0x2400<<48) // in 2400::/6
			p = netip.PrefixFrom(netip.AddrFrom16(a), 24+r.IntN(25)).Masked()
		}
		if !seen[p] {
			seen[p] = true
			list = append(list, p)
		}
	}
	return list
}

// publicAddress is an IPv4 address outside the networks of the lab and those with a meaning of their own.
func publicAddress(r *rand.Rand) netip.Addr {
	for {
		a := netip.AddrFrom4([4]byte{byte(1 + r.IntN(222)), byte(r.IntN(256)), byte(r.IntN(256)), byte(1 + r.IntN(254))})
		b := a.As4()
		if !a.IsPrivate() && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !(b[0] == 203 && b[1] == 0) {
			return a
		}
	}
}

// destinations returns n addresses, the same for every policy: half of them in prefixes of the largest set.
func destinations(n int) []netip.AddrPort {
	r := rand.New(rand.NewPCG(2, 0))
	known := prefixes(n)
	list := make([]netip.AddrPort, n)
	for i := range list {
		a := publicAddress(r)
		if p := known[i]; i%2 == 0 && p.Addr().Is4() {
			b := p.Addr().As4()
			b[3] |= 1
			a = netip.AddrFrom4(b)
		}
		list[i] = netip.AddrPortFrom(a, 443)
	}
	return list
}
