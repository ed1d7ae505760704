package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestDNSExample compares the section of the example with what it says.
func TestDNSExample(t *testing.T) {
	c, err := Load("testdata/example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.Sniff != SniffAmbiguous || c.Dial != DialDomain || c.TrustSniffed {
		t.Errorf("sniff %s, dial %s, trust_sniffed %t", c.Sniff, c.Dial, c.TrustSniffed)
	}
	got := c.DNS
	for name, u := range got.Upstreams {
		u.Position = Position{}
		got.Upstreams[name] = u
	}
	addr, server := netip.MustParseAddr, netip.MustParseAddrPort
	upstreams := map[string]DNSUpstream{
		"isp": {URL: "udp://192.168.0.1", Detour: "direct"},
		"doh": {URL: "https://dns.example/dns-query", Addresses: []netip.Addr{addr("192.0.2.53"), addr("2001:db8::53")}, Detour: "hk"},
		"dot": {
			URL: "tls://dot.example", Bootstrap: []netip.AddrPort{server("192.168.0.1:53"), server("192.168.0.1:5353")}, Detour: "direct",
			CAFile: "testdata/ca.pem", ServerName: "dns.example",
		},
	}
	if !reflect.DeepEqual(got.Upstreams, upstreams) {
		t.Errorf("upstreams\n%+v\nwant\n%+v", got.Upstreams, upstreams)
	}
	if got.Default != "doh" || got.IPVersion != AnyVersion || got.StripECH {
		t.Errorf("default %s, ip_version %s, strip_ech %t", got.Default, got.IPVersion, got.StripECH)
	}
	if want := map[string][]netip.Addr{"nas.lan": {addr("192.168.0.9"), addr("fd00::9")}, "printer.lan": {addr("192.168.0.10")}}; !reflect.DeepEqual(got.Hosts, want) {
		t.Errorf("hosts %v", got.Hosts)
	}
	if fmt.Sprint(got.RebindAllow, got.Allow) != "[corp.example] [203.0.113.0/24]" {
		t.Errorf("rebind_allow %v, allow %v", got.RebindAllow, got.Allow)
	}
	if want := (DNSCache{65536, 0, 24 * time.Hour, time.Hour, 5 * time.Second, true}); got.Cache != want {
		t.Errorf("cache %+v", got.Cache)
	}
	rules := []string{
		`rule "no tracking" [domain_suffix: tracker.example] not [] types [] upstream  answer [] reject nxdomain`,
		`rule "portal" [domain: portal.example] not [] types [] upstream  answer [192.168.0.2 fd00::2] reject `,
		`rule "home" [geosite: cn] not [source_ip_cidr: 192.168.0.64/26 domain_keyword: away] types [] upstream isp answer [] reject  prefer_4 strip true`,
		`rule "no h3 hints" [source_mac_address: 02:00:00:00:00:10] not [] types [65 64] upstream  answer [] reject empty`,
	}
	for i, r := range got.Rules {
		text := fmt.Sprintf("%s %v not %v types %v upstream %s answer %v reject %s", &r.Match, r.Match.Is, r.Match.Not, r.QueryTypes, r.Upstream, r.Answer, r.Reject)
		if r.IPVersion != nil {
			text += fmt.Sprintf(" %s strip %t", *r.IPVersion, *r.StripECH)
		}
		if i >= len(rules) || text != rules[i] {
			t.Errorf("rule %d is\n%s", i, text)
		}
	}
	responses := []string{
		`rule "home is home" [geoip: cn] not [] from [isp] upstream  reject  accept true`,
		`rule "lies" [] not [ip_is_private: true] from [isp] upstream doh reject  accept false`,
		`rule "sinkhole" [ip_cidr: 198.51.100.66/32] not [] from [] upstream  reject nxdomain accept false`,
	}
	for i, r := range got.Responses {
		text := fmt.Sprintf("%s %v not %v from %v upstream %s reject %s accept %t", &r.Match, r.Match.Is, r.Match.Not, r.From, r.Upstream, r.Reject, r.Accept)
		if i >= len(responses) || text != responses[i] {
			t.Errorf("response %d is\n%s", i, text)
		}
	}
	if len(got.Rules) != len(rules) || len(got.Responses) != len(responses) {
		t.Errorf("%d rules and %d responses", len(got.Rules), len(got.Responses))
	}
}

// TestDNSDefaults is the least that the section can be.
func TestDNSDefaults(t *testing.T) {
	c := parse(t, "default: direct\ndns: { upstreams: { isp: 'udp://192.168.0.1' }, default: isp, rules: [{ query_type: AAAA, ip_version: only_4 }] }\n")
	if d := c.DNS; d.Cache != (DNSCache{65536, 0, 24 * time.Hour, time.Hour, 5 * time.Second, true}) || d.IPVersion != AnyVersion || d.StripECH {
		t.Errorf("%+v", d)
	}
	// A rule that only has a preference asks the default upstream.
	if r := c.DNS.Rules[0]; r.Upstream != "isp" || !slices.Equal(r.QueryTypes, []uint16{28}) || *r.IPVersion != Only4 || r.StripECH != nil {
		t.Errorf("%+v", r)
	}
	if c := parse(t, "default: direct\n"); c.DNS != nil {
		t.Errorf("without the section there is %+v", c.DNS)
	}
}

// TestDNSCircles tries detours that need themselves, and those that only seem to.
func TestDNSCircles(t *testing.T) {
	const circle = `detour: it needs hk, whose host hk.example is looked up through upstream "doh"`
	for _, try := range []struct{ about, outbound, dns, wrong string }{
		{"the host is an address", "192.0.2.1", "", ""},
		{"the host is an IPv6 address", "[2001:db8::1]", "", ""},
		{"the host needs the detour", "hk.example", "", circle},
		{"hosts has the host", "HK.example.", "hosts: { hk.EXAMPLE: 192.0.2.1 }", ""},
		{"hosts has another", "hk.example", "hosts: { hk2.example: 192.0.2.1 }", circle},
		{"a rule sends it elsewhere", "hk.example", "rules: [{ domain_suffix: example, upstream: isp }]", ""},
		{"a rule answers it", "hk.example", "rules: [{ domain: hk.example, answer: 192.0.2.1 }]", ""},
		{"a rule sends another elsewhere", "hk.example", "rules: [{ domain: us.example, upstream: isp }]", circle},
		{"a rule sends one type elsewhere", "hk.example", "rules: [{ domain: hk.example, query_type: AAAA, upstream: isp }]", circle},
		{"two rules send both types elsewhere", "hk.example", "rules: [{ domain: hk.example, query_type: [AAAA, HTTPS], upstream: isp }, { query_type: A, upstream: isp }]", ""},
		{"a rule is for clients", "hk.example", "rules: [{ source_ip_cidr: 0.0.0.0/0, upstream: isp }]", circle},
		{"a rule comes too late", "hk.example", "rules: [{ domain_keyword: hk, upstream: doh }, { domain: hk.example, upstream: isp }]", circle},
		{"an answer may be judged so that it needs the detour", "hk.example", "rules: [{ domain: hk.example, upstream: isp }], responses: [{ from: isp, not: { ip_is_private: true }, upstream: doh }]", circle},
		{"other names are judged", "hk.example", "rules: [{ domain: hk.example, upstream: isp }], responses: [{ domain: www.example, ip_cidr: 192.0.2.0/24, upstream: doh }]", ""},
		{"other upstreams are judged", "hk.example", "rules: [{ domain: hk.example, upstream: isp }], responses: [{ from: doh, ip_cidr: 192.0.2.0/24, upstream: isp }]", ""},
		{"another upstream's answer is judged so", "hk.example", "rules: [{ domain: hk.example, upstream: isp }], responses: [{ from: other, ip_cidr: 192.0.2.0/24, upstream: doh }]", ""},
		{"an answer is judged, and that of the next upstream too", "hk.example", "rules: [{ domain: hk.example, upstream: isp }], responses: [{ from: other, ip_cidr: 192.0.2.0/24, upstream: doh }, { from: isp, ip_cidr: 198.51.100.0/24, upstream: other }]", circle},
		{"it is accepted before", "hk.example", "rules: [{ domain: hk.example, upstream: isp }], responses: [{ domain: hk.example, accept: true }, { from: isp, not: { ip_is_private: true }, upstream: doh }]", ""},
		{"it may not be accepted before", "hk.example", "rules: [{ domain: hk.example, upstream: isp }], responses: [{ domain: hk.example, ip_cidr: 192.0.2.1, accept: true }, { from: isp, not: { ip_is_private: true }, upstream: doh }]", circle},
	} {
		text := fmt.Sprintf(`
default: direct
outbounds: { hk: { url: "socks5://%s:1080" } }
dns: { upstreams: { isp: "udp://192.168.0.1", other: "udp://192.168.0.3", doh: { url: "https://192.0.2.53/dns-query", detour: hk } }, default: doh, %s }
`, try.outbound, try.dns)
		_, err := Parse("c.yaml", []byte(text), YAML)
		switch {
		case try.wrong == "" && err != nil:
			t.Errorf("%s: %v", try.about, err)
		case try.wrong != "" && (err == nil || !strings.Contains(err.Error(), try.wrong) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%s: got %v, want %s", try.about, err, try.wrong)
		}
	}
}

// TestDNSCircleOfMany goes through several upstreams, and is told once.
func TestDNSCircleOfMany(t *testing.T) {
	const text = `
default: direct
outbounds: { de: { url: "http://de.example:80" }, hk: { url: "socks5://hk.example" }, us: { url: "http://us.example:80" } }
dns:
  default: z
  upstreams:
    a: { url: "tls://192.0.2.1", detour: hk }
    b: { url: "tls://192.0.2.2", detour: us }
    aa: { url: "tls://192.0.2.3", detour: de }
    z: "udp://192.168.0.1"
  rules:
    - { domain: hk.example, query_type: A, upstream: aa }
    - { domain: hk.example, upstream: b }
    - { domain: us.example, upstream: a }
`
	_, err := Parse("c.yaml", []byte(text), YAML)
	// aa is gone through in vain, and is no part of the circle.
	const want = `c.yaml:7: dns upstream "a": detour: it needs hk, whose host hk.example is looked up through upstream "b", ` +
		`which needs us, whose host us.example is looked up through upstream "a"; ` +
		`give hk an address in its url, list hk.example under hosts of dns, or send it to another upstream by a rule`
	if fmt.Sprint(err) != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestDNSWarnings(t *testing.T) {
	c := parse(t, `
default: direct
dns:
  upstreams: { isp: "udp://192.168.0.1", doh: "https://192.0.2.1/dns-query" }
  default: isp
  rules:
    - { name: a, domain: a.example, upstream: isp }
    - { name: again, domain: a.example, upstream: doh }
    - { name: type, domain: a.example, query_type: A, upstream: doh }
    - { name: types, query_type: [AAAA, A], reject: empty }
    - { name: same types, query_type: [A, AAAA], reject: refused }
    - { name: rest, upstream: doh }
    - { name: never, domain: b.example, upstream: isp }
  responses:
    - { name: isp, from: isp, accept: true }
    - { name: all, accept: true }
    - { name: never, from: doh, reject: drop }
rules:
  - { name: named, domain: a.example, outbound: block }
`)
	want := []string{
		`w.yaml:8: dns rule "again": it never matches: dns rule "a" (line 7) has the same conditions; remove one`,
		`w.yaml:11: dns rule "same types": it never matches: dns rule "types" (line 10) has the same conditions; remove one`,
		`w.yaml:13: dns rule "never": it never matches, nor does any rule after it: dns rule "rest" (line 12) has no condition and takes everything; move that to the end`,
		`w.yaml:17: dns response "never": it never matches, nor does any rule after it: dns response "all" (line 16) has no condition and takes everything; move that to the end`,
	}
	if !slices.Equal(c.Warnings, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(c.Warnings, "\n"), strings.Join(want, "\n"))
	}
}

// TestNamelessWarning: rules on names are worth nothing where nothing tells names.
func TestNamelessWarning(t *testing.T) {
	const rules = "default: direct\nrules:\n  - { port: 1, outbound: block }\n  - { name: ads, not: { domain: a.example }, outbound: block }\n  - { domain: b.example, outbound: block }\n"
	warning := []string{`w.yaml:4: rule "ads": it asks for a name, and nothing tells the names of connections; add dns, or sniff: unknown`}
	for text, want := range map[string][]string{
		"":                 warning,
		"sniff: ambiguous": warning,
		"sniff: unknown":   nil,
		"dns: { upstreams: { isp: 'udp://192.168.0.1' }, default: isp }": nil,
	} {
		if c := parse(t, rules+text+"\n"); !slices.Equal(c.Warnings, want) {
			t.Errorf("with %q: %q", text, c.Warnings)
		}
	}
}

// TestDNSFormats writes one section in three formats.
func TestDNSFormats(t *testing.T) {
	texts := map[Format]string{
		YAML: `
default: direct
sniff: unknown
dns:
  upstreams:
    isp: udp://192.168.0.1
    doh:
      url: https://dns.example/dns-query
      addresses: 192.0.2.53
  default: doh
  hosts:
    nas.lan: 192.168.0.9
  rules:
    - query_type: [A, AAAA]
      not: { domain: [a.example, b.example] }
      upstream: isp
      strip_ech: true
  cache: { stale: 0s }
`,
		JSON: `{"default": "direct", "sniff": "unknown", "dns": {
	"upstreams": {"isp": "udp:\/\/192.168.0.1", "doh": {"url": "https://dns.example/dns-query", "addresses": ["192.0.2.53"]}},
	"default": "doh",
	"hosts": {"nas.lan": ["192.168.0.9"]},
	"rules": [{"query_type": ["A", "AAAA"], "not": {"domain": ["a.example", "b.example"]}, "upstream": "isp", "strip_ech": true}],
	"cache": {"stale": "0s"}
}}`,
		TOML: `
default = "direct"
sniff = "unknown"

[dns]
default = "doh"
hosts."nas.lan" = "192.168.0.9"
cache.stale = "0s"

[dns.upstreams]
isp = "udp://192.168.0.1"
doh = { url = "https://dns.example/dns-query", addresses = ["192.0.2.53"] }

[[dns.rules]]
query_type = ["A", "AAAA"]
not.domain = ["a.example", "b.example"]
upstream = "isp"
strip_ech = true
`,
	}
	loaded := map[Format]*Config{}
	for format, text := range texts {
		c, err := Parse("f."+string(format), []byte(text), format)
		if err != nil {
			t.Fatalf("%s: %v", format, err)
		}
		for name, u := range c.DNS.Upstreams {
			u.Position = Position{}
			c.DNS.Upstreams[name] = u
		}
		c.DNS.Position, c.DNS.Rules[0].Position = Position{}, Position{}
		loaded[format] = withoutPositions(c)
	}
	y := loaded[YAML]
	if y.Sniff != SniffUnknown || len(y.DNS.Rules[0].Match.Not) != 1 || len(y.DNS.Rules[0].Match.Not[0].Values) != 2 || y.DNS.Cache.Stale != 0 {
		t.Errorf("the config is %+v", y.DNS)
	}
	for _, format := range []Format{JSON, TOML} {
		if !reflect.DeepEqual(loaded[format], y) {
			t.Errorf("%s is\n%+v\nbut YAML\n%+v", format, loaded[format].DNS, y.DNS)
		}
	}
}

func TestQueryType(t *testing.T) {
	for text, want := range map[string]uint16{"A": 1, "aaaa": 28, "HTTPS": 65, "TYPE65": 65, "type65535": 65535, "TYPE0": 0, "TYPE65536": 0, "65": 0, "": 0, "TYPE": 0, "TYPE-1": 0, "TYPE+1": 0} {
		if got, ok := queryType(text); ok != (want != 0) || ok && got != want {
			t.Errorf("%q: %d, %t", text, got, ok)
		}
	}
}

func parse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("w.yaml", []byte(text), YAML)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
