package policy

import (
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestExplainReasons(t *testing.T) {
	for _, test := range []struct{ rule, flow, field, reason string }{
		{"port=80,1000-2000 -> hk", "", "port", "port 443 is not in 80, 1000-2000"},
		{"port=1 -> hk", "network=other", "port", "the flow has no destination port"},
		{"source_port=1 -> hk", "", "source_port", "source port 40000 is not in 1"},
		{"domain=a.net -> hk", "", "domain", "the destination has no known name"},
		{"domain_keyword=x domain=a.net,b.net -> hk", "names=C.net.", "domain_keyword", "name c.net matches none of domain_keyword x, domain a.net, b.net"},
		{"domain=a.net -> hk", "names=b.net,c.net", "domain", "name b.net matches none of domain a.net; name c.net matches none of domain a.net"},
		{"ip_cidr=10.0.0.0/8 geoip=cn -> hk", "", "ip_cidr", "destination 203.0.113.10 matches none of ip_cidr 10.0.0.0/8, geoip cn"},
		{"ip_cidr=10.0.0.0/8 -> hk", "ip=", "ip_cidr", "the destination address is not known"},
		{"source_ip_cidr=10.0.0.0/8 -> hk", "", "source_ip_cidr", "source 192.168.0.3 is not in 10.0.0.0/8"},
		{"network=udp -> hk", "", "network", "network tcp is not in udp"},
		{"ip_version=6 -> hk", "", "ip_version", "IP version 4 is not in 6"},
		{"dscp=1 -> hk", "", "dscp", "DSCP 0 is not in 1"},
		{"source_mac_address=02:00:00:00:00:10 -> hk", "", "source_mac_address", "source MAC 02:00:00:00:00:03 is not in 02:00:00:00:00:10"},
		{"source_mac_address=02:00:00:00:00:10 -> hk", "mac=", "source_mac_address", "the source MAC address is not known"},
		{"inbound_interface=eth1 -> hk", "", "inbound_interface", "interface eth0 is not in eth1"},
		{"process_name=curl -> hk", "", "process_name", "the flow is not from a process of the gateway whose name is known"},
		{"process_name=curl -> hk", "process=sshd", "process_name", "process sshd is not in curl"},
		{"process_path=/bin/curl -> hk", "process=curl", "process_path", "the flow is not from a process of the gateway whose path is known"},
		{"process_path=/bin/curl -> hk", "path=/usr/bin/curl", "process_path", "process path /usr/bin/curl is not in /bin/curl"},
		{"unit=web.service -> hk", "process=curl", "unit", "the flow is not from a process of the gateway whose unit is known"},
		{"unit=web.service -> hk", "unit=web.socket", "unit", "unit web.socket is not in web.service"},
		{"!unit=web.service -> hk", "unit=web.service", "not.unit", "unit web.service is in web.service, which the rule excludes"},
		{"network=udp port=80 -> hk", "", "network", "network tcp is not in udp"},
		{"network=tcp port=80 -> hk", "", "port", "port 443 is not in 80"},
		{"network=tcp !port=80,443 -> hk", "", "not.port", "port 443 is in 80, 443, which the rule excludes"},
		{"!domain=a.net -> hk", "", "not.domain", "the destination has no known name"},
		{"!domain_suffix=net -> hk", "names=a.net", "not.domain_suffix", "name a.net matches domain_suffix net, which the rule excludes"},
		{"port=1,2,3,4,5,6,7,8 -> hk", "", "port", "port 443 is not in 1, 2, 3, 4, 5, 6, … (2 more)"},
	} {
		p := &Policy{Rules: rules(t, test.rule), Default: "direct", Geo: testGeo}
		e := p.Explain(flow(t, test.flow))
		if len(e.Skipped) != 1 || e.Skipped[0] != (Skipped{"#1", 0, test.field, test.reason}) {
			t.Errorf("%s for %q: %+v\nwant %s: %s", test.rule, test.flow, e.Skipped, test.field, test.reason)
		}
	}
}

func TestExplainJSON(t *testing.T) {
	p := &Policy{Default: "auto", Rules: rules(t, `
		port=80 -> hk
		port=443 -> block
		port=443 -> us`)}
	p.Rules[0].Name, p.Rules[1].Name = "web", "kids"
	for ask, want := range map[string]string{
		"": `{"verdict":"block","outbound":"block","rule":"kids","index":1,` +
			`"skipped":[{"rule":"web","index":0,"field":"port","reason":"port 443 is not in 80"}]}`,
		"port=80": `{"verdict":"proxy","outbound":"hk","rule":"web","index":0,"skipped":[]}`,
		"port=1": `{"verdict":"proxy","outbound":"auto","rule":null,"index":-1,"skipped":[` +
			`{"rule":"web","index":0,"field":"port","reason":"port 1 is not in 80"},` +
			`{"rule":"kids","index":1,"field":"port","reason":"port 1 is not in 443"},` +
			`{"rule":"#3","index":2,"field":"port","reason":"port 1 is not in 443"}]}`,
	} {
		got, err := json.Marshal(p.Explain(flow(t, ask)))
		if err != nil || string(got) != want {
			t.Errorf("%q: %v\n%s, want\n%s", ask, err, got, want)
		}
	}
}

// Explain decides as Match does and has a reason for every rule before.
func TestExplainAgrees(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		p := Random(r)
		for range 10 {
			f := blur(r, p.RandomFlow(r))
			d, e := p.Match(f), p.Explain(f)
			if e.Verdict != d.Verdict || e.Outbound != d.Outbound || e.Index != d.Rule || e.Ambiguous != d.Ambiguous || (e.Rule == nil) != (d.Rule < 0) {
				t.Fatalf("seed %d: %+v, want %+v", seed, e, d)
			}
			before := d.Rule
			if before < 0 {
				before = len(p.Rules)
			}
			if len(e.Skipped) != before {
				t.Fatalf("seed %d: %d of %d rules explained", seed, len(e.Skipped), before)
			}
			for i, s := range e.Skipped {
				if _, ok := LookupField(strings.TrimPrefix(s.Field, "not.")); !ok || s.Index != i || s.Reason == "" {
					t.Fatalf("seed %d: %+v for %s", seed, s, &p.Rules[i])
				}
			}
		}
	}
}
