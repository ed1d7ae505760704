package endtoend

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"sidegate/appliance/lab"
)

// TestOwnDaemonIsNotItsClient: everything is proxied, what the daemon itself sends by name too, and it is in the cgroup. Its connections
// to the upstream, whose name it has to ask for, its questions to DNS servers, with a detour and without, are not its own
// clients': nothing goes in circles, each connection of a program is one at the upstream.
func TestOwnDaemonIsNotItsClient(t *testing.T) {
	if _, err := exec.LookPath("dig"); err != nil {
		t.Skip("needs dig: install the package bind9-dnsutils")
	}
	b := newBox(t)
	w := startWitness(t, b.server(), 7)
	near, err := b.AddServer(t.Context(), "near")
	need(t, err)
	zone, err := lab.Zone("proxy.test. 1 A "+b.upstream().Addr4().String(), "www.test. 300 A "+b.server().Addr4().String())
	need(t, err)
	asked := map[*lab.Host]*lab.Nameserver{}
	for _, h := range []*lab.Host{near, b.server()} {
		asked[h], err = h.StartNameserver(t.Context(), 53, zone)
		need(t, err)
	}
	b.start(t, fmt.Sprintf(`interfaces: { lan: auto }
gateway: { local: true, cgroup: %s }
dial: ip
dns:
  upstreams: { near: "udp://%s", far: { url: "udp://%s", detour: hk } }
  rules: [ { domain: proxy.test, upstream: near } ]
  default: far
outbounds: { hk: { url: "socks5://proxy.test:1080" } }
rules:
  - { name: itself, process_name: [sidegate], outbound: hk }
  - { name: its unit, unit: [sidegate.service], outbound: hk }
  - { name: red, unit: [red.service], outbound: direct }
default: hk
`, b.cgroup, near.Addr4(), b.server().Addr4()))

	from := func(h *lab.Host, by *lab.Host) {
		t.Helper()
		questions := asked[h].Questions()
		if len(questions) == 0 {
			t.Errorf("%s was asked nothing", h.Name())
		}
		for _, q := range questions {
			if !is(by, q.From.Addr()) {
				t.Errorf("%s was asked for %s by %s, not by %s", h.Name(), q.Name, q.From, by.Name())
			}
		}
	}
	for _, more := range []string{"+notcp", "+tcp"} {
		dig := b.sidegate().Command(within(t, forAnswer), "dig", "@"+somewhere.String(), "www.test", "+short", "+tries=1", more)
		dig.Cgroup = b.unit(t, "blue.service")
		if out, err := dig.Output(); strings.TrimSpace(out) != b.server().Addr4().String() {
			t.Errorf("dig %s: %q, %v", more, out, err)
		}
	}
	blue, red := b.agent(t, "/proc/self/exe", b.unit(t, "blue.service")), b.agent(t, "/proc/self/exe", b.unit(t, "red.service"))
	const rounds = 20
	for i := range rounds {
		for j, to := range w.addrs() {
			for k, network := range []string{"tcp", "udp"} {
				if s := blue.visit(t, 4*i+2*j+k, network, to); s.Error != "" || !is(b.upstream(), s.Seen.Addr()) {
					t.Fatalf("%s to %s: %+v", network, to, s)
				}
			}
		}
	}
	if s := red.visit(t, 1, "udp", w.addr4); s.Error != "" || !is(b.sidegate(), s.Seen.Addr()) {
		t.Errorf("direct: %+v", s)
	}
	from(near, b.sidegate())
	from(b.server(), b.upstream())

	need(t, lab.Wait(within(t, forAnswer), "the upstream's connections to be counted", func() error {
		hk := b.status(t).Proxy.Outbounds["hk"]
		if hk.Connections != 2*rounds || hk.Failures != 0 {
			return fmt.Errorf("%d by TCP for %d of programs, %d failures", hk.Connections, 2*rounds, hk.Failures)
		}
		return nil
	}))
	for _, f := range b.flows(t) {
		if f.Process != nil && f.Process.Name == "sidegate" {
			t.Errorf("the daemon is its own client: %+v of %+v", f, *f.Process)
		}
	}
	if s := b.status(t); len(s.Problems) > 0 {
		t.Errorf("problems: %v", s.Problems)
	}
}
