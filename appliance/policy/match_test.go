package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// rules reads one rule per line for tests: `key=value,value !key=value -> outbound`, where ! is not.
func rules(t testing.TB, lines string) []Rule {
	t.Helper()
	var all []Rule
	for line := range strings.Lines(lines) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		asked, outbound, ok := strings.Cut(line, "->")
		if !ok {
			t.Fatalf("no -> in %q", line)
		}
		r := Rule{Outbound: strings.TrimSpace(outbound)}
		for word := range strings.FieldsSeq(asked) {
			key, values, _ := strings.Cut(word, "=")
			side := &r.Is
			if strings.HasPrefix(key, "!") {
				key, side = key[1:], &r.Not
			}
			f, ok := LookupField(key)
			if !ok {
				t.Fatalf("no field %q", key)
			}
			c, err := f.Parse(strings.Split(values, ",")...)
			if err != nil {
				t.Fatal(err)
			}
			*side = append(*side, c)
		}
		all = append(all, r)
	}
	return all
}

// flow reads a flow for tests, on top of a TCP flow of a client with everything but a name and process.
func flow(t testing.TB, words string) Flow {
	t.Helper()
	f := Flow{
		Network:   TCP,
		SourceMAC: MAC{2, 0, 0, 0, 0, 3},
		Interface: "eth0",
	}
	from, to := netip.MustParseAddr("192.168.0.3"), netip.MustParseAddr("203.0.113.10")
	fromPort, toPort := uint16(40000), uint16(443)
	for word := range strings.FieldsSeq(words) {
		key, value, _ := strings.Cut(word, "=")
		var err error
		switch key {
		case "ip":
			to, err = netip.Addr{}, nil
			if value != "" {
				to, err = netip.ParseAddr(value)
			}
		case "from":
			from, err = netip.Addr{}, nil
			if value != "" {
				from, err = netip.ParseAddr(value)
			}
		case "port":
			_, err = fmt.Sscan(value, &toPort)
		case "source_port":
			_, err = fmt.Sscan(value, &fromPort)
		case "dscp":
			_, err = fmt.Sscan(value, &f.DSCP)
		case "network":
			err = f.Network.UnmarshalText([]byte(value))
		case "mac":
			err = f.SourceMAC.UnmarshalText([]byte(value))
		case "interface":
			f.Interface = value
		case "process":
			f.Process.Name = value
		case "path":
			f.Process.Path = value
		case "unit":
			f.Process.Unit = value
		case "names":
			f.Names = strings.Split(value, ",")
		default:
			t.Fatalf("no fact %q", key)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f.Source, f.Destination = netip.AddrPortFrom(from, fromPort), netip.AddrPortFrom(to, toPort)
	return f
}

var testGeo = &lists{
	sites: map[string][]Value{
		"cn":    {exactName("www.example.cn"), suffixName("baidu.example"), keywordName("taobao")},
		"empty": {},
	},
	codes: map[string][]netip.Prefix{
		"cn":    {netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:c::/48")},
		"empty": {},
	},
}

// matchBoth asks the specification and the tables.
func matchBoth(t *testing.T, p *Policy, f Flow) Decision {
	t.Helper()
	tables, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	d := p.Match(f)
	if got := tables.Match(f); got != d {
		t.Errorf("the tables say %+v, the specification %+v", got, d)
	}
	return d
}

// Each settled sentence of the design about what rules mean. The default is direct; the answer is the
// index of the deciding rule, -1 for the default.
var settledSemantics = []struct {
	sentence string
	rules    string
	asks     asks
}{
	{
		"the first match wins", `
			port=443 -> hk
			network=tcp -> us`,
		asks{{"port=443", 0}, {"port=80", 1}, {"network=udp port=80", -1}},
	},
	{
		"a rule without conditions matches everything", `
			port=1 -> hk
			-> us`,
		asks{{"", 1}, {"network=other ip= from= mac= interface=", 1}},
	},
	{
		"values in a field are alternatives", `port=80,443,1000-2000 -> hk`,
		asks{{"port=80", 0}, {"port=443", 0}, {"port=999", -1}, {"port=1000", 0}, {"port=1500", 0}, {"port=2000", 0}, {"port=2001", -1}},
	},
	{
		"different dimensions must all match", `network=udp port=443 -> block`,
		asks{{"network=udp port=443", 0}, {"network=tcp port=443", -1}, {"network=udp port=80", -1}},
	},

	{
		"domain is the whole name", `domain=www.example.com -> hk`,
		asks{{"names=www.example.com", 0}, {"names=example.com", -1}, {"names=a.www.example.com", -1}, {"names=www.example.com.cn", -1}},
	},
	{
		"names are compared in lower case, a trailing dot is ignored", `
			domain=WWW.Example.COM. -> hk
			domain_suffix=Example.ORG. -> us
			domain_keyword=TRACK -> us
			domain_regex=^ADS -> us`,
		asks{{"names=www.EXAMPLE.com.", 0}, {"names=www.example.com", 0}, {"names=A.EXAMPLE.ORG.", 1}, {"names=a.track.net", 2}, {"names=Ads.net", 3}},
	},
	{
		"domain_suffix is the name and its subdomains", `domain_suffix=example.com -> hk`,
		asks{{"names=example.com", 0}, {"names=a.b.example.com", 0}, {"names=badexample.com", -1}, {"names=com", -1}, {"names=example.com.cn", -1}},
	},
	{
		"domain_suffix with a leading dot is only the subdomains", `domain_suffix=.example.com -> hk`,
		asks{{"names=example.com", -1}, {"names=www.example.com", 0}, {"names=a.b.example.com", 0}},
	},
	{
		"domain_keyword is anywhere in the name", `domain_keyword=track,-ad. -> hk`,
		asks{{"names=tracker.net", 0}, {"names=my-ad.net", 0}, {"names=www.net", -1}},
	},
	{
		"domain_regex is found in the name", `domain_regex=^ads?[0-9]+\.,\.cn$ -> hk`,
		asks{{"names=ads7.net", 0}, {"names=ad1.net", 0}, {"names=www.ads7.net", -1}, {"names=a.cn", 0}, {"names=a.cn.net", -1}},
	},
	{
		"geosite is every pattern of the category", `geosite=CN -> hk`,
		asks{{"names=www.example.cn", 0}, {"names=a.baidu.example", 0}, {"names=m.taobao.net", 0}, {"names=example.cn", -1}},
	},
	{
		"an empty list matches nothing, and its negation every known name", `
			geosite=empty -> hk
			!geosite=empty -> us`,
		asks{{"names=a.net", 1}, {"", -1}},
	},
	{
		"the five name fields are one dimension", `domain=a.net domain_suffix=b.net domain_keyword=track domain_regex=^x\. geosite=cn -> hk`,
		asks{{"names=a.net", 0}, {"names=b.net", 0}, {"names=track.me", 0}, {"names=x.net", 0}, {"names=baidu.example", 0}, {"names=c.net", -1}},
	},

	{
		"ip_cidr is the destination", `ip_cidr=192.0.2.0/24,2001:db8::/32,198.51.100.7 -> hk`,
		asks{
			{"ip=192.0.2.0", 0},
			{"ip=192.0.2.255", 0},
			{"ip=192.0.1.255", -1},
			{"ip=192.0.3.0", -1},
			{"ip=198.51.100.7", 0},
			{"ip=198.51.100.8", -1},
			{"from=fd00::3 ip=2001:db8::1", 0},
			{"from=fd00::3 ip=2001:db9::", -1},
		},
	},
	{
		"geoip is every prefix of the code", `geoip=cn -> hk`,
		asks{{"ip=198.51.100.1", 0}, {"from=fd00::3 ip=2001:db8:c::1", 0}, {"ip=198.51.101.1", -1}},
	},
	{
		"ip_is_private is every destination that is not public", `ip_is_private=true -> block`,
		asks{
			{"ip=10.1.2.3", 0},
			{"ip=192.168.0.9", 0},
			{"ip=172.31.255.255", 0},
			{"ip=172.32.0.0", -1},
			{"ip=127.0.0.1", 0},
			{"ip=169.254.1.1", 0},
			{"ip=224.0.0.251", 0},
			{"from=fd00::3 ip=fd00::9", 0},
			{"from=fd00::3 ip=fe80::1", 0},
			{"from=fd00::3 ip=2001:db8::1", -1},
			{"ip=8.8.8.8", -1},
		},
	},
	{
		"ip_cidr, geoip and ip_is_private are one dimension", `ip_cidr=192.0.2.0/24 geoip=cn ip_is_private=true -> hk`,
		asks{{"ip=192.0.2.1", 0}, {"ip=198.51.100.1", 0}, {"ip=10.0.0.1", 0}, {"ip=8.8.8.8", -1}},
	},
	{
		"a name and an address are two dimensions", `domain=a.net ip_cidr=192.0.2.0/24 -> hk`,
		asks{{"names=a.net ip=192.0.2.1", 0}, {"names=a.net", -1}, {"ip=192.0.2.1", -1}},
	},
	{
		"an IPv4-mapped IPv6 address is the IPv4 address", `
			ip_cidr=192.0.2.0/24 ip_version=4 -> hk
			ip_cidr=::ffff:198.51.100.0/120 -> us`,
		asks{{"ip=::ffff:192.0.2.1 from=::ffff:192.168.0.3", 0}, {"ip=198.51.100.9", 1}, {"ip=::ffff:198.51.100.9", 1}},
	},
	{
		"0.0.0.0/0 is all of IPv4 and nothing of IPv6", `ip_cidr=0.0.0.0/0 -> hk`,
		asks{{"ip=0.0.0.0", 0}, {"ip=255.255.255.255", 0}, {"from=fd00::3 ip=::", -1}, {"from=fd00::3 ip=2001:db8::1", -1}},
	},
	{
		"::/0 is all of IPv6 and nothing of IPv4", `source_ip_cidr=::/0 -> hk`,
		asks{{"from=::1 ip=::1", 0}, {"from=192.168.0.3", -1}},
	},
	{
		"a prefix inherits what the prefixes around it say", `
			ip_cidr=10.0.0.0/8 port=80 -> hk
			ip_cidr=10.1.0.0/16 port=443 -> us
			ip_cidr=10.1.1.0/24 port=22 -> block
			!ip_cidr=10.1.1.0/24 network=udp -> us`,
		asks{
			{"ip=10.1.1.1 port=80", 0},
			{"ip=10.1.1.1 port=443", 1},
			{"ip=10.1.1.1 port=22", 2},
			{"ip=10.1.2.1 port=22", -1},
			{"ip=10.2.0.1 port=443", -1},
			{"ip=10.1.1.1 port=1 network=udp", -1},
			{"ip=10.1.2.1 port=1 network=udp", 3},
		},
	},
	{
		"source_ip_cidr is the client", `source_ip_cidr=192.168.0.0/28,192.168.0.32 -> hk`,
		asks{{"from=192.168.0.32", 0}, {"from=192.168.0.33", -1}, {"from=192.168.0.15", 0}, {"from=192.168.0.16", -1}, {"from=192.168.1.3 ip=192.168.0.3", -1}},
	},

	{
		"source_port is the client's port", `source_port=123 -> hk`,
		asks{{"source_port=122", -1}, {"source_port=123", 0}, {"source_port=124", -1}, {"port=123", -1}},
	},
	{
		"ports reach from 1 to 65535", `
			port=1 -> hk
			port=65535 -> us
			port=1-65535 -> block`,
		asks{{"port=1", 0}, {"port=65535", 1}, {"port=2", 2}, {"port=65534", 2}},
	},
	{
		"a protocol without ports satisfies neither port nor not: port", `
			port=1-65535 -> hk
			!port=443 -> us
			!source_port=443 -> us`,
		asks{{"network=other port=0 source_port=0", -1}, {"network=other port=443", -1}, {"port=80", 0}},
	},
	{
		"a protocol that is neither TCP nor UDP satisfies not: network", `!network=tcp,udp -> block`,
		asks{{"network=other", 0}, {"network=tcp", -1}, {"network=udp", -1}},
	},
	{
		"ip_version", `ip_version=6 -> hk`,
		asks{{"ip=2001:db8::1 from=fd00::3", 0}, {"ip=192.0.2.1", -1}},
	},
	{
		"dscp", `dscp=46,0 -> hk`,
		asks{{"dscp=46", 0}, {"dscp=0", 0}, {"dscp=14", -1}, {"dscp=45", -1}, {"dscp=47", -1}},
	},
	{
		"source_mac_address", `source_mac_address=02:00:00:00:00:10,02-AA-BB-CC-DD-EE -> block`,
		asks{{"mac=02:00:00:00:00:10", 0}, {"mac=02:aa:bb:cc:dd:ee", 0}, {"mac=02:00:00:00:00:11", -1}},
	},
	{
		"inbound_interface", `inbound_interface=eth0 -> hk`,
		asks{{"interface=eth0", 0}, {"interface=eth01", -1}, {"interface=eth", -1}},
	},
	{
		"process_name", `process_name=curl -> hk`,
		asks{{"process=curl", 0}, {"process=Curl", -1}, {"process=curl2", -1}, {"path=/usr/bin/curl", -1}},
	},
	{
		"process_path", `process_path=/usr/bin/curl,/sbin/dhclient -> hk`,
		asks{
			{"path=/usr/bin/curl", 0},
			{"path=/sbin/dhclient", 0},
			{"path=/bin/curl", -1},
			{"path=/usr/bin/curl2", -1},
			{"path=/usr/bin", -1},
			{"path=/opt/usr/bin/curl", -1},
			{"process=curl", -1},
		},
	},
	{
		"unit", `unit=web.service -> hk`,
		asks{{"unit=web.service", 0}, {"unit=web.socket", -1}, {"unit=web@1.service", -1}, {"unit=web", -1}},
	},

	{
		"not: the rule matches only if none of these does", `!port=80,443 !network=udp -> hk`,
		asks{{"port=22", 0}, {"port=80", -1}, {"port=443", -1}, {"port=22 network=udp", -1}},
	},
	{
		"not excludes from what the same dimension includes", `ip_cidr=10.0.0.0/8 !ip_cidr=10.1.0.0/16 -> hk`,
		asks{{"ip=10.0.0.1", 0}, {"ip=10.1.0.1", -1}, {"ip=10.2.0.1", 0}, {"ip=8.8.8.8", -1}},
	},
	{
		"an unknown name satisfies neither domain nor not: domain", `
			domain_regex=. -> hk
			!domain=a.net -> us`,
		asks{{"", -1}, {"names=b.net", 0}},
	},
	{
		"not: domain holds for every other name", `!domain_suffix=a.net -> us`,
		asks{{"names=b.net", 0}, {"names=x.a.net", -1}, {"", -1}},
	},
	{
		"the root is no name", `!domain=a.net -> us`,
		asks{{"names=.", -1}},
	},
	{
		"an unknown MAC satisfies neither field nor negation", `
			source_mac_address=02:00:00:00:00:10 -> hk
			!source_mac_address=02:00:00:00:00:10 -> us`,
		asks{{"mac=", -1}, {"mac=02:00:00:00:00:11", 1}},
	},
	{
		"an unknown interface satisfies neither field nor negation", `
			inbound_interface=eth0 -> hk
			!inbound_interface=eth0 -> us`,
		asks{{"interface=", -1}, {"interface=eth1", 1}},
	},
	{
		"a client's flow has no process and satisfies neither field nor negation", `
			process_name=curl -> hk
			!process_name=curl -> us`,
		asks{{"", -1}, {"process=sshd", 1}},
	},
	{
		"of a process what is not known satisfies neither field nor negation", `
			process_path=/usr/bin/curl unit=web.service -> hk
			!process_path=/usr/bin/curl -> us
			!unit=web.service -> block`,
		asks{
			{"", -1},
			{"process=curl", -1},
			{"process=curl path=/usr/bin/wget", 1},
			{"process=curl unit=ssh.service", 2},
			{"path=/usr/bin/curl", -1},
			{"unit=web.service", -1},
			{"path=/usr/bin/curl unit=web.service", 0},
		},
	},
	{
		"name, path and unit of a process are dimensions of their own", `process_name=curl,wget process_path=/usr/bin/wget !unit=web.service -> hk`,
		asks{
			{"process=curl path=/usr/bin/wget unit=ssh.service", 0},
			{"process=curl path=/usr/bin/curl unit=ssh.service", -1},
			{"process=wget path=/usr/bin/wget unit=web.service", -1},
			{"process=sshd path=/usr/bin/wget unit=ssh.service", -1},
			{"process=curl path=/usr/bin/wget", -1},
		},
	},
	{
		"an unknown address satisfies neither field nor negation", `
			ip_cidr=0.0.0.0/0,::/0 -> hk
			!ip_cidr=10.0.0.0/8 -> hk
			source_ip_cidr=0.0.0.0/0,::/0 -> hk
			!source_ip_cidr=10.0.0.0/8 -> hk
			ip_version=4,6 -> hk
			!ip_version=4 -> hk
			port=443 -> us`,
		asks{{"ip= from=", 6}},
	},
	{
		"the lowest rule of the names' decisions is the answer", `
			domain=b.net -> hk
			domain=a.net -> hk`,
		asks{{"names=a.net,b.net", 0}, {"names=a.net", 1}, {"names=a.net,c.net", 1}, {"names=c.net,a.net", 1}},
	},
	{
		"each name is decided alone", `
			domain_suffix=net !domain=a.net -> hk
			-> us`,
		asks{{"names=a.net", 1}, {"names=a.net,b.net", 0}},
	},
}

type asks []struct {
	flow string
	rule int
}

func TestSettledSemantics(t *testing.T) {
	for _, test := range settledSemantics {
		t.Run(test.sentence, func(t *testing.T) {
			p := &Policy{Rules: rules(t, test.rules), Default: "direct", Geo: testGeo}
			for _, ask := range test.asks {
				if got := matchBoth(t, p, flow(t, ask.flow)); got.Rule != ask.rule {
					t.Errorf("%s: decided by %d, want %d", ask.flow, got.Rule, ask.rule)
				}
			}
		})
	}
}

func TestVerdicts(t *testing.T) {
	p := &Policy{Default: "auto", Rules: rules(t, `
		port=1 -> direct
		port=2 -> block
		port=3 -> hk`)}
	for port, want := range map[string]Decision{
		"port=1": {Direct, "direct", 0, false},
		"port=2": {Block, "block", 1, false},
		"port=3": {Proxy, "hk", 2, false},
		"port=4": {Proxy, "auto", -1, false},
	} {
		if got := matchBoth(t, p, flow(t, port)); got != want {
			t.Errorf("%s: %+v, want %+v", port, got, want)
		}
	}
}

// A flow is ambiguous if its names lead to different verdicts or outbounds.
func TestAmbiguous(t *testing.T) {
	p := &Policy{Default: "direct", Rules: rules(t, `
		domain=hk1.net -> hk
		domain=hk2.net -> hk
		domain=us.net -> us
		domain=direct.net -> direct`)}
	for names, want := range map[string]Decision{
		"hk1.net":                 {Proxy, "hk", 0, false},
		"hk2.net,hk1.net":         {Proxy, "hk", 0, false},
		"us.net,hk1.net":          {Proxy, "hk", 0, true},
		"hk2.net,us.net":          {Proxy, "hk", 1, true},
		"us.net,us.net":           {Proxy, "us", 2, false},
		"other.net,us.net":        {Proxy, "us", 2, true},
		"other.net,direct.net":    {Direct, "direct", 3, false},
		"direct.net,hk1.net":      {Proxy, "hk", 0, true},
		"hk1.net,us.net,hk1.net":  {Proxy, "hk", 0, true},
		"other.net,different.net": {Direct, "direct", -1, false},
	} {
		if got := matchBoth(t, p, flow(t, "names="+names)); got != want {
			t.Errorf("%s: %+v, want %+v", names, got, want)
		}
	}
}

// What ip_is_private means is one thing in the specification and in the table.
func TestPrivatePrefixes(t *testing.T) {
	listed := func(a netip.Addr) bool {
		for _, p := range privatePrefixes {
			if p.Contains(a) {
				return true
			}
		}
		return false
	}
	for _, p := range privatePrefixes {
		for _, a := range []netip.Addr{p.Addr(), p.Addr().Prev(), lastAddr(p), lastAddr(p).Next()} {
			if !a.IsValid() {
				continue
			}
			f := facts{Flow: Flow{Destination: netip.AddrPortFrom(a, 1)}}
			if got := matchPrivate(private{}, &f, nil); got != listed(a) {
				t.Errorf("%s: %v by its methods, %v by the list", a, got, listed(a))
			}
		}
	}
}

func lastAddr(p netip.Prefix) netip.Addr {
	last := p.Addr()
	for bits := last.BitLen(); bits > p.Bits(); bits-- {
		bytes := last.AsSlice()
		bytes[(bits-1)/8] |= 1 << (7 - (bits-1)%8)
		last, _ = netip.AddrFromSlice(bytes)
	}
	return last
}
