package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"runtime"
	"testing"
)

// The layout that bpf/policy.h mirrors.
func TestTablesLayout(t *testing.T) {
	if got := HeaderIndex(46, UDP, true); got != 46|2<<6|1<<8 {
		t.Errorf("header index %d", got)
	}
	if got := HeaderIndex(63, TCP, false); got != 63|1<<6 {
		t.Errorf("header index %d", got)
	}
	if HeaderIndex(0, 0, false) != 0 {
		t.Error("another protocol is not 0")
	}
	if id := OutboundID("hk"); id != 0x663af374 { // computed by hand: FNV-1a, 32 bits
		t.Errorf("outbound id %#x", id)
	}

	p := &Policy{Default: "hk", Rules: rules(t, `
		port=443 ip_cidr=10.0.0.0/8 -> direct
		!port=443 -> block
		-> direct`)}
	p.Rules[0].Mark, p.Rules[0].SNAT, p.Rules[1].Reject = 7, new(true), true
	tables, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	wantRules := []RuleAction{
		{Verdict: Direct, OutboundID: OutboundID("direct"), Outbound: "direct", Mark: 7, SNAT: p.Rules[0].SNAT},
		{Verdict: Block, OutboundID: OutboundID("block"), Outbound: "block", Reject: true},
		{Verdict: Direct, OutboundID: OutboundID("direct"), Outbound: "direct"},
	}
	if !reflect.DeepEqual(tables.Rules, wantRules) || tables.Words != 1 {
		t.Errorf("words %d, rules %+v", tables.Words, tables.Rules)
	}
	if want := (RuleAction{Verdict: Proxy, OutboundID: OutboundID("hk"), Outbound: "hk"}); tables.Default != want {
		t.Errorf("default %+v", tables.Default)
	}
	ports := &tables.DestinationPort
	for _, c := range []struct {
		name string
		got  Bits
		want uint64
	}{
		{"no port", ports.Bits[ports.Class[0]], 0b100},
		{"port 443", ports.Bits[ports.Class[443]], 0b101},
		{"another port", ports.Bits[ports.Class[442]], 0b110},
		{"the row of other ports", ports.Bits[ClassOther], 0b110},
		{"unknown address", tables.Destination.Bits[ClassUnknown], 0b110},
		{"another address", tables.Destination.Bits[ClassOther], 0b110},
		{"10.0.0.0/8", tables.Destination.Bits[tables.Destination.Prefixes[0].Class], 0b111},
		{"any source", tables.Source.Bits[ClassOther], 0b111},
		{"no name", tables.Name.Unknown, 0b111},
		{"any MAC", tables.MAC.Bits[ClassOther], 0b111},
	} {
		if c.got != (Bits{c.want}) {
			t.Errorf("%s: %b, want %b", c.name, c.got, c.want)
		}
	}
	if ports.Class[0] != uint16(ClassUnknown) || ports.Class[442] != uint16(ClassOther) {
		t.Errorf("classes %d %d", ports.Class[0], ports.Class[442])
	}
}

// Words has no word too few and none too many.
func TestWords(t *testing.T) {
	for n, want := range map[int]int{0: 1, 1: 1, 63: 1, 64: 1, 65: 2, 128: 2, 129: 3, 1023: 16, 1024: 16} {
		p := &Policy{Default: "direct", Rules: make([]Rule, n)}
		for i := range p.Rules {
			p.Rules[i].Outbound = "direct"
		}
		tables, err := Compile(p)
		if err != nil || tables.Words != want {
			t.Errorf("%d rules: %d words, want %d (%v)", n, tables.Words, want, err)
		}
	}
}

// Prefixes are sorted and unique, no entry says what the one around it says, and no bit stands for a
// rule that does not exist.
func TestTablesAreMinimal(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		p := Random(r)
		tables, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, table := range []PrefixTable{tables.Destination, tables.Source} {
			for i, entry := range table.Prefixes {
				if entry.Prefix != entry.Prefix.Masked() || i > 0 && table.Prefixes[i-1].Prefix.Compare(entry.Prefix) >= 0 {
					t.Fatalf("seed %d: %v", seed, table.Prefixes)
				}
				around := ClassOther
				for _, outer := range table.Prefixes[:i] { // the last that contains it is the nearest
					if outer.Prefix.Overlaps(entry.Prefix) {
						around = outer.Class
					}
				}
				if entry.Class == around || entry.Class == ClassUnknown {
					t.Fatalf("seed %d: entry %v within class %d", seed, entry, around)
				}
			}
		}
		for _, rows := range [][]Bits{
			tables.Destination.Bits, tables.Source.Bits, tables.DestinationPort.Bits, tables.SourcePort.Bits, tables.Header.Bits,
			tables.MAC.Bits, tables.Interface.Bits, tables.ProcessName.Bits, tables.ProcessPath.Bits, tables.ProcessUnit.Bits,
			{tables.Name.Unknown, tables.Name.Other},
		} {
			seen := map[Bits]int{}
			for i, row := range rows {
				if i > 0 && seen[row] > 0 {
					t.Fatalf("seed %d: rows %d and %d are equal", seed, seen[row], i)
				}
				seen[row] = i
				for rule := len(p.Rules); rule < MaxRules; rule++ {
					if row[rule/64]>>(rule%64)&1 != 0 {
						t.Fatalf("seed %d: row %d has rule %d of %d", seed, i, rule, len(p.Rules))
					}
				}
			}
		}
	}
}

// A policy compiles to the same tables each time, so that a reload without a change changes nothing.
func TestCompileIsDeterministic(t *testing.T) {
	for seed := range uint64(50) {
		p := Random(rand.New(rand.NewPCG(seed, 4)))
		var first Tables
		for i := range 3 {
			tables, err := Compile(p)
			if err != nil {
				t.Fatal(err)
			}
			exported := *tables
			exported.Name = NameTable{Unknown: tables.Name.Unknown, Other: tables.Name.Other}
			if i == 0 {
				first = exported
			} else if !reflect.DeepEqual(exported, first) {
				t.Fatalf("seed %d: another result", seed)
			}
		}
	}
}

// Ten rules that share a long list hold it once.
func TestSharedListIsExpandedOnce(t *testing.T) {
	geo := &lists{codes: map[string][]netip.Prefix{"cn": nil}}
	for i := range 1000 {
		geo.codes["cn"] = append(geo.codes["cn"], netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)))
	}
	p := &Policy{Default: "direct", Geo: geo}
	for i := range 10 {
		p.Rules = append(p.Rules, rules(t, fmt.Sprintf("geoip=cn port=%d -> hk", i+1))...)
	}
	c := &compiler{groups: make([][]use, 21), countries: map[country][]use{}}
	for i := range p.Rules {
		c.groups[use(i<<1).group()] = []use{use(i << 1)}
		c.addCountry(country("cn"), use(i<<1).group())
	}
	c.expandLists(geo)
	if len(c.destination) != 1000 {
		t.Errorf("%d occurrences", len(c.destination))
	}
	if d := matchBoth(t, p, flow(t, "ip=10.3.2.1 port=7")); d.Rule != 6 {
		t.Errorf("decided by %d", d.Rule)
	}
}

// large has 900 rules over 100,000 prefixes of both families, a third of them within others, and names.
func large(tb testing.TB) *Policy {
	r := rand.New(rand.NewPCG(1, 2))
	p := &Policy{Default: "direct"}
	ipCIDR, _ := LookupField("ip_cidr")
	suffix, _ := LookupField("domain_suffix")
	const count, perRule = 900, 112
	for i := range count {
		var texts, names []string
		for range perRule {
			bytes := make([]byte, 4)
			bits := 16 + r.IntN(9)
			if oneIn(r, 4) {
				bytes = make([]byte, 16)
				bits = 32 + r.IntN(33)
			}
			for k := range bytes {
				bytes[k] = byte(r.Uint32())
			}
			if len(bytes) == 16 {
				bytes[0], bytes[1], bytes[2] = 0x20, 1, byte(r.IntN(8))
			}
			addr, _ := netip.AddrFromSlice(bytes)
			texts = append(texts, netip.PrefixFrom(addr, bits).Masked().String())
			names = append(names, fmt.Sprintf("n%x.example", r.Uint32()))
		}
		is, err := ipCIDR.Parse(texts...)
		if err != nil {
			tb.Fatal(err)
		}
		rule := Rule{Name: fmt.Sprint("r", i), Is: []Condition{is}, Outbound: pick(r, randomOutbounds)}
		if i%9 == 0 {
			byName, err := suffix.Parse(names...)
			if err != nil {
				tb.Fatal(err)
			}
			rule.Not = append(rule.Not, byName)
		}
		rule.Is = append(rule.Is, mustParse("port", randomSpan(r)))
		p.Rules = append(p.Rules, rule)
	}
	return p
}

// The daemon stays below 120 MiB with such a policy; the tables and what they leave to the collector take a third of it at most.
func TestLargePolicyIsLean(t *testing.T) {
	p := large(t)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	tables, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	allocated := after.TotalAlloc - before.TotalAlloc
	runtime.GC()
	runtime.ReadMemStats(&after)
	kept := after.HeapAlloc - before.HeapAlloc
	t.Logf("%d prefixes, %d classes: %d MiB kept, %d MiB allocated on the way",
		len(tables.Destination.Prefixes), len(tables.Destination.Bits), kept>>20, allocated>>20)
	if len(tables.Destination.Prefixes) < 95_000 {
		t.Errorf("%d prefixes are not the large policy that this is about", len(tables.Destination.Prefixes))
	}
	if kept > 16<<20 || allocated > 40<<20 {
		t.Errorf("%d bytes kept, %d allocated", kept, allocated)
	}
	runtime.KeepAlive(p)
}

// A learned name costs no allocation.
func TestNameBitsDoesNotAllocate(t *testing.T) {
	tables, err := Compile(large(t))
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"www.n1.example", "a.b.c.example.com"}
	var row Bits
	if n := testing.AllocsPerRun(100, func() { row = tables.Name.Bits(names) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if row != tables.Name.Other {
		t.Error("names that no rule has are not Other")
	}
}

func BenchmarkCompile(b *testing.B) {
	p := large(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(p); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTablesMatch(b *testing.B) {
	p := large(b)
	tables, err := Compile(p)
	if err != nil {
		b.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 0))
	flows := make([]Flow, 1024)
	for i := range flows {
		flows[i] = p.RandomFlow(r)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		tables.Match(flows[i%len(flows)])
		i++
	}
}

func BenchmarkNameBits(b *testing.B) {
	tables, err := Compile(large(b))
	if err != nil {
		b.Fatal(err)
	}
	names := []string{"cdn.www.n1.example"}
	b.ReportAllocs()
	for b.Loop() {
		tables.Name.Bits(names)
	}
}
