package datapath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// cost is the run time of a program on one packet under BPF_PROG_TEST_RUN: the first decile of many rounds, for the machine is shared.
func cost(t testing.TB, p *ebpf.Program, data []byte) time.Duration {
	t.Helper()
	var rounds []time.Duration
	for range 41 {
		_, d, err := p.Benchmark(data, 50_000, nil)
		if err != nil {
			t.Fatal(err)
		}
		rounds = append(rounds, d)
	}
	slices.Sort(rounds)
	return rounds[len(rounds)/10]
}

// manyRules is a policy of n rules that all look at something, with prefixes spread over them.
func manyRules(t testing.TB, n, prefixes int) *policy.Policy {
	t.Helper()
	p := &policy.Policy{Default: "direct"}
	texts := make([][]string, n)
	for i := range prefixes {
		a := netip.AddrFrom4([4]byte{byte(1 + i>>16), byte(i >> 8), byte(i), 0})
		texts[i%n] = append(texts[i%n], netip.PrefixFrom(a, 24).String())
	}
	for i := range n {
		r := rule(t, fmt.Sprint("r", i), "block", "port", fmt.Sprint(1000+i), "network", "udp")
		if len(texts[i]) > 0 {
			f, _ := policy.LookupField("ip_cidr")
			c, err := f.Parse(texts[i]...)
			if err != nil {
				t.Fatal(err)
			}
			r.Is = append(r.Is, c)
		}
		p.Rules = append(p.Rules, r)
	}
	return p
}

func BenchmarkPacket(b *testing.B) {
	d := opened(b)
	established := packet{src: addrPort("192.168.0.3:40000"), dst: addrPort("203.0.113.10:443"), protocol: unix.IPPROTO_UDP, payload: make([]byte, 60)}.bytes()
	for _, size := range []struct{ rules, prefixes int }{{10, 0}, {900, 0}, {900, 100_000}} {
		apply(b, d, Desired{Policy: manyRules(b, size.rules, size.prefixes)})
		d.run(b, established)
		hit := cost(b, d.generation.objects.LanEthernet, established)
		facts := make([]byte, binary.Size(gatewayFacts{}))
		copy(facts[16:32], []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 2, 3, 4})
		facts[36] = 2
		decide := cost(b, d.generation.objects.PolicyQuery, facts)
		b.Logf("%d rules, %d prefixes: established %v, decision %v", size.rules, size.prefixes, hit, decide)
	}
}
