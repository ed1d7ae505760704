package gateway_test

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
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/admin"
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
	answer, _, err := new(dns.Client).ExchangeWithConnContext(ctx, question, &dns.Conn{Conn: c})
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

// TestReloadUndone: a reload that fails when everything but the kernel has taken the new configuration leaves nothing of
// it, however often it is tried.
func TestReloadUndone(t *testing.T) {
	w := newWorld(t)
	one := w.nameserver(t, w.server(), "www.test. 0 A 203.0.113.101")
	two := w.nameserver(t, w.Host(lab.Upstream), "www.test. 0 A 203.0.113.102", "proxy.test. 0 A 203.0.113.21")
	proxy := w.secretary(t)
	stranger := w.stranger(t)
	w.ip(t, w.box(), "link add side0 type bridge")
	w.ip(t, w.box(), "address add 198.51.100.1/24 dev side0") // the stranger's network
	good := proxy.outbound + "interfaces: { lan: [eth0] }\nrules: [ { port: 80, outbound: hk } ]\ndefault: direct\ndial: domain\n" + answeredBy(one)
	bad := fmt.Sprintf(`outbounds: { hk: { url: "socks5://proxy.test" }, us: { url: "socks5://nowhere.test" } }
interfaces: { lan: [eth0, side0] }
dns: { upstreams: { up: "tcp://%s" }, default: up, allow: [%s] }
dial: ip
rules: [ { port: 80, outbound: hk } ]
default: direct
`, two.Addr4.Addr(), stranger)
	w.start(t, good)
	before := w.status(t)

	// A pin that cannot be put where this is.
	pin := filepath.Join(w.State, "links", "lan-side0")
	need(t, os.MkdirAll(filepath.Join(pin, "occupied"), 0o700))
	w.rewrite(t, bad)
	const reloads = 20
	for range reloads {
		r, err := w.api.Reload(t.Context())
		if err != nil || r.OK || !strings.Contains(r.Error, "lan-side0") {
			t.Fatalf("%+v, %v: this test proves nothing", r, err)
		}
	}
	need(t, os.Remove(filepath.Join(pin, "occupied")))
	need(t, os.Remove(pin))
	if n := len(two.Questions()); n < reloads {
		t.Fatalf("the new configuration's server was asked %d times: its resolver was not in use", n)
	}

	// Quickly: the reconciler looks at everything again in a while.
	if got, err := w.lookUp(t.Context(), netip.Addr{}, one.Addr4.Addr(), "www.test"); err != nil || got != "203.0.113.101" {
		t.Errorf("the answer is %q, %v", got, err)
	}
	if got := proxy.told(t, w, netip.MustParseAddrPort("203.0.113.101:80"), ""); got != "www.test:80" {
		t.Errorf("the upstream is told %s", got)
	}
	if got, err := w.lookUp(t.Context(), stranger, one.Addr4.Addr(), "www.test"); err == nil {
		t.Errorf("a stranger is answered: %s", got)
	}
	after := w.status(t)
	if after.Generation != before.Generation || after.Config.Digest != before.Config.Digest || after.Config.ImplicitRules != before.Config.ImplicitRules {
		t.Errorf("the status was %+v, is %+v", before.Config, after.Config)
	}
	if text := strings.Join(after.Problems, "\n"); strings.Contains(text, "nowhere.test") {
		t.Errorf("what the refused configuration wanted is a problem: %s", text)
	}
	for _, goroutine := range w.dump(t) {
		if strings.Contains(goroutine, "dns/exchange.") {
			t.Errorf("left behind:\n%s", goroutine)
		}
	}
}

// TestReloadIsWhole: while a reload looks up where its upstreams are, which a slow server tells it, nothing of the new
// configuration shows: not in DNS, the policy, the outbounds, what upstreams are told or who may ask. Then all of it
// does, or, if it was refused, nothing, also of the addresses that it found for a proxy that both configurations have. What
// breaks it is any part that changes before the kernel does.
func TestReloadIsWhole(t *testing.T) {
	for _, refused := range []bool{false, true} {
		t.Run(fmt.Sprintf("refused %v", refused), func(t *testing.T) {
			w := newWorld(t)
			one := w.nameserver(t, w.server(), "www.test. 0 A 203.0.113.101", "proxy.test. 0 A 203.0.113.20")
			two := w.nameserver(t, w.Host(lab.Upstream), "www.test. 0 A 203.0.113.102", "proxy.test. 0 A 203.0.113.21")
			asked, hold := make(chan struct{}), make(chan struct{})
			tell, release := sync.OnceFunc(func() { close(asked) }), sync.OnceFunc(func() { close(hold) })
			defer release()
			slow, err := w.server().StartNameserver(t.Context(), 5353, func(q *dns.Msg, _ lab.Question) *dns.Msg {
				tell()
				<-hold
				m := new(dns.Msg).SetReply(q)
				if q.Question[0].Qtype == dns.TypeA {
					m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: two.Addr4.Addr().AsSlice()}}
				}
				return m
			})
			need(t, err)
			proxy := w.secretary(t)
			stranger := w.stranger(t)
			w.ip(t, w.box(), "link add side0 type bridge")
			const rest = "rules: [ { port: 80, outbound: hk } ]\ndefault: direct\n"
			outbounds := func(hk string) string {
				return fmt.Sprintf("outbounds: { hk: { url: %q }, us: { url: \"socks5://proxy.test\" } }\n", hk)
			}
			hk := "socks5://" + netip.AddrPortFrom(w.Host(lab.Upstream).Addr4(), 1081).String()
			w.start(t, outbounds(hk)+"interfaces: { lan: [eth0] }\ndial: domain\n"+answeredBy(one)+rest)
			pin := filepath.Join(w.State, "links", "lan-side0")
			if refused {
				need(t, os.MkdirAll(filepath.Join(pin, "occupied"), 0o700))
			}

			// state is what clients see, and what the gateway says of itself.
			state := func() []string {
				t.Helper()
				lines := []string{}
				add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
				got, err := w.lookUp(t.Context(), netip.Addr{}, one.Addr4.Addr(), "www.test")
				add("www.test is %s, %v", got, err)
				// By the name that was just learned: dial: domain.
				add("the upstream is told %s", proxy.told(t, w, netip.MustParseAddrPort("203.0.113.101:80"), ""))
				before := w.status(t).DNS.Dropped["not_allowed"]
				ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
				defer cancel()
				if _, err := w.lookUp(ctx, stranger, one.Addr4.Addr(), "www.test"); err == nil || w.status(t).DNS.Dropped["not_allowed"] == before {
					add("a stranger may ask")
				}
				rules, err := w.api.Rules(t.Context())
				need(t, err)
				for _, r := range rules {
					add("%s: %s %s", r.Name, r.Matches, r.Outbound)
				}
				s := w.status(t)
				add("%d %s %v", s.Generation, s.Config.Digest, s.Problems)
				return lines
			}
			before := state()

			w.rewrite(t, outbounds("socks5://192.0.2.1:1")+fmt.Sprintf(`interfaces: { lan: [eth0, side0] }
dns: { upstreams: { up: { url: "udp://dns.two.test", bootstrap: ["%s"] } }, default: up, allow: [%s] }
dial: ip
`, slow.Addr4, stranger)+rest)
			type result struct {
				admin.Reload
				err error
			}
			done := make(chan result, 1)
			go func() {
				r, err := w.api.Reload(t.Context())
				done <- result{r, err}
			}()
			<-asked
			during := state()
			select {
			case r := <-done:
				t.Errorf("the reload was through before its names were looked up: %+v", r)
				done <- r
			default:
			}
			if !slices.Equal(during, before) {
				t.Errorf("during the reload it was\n%s\nbefore it\n%s", strings.Join(during, "\n"), strings.Join(before, "\n"))
			}
			release()
			if r := <-done; r.err != nil || r.OK == refused {
				t.Fatalf("%+v", r)
			}
			if !slices.ContainsFunc(two.Questions(), func(q lab.Question) bool { return strings.EqualFold(q.Name, "proxy.test.") }) {
				t.Error("the new configuration's server was not asked for its proxy: this test proves nothing")
			}
			if refused {
				need(t, os.Remove(filepath.Join(pin, "occupied")))
				need(t, os.Remove(pin))
				// Whatever the gateway has in mind it does when the network changes.
				w.ip(t, w.box(), "address add 192.168.99.1/32 dev eth0")
				await(t, "the gateway to look at everything again", func() error {
					if !slices.Contains(w.status(t).OwnAddresses, netip.MustParseAddr("192.168.99.1")) {
						return errors.New("it has not")
					}
					return nil
				})
				if after := state(); !slices.Equal(after, before) {
					t.Errorf("after the refused reload it is\n%s\nbefore it was\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
				}
				return
			}
			if got, err := w.lookUp(t.Context(), stranger, one.Addr4.Addr(), "www.test"); err != nil || got != "203.0.113.102" {
				t.Errorf("after the reload www.test is %s, %v", got, err)
			}
			if s := w.status(t); s.Interfaces[1].Name != "side0" {
				t.Errorf("after the reload the status has %+v", s)
			}
		})
	}
}

// dump ends the gateway and returns what its goroutines were at.
func (w *world) dump(t *testing.T) []string {
	t.Helper()
	w.signal(t, syscall.SIGQUIT)
	<-w.Done()
	log, err := os.ReadFile(w.Log())
	need(t, err)
	all := strings.Split(string(log), "\n\n")
	all = slices.DeleteFunc(all, func(s string) bool { return !strings.HasPrefix(s, "goroutine ") })
	if len(all) < 10 {
		t.Fatalf("the gateway has only %d goroutines: this test looks in the wrong place", len(all))
	}
	return all
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
