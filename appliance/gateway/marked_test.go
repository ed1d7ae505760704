package gateway_test

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// TestEverySocketIsMarked: whatever the daemon sends bears its own mark, which keeps it from being taken for any other program of the
// box, and steered into itself: what faces clients and upstreams, proxies and DNS servers of each kind, directly and through a proxy,
// look-ups by the system's resolver and by its own, and what it says to the LAN. What breaks it is a socket that is made without the
// mark, or a kind of them that sends nothing here. No server needs to answer for that, but those that know the others' names, and the
// proxy that others are asked through.
func TestEverySocketIsMarked(t *testing.T) {
	w := newWorld(t)
	dante, err := w.Host(lab.Upstream).StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	kinds := map[string]string{
		"udp": "udp://udp.test:2001", "tcp": "tcp://tcp.test:2002", "tls": "tls://tls.test:2003",
		"https": "https://https.test:2004/dns-query", "h3": "h3://h3.test:2005/dns-query", "quic": "quic://quic.test:2006",
	}
	laptop, server, upstream := w.laptop().Addr4(), w.server().Addr4(), w.Host(lab.Upstream).Addr4()
	records := []string{"socks.test. 300 A " + upstream.String()}
	for _, name := range []string{"plain", "secure", "udp", "tcp", "tls", "https", "h3", "quic"} {
		records = append(records, name+".test. 300 A "+server.String())
	}
	w.nameserver(t, w.server(), records...)
	told := w.nameserver(t, w.Host(lab.Upstream), records...)
	sent := w.watchMarks(t)

	config := fmt.Sprintf(`interfaces: { lan: auto }
ipv6: advertise
sniff: unknown
outbounds:
  socks: { url: "socks5://socks.test:%d" }
  plain: { url: "http://plain.test:3128" }
  secure: { url: "https://secure.test:3129" }
rules:
  - { domain: never.test, outbound: block } # so that first bytes matter
  - { port: 1001, outbound: socks }
  - { port: 1002, outbound: plain }
  - { port: 1003, outbound: secure }
default: direct
`, dante.Addr4.Port())
	w.startWith(t, lab.GatewayOptions{Config: config, Resolver: server})
	for port := uint16(1001); port <= 1004; port++ {
		for _, network := range []string{"tcp", "udp"} {
			w.speak(t, network, netip.AddrPortFrom(server, port))
		}
	}
	sent.await(
		t, "to clients, by proxies whose names the system knows, and to the LAN",
		element("tcp", laptop, 0), "advertisements",
		element("udp", server, 53),
		element("tcp", upstream, dante.Addr4.Port()), element("udp", upstream, 0), // its relay's port
		element("tcp", server, 3128), element("tcp", server, 3129),
		element("tcp", server, 1004), // direct, by the box itself, after its first bytes
	)

	config += "dns:\n  default: udp\n  hosts: { socks.test: [" + upstream.String() + "] }\n"
	upstreams, rules := "  upstreams:\n", "  rules:\n"
	var names []string
	for kind, url := range kinds {
		for way, more := range map[string]string{
			"":        "",
			"-told":   fmt.Sprintf(", bootstrap: [%q]", told.Addr4),
			"-detour": fmt.Sprintf(", bootstrap: [%q], detour: socks", told.Addr4),
		} {
			upstreams += fmt.Sprintf("    %s: { url: %q%s }\n", kind+way, url, more)
			rules += fmt.Sprintf("    - { domain_suffix: %s.test, upstream: %s }\n", kind+way, kind+way)
			names = append(names, "www."+kind+way+".test")
		}
	}
	w.reload(t, config+upstreams+rules)
	sent.forget(t)
	var asking sync.WaitGroup
	for _, name := range names {
		asking.Go(func() { w.lookUp(t.Context(), netip.Addr{}, netip.MustParseAddr("8.8.8.8"), name) }) // an error: nobody answers
	}
	asking.Wait()
	sent.await(
		t, "to clients that ask, and to DNS servers",
		element("udp", laptop, 0), element("udp", server, 53), element("udp", upstream, 53),
		element("udp", server, 2001), element("tcp", server, 2002), element("tcp", server, 2003),
		element("tcp", server, 2004), element("udp", server, 2005), element("udp", server, 2006),
		element("tcp", upstream, dante.Addr4.Port()), element("udp", upstream, 0),
	)
	w.stop(t)
	sent.check(t)
}

// speak has the laptop say something, whether it is heard or not.
func (w *world) speak(t *testing.T, network string, to netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := w.laptop().Dial(ctx, network, to.String())
	if err != nil {
		return // refused, by the box in the server's name
	}
	t.Cleanup(func() { c.Close() })
	fmt.Fprint(c, "hello")
}

// marks are what the box has sent since forget, by the mark of its packets. What the kernel says by itself is left out: resets of what
// belongs to no socket, and all of ICMP but router advertisements.
type marks struct{ *world }

func (w *world) watchMarks(t *testing.T) marks {
	t.Helper()
	_, err := w.box().Exec(t.Context(), "nft", `table inet watch {
	set own_tcp { type ipv4_addr . inet_service; flags dynamic; }
	set own_udp { type ipv4_addr . inet_service; flags dynamic; }
	set others { type ipv4_addr . inet_service; flags dynamic; }
	counter advertisements { }
	counter unmarked { }
	chain marked {
		icmpv6 type nd-router-advert counter name advertisements return
		add @own_tcp { ip daddr . tcp dport }
		add @own_udp { ip daddr . udp dport }
	}
	chain output {
		type filter hook output priority filter
		oifname "lo" return
		meta l4proto != { tcp, udp, icmpv6 } return
		icmpv6 type != nd-router-advert return
		tcp flags & rst == rst return
		meta mark & 0x0f000000 == 0x02000000 goto marked
		add @others { ip daddr . th dport }
		counter name unmarked
	}
}`)
	need(t, err)
	return marks{w}
}

// element is what packets to an address and port are listed as, or, if that is 0, what it begins with to any port.
func element(protocol string, to netip.Addr, port uint16) string {
	if port == 0 {
		return fmt.Sprintf("%s %s . ", protocol, to)
	}
	return fmt.Sprintf("%s %s . %d", protocol, to, port)
}

func (m marks) list(t *testing.T, kind, name string) string {
	t.Helper()
	out, err := m.box().Exec(t.Context(), "nft", "-n", "list", kind, "inet", "watch", name)
	need(t, err)
	return out
}

// own are the elements of what was sent with the mark.
func (m marks) own(t *testing.T) (own []string) {
	t.Helper()
	for _, protocol := range []string{"tcp", "udp"} {
		for _, e := range regexp.MustCompile(`[0-9.]+ \. \d+`).FindAllString(m.list(t, "set", "own_"+protocol), -1) {
			own = append(own, protocol+" "+e)
		}
	}
	if !strings.Contains(m.list(t, "counter", "advertisements"), "packets 0 ") {
		own = append(own, "advertisements")
	}
	return own
}

// await waits until all of what is wanted has been sent with the mark.
func (m marks) await(t *testing.T, what string, wanted ...string) {
	t.Helper()
	await(t, "marked packets "+what, func() error {
		own := m.own(t)
		for _, want := range wanted {
			if !slices.ContainsFunc(own, func(e string) bool { return e == want || strings.HasSuffix(want, " ") && strings.HasPrefix(e, want) }) {
				return fmt.Errorf("none of %q, but %q; not marked: %s", want, own, m.list(t, "set", "others"))
			}
		}
		return nil
	})
}

func (m marks) forget(t *testing.T) {
	t.Helper()
	_, err := m.box().Exec(t.Context(), "nft", "flush set inet watch own_tcp; flush set inet watch own_udp")
	need(t, err)
}

// check expects that nothing was sent without the mark.
func (m marks) check(t *testing.T) {
	t.Helper()
	if c := m.list(t, "counter", "unmarked"); !strings.Contains(c, "packets 0 ") {
		t.Errorf("packets without the mark: %s, to %s", c, m.list(t, "set", "others"))
	}
}
