package datapath

import (
	"testing"

	"github.com/cilium/ebpf"

	"sidegate/appliance/policy"
)

// Instructions that the verifier walks for each program, at most: a budget, so that growth is noticed while
// the limit of a million is far, and because loading time follows it.
var verifierBudget = map[string]uint32{
	"lan_ethernet": 16_000,
	"lan_ip":       16_000,
	"policy_query": 4000,
	"proxy_lookup": 1000,
}

// The verifier leaves out what no rule looks at, so the rule here looks at everything: the programs are as large as they get, and
// their calls as deep in stack.
func TestVerifierBudget(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Sniff: SniffUnknown, Policy: &policy.Policy{Default: "direct", Rules: []policy.Rule{rule(
		t, "all", "block",
		"domain", "a.example", "ip_cidr", "203.0.113.0/24", "source_ip_cidr", "192.168.0.0/24", "port", "443", "source_port", "1000",
		"source_mac_address", "02:00:00:00:00:10", "inbound_interface", "eth0", "process_name", "curl", "process_path", "/usr/bin/curl", "unit", "a.service",
	)}}})
	o := &d.generation.objects
	for _, p := range []*ebpf.Program{o.LanEthernet, o.LanIp, o.PolicyQuery, o.ProxyLookup} {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		n, ok := info.VerifiedInstructions()
		if !ok {
			t.Skip("this kernel does not report the instructions that the verifier walked")
		}
		t.Logf("%s: %d instructions verified", info.Name, n)
		if budget := verifierBudget[info.Name]; n > budget {
			t.Errorf("%s: %d instructions verified, budget %d", info.Name, n, budget)
		}
	}
}

func BenchmarkGeneration(b *testing.B) {
	d := opened(b)
	for b.Loop() {
		apply(b, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	}
}
