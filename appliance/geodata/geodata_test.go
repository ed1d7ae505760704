package geodata

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sidegate/appliance/policy"
)

// texts of values with what kind they are, since the texts alone do not say it.
func texts(values []policy.Value) []string {
	out := []string{}
	for _, v := range values {
		out = append(out, strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%T", v), "policy."), "Name")+" "+v.String())
	}
	slices.Sort(out)
	return out
}

func prefixTexts(prefixes []netip.Prefix) []string {
	out := []string{}
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	slices.Sort(out)
	return out
}

// lines of a test's expectation.
func lines(text string) []string {
	out := []string{}
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return out
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n%q, want\n%q", what, got, want)
	}
}

func load(t *testing.T, s Sources, w Wanted) *Data {
	t.Helper()
	d, err := Load(s, w)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Each format gives the names and addresses that it is known for.
func TestFormats(t *testing.T) {
	for _, c := range []struct {
		name            string
		data            []byte
		names, prefixes string
	}{
		{
			"text", []byte("\ufeff# a comment\r\nExample.COM\r\n.below.example # another\n\n*.also.example\n+.both.example\ndomain:root.example\n" +
				"full:full.example\nkeyword:Track\nregexp:^ads?[0-9]+#\\.\nregex:^x y$\n192.0.2.7\n198.51.100.0/24\n2001:db8::/32\n" +
				"::1\n::ffff:203.0.113.0/120\n0.0.0.0 one.example two.example # hosts\n127.0.0.1\tthree.example localhost\n::1 ip6-localhost\n0.0.0.0 0.0.0.0\nbücher.example\n+.köln.example\n*.中国\nStun.*.*\n+.a.*.example\n.b.*.example\n*.c.*.example"), `
			regex ^stun\.[^.]+\.[^.]+$
			regex ^a\.[^.]+\.example$
			regex ^.+\.a\.[^.]+\.example$
			regex ^.+\.b\.[^.]+\.example$
			regex ^[^.]+\.c\.[^.]+\.example$
			exact example.com
			suffix .below.example
			suffix .also.example
			suffix both.example
			suffix root.example
			exact full.example
			keyword track
			regex ^ads?[0-9]+#\.
			regex ^x y$
			exact one.example
			exact two.example
			exact three.example
			exact xn--bcher-kva.example
			suffix xn--kln-sna.example
			suffix .xn--fiqs8s
			`, "192.0.2.7/32\n198.51.100.0/24\n2001:db8::/32\n::1/128\n203.0.113.0/24",
		}, {
			"srs 1", encodeSRS(
				1,
				rule(0, domainItem(true, []string{"a.example", "ab.example"}, []string{"s.example", ".below.example"}), stringsItem(3, "track", "ads")),
				rule(0, stringsItem(4, `^x\.`), rangesItem(6, "10.0.0.0-10.0.0.255", "192.0.2.1-192.0.2.4", "2001:db8::-2001:db8::ffff", "0.0.0.0-255.255.255.255")),
			), `
			exact a.example
			exact ab.example
			exact s.example
			suffix .s.example
			suffix .below.example
			keyword track
			keyword ads
			regex ^x\.
			`, "10.0.0.0/24\n192.0.2.1/32\n192.0.2.2/31\n192.0.2.4/32\n2001:db8::/112\n0.0.0.0/0",
		}, {
			"srs 2", encodeSRS(2, rule(0, domainItem(false, []string{"a.example", "192.0.2.1", "bücher.example"}, []string{"s.example", ".below.example"}))),
			"exact a.example\nexact xn--bcher-kva.example\nsuffix s.example\nsuffix .below.example", "",
		}, {
			"srs 3, alternatives", encodeSRS(
				3,
				logical(1, 0, rule(0, domainItem(false, []string{"a.example"}, nil)), logical(1, 0, rule(0, rangesItem(6, "::-::")))),
				logical(0, 0, rule(0, stringsItem(3, "ads"))),
			),
			"exact a.example\nkeyword ads", "::/128",
		}, {
			"mrs names", mrsDomains("a.example", "+.s.example", ".below.example", "*.one.example", "a.*.example", "+.*.many.example", "bücher.example", "2001:db8::1"), `
			exact a.example
			exact s.example
			exact xn--bcher-kva.example
			suffix .s.example
			suffix .below.example
			regex ^[^.]+\.one\.example$
			regex ^a\.[^.]+\.example$
			regex ^[^.]+\.many\.example$
			regex ^.+\.[^.]+\.many\.example$
			`, "",
		}, {
			"mrs addresses", mrsRanges("10.0.0.0-10.0.1.255", "192.0.2.1-192.0.2.1", "2001:db8::-2001:db8:1:ffff:ffff:ffff:ffff:ffff"),
			"", "10.0.0.0/23\n192.0.2.1/32\n2001:db8::/47",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := file(t, "list", c.data)
			s := Sources{Sets: map[string]string{"mine": path, "other": "/there/is/none"}}
			var w Wanted
			names, prefixes := lines(c.names), lines(c.prefixes)
			if len(names) > 0 || len(prefixes) == 0 {
				w.Sites = []string{"mine"}
			}
			if len(prefixes) > 0 || len(names) == 0 {
				w.Codes = []string{"mine"}
			}
			d := load(t, s, w)
			values, ok := d.Site("mine")
			if ok != (w.Sites != nil) {
				t.Errorf("Site: %v", ok)
			}
			equal(t, "names", texts(values), names)
			addrs, ok := d.IP("mine")
			if ok != (w.Codes != nil) {
				t.Errorf("IP: %v", ok)
			}
			equal(t, "addresses", prefixTexts(addrs), prefixes)
			if _, ok := d.Site("other"); ok {
				t.Error("a list that nobody wanted is there")
			}
			if ok && d.Origin(Geoip, "mine") != path || values != nil && d.Origin(Geosite, "mine") != path || d.Origin(Geosite, "other") != "" {
				t.Error("the origin is not the file")
			}
		})
	}
}

func TestGeosite(t *testing.T) {
	path := file(t, "geosite.dat", slices.Concat(
		encodeSite("GOOGLE", domain{2, "google.com", nil}, domain{3, "ads.google.com", []string{"ads"}}, domain{2, "google.cn", []string{"cn", "ADS"}}),
		encodeSite("GEOLOCATION-!CN", domain{0, "track", nil}, domain{1, `^ads?\.`, nil}),
		encodeSite("apple@cn", domain{3, "apple.cn", nil}),
		encodeSite("google", domain{3, "second.google.com", nil}, domain{3, "192.0.2.1", nil}, domain{2, "2001:db8::1", nil}, domain{2, "bücher.example", nil}),
		encodeSite("spoilt", domain{9, "x", nil}), // not wanted below
	))
	d := load(t, Sources{Geosite: path}, Wanted{Sites: []string{"google@ads", "google", "geolocation-!cn", "google@cn@ads", "apple@cn", "google"}})
	for category, want := range map[string]string{
		"google":          "suffix google.com\nexact ads.google.com\nsuffix google.cn\nexact second.google.com\nsuffix xn--bcher-kva.example",
		"google@ads":      "exact ads.google.com\nsuffix google.cn",
		"google@cn@ads":   "suffix google.cn",
		"geolocation-!cn": "keyword track\nregex ^ads?\\.",
		"apple@cn":        "exact apple.cn",
	} {
		values, ok := d.Site(category)
		if !ok {
			t.Errorf("%s is missing", category)
		}
		equal(t, category, texts(values), lines(want))
	}
	if _, ok := d.Site("apple"); ok {
		t.Error("apple is there")
	}
}

func TestGeoip(t *testing.T) {
	dat := file(t, "geoip.dat", slices.Concat(
		encodeIP("CN", "192.0.2.0/24", "2001:db8::/32", "::ffff:198.51.100.0/120", "203.0.113.9/24"), encodeIP("PRIVATE", "10.0.0.0/8"), encodeIP("CN", "0.0.0.0/0"),
	))
	mmdb := file(t, "Country.mmdb", encodeMMDB(map[string]any{
		"192.0.2.0/24":    map[string]any{"country": map[string]any{"iso_code": "CN"}, "continent": map[string]any{"code": "AS"}},
		"198.51.100.0/24": "cn",
		"2001:db8::/32":   []string{"CN", "cloudflare"},
		"2001:db9::/32":   map[string]any{"continent": map[string]any{"code": "EU"}},
		"203.0.113.0/25":  "DE",
	}))
	d := load(t, Sources{Geoip: dat}, Wanted{Codes: []string{"cn", "private"}})
	cn, _ := d.IP("cn")
	equal(t, "cn of .dat", prefixTexts(cn), lines("192.0.2.0/24\n2001:db8::/32\n198.51.100.0/24\n203.0.113.0/24\n0.0.0.0/0"))
	private, _ := d.IP("private")
	equal(t, "private of .dat", prefixTexts(private), lines("10.0.0.0/8"))

	d = load(t, Sources{Geoip: mmdb}, Wanted{Codes: []string{"cn", "cloudflare"}})
	cn, _ = d.IP("cn")
	equal(t, "cn of .mmdb", prefixTexts(cn), lines("192.0.2.0/24\n2001:db8::/32\n198.51.100.0/24"))
	cloudflare, _ := d.IP("cloudflare")
	equal(t, "cloudflare of .mmdb", prefixTexts(cloudflare), lines("2001:db8::/32"))
	if _, ok := d.IP("de"); ok {
		t.Error("a code that nobody wanted is there")
	}

	// A network around all of IPv4 holds it.
	whole := file(t, "whole.mmdb", encodeMMDB(map[string]any{"::/8": "zz"}))
	zz, _ := load(t, Sources{Geoip: whole}, Wanted{Codes: []string{"zz"}}).IP("zz")
	equal(t, "::/8", prefixTexts(zz), lines("::/8\n0.0.0.0/0"))
}

// Sets come before the files of many lists, and only files that are needed are opened.
func TestWhatIsRead(t *testing.T) {
	set := file(t, "cn.txt", []byte("example.cn\n192.0.2.0/24\n"))
	none := filepath.Join(t.TempDir(), "none.dat")
	s := Sources{Geosite: none, Geoip: none, Sets: map[string]string{"cn": set, "unused": none}}
	d := load(t, s, Wanted{Sites: []string{"cn"}, Codes: []string{"cn"}})
	values, _ := d.Site("cn")
	equal(t, "cn", texts(values), lines("exact example.cn"))
	load(t, s, Wanted{})
	if _, err := Load(s, Wanted{Sites: []string{"google"}}); err == nil {
		t.Error("the missing file was not missed")
	}
}
