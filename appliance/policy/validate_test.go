package policy

import (
	"fmt"
	"strings"
	"testing"
)

// Every bad value is refused in one line that says what to write instead.
func TestBadValues(t *testing.T) {
	long := strings.Repeat("a", 64)
	for _, test := range []struct{ key, text, want string }{
		{"domain", "", "the name is empty"},
		{"domain", "bücher.example", "punycode"},
		{"domain", "*.example.com", "write domain_suffix: .example.com"},
		{"domain", "www*.example.com", "use domain_suffix, domain_keyword or domain_regex"},
		{"domain", "https://example.com/", "write only the host's name"},
		{"domain", "example.com/path", `'/' cannot be in a name`},
		{"domain", "a..b", "two dots"},
		{"domain", ".example.com", "begins with one"},
		{"domain", "a b", `' ' cannot be in a name`},
		{"domain", long + ".example", "at most 63"},
		{"domain", strings.Repeat("a.", 127) + "a", "at most 253"},
		{"domain", "192.0.2.1", "use ip_cidr"},
		{"domain_suffix", ".", "the name is empty"},
		{"domain_suffix", "..example.com", "two dots"},
		{"domain_suffix", "*.example.com", "write domain_suffix: .example.com"},
		{"domain_keyword", "", "remove it"},
		{"domain_keyword", "ü", "punycode"},
		{"domain_regex", "a(\n", "control characters"},
		{"domain_regex", "", "matches every name"},
		{"domain_regex", "a(", "missing closing ): `a(`"},
		{"domain_regex", `(?=a)`, "not an RE2 expression"},
		{"domain_regex", `ü`, "punycode"},
		{"geosite", "", "such as cn"},
		{"geosite", "cn, us", "one name per list entry"},
		{"geoip", "geoip:cn", "such as cn"},
		{"ip_cidr", "", "write 192.0.2.7"},
		{"ip_cidr", "example.com", "write 192.0.2.7"},
		{"ip_cidr", "10.1.2.3/8", "write 10.0.0.0/8 for the network or 10.1.2.3 for the address"},
		{"ip_cidr", "10.0.0.0/33", "between 0 and 32"},
		{"ip_cidr", "fd00::/129", "between 0 and 128"},
		{"ip_cidr", "10.0.0.0/255.0.0.0", "write the prefix length"},
		{"ip_cidr", "fe80::1%eth0", "use inbound_interface"},
		{"source_ip_cidr", "192.168.0.300", "write 192.0.2.7"},
		{"ip_is_private", "false", "write not: {ip_is_private: true}"},
		{"ip_is_private", "yes", "write true"},
		{"port", "0", "ports are 1 to 65535"},
		{"port", "65536", "ports are 1 to 65535"},
		{"port", "1000-70000", "ports are 1 to 65535"},
		{"port", "-1", "write 443 or 1000-2000"},
		{"port", "https", "write 443 or 1000-2000"},
		{"port", "80,443", "write a list, [80, 443]"},
		{"port", "1000:2000", "1000-2000"},
		{"port", "2000-1000", "write 1000-2000"},
		{"port", "1-2-3", "write 443 or 1000-2000"},
		{"source_port", "+80", "write 443 or 1000-2000"},
		{"network", "TCP", "write tcp or udp"},
		{"network", "icmp", "not: {network: [tcp, udp]}"},
		{"ip_version", "v6", "write 4 or 6"},
		{"dscp", "64", "0 to 63"},
		{"dscp", "ef", "46 is EF"},
		{"source_mac_address", "02:00:00:00:00", "02:00:00:00:00:10"},
		{"source_mac_address", "02:00:00-00:00:10", "02:00:00:00:00:10"},
		{"source_mac_address", "02:00:00:00:00:+1", "02:00:00:00:00:10"},
		{"source_mac_address", "00:00:00:00:00:00", "unknown"},
		{"source_mac_address", "ff:ff:ff:ff:ff:ff", "never a source"},
		{"inbound_interface", "", "1 to 15 bytes"},
		{"inbound_interface", "averylonginterface", "1 to 15 bytes"},
		{"inbound_interface", "eth*", "list each interface"},
		{"process_name", "/usr/bin/curl", "write curl, or process_path: /usr/bin/curl"},
		{"process_name", "", "base name"},
		{"process_name", "..", "base name"},
		{"process_path", "curl", "write one like /usr/bin/curl"},
		{"process_path", "bin/curl", "not an absolute path"},
		{"process_path", "", "not an absolute path"},
		{"process_path", "/usr/bin/../sbin/curl", "write /usr/sbin/curl"},
		{"process_path", "/usr//bin/curl/", "write /usr/bin/curl"},
		{"process_path", "/", "not the path of a program"},
		{"process_path", "/usr/" + strings.Repeat(long, 4), "each name in it at most 255"},
		{"process_path", strings.Repeat("/"+long, 64), "at most 4095 bytes"},
		{"unit", "system.slice/web.service", "write web.service"},
		{"unit", "/sys/fs/cgroup/system.slice/web.service", "write web.service"},
		{"unit", "system.slice/", "without slashes"},
		{"unit", "", "such as transmission.service"},
		{"unit", ".", "such as transmission.service"},
		{"unit", strings.Repeat(long, 4), "1 to 255 bytes"},
	} {
		t.Run(fmt.Sprintf("%s %.60s", test.key, test.text), func(t *testing.T) {
			f, ok := LookupField(test.key)
			if !ok {
				t.Fatal("no such field")
			}
			_, err := f.Parse(test.text)
			if err == nil {
				t.Fatal("accepted")
			}
			message := err.Error()
			if !strings.Contains(message, test.want) || !strings.HasPrefix(message, fmt.Sprintf("%s %q: ", test.key, test.text)) || strings.Contains(message, "\n") {
				t.Errorf("%s\nwant one line with %q", message, test.want)
			}
		})
	}
	t.Run("no values", func(t *testing.T) {
		f, _ := LookupField("port")
		if _, err := f.Parse(); err == nil || !strings.Contains(err.Error(), "port: no values") {
			t.Error(err)
		}
	})
	t.Run("the bad one of several", func(t *testing.T) {
		f, _ := LookupField("port")
		if _, err := f.Parse("80", "x", "y"); err == nil || !strings.Contains(err.Error(), `port "x"`) {
			t.Error(err)
		}
	})
}

func TestValidate(t *testing.T) {
	many := &Policy{Default: "direct"}
	for range MaxRules {
		many.Rules = append(many.Rules, Rule{Outbound: "direct"})
	}
	if err := many.Validate(); err != nil {
		t.Errorf("%d rules: %v", MaxRules, err)
	}
	if d := matchBoth(t, many, flow(t, "")); d.Rule != 0 {
		t.Errorf("decided by %d", d.Rule)
	}
	for _, test := range []struct {
		name   string
		change func(p *Policy)
		want   string
	}{
		{"one rule too many", func(p *Policy) {
			p.Rules = append(many.Rules[:MaxRules:MaxRules], Rule{Name: "last straw", Outbound: "direct"})
		}, `rule "last straw" is one too many: a policy has at most 1024 rules`},
		{"no default", func(p *Policy) { p.Default = "" }, "default is missing"},
		{"no outbound", func(p *Policy) { p.Rules[1].Outbound = "" }, "rule #2: outbound is missing"},
		{"reject on direct", func(p *Policy) { p.Rules[0].Reject = true }, `rule "nas": reject needs outbound: block, not "direct"`},
		{"mark on a proxy", func(p *Policy) { p.Rules[1].Mark = 1 }, `rule #2: mark needs outbound: direct, not "hk"`},
		{"snat on a proxy", func(p *Policy) { p.Rules[1].SNAT = new(true) }, `rule #2: snat needs outbound: direct, not "hk"`},
		{"one name twice", func(p *Policy) { p.Rules[1].Name = "nas" }, `rule "nas": rule #1 has the same name`},
		{"no values", func(p *Policy) { p.Rules[1].Is[0].Values = nil }, "rule #2: port has no values"},
		{"unknown category", func(p *Policy) { p.Rules[1].Is = rules(t, "geosite=nowhere -> hk")[0].Is }, `rule #2: geosite "nowhere": the geo data has no such list`},
		{"unknown code", func(p *Policy) { p.Rules[1].Not = rules(t, "geoip=nowhere -> hk")[0].Is }, `rule #2: geoip "nowhere": the geo data has no such list`},
		{"no geo data", func(p *Policy) { p.Geo, p.Rules[1].Is = nil, rules(t, "geoip=cn -> hk")[0].Is }, `rule #2: geoip "cn": there is no geo data`},
		// Two English words with one FNV-1a hash.
		{"equal hashes", func(p *Policy) { p.Rules[0].Outbound, p.Rules[1].Outbound = "costarring", "liquid" }, `rule #2: outbound "liquid" has the same 32-bit hash as "costarring"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := &Policy{Default: "direct", Rules: rules(t, "ip_is_private=true -> direct\nport=443 -> hk"), Geo: testGeo}
			p.Rules[0].Name = "nas"
			if err := p.Validate(); err != nil {
				t.Fatal(err)
			}
			test.change(p)
			_, err := Compile(p)
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v\nwant one line with %q", err, test.want)
			}
		})
	}
	t.Run("every defect has its line", func(t *testing.T) {
		p := &Policy{Rules: []Rule{{}, {Outbound: "hk", Reject: true, Mark: 1}}}
		if got := strings.Count(p.Validate().Error(), "\n") + 1; got != 4 {
			t.Errorf("%d lines: %v", got, p.Validate())
		}
	})
}

func TestRuleText(t *testing.T) {
	p := &Policy{Rules: rules(t, `
		port=80,443 !network=udp -> hk
		port=1,3,5,7,9,11,13,15,17 -> direct`)}
	p.Rules = append(p.Rules, Rule{Name: "nas"})
	for i, want := range []string{
		"rule {port: 80, 443, not network: udp} → hk",
		"rule {port: 1, 3, 5, 7, 9, 11, … (3 more)} → direct",
		`rule "nas"`,
	} {
		if got := p.Rules[i].String(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	for i, want := range map[int]string{-1: "the default", 0: "rule #1", 2: `rule "nas"`} {
		if got := p.RuleLabel(i); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
