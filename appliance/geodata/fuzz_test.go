package geodata

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"sidegate/appliance/policy"
)

// sound holds what every parser's outcome has to be, whatever the bytes: a policy compiles from it, and messages are one line.
func sound(t *testing.T, c *content, errs []error) {
	t.Helper()
	for _, err := range errs {
		if text := err.Error(); text == "" || strings.ContainsAny(text, "\n\r") || len(text) > 2000 {
			t.Fatalf("not a line of a message: %q", text)
		}
	}
	if len(errs) > mostBadLines+1 {
		t.Fatalf("%d messages", len(errs))
	}
	for _, p := range c.prefixes {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() && p.Bits() >= 96 {
			t.Fatalf("%v is no prefix of a policy", p)
		}
	}
	if len(c.names) > 1000 || len(errs) > 0 {
		return
	}
	for _, v := range c.names {
		if v == nil || v.String() == "" {
			t.Fatalf("an empty value: %#v", v)
		}
	}
	site, _ := policy.LookupField("geosite")
	is, err := site.Parse("fuzzed")
	if err != nil {
		t.Fatal(err)
	}
	p := &policy.Policy{
		Default: "direct", Rules: []policy.Rule{{Is: []policy.Condition{is}, Outbound: "hk"}},
		Geo: &Data{sites: map[string]list[policy.Value]{"fuzzed": {entries: c.names}}},
	}
	tables, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.example", "ads.example.com", strings.TrimPrefix(firstName(c), ".")} {
		if f := (policy.Flow{Names: []string{name}}); tables.Match(f) != p.Match(f) {
			t.Fatalf("the tables disagree about %q", name)
		}
	}
}

func firstName(c *content) string {
	if len(c.names) == 0 {
		return ""
	}
	return c.names[0].String()
}

func errorsOf(err error) []error {
	if err == nil {
		return nil
	}
	return []error{err}
}

func FuzzText(f *testing.F) {
	f.Add([]byte("a.example\n.b.example # x\n0.0.0.0 c.example\n192.0.2.0/24\nregexp:^x"))
	f.Add([]byte("\ufefffull:bücher.example\r\n*.x\n+.y\n||z^"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var c content
		sound(t, &c, readText(data, &c))
	})
}

// fuzzDat reads all lists of the file, and one by an attribute.
func fuzzDat(t *testing.T, data []byte, read func([]byte, []string) (map[string]*one, []string, error)) {
	_, all, err := read(data, nil)
	sound(t, new(content), errorsOf(err))
	if err != nil {
		return
	}
	wanted := slices.Clone(all[:min(len(all), 20)])
	if len(all) > 0 {
		wanted = append(wanted, all[0]+"@ads")
	}
	found, _, err := read(data, wanted)
	if err != nil {
		t.Fatalf("the file is read for its names only: %v", err)
	}
	for _, code := range all[:min(len(all), 20)] {
		if found[code] == nil {
			t.Fatalf("the list %q, which is there, was not found", code)
		}
		sound(t, &found[code].content, errorsOf(found[code].err))
	}
}

func FuzzSiteDat(f *testing.F) {
	f.Add(encodeSite("CN", domain{2, "a.example", []string{"ads"}}, domain{1, "^x", nil}, domain{0, "k", nil}))
	f.Add(site("cn", "us"))
	f.Fuzz(func(t *testing.T, data []byte) { fuzzDat(t, data, readSiteDat) })
}

func FuzzIPDat(f *testing.F) {
	f.Add(encodeIP("CN", "192.0.2.0/24", "2001:db8::/32", "::ffff:10.0.0.0/104"))
	f.Fuzz(func(t *testing.T, data []byte) { fuzzDat(t, data, readIPDat) })
}

func FuzzMMDB(f *testing.F) {
	f.Add(encodeMMDB(map[string]any{"192.0.2.0/24": "cn", "2001:db8::/32": []string{"us", "x"}}))
	f.Add(encodeMMDB(map[string]any{"::/8": map[string]any{"country": map[string]any{"iso_code": "DE"}}}))
	f.Fuzz(func(t *testing.T, data []byte) { fuzzDat(t, data, readMMDB) })
}

// FuzzSRS fuzzes what is inside of the compression, which a fuzzer does not get through.
func FuzzSRS(f *testing.F) {
	for _, r := range [][]byte{
		rule(0, domainItem(true, []string{"a.example"}, []string{"b.example"}), stringsItem(3, "k"), rangesItem(6, "10.0.0.0-10.0.0.9")),
		rule(0, domainItem(false, nil, []string{".a.example", "b.example"}), stringsItem(4, "^x")),
		logical(1, 0, rule(0, stringsItem(3, "x")), rule(1, portsItem(9, 80))),
	} {
		f.Add(append([]byte{1}, r...))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var c content
		in := srsReader{cursor: cursor{rest: data}, content: &c}
		in.rules(0)
		sound(t, &c, errorsOf(in.err))
	})
}

// FuzzSRSFile and FuzzMRSFile fuzz the rest.
func FuzzSRSFile(f *testing.F) {
	f.Add(encodeSRS(2, rule(0, stringsItem(3, "k"))))
	f.Fuzz(func(t *testing.T, data []byte) {
		if strings.HasPrefix(string(data), magicSRS) {
			var c content
			sound(t, &c, readSRS(data, &c))
		}
	})
}

func FuzzMRSFile(f *testing.F) {
	f.Add(mrsDomains("a.example", "+.b.example", "*.c.example"))
	f.Add(mrsRanges("10.0.0.0-10.0.0.9", "2001:db8::-2001:db8::f"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var c content
		sound(t, &c, readMRS(data, &c))
	})
}

func FuzzMRS(f *testing.F) {
	header := "MRS\x01\x00" + strings.Repeat("\x00", 16) + "\x01"
	f.Add([]byte(header))
	f.Add([]byte(strings.Replace(header, "\x01\x00", "\x01\x01", 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var c content
		sound(t, &c, errorsOf(addMRSUnpacked(data, &c)))
	})
}

// FuzzTrie: what is encoded comes back, and what is not encoded does no harm.
func FuzzTrie(f *testing.F) {
	f.Add("a.example,b.example,example,ab", []byte{1, 2}, []byte{3}, "xy")
	f.Fuzz(func(t *testing.T, keys string, leaves, bitmap []byte, labels string) {
		wild := trie{leaves: words(leaves[:len(leaves)/8*8]), bitmap: words(bitmap[:len(bitmap)/8*8]), labels: []byte(labels)}
		wild.each(func([]byte) error { return nil })

		want := slices.DeleteFunc(strings.Split(keys, ","), func(k string) bool { return k == "" || len(k) >= longestKey || !isASCII(k) })
		var reverse []string
		for _, k := range want {
			reverse = append(reverse, reversed(k))
		}
		encoded := encodeTrie(reverse)
		var e encoder
		e.number(encoded.leaves)
		at := e.Len()
		e.number(encoded.bitmap)
		tame := trie{leaves: words(e.Bytes()[:at]), bitmap: words(e.Bytes()[at:]), labels: encoded.labels}
		var got []string
		if err := tame.each(func(name []byte) error { got = append(got, string(name)); return nil }); err != nil {
			t.Fatal(err)
		}
		slices.Sort(want)
		slices.Sort(got)
		if want = slices.Compact(want); !slices.Equal(got, want) {
			t.Fatalf("%q, want %q", got, want)
		}
	})
}

// FuzzRange: the prefixes of a range are disjoint, in order, begin and end where it does, and are few.
func FuzzRange(f *testing.F) {
	f.Add([]byte{10, 0, 0, 1}, []byte{10, 0, 1, 4})
	f.Add([]byte{0, 0, 0, 0}, []byte{255, 255, 255, 255})
	f.Add(make([]byte, 16), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe").AsSlice())
	f.Fuzz(func(t *testing.T, from, to []byte) {
		first, ok := netip.AddrFromSlice(from)
		last, alsoOK := netip.AddrFromSlice(to)
		if !ok || !alsoOK {
			return
		}
		var c content
		err := c.addRange(first, last)
		if valid := first.BitLen() == last.BitLen() && !last.Less(first); valid != (err == nil) {
			t.Fatalf("%s-%s: %v", first, last, err)
		}
		if err != nil || first.Is4In6() || last.Is4In6() {
			return
		}
		next := first
		for _, p := range c.prefixes {
			if p.Addr() != next || p != p.Masked() {
				t.Fatalf("%s-%s: %v", first, last, c.prefixes)
			}
			next = lastOf(p).Next()
		}
		if next.Prev() != last && (next.IsValid() || last.Next().IsValid()) || len(c.prefixes) > 2*first.BitLen()-1 {
			t.Fatalf("%s-%s: %v", first, last, c.prefixes)
		}
	})
}
