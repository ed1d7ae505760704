package policy

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// found are the distinct owners that an automaton over these texts finds in the name.
func found(texts []string, name string) []uint32 {
	var all []wanted
	for i, text := range texts {
		all = append(all, wanted{text, uint32(i)})
	}
	a := newAutomaton(all)
	owners := map[uint32]bool{}
	a.owners(name, func(owner uint32) { owners[owner] = true })
	return slices.Sorted(maps.Keys(owners))
}

func contained(texts []string, name string) []uint32 {
	var owners []uint32
	for i, text := range texts {
		if strings.Contains(name, text) {
			owners = append(owners, uint32(i))
		}
	}
	return owners
}

// The automaton finds what strings.Contains finds, where texts overlap, contain and repeat each other.
func TestAutomaton(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 5))
	word := func(most int) string {
		b := make([]byte, 1+r.IntN(most))
		for i := range b {
			b[i] = "ab.-9z"[r.IntN(3+r.IntN(4))]
		}
		return string(b)
	}
	hits := 0
	for range 20_000 {
		texts := make([]string, r.IntN(12))
		for i := range texts {
			texts[i] = word(6)
		}
		name := word(20)
		got, want := found(texts, name), contained(texts, name)
		if !slices.Equal(got, want) {
			t.Fatalf("%q in %q: %v, want %v", texts, name, got, want)
		}
		hits += len(want)
	}
	if hits < 20_000 {
		t.Errorf("%d texts were found: the generator has lost its reach", hits)
	}
}

// A text with a character that no name has is found too, and perhaps where it is not.
func FuzzAutomaton(f *testing.F) {
	f.Add("ads,dsx,s", "www.adsx.example")
	f.Add("a,aa,aaa", "baaaab")
	f.Add("é", "café")
	f.Add("a,9,.", "!é")
	f.Fuzz(func(t *testing.T, list, name string) {
		var texts []string
		for text := range strings.SplitSeq(list, ",") {
			if text != "" && len(texts) < 64 {
				texts = append(texts, text)
			}
		}
		got := found(texts, name)
		for _, i := range contained(texts, name) {
			if !slices.Contains(got, i) {
				t.Fatalf("%q is in %q and was not found", texts[i], name)
			}
		}
		for _, i := range got {
			if checkCharacters(texts[i]) == nil && !strings.Contains(name, texts[i]) {
				t.Fatalf("%q was found in %q", texts[i], name)
			}
		}
	})
}

func TestRequiredTexts(t *testing.T) {
	for _, c := range []struct {
		expression string
		want       string // texts, or "-" where none is known
	}{
		{`^ads?\.`, "ad. ads."},
		{`^ad[0-9]{1,2}\.example\.com$`, ".example.com"},
		{`\.example\.com$`, ".example.com"},
		{`(^|\.)track(er|ing)\.`, "tracker. tracking."},
		{`^(a|b).+\.tracker\.(com|net)$`, ".tracker.com .tracker.net"},
		{`^r+[0-9]+(---|\.)sn-(2x3|ni5|j5o)\w{5}\.xn--ngstr-lra8j\.com$`, ".xn--ngstr-lra8j.com"},
		{`(?i)ADS\.Example`, "ads.example"},
		{`tracker|^[0-9]+$`, "0 1 2 3 4 5 6 7 8 9 tracker"},
		{`tracker|^[a-z]+$`, "-"},
		{`(tracker)+x`, "tracker"},
		{`(tracker)?x`, "x"},
		{`(tracker)*`, "-"},
		{`^[^.]+$`, "-"},
		{`.`, "-"},
		{`[a-z]+\.com`, ".com"},
		{`www\..*cdn`, "cdn"},
		{`[[:upper:]]`, ""},
		{`é`, "é"},
		{`a[^\x00-\x{10ffff}]b`, ""},
		{`x{3}`, "xxx"},
		{`(x{3}){2,}`, "xxx"},
		{`ads|xads|(ad|a)(s|z)`, "as az ads adz"},
		{`\b\Bads`, "ads"},
		{`(?:[0-9]{1000}|b{1000})x{999}yz.`, strings.Repeat("x", 64)},
	} {
		texts, ok := requiredTexts(c.expression)
		got := strings.Join(texts, " ")
		if !ok {
			got = "-"
		}
		if got != c.want {
			t.Errorf("%s requires %q, want %q", c.expression, got, c.want)
		}
	}
}

// Whatever the expression: a name that it is found in has one of the texts that are said to be required.
func FuzzRequiredTexts(f *testing.F) {
	for _, expression := range []string{
		`^ads?\.`, `^(www|ab)\.example\.`, `(a|b.)+c?[de]{2,3}`, `(?i)KELVIN|S[^a-f]`, `(?s).x|\bb\B`, `^$|a{0}`, `[[:alpha:]]\pL`,
		`(?:a|(b|c)*d)(?:|e)f`, `(?m:^a$)`, `(?U)a+?b`,
	} {
		for _, name := range []string{"ads.example.com", "abccddee", "kelvin-s", "x", "a-adf"} {
			f.Add(expression, name)
		}
	}
	f.Fuzz(func(t *testing.T, expression, name string) {
		v, err := parseRegex(expression)
		if name = normalName(name); err != nil || !isASCII(name) {
			return
		}
		re := v.(regexName).re
		texts, ok := requiredTexts(re.String())
		if ok && re.MatchString(name) && !slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(name, text) }) {
			t.Fatalf("%s is found in %q, which has none of %q", re, name, texts)
		}
		if ok && slices.Contains(texts, "") {
			t.Fatalf("%s requires nothing: %q", re, texts)
		}
	})
}

// crowded is a category of as many keywords and expressions as the lists that people use have.
func crowded(count int) *Policy {
	geo := &lists{sites: map[string][]Value{}}
	add := func(category, key, text string) {
		geo.sites[category] = append(geo.sites[category], mustParse(key, text).Values...)
	}
	for i := range count {
		category := []string{"ads", "cn", "media"}[i%3]
		add(category, "domain_keyword", fmt.Sprintf("track%dword", i))
		add(category, "domain_regex", fmt.Sprintf(`^ad[0-9]*\.(.+\.)?site%d\.(com|net)$`, i))
	}
	return &Policy{Default: "direct", Geo: geo, Rules: []Rule{
		{Is: []Condition{mustParse("geosite", "ads")}, Outbound: "block"},
		{Is: []Condition{mustParse("geosite", "cn")}, Outbound: "direct"},
		{Is: []Condition{mustParse("geosite", "media")}, Outbound: "hk"},
	}}
}

// Match and the tables agree on a crowd of patterns: those that nothing indexes, those behind one text, names beyond
// ASCII, and more patterns than the small set of those tried holds.
func TestCrowdedNames(t *testing.T) {
	for _, count := range []int{40, 700} {
		p := crowded(count)
		geo := p.Geo.(*lists)
		for text, category := range map[string]string{
			`^[0-9]+$`: "media", `K$`: "ads", `^s.*\.example$`: "cn", `(?i)\x{17f}$`: "ads", `\x{212a}`: "media",
		} {
			geo.sites[category] = append(geo.sites[category], mustParse("domain_regex", text).Values...)
		}
		tables, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		decided := map[int]int{}
		var names []string
		for i := range count { // has the text that an expression requires, and does not match it
			names = append(names, fmt.Sprintf("xad.site%d.com", i))
		}
		for _, name := range append(
			names,
			"ad7.x.site7.com", "ad.site8.net", "ad.site8.org", "xad.site9.com", "ad99999.site39.com", "www.track1wordtrack2word.com", "track39word",
			"track1wor", "a.track0word.site1.com", "2024", "2024.com", "k", "milk.example", "s.example", "mil\u212a", "\u017f.example", "\u017f",
			"ad.é.site3.com", "é.track4word", strings.Repeat("track0word", 20), "ad."+strings.Repeat("site1.com.", 20)+"site1.com",
		) {
			d := p.Match(Flow{Names: []string{name}})
			if got := tables.Match(Flow{Names: []string{name}}); got != d {
				t.Errorf("%s: %+v, want %+v", name, got, d)
			}
			decided[d.Rule]++
		}
		for rule := -1; rule < 3; rule++ {
			if decided[rule] == 0 {
				t.Errorf("no name was decided by rule %d", rule)
			}
		}
	}
}

// counted is an expression's name for the test below, and how often it was asked.
type counted struct {
	regexName
	asked *int
}

func (c counted) matches(name string) bool {
	*c.asked++
	return c.regexName.matches(name)
}

// A name asks the few expressions whose text it has, and each once, however often the text is there.
func TestFewExpressionsAreTried(t *testing.T) {
	p := crowded(300)
	geo := p.Geo.(*lists)
	geo.sites["media"] = append(geo.sites["media"], mustParse("domain_suffix", "listed.example").Values...)
	tables, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	for i := range tables.Name.scanned {
		p := &tables.Name.scanned[i].pattern
		if re, ok := (*p).(regexName); ok {
			*p = counted{re, &asked}
		}
	}
	for name, want := range map[string]int{
		"www.example.com":                  0,
		"ad1.site2.example":                0,
		"ad1.site2.com":                    1,
		strings.Repeat(".site2.com", 20):   1,
		"a.site2.com.site3.net.site4.com.": 3,
		"ad1.site2.com.listed.example":     0, // the list that has the expression matches already
		"ad1.site3.com.listed.example":     1,
	} {
		asked = 0
		tables.Name.Bits([]string{name})
		if asked != want {
			t.Errorf("%s: %d expressions were tried, want %d", name, asked, want)
		}
	}
	if len(tables.Name.always) != 0 {
		t.Errorf("%d expressions have no required text", len(tables.Name.always))
	}
	var names []string
	for i := range 300 {
		names = append(names, fmt.Sprintf("track%dword.site%d.com", i, i))
	}
	if n := testing.AllocsPerRun(10, func() { tables.Name.Bits(names) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// The texts that an expression requires are known, or it is tried for every name: the real lists' kinds have them.
func TestUsualExpressionsAreIndexed(t *testing.T) {
	for _, expression := range []string{
		`(^|\.)ads?[0-9]*\.example\.`, `^adservice\.google\.([a-z]{2}|com?)(\.[a-z]{2})?$`, `.+\.awsstatic\.com$`, `^cn[0-9]*-.*\.steam`,
		`^(?:.+\.)?cdn-[0-9]+\.video\.`, `^[a-z]([a-z0-9-]*[a-z0-9])?\.googlevideo\.com$`, `\.(mp|wx)\.qq\.com$`, `metrics?(-v[0-9])?\.`,
	} {
		if _, err := regexp.Compile(expression); err != nil {
			t.Fatal(err)
		}
		if _, ok := requiredTexts(expression); !ok {
			t.Errorf("%s: no required text is known", expression)
		}
	}
}

func TestListsOf(t *testing.T) {
	sites, codes := ListsOf(rules(t, `
		geosite=CN,geolocation-!cn port=443 -> hk
		!geosite=google@ads -> us
		!geoip=us geosite=cn domain=x.example -> us
		geoip=cn,US -> direct`))
	if want := []string{"cn", "geolocation-!cn", "google@ads"}; !slices.Equal(sites, want) {
		t.Errorf("sites %q", sites)
	}
	if want := []string{"cn", "us"}; !slices.Equal(codes, want) {
		t.Errorf("codes %q", codes)
	}
	if sites, codes := ListsOf(nil); len(sites)+len(codes) != 0 {
		t.Errorf("no rules have %v and %v", sites, codes)
	}
}

func BenchmarkCrowdedNameBits(b *testing.B) {
	tables, err := Compile(crowded(300))
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"cdn.www.n1.example", "ad1.a.site2.com"} {
		b.Run(name, func(b *testing.B) {
			names := []string{name}
			b.ReportAllocs()
			for b.Loop() {
				tables.Name.Bits(names)
			}
		})
	}
}
