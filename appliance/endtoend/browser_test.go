package endtoend

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// The page visits every site and says what each of them saw. Whatever the page cannot have is said too.
const browserScript = `<!doctype html><div id=out>waiting</div><script>
Promise.all([%s].map(u => fetch(u).then(r => r.text(), e => 'failed ' + u))).then(all => out.textContent = all.join(';'))
</script>`

// TestBrowser: Chromium loads a page of several origins, all of them on one address and one of them by HTTP/3, and each
// is subject to its own rule: with the DNS that it is given, where the names are ambiguous, and with its own DNS over
// HTTPS, where they are unknown. What breaks it is any origin that shares the verdict of another. Without sniffing
// the origins do share it, in the last run.
func TestBrowser(t *testing.T) {
	for _, run := range []struct {
		name, sniff string
		doh, right  bool
	}{
		{"DNS as given", "ambiguous", false, true},
		{"own DNS over HTTPS", "unknown", true, true},
		{"without sniffing", "off", true, false},
	} {
		t.Run(run.name, func(t *testing.T) {
			w := newNamesWorld(t)
			sites := []string{"a.direct.test", "b.proxied.test", "c.direct.test", "d.proxied.test", "e.blocked.test"}
			const quicDirect, quicProxied = "q.direct.test", "q.proxied.test"
			var records, urls []string
			for _, site := range append([]string{"page.direct.test", quicDirect, quicProxied}, sites...) {
				records = append(records, site+". 300 A "+w.server().Addr4().String())
			}
			for _, site := range sites {
				urls = append(urls, fmt.Sprintf("'https://%s/whoami'", site))
			}
			for _, site := range []string{quicDirect, quicProxied} {
				urls = append(urls, fmt.Sprintf("'https://%s:4433/whoami'", site))
			}
			w.serveNames(t, true, records...)
			pages := []lab.Site{{Name: "page.direct.test", Pages: map[string]string{"/index.html": fmt.Sprintf(browserScript, strings.Join(urls, ","))}}}
			for _, site := range sites {
				pages = append(pages, lab.Site{Name: site})
			}
			_, err := w.server().StartNginx(t.Context(), lab.NginxOptions{HTTPS: 443, Sites: pages})
			need(t, err)
			_, err = w.server().StartHTTP3(t.Context(), 4433, quicDirect, quicProxied)
			need(t, err)
			w.startWith(t, "sniff: "+run.sniff, nameRules, "default: direct")

			o := lab.ChromiumOptions{
				URL: "https://page.direct.test/", Resolver: somewhere, QUIC: []string{quicDirect + ":4433", quicProxied + ":4433"},
			}
			if run.doh {
				o.DoH = "https://" + w.resolver.Addr4().String() + "/dns-query"
			}
			page, err := w.laptop().Chromium(within(t, 2*time.Minute), o)
			need(t, err)
			wrong := 0
			for _, site := range append([]string{quicDirect, quicProxied}, sites...) {
				v := visitOn(page, site)
				if site == quicDirect || site == quicProxied {
					if v.Address.IsValid() && v.Protocol != "HTTP/3.0" {
						t.Errorf("%s answered by %s: this test proves nothing of QUIC", site, v.Protocol)
					}
				}
				if got := w.outcome(v, nil); got != domainOf(site) {
					wrong++
					if run.right {
						t.Errorf("%s was %s", site, got)
					}
				}
			}
			if !run.right && wrong == 0 {
				t.Error("without sniffing every origin had its own verdict: this test proves nothing")
			}
			if t.Failed() {
				t.Logf("the page: %s\n%s", page, w.cli(t, "names"))
			}
		})
	}
}

// visitOn finds what a site said in the text of a page; nothing, if it said nothing.
func visitOn(page, site string) lab.Visit {
	_, out, _ := strings.Cut(page, "<div id=\"out\">")
	out, _, _ = strings.Cut(out, "</div>")
	for line := range strings.SplitSeq(out, ";") {
		if v, err := lab.ParseVisit(line); err == nil && v.Site == site {
			return v
		}
	}
	return lab.Visit{}
}

// TestRealClients: curl in each protocol and getaddrinfo find what they ask for, though the resolver that they mean does
// not exist, and rules on names hold for them. What breaks it is an unanswered question, or an answer that a client
// does not take because it comes from elsewhere.
func TestRealClients(t *testing.T) {
	w := newNamesWorld(t)
	sites := []string{"one.direct.test", "two.proxied.test", "three.blocked.test"}
	var records []string
	for i, site := range sites {
		records = append(records,
			fmt.Sprintf("%s. 300 A %s", site, farAddress(i)), fmt.Sprintf("%s. 300 AAAA %s", site, raceAddress(2*i+1)))
	}
	w.serveNames(t, false, records...)
	w.serveSites(t, sites...)
	need(t, w.server().OwnPrefix(far6))
	w.startWith(t, nameRules, "default: block")
	for i, site := range sites {
		for _, resolver := range []netip.Addr{somewhere, netip.MustParseAddr("2001:4860:4860::8888")} {
			found, err := w.laptop().Getent(within(t, 20*time.Second), resolver, site)
			if err != nil || len(found) != 2 {
				t.Errorf("getaddrinfo for %s at %s: %v, %v, want %s and %s", site, resolver, found, err, farAddress(i), raceAddress(2*i+1))
			}
		}
		for _, args := range [][]string{
			{"https://%s/whoami"},
			{"https://%s/whoami", "--http1.1"},
			{"http://%s/whoami", "-4"},
			{"https://%s/whoami", "-6"},
			{"http://%s:8080/whoami", "--http2-prior-knowledge"},
		} {
			v, err := w.visit(t, w.laptop(), fmt.Sprintf(args[0], site), args[1:]...)
			if got := w.outcome(v, err); got != domainOf(site) {
				t.Errorf("curl %v: %s was %s (%v)", args, site, got, err)
			}
		}
	}
}
