package geodata

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"sidegate/appliance/policy"
)

const (
	largeDomains     = 100_000
	largeExpressions = 300
	largeKeywords    = 300
)

// largeGeosite is a file with a list as large as the largest that people use, beside as much that nobody wants.
func largeGeosite(tb testing.TB) string {
	r := rand.New(rand.NewPCG(3, 4))
	var wanted, other []domain
	for i := range largeDomains {
		name := fmt.Sprintf("n%x-%x.%s", r.Uint32(), i, []string{"com", "net", "cn", "example.com", "ads.example.net"}[i%5])
		wanted = append(wanted, domain{2 + uint64(i%2), name, nil})
		other = append(other, domain{2, "o" + name, []string{"ads"}})
	}
	for i := range largeExpressions {
		wanted = append(wanted, domain{1, fmt.Sprintf(`(^|\.)ad[sv]?[0-9]*\.(.+\.)?site%d\.(com|net)$`, i), nil})
	}
	for i := range largeKeywords {
		wanted = append(wanted, domain{0, fmt.Sprintf("track%dword", i), nil})
	}
	return file(tb, "geosite.dat", append(encodeSite("OTHER", other...), encodeSite("LARGE", wanted...)...))
}

// tables of a policy with the list in two rules.
func tables(tb testing.TB, path string) *policy.Tables {
	tb.Helper()
	large, err := fieldOf("geosite").Parse("large")
	if err != nil {
		tb.Fatal(err)
	}
	p := &policy.Policy{Default: "direct", Rules: []policy.Rule{
		{Is: []policy.Condition{large}, Outbound: "block"},
		{Not: []policy.Condition{large}, Outbound: "hk"},
	}}
	sites, codes := policy.ListsOf(p.Rules)
	data, err := Load(Sources{Geosite: path}, Wanted{sites, codes})
	if err != nil {
		tb.Fatal(err)
	}
	p.Geo = data
	compiled, err := policy.Compile(p)
	if err != nil {
		tb.Fatal(err)
	}
	kept = p // a configuration keeps its policy, for explain
	return compiled
}

var kept any

// The tables of the largest lists, and the lists themselves, leave room for everything else.
func TestLargeListIsLean(t *testing.T) {
	path := largeGeosite(t)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	compiled := tables(t, path)
	runtime.ReadMemStats(&after)
	allocated := after.TotalAlloc - before.TotalAlloc
	runtime.GC()
	runtime.ReadMemStats(&after)
	added := after.HeapAlloc - before.HeapAlloc
	t.Logf("%.1f MiB kept, %.1f MiB allocated on the way", float64(added)/(1<<20), float64(allocated)/(1<<20))
	if added > 60<<20 {
		t.Errorf("%d bytes are kept", added)
	}
	if allocated > 200<<20 {
		t.Errorf("%d bytes were allocated", allocated)
	}

	// It is the list that this is about, and a name costs no allocation.
	for name, want := range map[string]int{
		"ads1.a.site299.net": 0, "xads.site299.net": 1, "www.track77word.example": 0, "www.example.com": 1,
	} {
		names := []string{name}
		if d := compiled.Match(policy.Flow{Names: names}); d.Rule != want {
			t.Errorf("%s was decided by rule %d, want %d", name, d.Rule, want)
		}
		if n := testing.AllocsPerRun(100, func() { compiled.Name.Bits(names) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	values, _ := kept.(*policy.Policy).Geo.Site("large")
	if len(values) != largeDomains+largeExpressions+largeKeywords {
		t.Errorf("%d entries", len(values))
	}
	kept = nil
}

// BenchmarkLargeList loads and compiles: ns/op is how long a start or a reload takes longer.
func BenchmarkLargeList(b *testing.B) {
	path := largeGeosite(b)
	b.ReportAllocs()
	for b.Loop() {
		tables(b, path)
	}
}

// BenchmarkLargeListName asks for one name.
func BenchmarkLargeListName(b *testing.B) {
	compiled := tables(b, largeGeosite(b))
	for _, name := range []string{"www.example.com", "cdn-7.assets.static.images.example.net", "ads1.a.site299.net", "www.track77word.example"} {
		b.Run(name, func(b *testing.B) {
			names := []string{name}
			b.ReportAllocs()
			for b.Loop() {
				compiled.Name.Bits(names)
			}
		})
	}
}
