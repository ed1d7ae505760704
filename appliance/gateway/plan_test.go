package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

func load(t *testing.T, text string) (*Plan, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path)
}

func mustLoad(t *testing.T, text string) *Plan {
	t.Helper()
	p, err := load(t, text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const twoUpstreams = `
outbounds:
  hk: { url: "socks5://198.51.100.7:1080" }
  us: { url: "http://proxy.example:3128" }
rules:
  - { name: "upstream hk", port: 1, outbound: block }
  - { port: 443, outbound: hk }
  - { name: "#2", port: 444, outbound: us }
default: us
`

// TestImplicitRules: they come first, and people's rules keep their places and get names that are free.
func TestImplicitRules(t *testing.T) {
	p := mustLoad(t, twoUpstreams)
	names := newNames()
	names.learn("proxy.example", []netip.Addr{netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("::ffff:192.0.2.7")}, time.Now())
	c := p.combine(names.addresses, nil)
	var got []string
	for i, r := range c.policy.Rules {
		index, implicit := c.index(i)
		got = append(got, fmt.Sprintf("%d %t %s: %s → %s", index, implicit, r.Name, matches(r), r.Outbound))
	}
	want := []string{
		`-1 true upstream hk (implicit): ip_cidr: 198.51.100.7/32, port: 1080 → direct`,
		`-1 true upstream us: ip_cidr: 192.0.2.7/32, 2001:db8::7/128, port: 3128 → direct`,
		`-1 true from upstreams: source_ip_cidr: 192.0.2.7/32, 198.51.100.7/32, 2001:db8::7/128 → direct`,
		`0 false upstream hk: port: 1 → block`,
		`1 false #2 (implicit): port: 443 → hk`,
		`2 false #2: port: 444 → us`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("the combined policy is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if err := c.policy.Validate(); err != nil {
		t.Error(err)
	}
	if len(p.Config.Policy.Rules) != 3 || p.Config.Policy.Rules[1].Name != "" {
		t.Error("combining changed the policy of the file")
	}
}

// TestImplicitRulesDecide: to the upstream and from it is direct, beside it nothing is.
func TestImplicitRulesDecide(t *testing.T) {
	p := mustLoad(t, twoUpstreams)
	for _, c := range []struct {
		source, destination string
		network             policy.Network
		want                string
		index               int
	}{
		{"192.168.0.3:1000", "198.51.100.7:1080", policy.TCP, "direct", -1},
		{"192.168.0.3:1000", "198.51.100.7:1080", policy.UDP, "direct", -1},
		{"192.168.0.3:1000", "198.51.100.7:1081", policy.TCP, "us", -1},
		{"192.168.0.3:1000", "198.51.100.8:1080", policy.TCP, "us", -1},
		{"198.51.100.7:1000", "203.0.113.10:443", policy.TCP, "direct", -1},
		{"198.51.100.8:1000", "203.0.113.10:443", policy.TCP, "hk", 1},
	} {
		f := policy.Flow{Network: c.network, Source: netip.MustParseAddrPort(c.source), Destination: netip.MustParseAddrPort(c.destination)}
		e := p.Explain(f)
		if e.Outbound != c.want || e.Index != c.index || e.Implicit != (c.want == "direct") {
			t.Errorf("%s → %s %s: %+v, want %s by %d", c.source, c.destination, c.network, e.Answer, c.want, c.index)
		}
	}
}

// TestSamePolicy: nothing but a new file or a new address of an upstream makes a new policy.
func TestSamePolicy(t *testing.T) {
	p := mustLoad(t, twoUpstreams)
	names := newNames()
	before := p.combine(names.addresses, nil)
	if !before.same(p.combine(names.addresses, nil)) {
		t.Error("the same plan makes another policy each time")
	}
	names.learn("proxy.example", []netip.Addr{netip.MustParseAddr("192.0.2.7")}, time.Now())
	after := p.combine(names.addresses, nil)
	if before.same(after) {
		t.Error("a new address of an upstream changes nothing")
	}
	names.learn("proxy.example", []netip.Addr{netip.MustParseAddr("192.0.2.7")}, time.Now())
	if !after.same(p.combine(names.addresses, nil)) {
		t.Error("an address that was known makes another policy")
	}
	if after.same(mustLoad(t, twoUpstreams).combine(names.addresses, nil)) {
		t.Error("a file that was read again is the same policy")
	}
}

func TestNames(t *testing.T) {
	answers := map[string][]netip.Addr{"a.example": {netip.MustParseAddr("192.0.2.1")}}
	n := newNames()
	find := func(_ context.Context, host string) ([]netip.Addr, error) {
		if found, ok := answers[host]; ok {
			return found, nil
		}
		if host == "slow.example" {
			return nil, fmt.Errorf("looking up %q: %w", host, context.DeadlineExceeded)
		}
		return nil, errors.New("no such host")
	}
	upstreams := []upstream{{"a", "a.example", 1}, {"b", "b.example", 2}, {"c", "198.51.100.1", 3}, {"d", "a.example", 4}, {"e", "slow.example", 5}}
	err := n.refresh(t.Context(), find, upstreams)
	if err == nil || err.Error() != "looking up the upstream b.example: no such host\nlooking up the upstream slow.example: no answer in time" {
		t.Errorf("the failure is told as %v", err)
	}
	check := func(host string, want ...string) {
		t.Helper()
		if got := texts(n.addresses(host)); !slices.Equal(got, want) {
			t.Errorf("%s is %v, want %v", host, got, want)
		}
	}
	check("a.example", "192.0.2.1")
	check("b.example")
	check("198.51.100.1", "198.51.100.1")

	// Rotating answers add up, and a failure forgets nothing.
	answers["a.example"] = []netip.Addr{netip.MustParseAddr("192.0.2.2")}
	n.refresh(t.Context(), find, upstreams)
	check("a.example", "192.0.2.1", "192.0.2.2")
	delete(answers, "a.example")
	n.refresh(t.Context(), find, upstreams)
	check("a.example", "192.0.2.1", "192.0.2.2")

	// What was not seen for long goes, and a name cannot grow without bound.
	n.learn("a.example", []netip.Addr{netip.MustParseAddr("192.0.2.3")}, time.Now().Add(2*addressLife))
	check("a.example", "192.0.2.3")
	var many []netip.Addr
	for a := netip.MustParseAddr("192.0.2.3"); len(many) < 2*maxPerHost; a = a.Next() {
		many = append(many, a)
	}
	n.learn("a.example", many, time.Now().Add(2*addressLife))
	if got := len(n.addresses("a.example")); got != maxPerHost {
		t.Errorf("a name has %d addresses, want %d at most", got, maxPerHost)
	}
}

// TestPlanLooksUp: a plan and its outbounds find hosts by its own DNS, also before it is in force, and by that of the plan in
// force when it has been replaced: its outbounds live as long as the flows that were decided for them.
func TestPlanLooksUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	_, port, _ := net.SplitHostPort(proxy.Addr().String())
	text := "outbounds: { hk: { url: \"socks5://proxy.test:" + port + "\" } }\ndefault: direct\n" +
		"dns: { upstreams: { up: \"udp://192.0.2.53\" }, default: up, hosts: { proxy.test: [127.0.0.1] } }\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := loadFor(path, surroundings{lookup: func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("192.0.2.2")}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	check := func(host, want string) {
		t.Helper()
		if got, err := p.lookup(t.Context(), host); err != nil || len(got) != 1 || got[0].String() != want {
			t.Errorf("%s: %v, %v, want %s", host, got, err, want)
		}
	}
	check("proxy.test", "127.0.0.1")
	if os.Geteuid() == 0 { // the outbounds' sockets are marked
		found := make(chan bool)
		go func() {
			c, err := proxy.Accept()
			if err == nil {
				c.Close() // that is enough
			}
			found <- err == nil
		}()
		hk, _ := p.outbounds.Outbound("hk")
		hk.DialTCP(t.Context(), outbound.Destination{Addr: netip.MustParseAddrPort("203.0.113.1:80")})
		proxy.Close()
		if !<-found {
			t.Error("the outbound does not find its proxy")
		}
	}
	p.resolution.close()
	check("other.test", "192.0.2.2")
}

// TestTooManyRules: the implicit rules count, and the refusal names the file.
func TestTooManyRules(t *testing.T) {
	for _, host := range []string{"198.51.100.7", "proxy.example"} {
		text := func(rules int) string {
			var b strings.Builder
			fmt.Fprintf(&b, "outbounds: { hk: { url: \"socks5://%s:1080\" } }\ndefault: hk\nrules:\n", host)
			for i := range rules {
				fmt.Fprintf(&b, "  - { port: %d, outbound: direct }\n", i+1)
			}
			return b.String()
		}
		if _, err := load(t, text(policy.MaxRules-1)); err == nil || !strings.Contains(err.Error(), "config.yaml: ") || !strings.Contains(err.Error(), "at most 1024 rules") {
			t.Errorf("%s: %d rules and two implicit ones: %v", host, policy.MaxRules-1, err)
		}
		if _, err := load(t, text(policy.MaxRules-2)); err != nil {
			t.Errorf("%s: %d rules and two implicit ones: %v", host, policy.MaxRules-2, err)
		}
	}
}

// TestOutboundsAcrossReload: an outbound that was removed serves the flows that were decided for it until
// the reload after; one that was changed is what it was until the reload is through.
func TestOutboundsAcrossReload(t *testing.T) {
	const rest = "default: direct\n"
	first := mustLoad(t, "outbounds: { hk: { url: \"socks5://198.51.100.7:1080\" }, us: { url: \"socks5://198.51.100.8:1080\" } }\n"+rest)
	second := mustLoad(t, "outbounds: { hk: { url: \"socks5://198.51.100.9:1080\" } }\n"+rest)
	third := mustLoad(t, "outbounds: { new: { url: \"socks5://198.51.100.10:1080\" }, us: { url: \"socks5://198.51.100.11:1080\" } }\n"+rest)
	var o outbounds
	check := func(when string, want map[string]string) {
		t.Helper()
		for name, address := range want {
			got := ""
			if found, ok := o.Outbound(name); ok {
				got, _, _ = found.Upstream()
			}
			if got != address {
				t.Errorf("%s: %s is %q, want %q", when, name, got, address)
			}
		}
	}
	o.prepare(first.outbounds)
	o.commit()
	before := map[string]string{"hk": "198.51.100.7", "us": "198.51.100.8", "new": ""}
	check("at first", before)
	o.prepare(third.outbounds)
	check("during a reload, which fails", map[string]string{"hk": "198.51.100.7", "us": "198.51.100.8", "new": "198.51.100.10"})
	o.prepare(second.outbounds)
	check("during the next", before)
	o.commit()
	after := map[string]string{"hk": "198.51.100.9", "us": "198.51.100.8", "new": ""}
	check("after it", after)
	o.prepare(second.outbounds)
	o.commit()
	check("when the same is put in force again", after)
	o.prepare(third.outbounds)
	o.commit()
	check("after a third", map[string]string{"hk": "198.51.100.9", "us": "198.51.100.11", "new": "198.51.100.10"})
	o.prepare(first.outbounds)
	o.commit()
	check("after a fourth", map[string]string{"hk": "198.51.100.7", "us": "198.51.100.8", "new": "198.51.100.10"})
}
