package lab

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestNameservers asks each kind of server with real clients: what it knows, what it does not, over both families.
func TestNameservers(t *testing.T) {
	l := newLab(t, Options{})
	zone, err := Zone("www.test. 300 A 203.0.113.10", "www.test. 300 AAAA 2001:db8:113::10", "alias.test. 300 CNAME www.test.")
	if err != nil {
		t.Fatal(err)
	}
	for i, server := range []struct {
		name  string
		start func(h *Host) error
		alias bool // it follows aliases
	}{
		{"unbound", func(h *Host) error {
			_, err := h.StartUnbound(t.Context(), UnboundOptions{Records: []string{"www.test. 300 A 203.0.113.10", "www.test. 300 AAAA 2001:db8:113::10"}})
			return err
		}, false},
		{"dnsmasq", func(h *Host) error {
			_, err := h.StartDnsmasq(t.Context(), DnsmasqOptions{
				Hosts:   map[string][]netip.Addr{"www.test": {netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8:113::10")}},
				Aliases: map[string]string{"alias.test": "www.test"},
			})
			return err
		}, true},
		{"ours", func(h *Host) error {
			_, err := h.StartNameserver(t.Context(), 53, zone)
			return err
		}, true},
	} {
		t.Run(server.name, func(t *testing.T) {
			h, err := l.AddServer(t.Context(), "ns"+strconv.Itoa(i))
			if err != nil {
				t.Fatal(err)
			}
			skipMissing(t, server.start(h))
			laptop := l.Host(Laptop)
			for _, at := range []netip.Addr{h.Addr4(), h.Addr6()} {
				for _, transport := range []string{"+notcp", "+tcp"} {
					r, err := laptop.Dig(brief(t), at, "www.test", "A", transport)
					skipMissing(t, err)
					if got := r.Data("A"); r.Status != "NOERROR" || !slices.Equal(got, []string{"203.0.113.10"}) || !strings.HasPrefix(r.Flags, "qr") {
						t.Errorf("%s %s: %+v, want 203.0.113.10", at, transport, r)
					}
				}
				r, err := laptop.Dig(brief(t), at, "nobody.test")
				if err != nil || r.Status != "NXDOMAIN" {
					t.Errorf("%s: %+v, %v, want NXDOMAIN", at, r, err)
				}
				if server.alias {
					r, err := laptop.Dig(brief(t), at, "alias.test", "AAAA")
					if err != nil || !slices.Equal(r.Data("CNAME"), []string{"www.test."}) || !slices.Equal(r.Data("AAAA"), []string{"2001:db8:113::10"}) {
						t.Errorf("%s: %+v, %v, want the alias and its address", at, r, err)
					}
				}
				found, err := laptop.Getent(brief(t), at, "www.test")
				if err != nil || !slices.Contains(found, netip.MustParseAddr("203.0.113.10")) {
					t.Errorf("getaddrinfo at %s: %v, %v", at, found, err)
				}
			}
		})
	}
}

// TestNameserverRemembers has what was asked, from where and how.
func TestNameserverRemembers(t *testing.T) {
	l := newLab(t, Options{})
	n, err := l.Host(Server).StartNameserver(t.Context(), 53, func(*dns.Msg, Question) *dns.Msg { return nil })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err = l.Host(Laptop).Dig(ctx, n.Addr4.Addr(), "WWW.test", "AAAA", "+timeout=1")
	if err == nil {
		t.Error("silence is an answer")
	}
	asked := n.Questions()
	if len(asked) != 1 || asked[0].Name != "WWW.test." || asked[0].Qtype != dns.TypeAAAA ||
		asked[0].From.Addr() != l.Host(Laptop).Addr4() || asked[0].Network != "udp" {
		t.Errorf("it remembers %+v", asked)
	}
}

// TestWebServers visits sites that share an address, in every protocol, and at an address of a large prefix.
func TestWebServers(t *testing.T) {
	l := newLab(t, Options{})
	server, laptop := l.Host(Server), l.Host(Laptop)
	unbound, err := server.StartUnbound(t.Context(), UnboundOptions{Records: []string{
		"one.test. 300 A 203.0.113.10", "two.test. 300 AAAA 2001:db8:113::10", "far.test. 300 A 198.18.77.77",
	}})
	skipMissing(t, err)
	_, err = server.StartNginx(t.Context(), NginxOptions{HTTP: 80, HTTPS: 443, HTTP2: 8080, Sites: []Site{
		{Name: "other.test"}, {Name: "one.test", Pages: map[string]string{"/index.html": "<p>one"}}, {Name: "two.test"}, {Name: "far.test"},
	}})
	skipMissing(t, err)
	at, err := server.StartHTTP3(t.Context(), 443, "one.test", "two.test")
	if err != nil {
		t.Fatal(err)
	}
	if err := server.OwnPrefix(netip.MustParsePrefix("198.18.0.0/15")); err != nil {
		t.Fatal(err)
	}
	for url, want := range map[string]Visit{
		"https://one.test/whoami":     {laptop.Addr4(), "one.test", "HTTP/2.0"},
		"https://two.test/whoami":     {laptop.Addr6(), "two.test", "HTTP/2.0"},
		"http://one.test/whoami":      {laptop.Addr4(), "one.test", "HTTP/1.1"},
		"https://far.test/whoami":     {laptop.Addr4(), "far.test", "HTTP/2.0"},
		"http://one.test:8080/whoami": {laptop.Addr4(), "one.test", "HTTP/2.0"},
	} {
		args := []string{url}
		if strings.Contains(url, ":8080") {
			args = append(args, "--http2-prior-knowledge")
		}
		text, err := laptop.Curl(brief(t), unbound.Addr4.Addr(), args...)
		skipMissing(t, err)
		if got, err := ParseVisit(text); err != nil || got != want {
			t.Errorf("%s: %v, %v, want %v", url, got, err, want)
		}
	}
	if page, err := laptop.Curl(brief(t), unbound.Addr4.Addr(), "https://one.test/"); err != nil || page != "<p>one" {
		t.Errorf("the page is %q, %v", page, err)
	}
	got, took, err := laptop.VisitHTTP3(brief(t), 0, "two.test", at)
	if want := (Visit{laptop.Addr4(), "two.test", "HTTP/3.0"}); err != nil || got != want || took <= 0 {
		t.Errorf("by HTTP/3: %v in %v, %v, want %v", got, took, err, want)
	}
	if _, _, err := laptop.VisitHTTP3(brief(t), 0, "three.test", at); err == nil {
		t.Error("a certificate for other names was taken")
	}
}

// TestDNSOverHTTPS has curl ask a DNS server by HTTPS: nobody else could tell it the address.
func TestDNSOverHTTPS(t *testing.T) {
	l := newLab(t, Options{})
	up, laptop := l.Host(Upstream), l.Host(Laptop)
	_, err := up.StartUnbound(t.Context(), UnboundOptions{Secure: true, Records: []string{"one.test. 300 A 203.0.113.10"}})
	skipMissing(t, err)
	_, err = l.Host(Server).StartNginx(t.Context(), NginxOptions{HTTPS: 443, Sites: []Site{{Name: "one.test"}}})
	skipMissing(t, err)
	nobody := netip.MustParseAddr("127.0.0.1")
	text, err := laptop.Curl(brief(t), nobody, "--doh-url", "https://"+up.Addr4().String()+"/dns-query", "https://one.test/whoami")
	if got, parse := ParseVisit(text); err != nil || parse != nil || got.Site != "one.test" {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := laptop.Curl(brief(t), nobody, "https://one.test/whoami"); err == nil {
		t.Error("curl found the name without asking: the test proves nothing")
	}
}

// TestChromium opens a page whose script visits a second site and, by HTTP/3, a third.
func TestChromium(t *testing.T) {
	l := newLab(t, Options{})
	server := l.Host(Server)
	const script = `<div id=out>waiting</div><script>Promise.all(['https://two.test/whoami','https://three.test:4433/whoami'].map(
		u => fetch(u).then(r => r.text(), e => u + ': ' + e))).then(all => out.textContent = all.join('|'))</script>`
	unbound, err := server.StartUnbound(t.Context(), UnboundOptions{Records: []string{
		"one.test. 300 A 203.0.113.10", "two.test. 300 A 203.0.113.10", "three.test. 300 A 203.0.113.10",
	}})
	skipMissing(t, err)
	_, err = server.StartNginx(t.Context(), NginxOptions{HTTPS: 443, Sites: []Site{
		{Name: "one.test", Pages: map[string]string{"/index.html": script}}, {Name: "two.test"},
	}})
	skipMissing(t, err)
	if _, err := server.StartHTTP3(t.Context(), 4433, "three.test"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	page, err := l.Host(Laptop).Chromium(ctx, ChromiumOptions{
		URL: "https://one.test/", Resolver: unbound.Addr4.Addr(), QUIC: []string{"three.test:4433"},
	})
	skipMissing(t, err)
	for _, want := range []string{"192.168.0.3 two.test HTTP/2.0", "192.168.0.3 three.test HTTP/3.0"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %q: %s", want, page)
		}
	}
}

func TestDnsperf(t *testing.T) {
	l := newLab(t, Options{})
	unbound, err := l.Host(Server).StartUnbound(t.Context(), UnboundOptions{Records: []string{"one.test. 300 A 203.0.113.10", "two.test. 300 A 203.0.113.10"}})
	skipMissing(t, err)
	r, err := l.Host(Laptop).Dnsperf(brief(t), DnsperfOptions{Server: unbound.Addr4, Names: []string{"one.test", "two.test"}, Once: true, Latencies: true})
	skipMissing(t, err)
	if err != nil || r.Sent != 2 || r.Completed != 2 || r.Lost != 0 || r.PerSecond <= 0 || len(r.Latencies) != 2 || r.Latencies[0] <= 0 {
		t.Errorf("%+v, %v", r, err)
	}
}
