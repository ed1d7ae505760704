package dns

import (
	"fmt"
	"strings"
	"testing"
)

// dig asks as users do, by UDP and TCP, IPv4 and IPv6, whatever resolver they mean.
func TestDig(t *testing.T) {
	n := newNetwork(t)
	z := newZone(t, "www.example.com. 300 A 203.0.113.9", "www.example.com. 300 AAAA 2001:db8::9")
	p := new(pupil)
	n.serve(Options{Learner: p}, newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}))
	for range 2 { // asked, then cached
		for _, server := range []string{asked4.String(), asked6.String(), "192.168.7.2", "fd07::2"} {
			for _, transport := range []string{"+notcp", "+tcp"} {
				out := n.client.run(t, fmt.Sprintf("dig +time=2 +tries=1 %s @%s www.example.com A", transport, server))
				if !strings.Contains(out, "203.0.113.9") || !strings.Contains(out, "SERVER: "+server+"#53") {
					t.Errorf("%s %s:\n%s", server, transport, out)
				}
			}
		}
	}
	if q := z.questions(); len(q) != 1 {
		t.Errorf("the upstream was asked %q, want once", q)
	}
	if !p.knows(client4, "www.example.com", addrs("203.0.113.9")[0]) || !p.knows(client6, "www.example.com", addrs("203.0.113.9")[0]) {
		t.Errorf("taught: %v", p.all())
	}
}
