package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/lab"
)

// nameserver starts one that knows records, and nothing else.
func (w *world) nameserver(t *testing.T, on *lab.Host, records ...string) *lab.Nameserver {
	t.Helper()
	zone, err := lab.Zone(records...)
	need(t, err)
	n, err := on.StartNameserver(t.Context(), 53, zone)
	need(t, err)
	return n
}

// lookUp asks a server, once, for the IPv4 address of a name. From is an address of the laptop's, or invalid: the
// kernel's choice. What is no address is the error, such as SERVFAIL.
func (w *world) lookUp(ctx context.Context, from, server netip.Addr, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var d net.Dialer
	if from.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	c, err := w.laptop().DialWith(ctx, d, "udp", netip.AddrPortFrom(server, 53).String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	question := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)
	answer, _, err := (&dns.Client{Timeout: 3 * time.Second}).ExchangeWithConnContext(ctx, question, &dns.Conn{Conn: c})
	if err != nil {
		return "", err
	}
	for _, r := range answer.Answer {
		if a, ok := r.(*dns.A); ok {
			return a.A.String(), nil
		}
	}
	return "", errors.New(dns.RcodeToString[answer.Rcode])
}

// asker is who asked a name server last.
func asker(n *lab.Nameserver) netip.Addr {
	all := n.Questions()
	if len(all) == 0 {
		return netip.Addr{}
	}
	return all[len(all)-1].From.Addr().Unmap()
}

// reload puts a configuration in force.
func (w *world) reload(t *testing.T, config string) {
	t.Helper()
	w.rewrite(t, config)
	if r, err := w.api.Reload(t.Context()); err != nil || !r.OK {
		t.Fatalf("%+v, %v", r, err)
	}
}

func answeredBy(n *lab.Nameserver) string {
	return fmt.Sprintf("dns: { upstreams: { up: %q }, default: up }\n", "udp://"+n.Addr4.Addr().String())
}

// TestReloadDNS adds the section, changes it, and takes it away, while questions are asked all the time: each has an
// answer, and the first one after a reload is what the new configuration says.
func TestReloadDNS(t *testing.T) {
	w := newWorld(t)
	one := w.nameserver(t, w.server(), "www.test. 300 A 203.0.113.101", "other.test. 300 A 203.0.113.101")
	two := w.nameserver(t, w.Host(lab.Upstream), "www.test. 300 A 203.0.113.102", "other.test. 300 A 203.0.113.102")
	w.start(t, everythingDirect)

	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	asked := 0
	asking.Go(func() {
		for ctx.Err() == nil {
			got, err := w.lookUp(t.Context(), netip.Addr{}, one.Addr4.Addr(), "other.test")
			if err != nil || got != "203.0.113.101" && got != "203.0.113.102" {
				t.Errorf("question %d got %q, %v", asked, got, err)
			}
			asked++
		}
	})
	defer asking.Wait()
	defer stop()

	laptop, box := w.laptop().Addr4(), w.box().Addr4()
	hosts := strings.Replace(answeredBy(two), "default", "hosts: { www.test: [203.0.113.103] }, default", 1)
	for _, c := range []struct {
		what, section, want string
		by                  *lab.Nameserver // who was asked for it; nil: nobody
		from                netip.Addr
	}{
		{"none", "", "203.0.113.101", one, laptop},
		{"added", answeredBy(one), "203.0.113.101", one, box},
		{"another upstream", answeredBy(two), "203.0.113.102", two, box},
		{"a host", hosts, "203.0.113.103", nil, box},
		{"taken away", "", "203.0.113.101", one, laptop},
		{"added again", answeredBy(two), "203.0.113.102", two, box},
	} {
		w.reload(t, everythingDirect+c.section)
		count := func(n *lab.Nameserver, from netip.Addr) int {
			return len(slices.DeleteFunc(n.Questions(), func(q lab.Question) bool {
				return !strings.EqualFold(q.Name, "www.test.") || q.From.Addr().Unmap() != from
			}))
		}
		var before int
		if c.by != nil {
			before = count(c.by, c.from)
		}
		got, err := w.lookUp(t.Context(), netip.Addr{}, one.Addr4.Addr(), "www.test")
		if err != nil || got != c.want {
			t.Errorf("%s: the answer is %q, %v; want %s", c.what, got, err, c.want)
		}
		if c.by != nil && count(c.by, c.from) != before+1 {
			t.Errorf("%s: %s did not ask %s; that was asked by %s", c.what, c.from, c.by.Addr4, asker(c.by))
		}
		if status := w.status(t).DNS; (status == nil) != (c.section == "") {
			t.Errorf("%s: the status has %+v", c.what, status)
		}
	}
	stop()
	asking.Wait()
	if asked < 10 {
		t.Errorf("only %d questions were asked meanwhile", asked)
	}
	w.stop(t)
	if got, err := w.lookUp(t.Context(), netip.Addr{}, one.Addr4.Addr(), "www.test"); err != nil || got != "203.0.113.101" || asker(one) != laptop {
		t.Errorf("after the stop: %q, %v, asked by %s", got, err, asker(one))
	}
}

// TestReloadLooksUp: the names of a new configuration's upstreams are looked up as that configuration says, so that
// their flows are direct from its first moment on.
func TestReloadLooksUp(t *testing.T) {
	w := newWorld(t)
	one := w.nameserver(t, w.server(), "proxy.one.test. 300 A 203.0.113.20")
	two := w.nameserver(t, w.Host(lab.Upstream), "proxy.two.test. 300 A 203.0.113.21")
	w.start(t, everythingDirect)
	for _, c := range []struct{ section, host, address string }{
		{answeredBy(one), "proxy.one.test", "203.0.113.20"},
		{answeredBy(two), "proxy.two.test", "203.0.113.21"},
	} {
		w.reload(t, everythingDirect+c.section+"outbounds: { hk: { url: \"socks5://"+c.host+"\" } }\n")
		rules, err := w.api.Rules(t.Context())
		need(t, err)
		if !rules[0].Implicit || !strings.Contains(rules[0].Matches, c.address) {
			t.Errorf("%s has no rule: the first one is %+v", c.host, rules[0])
		}
		if problems := w.status(t).Problems; len(problems) > 0 {
			t.Errorf("%s: %q", c.host, problems)
		}
	}
	w.reload(t, everythingDirect+answeredBy(two)+"outbounds: { hk: { url: \"socks5://nowhere.test\" } }\n")
	if problems := w.status(t).Problems; len(problems) != 1 || !strings.Contains(problems[0], "nowhere.test") {
		t.Errorf("of an upstream that cannot be found it says %q", problems)
	}
}

// TestStopUnderQuestions: the gateway ends at once, whatever its clients wait for, and whoever has a connection.
func TestStopUnderQuestions(t *testing.T) {
	w := newWorld(t)
	silent, err := w.server().StartNameserver(t.Context(), 53, func(*dns.Msg, lab.Question) *dns.Msg { return nil })
	need(t, err)
	before := network(t, w.box())
	w.start(t, everythingDirect+fmt.Sprintf("dns: { upstreams: { up: \"udp://%s\", stream: \"tcp://%[1]s\" }, default: up, "+
		"rules: [ { domain_suffix: stream.test, upstream: stream } ] }\n", silent.Addr4.Addr()))
	const each = 30
	for i := range each {
		for _, network := range []string{"udp", "tcp"} {
			c, err := w.laptop().Dial(t.Context(), network, "8.8.8.8:53")
			need(t, err)
			defer c.Close()
			for _, under := range []string{"packet", "stream"} {
				need(t, (&dns.Conn{Conn: c}).WriteMsg(new(dns.Msg).SetQuestion(fmt.Sprintf("q%d.%s.%s.test.", i, network, under), dns.TypeA)))
			}
		}
	}
	await(t, "the questions to be under way", func() error {
		names := map[string]bool{}
		for _, q := range silent.Questions() {
			names[strings.ToLower(q.Name)] = true
		}
		if len(names) < 4*each {
			return fmt.Errorf("%d are", len(names))
		}
		return nil
	})
	begun := time.Now()
	w.stop(t)
	// An upstream may be waited for 1.9 s, and is asked again meanwhile.
	if took := time.Since(begun); took > 1500*time.Millisecond {
		t.Errorf("the stop took %v", took)
	}
	if after := network(t, w.box()); after != before {
		t.Errorf("the network was\n%s\nand is\n%s", before, after)
	}
}

// stranger gives the laptop an address that is no private one, and that the box could answer.
func (w *world) stranger(t *testing.T) netip.Addr {
	t.Helper()
	a := netip.MustParseAddr("198.51.100.5")
	w.ip(t, w.laptop(), "address add %s/32 dev eth0", a)
	w.ip(t, w.box(), "route add %s dev eth0", a)
	return a
}

// TestWhoMayAsk: a source beyond the LAN has no answer, unless the configuration allows it, or its network becomes one of
// the LAN's.
func TestWhoMayAsk(t *testing.T) {
	w := newWorld(t)
	n := w.nameserver(t, w.server(), "www.test. 300 A 203.0.113.101")
	stranger := w.stranger(t)
	section := func(allow string) string {
		return fmt.Sprintf("dns: { upstreams: { up: \"udp://%s\" }, default: up, allow: [%s] }\n", n.Addr4.Addr(), allow)
	}
	w.start(t, everythingDirect+answeredBy(n))
	ask := func() error {
		_, err := w.lookUp(t.Context(), stranger, n.Addr4.Addr(), "www.test")
		return err
	}
	refused := func(when string) {
		t.Helper()
		dropped := func() uint64 { return w.status(t).DNS.Dropped["not_allowed"] }
		before := dropped()
		if ask() == nil {
			t.Errorf("a stranger is answered %s", when)
		}
		if dropped() == before {
			t.Errorf("nothing is counted %s: %v", when, w.status(t).DNS.Dropped)
		}
	}
	refused("by default")
	w.reload(t, everythingDirect+section("198.51.100.0/29"))
	if err := ask(); err != nil {
		t.Errorf("who is allowed has no answer: %v", err)
	}
	w.reload(t, everythingDirect+section("198.51.100.8/29"))
	refused("when somebody else is allowed")

	w.ip(t, w.box(), "address add 198.51.100.1/24 dev eth0")
	await(t, "the LAN's new network to be answered", ask)
}

// TestDetour: questions to an upstream with a detour are the outbound's, by packets and by a stream, and the answers are
// as good as others.
func TestDetour(t *testing.T) {
	w := newWorld(t)
	hk := w.dante(t)
	n := w.nameserver(t, w.server(), "www.packet.test. 300 A 203.0.113.101", "www.stream.test. 300 A 203.0.113.102")
	w.start(t, everythingDirect+hk+fmt.Sprintf(`dns:
  upstreams:
    packet: { url: "udp://%s", detour: hk }
    stream: { url: "tcp://%[1]s", detour: hk }
  default: packet
  rules: [ { domain_suffix: stream.test, upstream: stream } ]
`, n.Addr4.Addr()))
	for name, want := range map[string]string{"www.packet.test": "203.0.113.101", "www.stream.test": "203.0.113.102"} {
		got, err := w.lookUp(t.Context(), netip.Addr{}, netip.MustParseAddr("8.8.8.8"), name)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v; want %s", name, got, err, want)
		}
		if from := asker(n); from != w.Host(lab.Upstream).Addr4() {
			t.Errorf("%s was asked for by %s", name, from)
		}
	}
	networks := map[string]bool{}
	for _, q := range n.Questions() {
		networks[q.Network] = true
	}
	if !networks["udp"] || !networks["tcp"] {
		t.Errorf("the questions came by %v only", networks)
	}
}

// TestSharesOfQuestions: a reload changes how many questions one client may ask, in the kernel and in the DNS server.
func TestSharesOfQuestions(t *testing.T) {
	w := newWorld(t)
	n := w.nameserver(t, w.server(), "www.test. 300 A 203.0.113.101")
	config := everythingDirect + answeredBy(n)
	w.start(t, config+"per_client: { dns_queries: 1 }\n")
	w.reload(t, config+"per_client: { dns_queries: 100000 }\n")
	for range 20 {
		if got, err := w.lookUp(t.Context(), netip.Addr{}, n.Addr4.Addr(), "www.test"); err != nil || got != "203.0.113.101" {
			t.Fatalf("%s, %v", got, err)
		}
	}
}

// TestSlowUpstream: an upstream that takes longer than a client waits is asked once, and what it says is there when the
// client asks again. What breaks it is an exchange that ends with the client's patience, or with its own.
func TestSlowUpstream(t *testing.T) {
	w := newWorld(t)
	zone, err := lab.Zone("www.test. 300 A 203.0.113.101")
	need(t, err)
	const takes = 3 * time.Second
	n, err := w.server().StartNameserver(t.Context(), 53, func(q *dns.Msg, asked lab.Question) *dns.Msg {
		time.Sleep(takes) // this is what is slow about it
		return zone(q, asked)
	})
	need(t, err)
	w.start(t, everythingDirect+answeredBy(n))
	begun := time.Now()
	if got, err := w.lookUp(t.Context(), netip.Addr{}, n.Addr4.Addr(), "www.test"); err == nil || err.Error() != "SERVFAIL" || time.Since(begun) > 2500*time.Millisecond {
		t.Errorf("at first: %q, %v after %v", got, err, time.Since(begun))
	}
	if got, err := w.lookUp(t.Context(), netip.Addr{}, n.Addr4.Addr(), "www.test"); err != nil || got != "203.0.113.101" {
		t.Errorf("the next try: %q, %v", got, err)
	}
	begun = time.Now()
	if got, err := w.lookUp(t.Context(), netip.Addr{}, n.Addr4.Addr(), "www.test"); err != nil || got != "203.0.113.101" || time.Since(begun) > takes/2 {
		t.Errorf("afterwards: %q, %v after %v", got, err, time.Since(begun))
	}
	asked := map[uint16]bool{} // questions that are sent again keep their ids
	for _, q := range n.Questions() {
		asked[q.ID] = true
	}
	if len(asked) != 1 {
		t.Errorf("the upstream was asked %d times", len(asked))
	}
}
