package geodata

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"sidegate/appliance/policy"
)

func site(codes ...string) []byte {
	var data []byte
	for _, c := range codes {
		data = append(data, encodeSite(c, domain{2, c + ".example", []string{"ads", "cn"}})...)
	}
	return data
}

// Every defect is one line, which begins with the file and says what to do.
func TestDefects(t *testing.T) {
	srs := encodeSRS(2, rule(0, domainItem(false, []string{"a.example"}, nil), rangesItem(6, "10.0.0.0-10.0.0.9")))
	for _, c := range []struct {
		name string
		data []byte
		want string // behind the file's name
	}{
		{"empty file", nil, ": reading it: it is empty"},
		{"web page", []byte("\n<!DOCTYPE html><p>not found"), ": it is a web page, not a set: the download went wrong; fetch the file itself"},
		{"a file of many lists", site("cn"), ": it is binary data of many lists, not a set: name it under geosite or geoip"},
		{"an .mmdb", encodeMMDB(map[string]any{"::/8": "zz"}), ": it is an .mmdb database, with lists of addresses, not a set: name it under geoip"},

		{"bad name", []byte("a.example\n\nb..example\n"), `:3: domain "b..example": two dots follow each other, or the name begins with one: remove it`},
		{"bad prefix", []byte("192.0.2.1/24"), `:1: ip_cidr "192.0.2.1/24": bits are set after the prefix length: write 192.0.2.0/24 for the network or 192.0.2.1 for the address`},
		{"bad expression", []byte(`regexp:(?=x)`), ":1: domain_regex \"(?=x)\": not an RE2 expression: invalid or unsupported Perl syntax: `(?=`"},
		{"URL", []byte("https://a.example/x"), `:1: "https://a.example/x": this is a URL: write only the host's name`},
		{"ad blocker", []byte("||a.example^"), `:1: "||a.example^": this is an ad blocker's rule: take the list's form for hosts or DNS`},
		{"Clash", []byte("DOMAIN-SUFFIX,a.example"), `:1: "DOMAIN-SUFFIX,a.example": this is a Clash rule: write only its name, behind +. if it is a suffix`},
		{"YAML", []byte("payload:\n"), `:1: "payload:": this is YAML: take the list's text form`},
		{"unknown prefix", []byte("domian:a.example"), `:1: "domian:a.example": neither a name nor an address: write full:, domain:, keyword: or regexp: before what it is`},
		{"two on a line", []byte("a.example b.example"), `:1: "a.example b.example": write one entry a line`},
		{"two behind a prefix", []byte("full:a.example b.example"), `:1: "full:a.example b.example": write one entry a line`},
		{"attribute", []byte("a.example @ads"), `:1: "a.example @ads": attributes are read from geosite files only: remove it`},
		{"bad hosts line", []byte("0.0.0.0 a.example b,c"), `:1: domain "b,c": ',' cannot be in a name: use letters, digits, hyphens and dots`},
		{"no ASCII form", []byte("bü cher.example"), `:1: "bü cher.example": write one entry a line`},
		{"bad name with a wildcard", []byte("a^.*.example"), `:1: "a^.*.example": domain "a^": '^' cannot be in a name: use letters, digits, hyphens and dots`},
		{"half a wildcard", []byte("a*.example"), `:1: "a*.example": a wildcard stands for whole labels only`},
		{"only addresses", []byte("192.0.2.0/24"), ": it lists only addresses: name it under geoip, not geosite"},

		{"only comments", []byte("# nothing\n\n"), ": it has no entries: fetch it again, or write some into it"},
		{"hosts of the machine only", []byte("127.0.0.1 localhost\n"), ": it has no entries: fetch it again, or write some into it"},
		{"srs, no entries", encodeSRS(2), ": it has no entries: fetch it again, or write some into it"},
		{"mrs, no entries", mrsRanges(), ": it has no entries: fetch it again, or write some into it"},

		{"srs, more behind", slices.Concat(srs, []byte("x")), ": it is damaged: it goes on behind its end; fetch it again"},
		{"srs, two in one", slices.Concat(srs, srs), ": it is damaged: it goes on behind its end; fetch it again"},
		{"srs, more rules than it says", encodeSRS(2, slices.Concat(rule(0, stringsItem(3, "x")), rule(0, stringsItem(3, "y")))), ": it is damaged: it goes on behind its end; fetch it again"},
		{"mrs, more names behind", zstdOf(append(unzstd(t, mrsDomains("a.example")), 0)), ": it is damaged: it goes on behind its end; fetch it again"},
		{"mrs, more addresses behind", zstdOf(append(unzstd(t, mrsRanges("10.0.0.0-10.0.0.9")), 0)), ": it is damaged: it goes on behind its end; fetch it again"},
		{"mrs, two in one", slices.Concat(mrsDomains("a.example"), mrsDomains("b.example")), ": it is damaged: it goes on behind its end; fetch it again"},
		{"mrs, more behind", append(mrsDomains("a.example"), "more"...), ": it is damaged: fetch it again (invalid input: magic number mismatch)"},
		{"srs, cut", srs[:len(srs)-9], ": it is damaged: fetch it again (unexpected EOF)"},
		{"srs, no zlib", []byte("SRS\x01 and then"), ": it is damaged: fetch it again (zlib: invalid header)"},
		{"srs, too new", encodeSRS(6), ": its version is 6, and 1 to 5 can be read: compile it for an older sing-box"},
		{"srs, only a mark", []byte("SRS"), ": its version is 0, and 1 to 5 can be read: compile it for an older sing-box"},
		{"srs, ports", encodeSRS(1, rule(0, stringsItem(3, "x")), rule(0, portsItem(9, 443), stringsItem(3, "x"))), ": rule 2: it asks for port: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, ports last", encodeSRS(1, rule(0, stringsItem(3, "x"), portsItem(9, 443))), ": rule 1: it asks for port: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, AdGuard", encodeSRS(2, rule(0, []byte{16})), ": rule 1: it asks for adguard_domain: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, inverted", encodeSRS(1, rule(1, stringsItem(3, "x"))), ": rule 1: it is inverted: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, alternatives inverted", encodeSRS(1, logical(1, 1, rule(0, stringsItem(3, "x")))), ": rule 1: it is inverted: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, inverted within", encodeSRS(1, logical(1, 0, rule(1, stringsItem(3, "x")))), ": rule 2: it is inverted: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, both", encodeSRS(1, logical(0, 0, rule(0, stringsItem(3, "x")), rule(0, stringsItem(3, "y")))), ": rule 1: its 2 rules must all hold: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, all of none", encodeSRS(1, logical(0, 0)), ": rule 1: its 0 rules must all hold: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, everything", encodeSRS(1, rule(0)), ": rule 1: it has no condition, so it matches everything: a set is a list of names and addresses; write the rest in the rule that names it"},
		{"srs, unknown item", encodeSRS(1, rule(0, []byte{200})), ": rule 1: item 200 is one that this version does not know"},
		{"srs, unknown rule", encodeSRS(1, []byte{7}), ": rule 1 is of kind 7, which this version does not know"},
		{"srs, too deep", encodeSRS(1, nested(40)), ": rule 17: more than 16 rules within each other"},
		{"srs, bad expression", encodeSRS(1, rule(0, stringsItem(4, `(?<=x)`))), ": rule 1: domain_regex \"(?<=x)\": not an RE2 expression: invalid named capture: `(?<=x)`"},
		{"srs, range upside down", encodeSRS(1, rule(0, rangesItem(6, "10.0.0.9-10.0.0.1"))), ": rule 1: the range from 10.0.0.9 to 10.0.0.1 is none"},
		{"srs, range of both families", encodeSRS(1, rule(0, rangesItem(6, "10.0.0.9-::1"))), ": rule 1: the range from 10.0.0.9 to ::1 is none"},
		{"srs, too many", encodeSRS(1), ": it has more than 32 MiB when unpacked"},

		{"zstd, something else", zstdOf([]byte("MRS\x02 and then")), ": it is zstd data, but no mihomo rule set of version 1"},
		{"mrs, classical", encodeMRS(2, 0, []byte{1}), ": it lists neither names nor addresses (behavior 2)"},
		{"mrs, too new", encodeMRS(0, 0, []byte{2}), ": its list has version 2, and only 1 can be read"},
		{"mrs, short", encodeMRS(1, 1, []byte{1, 0, 0, 0, 0, 0, 0, 0, 1}), ": it is damaged: it ends too early; fetch it again"},
		{"mrs, long name", mrsDomains(strings.Repeat("a.example.", 30) + "x"), ": it is damaged: a name has more than 255 bytes"},
		{"mrs, half a wildcard", mrsDomains("a*.example"), `: "a*.example": a wildcard stands for whole labels only`},
		{"mrs, cut", mrsDomains("a.example", "b.example")[:30], ": it is damaged: fetch it again (unexpected EOF)"},
		{"mrs, no tree", encodeMRS(0, 0, append([]byte{1}, make([]byte, 24)...)), ": it is damaged: its names are no tree; fetch it again"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "srs, too many" {
				c.data = encodeSRS(1, bytes.Repeat([]byte{0}, maxUnpacked))
			}
			path := file(t, "list.x", c.data)
			d, err := Load(Sources{Sets: map[string]string{"mine": path}}, Wanted{Sites: []string{"mine"}})
			if err == nil {
				t.Fatalf("loaded: %v", d)
			}
			if got := strings.TrimPrefix(err.Error(), path); got != c.want {
				t.Errorf("%s\nwant %s", got, c.want)
			}
			var defect *Defect
			if !errors.As(err, &defect) || defect.Kind != Geosite || defect.Name != "mine" || defect.File != path {
				t.Errorf("not the list's defect: %+v", defect)
			}
		})
	}
}

// TestOnlyNames: a list of names is no list of addresses.
func TestOnlyNames(t *testing.T) {
	path := file(t, "list.txt", []byte("a.example\n"))
	s := Sources{Sets: map[string]string{"mine": path}}
	_, err := Load(s, Wanted{Codes: []string{"mine"}})
	if err == nil || err.Error() != path+": it lists only names: name it under geosite, not geoip" {
		t.Errorf("%v", err)
	}
	var defect *Defect
	if !errors.As(err, &defect) || defect.Kind != Geoip || defect.Name != "mine" {
		t.Errorf("not the list's defect: %+v", defect)
	}
	load(t, s, Wanted{Sites: []string{"mine"}})
}

// TestEmptyOfMany: a list that a file of many has, though empty, matches nothing, as its authors have it.
func TestEmptyOfMany(t *testing.T) {
	d := load(t, Sources{
		Geosite: file(t, "site.dat", slices.Concat(encodeSite("none"), site("cn"))),
		Geoip:   file(t, "ip.dat", slices.Concat(encodeIP("none"), encodeIP("cn", "10.0.0.0/8"))),
	}, Wanted{Sites: []string{"none"}, Codes: []string{"none"}})
	if names, ok := d.Site("none"); len(names) != 0 || !ok {
		t.Errorf("names %v, %v", names, ok)
	}
	if prefixes, ok := d.IP("none"); len(prefixes) != 0 || !ok {
		t.Errorf("prefixes %v, %v", prefixes, ok)
	}
}

// nested is a rule within alternatives within alternatives.
func nested(depth int) []byte {
	if depth == 0 {
		return rule(0, stringsItem(3, "x"))
	}
	return logical(1, 0, nested(depth-1))
}

// The same of the files of many lists.
func TestDefectsOfMany(t *testing.T) {
	many := site("cn", "google", "category-ads-all", "category-ads", "apple", "x")
	ip := slices.Concat(encodeIP("cn", "10.0.0.0/8"), encodeIP("de", "192.0.2.0/24"))
	mmdb := encodeMMDB(map[string]any{"192.0.2.0/24": "cn", "198.51.100.0/24": "de"})
	for _, c := range []struct {
		name   string
		data   []byte
		wanted Wanted
		want   string
	}{
		{"no such category", many, Wanted{Sites: []string{"category-add"}}, `: it has no list "category-add"; did you mean "category-ads"?`},
		{"nothing near", many, Wanted{Sites: []string{"netflix"}}, `: it has no list "netflix" (have: apple, category-ads, category-ads-all, cn, google, x)`},
		{"no such attribute", many, Wanted{Sites: []string{"cn@add"}}, `: geosite "cn@add": none of its entries has the attribute "add"; did you mean "ads"?`},
		{"no such category with attribute", many, Wanted{Sites: []string{"gogle@ads"}}, `: it has no list "gogle@ads"; did you mean "google"?`},
		{"unknown type", encodeSite("cn", domain{4, "a.example", nil}), Wanted{Sites: []string{"cn"}}, `: geosite "cn": "a.example" is of type 4, which this version does not know`},
		{"bad entry", encodeSite("cn", domain{2, "a..example", nil}), Wanted{Sites: []string{"cn"}}, `: geosite "cn": domain_suffix "a..example": two dots follow each other, or the name begins with one: remove it`},
		{"cut", many[:len(many)-5], Wanted{Sites: []string{"cn"}}, `: it is damaged, or no .dat file: fetch it again`},
		{"addresses for names", ip, Wanted{Sites: []string{"cn"}}, `: geosite "cn": its entries are no domains: is it a geoip file?`},
		{"names for addresses", many, Wanted{Codes: []string{"cn"}}, `: geoip "cn": its entries are no addresses: is it a geosite file?`},
		{"text", []byte("a.example\n"), Wanted{Sites: []string{"cn"}}, `: it is text, one list, not geosite data: name it under sets`},
		{"a set", encodeSRS(1), Wanted{Codes: []string{"cn"}}, `: it is a sing-box rule set, one list, not geoip data: name it under sets`},
		{"an .mmdb for names", mmdb, Wanted{Sites: []string{"cn"}}, `: it is an .mmdb database, with lists of addresses, not geosite data: name it under geoip`},
		{"no such code", ip, Wanted{Codes: []string{"dee"}}, `: it has no list "dee"; did you mean "de"?`},
		{"inverse", message(1, append(message(1, []byte("cn")), varint(3, 1)...)), Wanted{Codes: []string{"cn"}}, `: geoip "cn": it stands for every address that it does not list, which is not read: use its opposite under not`},
		{"bad address", message(1, append(message(1, []byte("cn")), message(2, append(message(1, []byte{1, 2, 3, 4, 5}), varint(2, 8)...))...)), Wanted{Codes: []string{"cn"}}, `: geoip "cn": an address of 5 bytes with a prefix length of 8 is none`},
		{"bad length", message(1, append(message(1, []byte("cn")), message(2, append(message(1, []byte{1, 2, 3, 4}), varint(2, 33)...))...)), Wanted{Codes: []string{"cn"}}, `: geoip "cn": an address of 4 bytes with a prefix length of 33 is none`},
		{"no such code of .mmdb", mmdb, Wanted{Codes: []string{"us"}}, `: it has no list "us" (have: cn, de)`},
		{"an .mmdb of something else", encodeMMDB(map[string]any{"192.0.2.0/24": map[string]any{"autonomous_system_number": uint32(1)}}), Wanted{Codes: []string{"us"}}, `: its records have no country: is it a database of something else?`},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := file(t, "geo.dat", c.data)
			d, err := Load(Sources{Geosite: path, Geoip: path}, c.wanted)
			if err == nil {
				t.Fatalf("loaded: %v", d)
			}
			if got := strings.TrimPrefix(err.Error(), path); got != c.want {
				t.Errorf("%s\nwant %s", got, c.want)
			}
		})
	}
}

// An .mmdb is no tree if its nodes lead back to each other, or if both sides of many lead to the same: such a ladder of forty
// nodes has a million million ends.
func TestEndlessMMDB(t *testing.T) {
	circle := encodeMMDB(map[string]any{"::/2": "zz"}) // nodes 0 and 1, of 8 bytes each
	copy(circle[4:8], circle[0:4])
	copy(circle[8:12], []byte{0, 0, 0, 0})
	ladder := encodeMMDB(map[string]any{"::/40": "zz"})
	for node := range 40 {
		copy(ladder[node*8+4:node*8+8], ladder[node*8:node*8+4])
	}
	deep := encodeMMDB(map[string]any{"::/128": "zz", "8000::/128": "zz"}) // 255 nodes, made one path
	for node := range 254 {
		copy(deep[node*8:], []byte{0, 0, 0, byte(node + 1)})
	}
	for _, data := range [][]byte{circle, ladder, deep} {
		_, err := Load(Sources{Geoip: file(t, "x.mmdb", data)}, Wanted{Codes: []string{"zz"}})
		if err == nil || !strings.Contains(err.Error(), "it is damaged: its networks are no tree") {
			t.Errorf("%v", err)
		}
	}
}

// A trie whose bits contradict each other is refused, and not followed in circles.
func TestNoTrie(t *testing.T) {
	bits := func(text string) (w words) {
		w = make(words, 8)
		for i, c := range text {
			if c == '1' {
				w[7-i/8] |= 1 << (i % 8)
			}
		}
		return w
	}
	for _, c := range []struct {
		bitmap, labels string
		want           error
	}{
		{"01" + "01" + "1", "ab", nil},
		{"001" + "1" + "1", "ab", nil},
		{"1" + "01" + "01", "ab", errNoTrie},  // node 1 has itself as its parent
		{"0001" + "1" + "1", "ab", errNoTrie}, // more nodes than labels
		{"01" + "1", "ab", errNoTrie},         // fewer, and no end
	} {
		tr := trie{leaves: bits("0111"), bitmap: bits(c.bitmap), labels: []byte(c.labels)}
		if err := tr.each(func([]byte) error { return nil }); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.bitmap, err, c.want)
		}
	}
}

// A list has a size beyond which it is refused, as a file has.
func TestLimits(t *testing.T) {
	c := content{names: make([]policy.Value, maxEntries-1), prefixes: make([]netip.Prefix, maxEntries-1)}
	for i, want := range []error{nil, errTooMany} {
		if err := c.addName(exact, "a.example"); !errors.Is(err, want) {
			t.Errorf("name %d more: %v", i+1, err)
		}
		if err := c.addPrefix(netip.MustParsePrefix("192.0.2.0/24")); !errors.Is(err, want) {
			t.Errorf("prefix %d more: %v", i+1, err)
		}
	}
	path := file(t, "huge.txt", nil)
	if err := os.Truncate(path, maxFile+1); err != nil { // a hole: it takes no room
		t.Fatal(err)
	}
	_, err := Load(Sources{Sets: map[string]string{"mine": path}}, Wanted{Sites: []string{"mine"}})
	if err == nil || !strings.HasSuffix(err.Error(), ": reading it: it has more than 256 MiB") {
		t.Errorf("%v", err)
	}
}

// All defects are told at once, each as a line.
func TestDefectsAreJoined(t *testing.T) {
	directory := t.TempDir()
	missing := filepath.Join(directory, "missing.srs")
	bad := filepath.Join(directory, "bad.txt")
	if err := os.WriteFile(bad, []byte("good.example\n"+strings.Repeat("bad example\n", 20)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(
		Sources{Sets: map[string]string{"a": missing, "b": bad, "c": directory}},
		Wanted{Sites: []string{"a", "b", "nowhere"}, Codes: []string{"a", "c"}},
	)
	if err == nil {
		t.Fatal("loaded")
	}
	got := strings.Split(strings.ReplaceAll(err.Error(), directory, ""), "\n")
	want := []string{"/missing.srs: reading it: no such file or directory"}
	for i := range mostBadLines {
		want = append(want, "/bad.txt:"+string(rune('2'+i))+`: "bad example": write one entry a line`)
	}
	want = append(want, "/bad.txt: 12 more lines are bad", ": reading it: it is not a file",
		`geosite "nowhere" is in no file: there is neither a geosite file nor a set of that name (have: a, b, c)`)
	equal(t, "defects", got, want)
}

// Near names are few, and the nearest come first.
func TestDidYouMean(t *testing.T) {
	all := strings.Fields("cn us google google-cn googlefcm category-ads category-ads-all youtube tiktok telegram netflix private geolocation-!cn geolocation-cn")
	for name, want := range map[string]string{
		"gogle":                 `; did you mean "google"?`,
		"google":                `; did you mean "google" or "google-cn" or "googlefcm"?`,
		"category-ads-al":       `; did you mean "category-ads-all" or "category-ads"?`,
		"geolocation!cn":        `; did you mean "geolocation-cn" or "geolocation-!cn"?`,
		"c":                     `; did you mean "cn"?`,
		"zzzz":                  `; it has 14 others, such as category-ads, category-ads-all, cn`,
		strings.Repeat("x", 65): `; it has 14 others, such as category-ads, category-ads-all, cn`,
	} {
		if got := didYouMean(name, all); got != want {
			t.Errorf("%s%s, want %s", name, got, want)
		}
	}
	if got := didYouMean("x", nil); got != "" {
		t.Errorf("%q of none", got)
	}
}

// TestPipe: a list that is a named pipe is refused, and nobody waits for its writer.
func TestPipe(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(Sources{Sets: map[string]string{"mine": file}}, Wanted{Sites: []string{"mine"}})
	if err == nil || !strings.Contains(err.Error(), "not a file") {
		t.Errorf("%v", err)
	}
}
