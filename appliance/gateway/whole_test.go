package gateway_test

import (
	"context"
	"errors"
	"fmt"
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
