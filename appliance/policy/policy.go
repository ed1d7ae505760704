// Package policy is the one definition of what sidegate decides: rules, flows and verdicts.
//
// Policy.Match is the specification. Tables.Match is the form that the kernel executes, and the
// BPF program in bpf/policy.h is its third rendering; the tests hold all three equal.
// The package is pure: it imports only the standard library and has no state.
package policy

import (
	"fmt"
	"net/netip"
	"strconv"
)

// Verdict is what happens to a flow. The zero value is invalid, in Go and in BPF.
type Verdict uint8

// The verdicts, numbered as in bpf/types.h (enum verdict).
const (
	Direct Verdict = iota + 1 // the kernel forwards it, untranslated
	Proxy                     // our transparent proxy carries it to an outbound
	Block                     // dropped, or refused where the rule says reject
)

func (v Verdict) String() string {
	switch v {
	case Direct:
		return "direct"
	case Proxy:
		return "proxy"
	case Block:
		return "block"
	}
	return "invalid(" + strconv.Itoa(int(v)) + ")"
}

// MarshalText makes verdicts words in JSON.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (v *Verdict) UnmarshalText(text []byte) error {
	for _, w := range []Verdict{Direct, Proxy, Block} {
		if string(text) == w.String() {
			*v = w
			return nil
		}
	}
	return fmt.Errorf("verdict %q is not direct, proxy or block", text)
}

// Network is the transport protocol of a flow as rules see it. Its zero value is every protocol that
// is neither TCP nor UDP: such a flow has no ports and cannot be proxied.
type Network uint8

// The networks that a rule can name; the numbers are the IP protocol numbers.
const (
	TCP Network = 6
	UDP Network = 17
)

func (n Network) String() string {
	switch n {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return "other"
}

// MarshalText makes networks words in JSON.
func (n Network) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (n *Network) UnmarshalText(text []byte) error {
	for _, w := range []Network{0, TCP, UDP} {
		if string(text) == w.String() {
			*n = w
			return nil
		}
	}
	return fmt.Errorf("network %q is not tcp, udp or other", text)
}

// MAC is an Ethernet address. The zero value means unknown: the packet came from an interface
// without link-layer addresses.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// MarshalText writes the usual form; the unknown address is empty.
func (m MAC) MarshalText() ([]byte, error) {
	if m == (MAC{}) {
		return nil, nil
	}
	return []byte(m.String()), nil
}

// UnmarshalText is the inverse of MarshalText.
func (m *MAC) UnmarshalText(text []byte) (err error) {
	*m = MAC{}
	if len(text) > 0 {
		*m, err = ParseMAC(string(text))
	}
	return err
}

// Flow is everything that a rule can look at. A fact that is not known is the zero value; a rule that
// asks for it, by a field or by its negation, does not match. IPv4-mapped IPv6 addresses are taken as
// the IPv4 that they stand for.
type Flow struct {
	Network             Network
	Source, Destination netip.AddrPort // ports are 0 where the protocol has none
	DSCP                uint8          // 0–63
	SourceMAC           MAC            // zero: unknown
	Interface           string         // where it came in; empty: unknown
	Names               []string       // names known for the destination; empty: unknown
	// Aliases are, by name, what DNS says it stands for (CNAME). They are that name too: a field matches if it matches
	// one of them, and what stands under not if it matches none.
	Aliases map[string][]string
	Process Process // zero: a client's flow
}

// Process is the process of the gateway itself that a flow comes from. What is empty is not known.
type Process struct {
	Name string // base name of its executable file
	Path string // absolute path of that file
	Unit string // the systemd unit that it belongs to, or else its cgroup's directory: a name without slashes
}

// The outbound names that no configuration can define.
const (
	OutboundDirect = "direct"
	OutboundBlock  = "block"
)

// MaxRules is the number of rules that the bit vectors hold: 16 words of 64.
const MaxRules = 1024

// Decision is the outcome for one flow.
type Decision struct {
	Verdict   Verdict
	Outbound  string // OutboundDirect, OutboundBlock, or the name of an outbound or group
	Rule      int    // index in Policy.Rules; -1 is the default
	Ambiguous bool   // the flow's names lead to different outbounds or marks; Rule is the first of them
}

// Policy is an ordered list of rules: the first that matches a flow decides, and Default where none does.
type Policy struct {
	Rules   []Rule
	Default string  // an outbound name
	Geo     GeoData // nil: a rule with geosite or geoip is an error
}

// Rule leads the flows that it matches to an outbound. Conditions of one dimension are alternatives,
// different dimensions must all hold, and none of Not may.
type Rule struct {
	Name     string // may be empty
	Is, Not  []Condition
	Outbound string
	Mark     uint32 // extra firewall mark for direct traffic; 0: none
	SNAT     *bool  // of direct traffic; nil: as the configuration's return path says
	Reject   bool   // block answers with a TCP reset or ICMP unreachable instead of silence
}

// Condition is one field of a rule. Its values are alternatives. Field.Parse makes one.
type Condition struct {
	Field  *Field
	Values []Value
}

// GeoData resolves the names of address and domain lists.
type GeoData interface {
	// Site returns the patterns of a geosite category: values of domain, domain_suffix, domain_keyword
	// and domain_regex.
	Site(category string) ([]Value, bool)
	// IP returns the prefixes of a geoip code.
	IP(code string) ([]netip.Prefix, bool)
}
