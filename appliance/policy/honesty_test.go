package policy

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"testing"
)

// The proof is worth what it catches. Each mutant below has one wrong comparison, in the specification,
// in an encoder or in the tables, and the generator has to find it.

// cases after which a mutant has escaped. Most are found within a thousand.
const mutantCases = 60_000

// With SIDEGATE_KEEP_MUTANTS set, the shrunk case that finds each mutant joins the corpus.
var keepMutants = os.Getenv("SIDEGATE_KEEP_MUTANTS") != ""

// find runs the proof's search; cases is 0 if nothing was found.
func find(mutate func(*Tables)) (c Case, cases int) {
	for seed := range uint64(mutantCases / flowsPerPolicy) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := Random(r)
		if len(p.Rules) > 200 { // seldom needed, and slow
			continue
		}
		tables, err := Compile(p)
		if err != nil {
			panic(err)
		}
		mutate(tables)
		for n := range flowsPerPolicy {
			f := blur(r, p.RandomFlow(r))
			if tables.Match(f) != p.Match(f) {
				return Case{p, f}, int(seed)*flowsPerPolicy + n + 1
			}
		}
	}
	return Case{}, 0
}

func mustFind(t *testing.T, mutate func(*Tables)) {
	t.Helper()
	c, n := find(mutate)
	if n == 0 {
		t.Errorf("not found in %d cases", mutantCases)
		return
	}
	t.Logf("found by case %d", n)
	if keepMutants {
		name := strings.NewReplacer("TestWrong", "mutant-", "IsFound/", "-", "/", "-", ":", "", "_", "-").Replace(t.Name())
		keep(t, name, Shrink(c, func(c Case) bool {
			tables, err := Compile(c.Policy)
			if err != nil {
				return false
			}
			mutate(tables)
			return tables.Match(c.Flow) != c.Policy.Match(c.Flow)
		}))
	}
}

// wrongPredicates has for each field a comparison that is slightly off.
var wrongPredicates = map[string]func(v Value, f *facts, geo GeoData) bool{
	"domain":         func(v Value, f *facts, _ GeoData) bool { return strings.HasPrefix(f.name[0], v.String()) },
	"domain_suffix":  func(v Value, f *facts, _ GeoData) bool { return strings.HasSuffix(f.name[0], v.String()) },
	"domain_keyword": func(v Value, f *facts, _ GeoData) bool { return strings.Index(f.name[0], v.String()) > 0 },
	"domain_regex": func(v Value, f *facts, _ GeoData) bool {
		return v.(regexName).re.FindString(f.name[0]) == f.name[0]
	},
	"geosite": func(v Value, f *facts, geo GeoData) bool {
		patterns := sitePatterns(geo, v.(siteName))
		return len(patterns) > 0 && patterns[0].(pattern).matches(f.name[0])
	},
	"ip_cidr": func(v Value, f *facts, _ GeoData) bool {
		p, a := v.(netip.Prefix), f.Destination.Addr()
		return p.Contains(a) && (p.IsSingleIP() || p.Contains(a.Next())) // misses the last address
	},
	"geoip": func(v Value, f *facts, geo GeoData) bool {
		prefixes := countryPrefixes(geo, v.(country))
		return len(prefixes) > 0 && prefixes[0].Contains(f.Destination.Addr())
	},
	"ip_is_private": func(_ Value, f *facts, _ GeoData) bool { return f.Destination.Addr().IsPrivate() },
	"source_ip_cidr": func(v Value, f *facts, _ GeoData) bool {
		p := v.(netip.Prefix)
		if p.Bits() == p.Addr().BitLen() {
			p = netip.PrefixFrom(p.Addr(), p.Bits()-1)
		}
		return p.Masked().Contains(f.Source.Addr())
	},
	"port": func(v Value, f *facts, _ GeoData) bool {
		s, port := v.(Span), f.Destination.Port()
		return s.First <= port && (port < s.Last || s.First == s.Last && port == s.Last)
	},
	"source_port": func(v Value, f *facts, _ GeoData) bool {
		s, port := v.(Span), f.Source.Port()
		return s.First-1 <= port && port <= s.Last
	},
	"network":           func(v Value, f *facts, _ GeoData) bool { return v.(Network) == f.Network || f.Network == 0 },
	"ip_version":        func(v Value, f *facts, _ GeoData) bool { return v.(version) >= f.version() },
	"dscp":              func(v Value, f *facts, _ GeoData) bool { return uint8(v.(codePoint))&31 == f.DSCP&31 },
	"inbound_interface": func(v Value, f *facts, _ GeoData) bool { return strings.HasPrefix(f.Interface, v.String()) },
	"process_name":      func(v Value, f *facts, _ GeoData) bool { return strings.EqualFold(f.Process.Name, v.String()) },
	"process_path":      func(v Value, f *facts, _ GeoData) bool { return strings.HasSuffix(f.Process.Path, v.String()) },
	"unit":              func(v Value, f *facts, _ GeoData) bool { return strings.HasPrefix(f.Process.Unit, v.String()[:3]) },
	"source_mac_address": func(v Value, f *facts, _ GeoData) bool {
		m := v.(MAC)
		return [5]byte(m[:5]) == [5]byte(f.SourceMAC[:5])
	},
}

func TestWrongPredicateIsFound(t *testing.T) {
	for _, field := range fields {
		wrong, ok := wrongPredicates[field.Key]
		if !ok {
			t.Errorf("%s has no wrong predicate", field.Key)
			continue
		}
		t.Run(field.Key, func(t *testing.T) {
			right := field.matches
			defer func() { field.matches = right }()
			field.matches = wrong
			mustFind(t, func(*Tables) {})
			if !sentencesCatch(t) {
				t.Error("the settled sentences do not notice")
			}
		})
	}
}

// sentencesCatch reports whether the sentences written by hand notice a specification that is wrong.
func sentencesCatch(t *testing.T) bool {
	for _, test := range settledSemantics {
		p := &Policy{Rules: rules(t, test.rules), Default: "direct", Geo: testGeo}
		for _, ask := range test.asks {
			if p.Match(flow(t, ask.flow)).Rule != ask.rule {
				return true
			}
		}
	}
	return false
}

// An encoder that forgets a value, or mistakes the rule.
func TestWrongEncoderIsFound(t *testing.T) {
	for _, field := range fields {
		right := field.encode
		for name, wrong := range map[string]func(c *compiler, v Value, g group){
			"negation": func(c *compiler, v Value, g group) { right(c, v, (g-1)^1+1) },
			"nothing":  func(*compiler, Value, group) {},
		} {
			t.Run(field.Key+"/"+name, func(t *testing.T) {
				defer func() { field.encode = right }()
				field.encode = wrong
				mustFind(t, func(*Tables) {})
			})
		}
	}
}

func TestWrongTableIsFound(t *testing.T) {
	flip := func(bits []Bits, class int) {
		if class < len(bits) {
			bits[class][0] ^= 1
		}
	}
	ports := func(t *PortTable) { // each edge one port later
		previous := t.Class[0]
		for i, c := range t.Class {
			if i > 1 {
				t.Class[i] = previous
			}
			previous = c
		}
	}
	forgetAncestors := func(t *PrefixTable) {
		for i, around := range t.around {
			if around < 0 {
				continue
			}
			row, outer := t.Bits[t.Prefixes[i].Class], t.Bits[t.Prefixes[around].Class]
			outer.andNot(&t.Bits[ClassOther])
			row.andNot(&outer)
			t.Bits = append(t.Bits, row)
			t.Prefixes[i].Class = Class(len(t.Bits) - 1)
		}
	}
	for name, mutate := range map[string]func(*Tables){
		"destination: one bit of the unknown class":    func(t *Tables) { flip(t.Destination.Bits, 0) },
		"destination: one bit of the other class":      func(t *Tables) { flip(t.Destination.Bits, 1) },
		"destination: one bit of one class":            func(t *Tables) { flip(t.Destination.Bits, 2) },
		"source: one bit of the other class":           func(t *Tables) { flip(t.Source.Bits, 1) },
		"source: one bit of one class":                 func(t *Tables) { flip(t.Source.Bits, 2) },
		"port: one bit of the unknown class":           func(t *Tables) { flip(t.DestinationPort.Bits, 0) },
		"port: one bit of the other class":             func(t *Tables) { flip(t.DestinationPort.Bits, 1) },
		"port: one bit of one class":                   func(t *Tables) { flip(t.DestinationPort.Bits, 2) },
		"source port: one bit of one class":            func(t *Tables) { flip(t.SourcePort.Bits, 2) },
		"header: one bit of one class":                 func(t *Tables) { flip(t.Header.Bits, 2) },
		"mac: one bit of the unknown class":            func(t *Tables) { flip(t.MAC.Bits, 0) },
		"mac: one bit of the other class":              func(t *Tables) { flip(t.MAC.Bits, 1) },
		"mac: one bit of one class":                    func(t *Tables) { flip(t.MAC.Bits, 2) },
		"interface: one bit of one class":              func(t *Tables) { flip(t.Interface.Bits, 2) },
		"process: one bit of one class":                func(t *Tables) { flip(t.ProcessName.Bits, 2) },
		"process path: one bit of one class":           func(t *Tables) { flip(t.ProcessPath.Bits, 2) },
		"process path: one bit of the unknown class":   func(t *Tables) { flip(t.ProcessPath.Bits, 0) },
		"process path: unknown is another path":        func(t *Tables) { t.ProcessPath.Bits[ClassUnknown] = t.ProcessPath.Bits[ClassOther] },
		"unit: one bit of one class":                   func(t *Tables) { flip(t.ProcessUnit.Bits, 2) },
		"unit: one bit of the other class":             func(t *Tables) { flip(t.ProcessUnit.Bits, 1) },
		"unit: unknown is another unit":                func(t *Tables) { t.ProcessUnit.Bits[ClassUnknown] = t.ProcessUnit.Bits[ClassOther] },
		"name: one bit of the unknown row":             func(t *Tables) { t.Name.Unknown[0] ^= 1 },
		"name: unknown is another name":                func(t *Tables) { t.Name.Unknown = t.Name.Other },
		"mac: unknown is another MAC":                  func(t *Tables) { t.MAC.Bits[ClassUnknown] = t.MAC.Bits[ClassOther] },
		"ports: edges one port later":                  func(t *Tables) { ports(&t.DestinationPort) },
		"source ports: edges one port later":           func(t *Tables) { ports(&t.SourcePort) },
		"destination: the prefixes around are ignored": func(t *Tables) { forgetAncestors(&t.Destination) },
		"source: the prefixes around are ignored":      func(t *Tables) { forgetAncestors(&t.Source) },
		"destination: the last prefix is missing": func(t *Tables) {
			t.Destination.Prefixes = t.Destination.Prefixes[:max(0, len(t.Destination.Prefixes)-1)]
		},
		"header: IPv6 taken for IPv4": func(t *Tables) { copy(t.Header.Class[256:], t.Header.Class[:256]) },
		"a word is ignored":           func(t *Tables) { t.Words = max(1, t.Words-1) },
		"the first word is taken for all rules": func(t *Tables) {
			if len(t.Rules) > 0 {
				t.Rules[len(t.Rules)-1] = t.Rules[0]
			}
		},
		"the default is another": func(t *Tables) { t.Default.Outbound += "x" },
	} {
		t.Run(name, func(t *testing.T) { mustFind(t, mutate) })
	}
	t.Run("none", func(t *testing.T) {
		if _, n := find(func(*Tables) {}); n != 0 {
			t.Errorf("the right tables fail at case %d", n)
		}
	})
}
