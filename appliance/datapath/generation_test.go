package datapath

import (
	"testing"

	"github.com/cilium/ebpf"

	"sidegate/appliance/policy"
)

// Instructions that the verifier walks for each program, at most: a budget, so that growth is noticed while
// the limit of a million is far, and because loading time follows it.
var verifierBudget = map[string]uint32{
	"lan_ethernet": 13_000,
	"lan_ip":       13_000,
	"policy_query": 4000,
	"proxy_lookup": 1000,
}

func TestVerifierBudget(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
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
