package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"unicode"
)

// Value is one alternative of a condition, parsed and checked; String is its normal form, which
// Field.Parse accepts again.
type Value interface{ fmt.Stringer }

// Field is one thing that a rule can ask about a flow. Configuration keys, the reference, parsing,
// Match, Compile, Explain and the generator of random policies all derive from this one table.
type Field struct {
	Key       string    // as in the configuration
	Doc       string    // what it matches, in Markdown
	Example   string    // a list of values as in YAML
	Dimension Dimension // fields of one dimension are alternatives

	parse   func(text string) (Value, error)
	matches func(v Value, f *facts, geo GeoData) bool         // the predicate; the dimension's fact is known
	encode  func(c *compiler, v Value, g group)               // the same for Compile: g is permitted or excluded by v
	random  func(r *rand.Rand) string                         // some value, from a small and nested universe
	near    func(r *rand.Rand, v Value, f *Flow, geo GeoData) // moves f to a boundary of v, inside or out
}

var fields = []*Field{
	{
		Key: "domain", Dimension: DestinationName, Example: "[www.example.com]",
		Doc:   "The destination's name, whole. Case and a trailing dot do not matter.",
		parse: parseDomain, matches: matchName, encode: (*compiler).addName,
		random: randomDomain, near: nearName,
	}, {
		Key: "domain_suffix", Dimension: DestinationName, Example: "[example.com, .example.org]",
		Doc:   "A name and its subdomains; with a leading dot, only its subdomains.",
		parse: parseSuffix, matches: matchName, encode: (*compiler).addName,
		random: randomSuffix, near: nearName,
	}, {
		Key: "domain_keyword", Dimension: DestinationName, Example: "[tracker]",
		Doc:   "Text that occurs anywhere in the name.",
		parse: parseKeyword, matches: matchName, encode: (*compiler).addName,
		random: randomKeyword, near: nearName,
	}, {
		Key: "domain_regex", Dimension: DestinationName, Example: `['^ads?\.']`,
		Doc:   "A [RE2](https://github.com/google/re2/wiki/Syntax) expression that is found in the name, ignoring case. Anchor it with `^` and `$`.",
		parse: parseRegex, matches: matchName, encode: (*compiler).addName,
		random: randomRegex, near: nearName,
	}, {
		Key: "geosite", Dimension: DestinationName, Example: "[cn]",
		Doc:   "A category of the geosite data.",
		parse: parseSite, matches: matchSite, encode: (*compiler).addSite,
		random: randomSite, near: nearName,
	}, {
		Key: "ip_cidr", Dimension: DestinationAddress, Example: "[192.0.2.0/24, '2001:db8::/32', 198.51.100.7]",
		Doc:   "The destination address. IPv4 prefixes match IPv4 only, IPv6 prefixes IPv6 only.",
		parse: parsePrefix, matches: matchDestination, encode: (*compiler).addDestination,
		random: randomPrefix, near: nearDestination,
	}, {
		Key: "geoip", Dimension: DestinationAddress, Example: "[cn]",
		Doc:   "The destination address is listed under a code of the geoip data.",
		parse: parseCountry, matches: matchCountry, encode: (*compiler).addCountry,
		random: randomCountry, near: nearCountry,
	}, {
		Key: "ip_is_private", Dimension: DestinationAddress, Example: "true",
		Doc:   "The destination address is not a public one: " + privateText() + ".",
		parse: parsePrivate, matches: matchPrivate, encode: (*compiler).addPrivate,
		random: func(*rand.Rand) string { return "true" }, near: nearPrivate,
	}, {
		Key: "source_ip_cidr", Dimension: SourceAddress, Example: "[192.168.0.32/28, 'fd00::3']",
		Doc:   "The client's address.",
		parse: parsePrefix, matches: matchSource, encode: (*compiler).addSource,
		random: randomPrefix, near: nearSource,
	}, {
		Key: "port", Dimension: DestinationPort, Example: "[443, 1000-2000]",
		Doc:   "The destination port. A protocol without ports matches neither `port` nor `not: port`.",
		parse: parseSpan, matches: matchPort, encode: (*compiler).addPort,
		random: randomSpan, near: nearPort,
	}, {
		Key: "source_port", Dimension: SourcePort, Example: "[123, 6881-6889]",
		Doc:   "The client's port.",
		parse: parseSpan, matches: matchSourcePort, encode: (*compiler).addSourcePort,
		random: randomSpan, near: nearSourcePort,
	}, {
		Key: "network", Dimension: Protocol, Example: "[udp]",
		Doc:   "The transport protocol, `tcp` or `udp`. Everything else: `not: {network: [tcp, udp]}`.",
		parse: parseNetwork, matches: matchNetwork, encode: (*compiler).addNetwork,
		random: randomNetwork, near: nearNetwork,
	}, {
		Key: "ip_version", Dimension: IPVersion, Example: "[6]",
		Doc:   "`4` or `6`.",
		parse: parseVersion, matches: matchVersion, encode: (*compiler).addVersion,
		random: randomVersion, near: nearVersion,
	}, {
		Key: "dscp", Dimension: DSCP, Example: "[46]",
		Doc:   "The differentiated services code point of the IP header, 0 to 63 (RFC 2474).",
		parse: parseCodePoint, matches: matchCodePoint, encode: (*compiler).addCodePoint,
		random: randomCodePoint, near: nearCodePoint,
	}, {
		Key: "source_mac_address", Dimension: SourceMAC, Example: "['02:00:00:00:00:10']",
		Doc:   "The Ethernet address that the packet came from: the client's, unless a router is between.",
		parse: parseMAC, matches: matchMAC, encode: (*compiler).addMAC,
		random: randomMAC, near: nearMAC,
	}, {
		Key: "inbound_interface", Dimension: InboundInterface, Example: "[eth0]",
		Doc:   "The interface that the packet came in by, whole name.",
		parse: parseInterface, matches: matchInterface, encode: (*compiler).addInterface,
		random: randomInterface, near: nearInterface,
	}, {
		Key: "process_name", Dimension: ProcessName, Example: "[curl]",
		Doc:   "The process on the gateway itself that opened the connection, by the base name of its executable file. Clients' flows match neither this nor its negation.",
		parse: parseProcess, matches: matchProcess, encode: (*compiler).addProcess,
		random: randomProcess, near: nearProcess,
	}, {
		Key: "process_path", Dimension: ProcessPath, Example: "[/usr/bin/curl]",
		Doc:   "The same by the absolute path of that file, whole: the file's own, not that of a link to it.",
		parse: parsePath, matches: matchPath, encode: (*compiler).addPath,
		random: randomPath, near: nearPath,
	}, {
		Key: "unit", Dimension: ProcessUnit, Example: "[transmission.service]",
		Doc:   "The same by its systemd unit, whole name; elsewhere than under systemd by its cgroup's directory.",
		parse: parseUnit, matches: matchUnit, encode: (*compiler).addUnit,
		random: randomUnit, near: nearUnit,
	},
}

// Fields returns every field in the order of the reference. The table is shared: do not change it.
func Fields() []*Field { return slices.Clone(fields) }

// LookupField finds a field by its configuration key.
func LookupField(key string) (*Field, bool) {
	for _, f := range fields {
		if f.Key == key {
			return f, true
		}
	}
	return nil, false
}

// Parse makes a condition; each text is one scalar as the user wrote it. The error names the first
// bad text and the fix, in one line.
func (f *Field) Parse(texts ...string) (Condition, error) {
	if len(texts) == 0 {
		return Condition{}, fmt.Errorf("%s: no values: such a rule never matches; remove the field or give it one", f.Key)
	}
	values := make([]Value, len(texts))
	for i, text := range texts {
		if strings.ContainsFunc(text, unicode.IsControl) {
			return Condition{}, fmt.Errorf("%s %q: control characters cannot be in a value: remove them", f.Key, text)
		}
		v, err := f.parse(text)
		if err != nil {
			return Condition{}, fmt.Errorf("%s %q: %w", f.Key, text, err)
		}
		values[i] = v
	}
	return Condition{Field: f, Values: values}, nil
}

// Dimension is a fact about flows. Each has one look-up in the tables, or a part of one.
type Dimension uint8

// The dimensions.
const (
	DestinationName Dimension = iota
	DestinationAddress
	SourceAddress
	DestinationPort
	SourcePort
	Protocol
	IPVersion
	DSCP
	SourceMAC
	InboundInterface
	ProcessName
	ProcessPath
	ProcessUnit
	dimensions // how many
)

// facts is a flow as one pass over the rules sees it: normalised, with one of its names at a time.
type facts struct {
	Flow
	name []string // with its aliases; empty: unknown
}

// dimensionTable says for each dimension when its fact is known, and the words of Explain.
var dimensionTable = [dimensions]struct {
	known   func(f *facts) bool
	absent  string                // why the fact is missing
	subject func(f *facts) string // the fact
}{
	DestinationName: {
		known:   func(f *facts) bool { return len(f.name) > 0 },
		absent:  "the destination has no known name",
		subject: func(f *facts) string { return "name " + strings.Join(f.name, " → ") },
	},
	DestinationAddress: {
		known:   func(f *facts) bool { return f.Destination.Addr().IsValid() },
		absent:  "the destination address is not known",
		subject: func(f *facts) string { return "destination " + f.Destination.Addr().String() },
	},
	SourceAddress: {
		known:   func(f *facts) bool { return f.Source.Addr().IsValid() },
		absent:  "the source address is not known",
		subject: func(f *facts) string { return "source " + f.Source.Addr().String() },
	},
	DestinationPort: {
		known:   func(f *facts) bool { return f.Destination.Port() != 0 },
		absent:  "the flow has no destination port",
		subject: func(f *facts) string { return fmt.Sprint("port ", f.Destination.Port()) },
	},
	SourcePort: {
		known:   func(f *facts) bool { return f.Source.Port() != 0 },
		absent:  "the flow has no source port",
		subject: func(f *facts) string { return fmt.Sprint("source port ", f.Source.Port()) },
	},
	Protocol: {
		known:   func(*facts) bool { return true },
		subject: func(f *facts) string { return "network " + f.Network.String() },
	},
	IPVersion: {
		known:   func(f *facts) bool { return f.version() != 0 },
		absent:  "the flow has no addresses",
		subject: func(f *facts) string { return "IP version " + f.version().String() },
	},
	DSCP: {
		known:   func(*facts) bool { return true },
		subject: func(f *facts) string { return fmt.Sprint("DSCP ", f.DSCP) },
	},
	SourceMAC: {
		known:   func(f *facts) bool { return f.SourceMAC != MAC{} },
		absent:  "the source MAC address is not known",
		subject: func(f *facts) string { return "source MAC " + f.SourceMAC.String() },
	},
	InboundInterface: {
		known:   func(f *facts) bool { return f.Interface != "" },
		absent:  "the inbound interface is not known",
		subject: func(f *facts) string { return "interface " + f.Interface },
	},
	ProcessName: {
		known:   func(f *facts) bool { return f.Process.Name != "" },
		absent:  "the flow is not from a process of the gateway whose name is known",
		subject: func(f *facts) string { return "process " + f.Process.Name },
	},
	ProcessPath: {
		known:   func(f *facts) bool { return f.Process.Path != "" },
		absent:  "the flow is not from a process of the gateway whose path is known",
		subject: func(f *facts) string { return "process path " + f.Process.Path },
	},
	ProcessUnit: {
		known:   func(f *facts) bool { return f.Process.Unit != "" },
		absent:  "the flow is not from a process of the gateway whose unit is known",
		subject: func(f *facts) string { return "unit " + f.Process.Unit },
	},
}

// Reference renders the table of fields as Markdown.
func Reference() string {
	var b strings.Builder
	b.WriteString("| field | example | matches |\n|---|---|---|\n")
	for _, f := range fields {
		// A vertical bar would end the cell, inside code too.
		fmt.Fprintf(&b, "| `%s` | `%s: %s` | %s |\n", f.Key, f.Key,
			strings.ReplaceAll(f.Example, "|", `\|`), strings.ReplaceAll(f.Doc, "|", `\|`))
	}
	return b.String()
}
