package endtoend

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// The tests of names have sites under three domains, whose rules lead to different ends: what a server says of its
// visitor tells which rule held.
const nameRules = `rules:
  - { name: direct, domain_suffix: direct.test, outbound: direct }
  - { name: proxied, domain_suffix: proxied.test, outbound: hk }
  - { name: blocked, domain_suffix: blocked.test, outbound: block, reject: true }
`

// somewhere is a resolver that clients mean and that does not exist: the gateway answers in its place.
var somewhere = netip.MustParseAddr("8.8.8.8")

// far is a prefix of the server's own, with more addresses than any test needs: each name can have one that nobody has
// met before.
var far = netip.MustParsePrefix("198.18.0.0/15")

func farAddress(i int) netip.Addr {
	a := far.Addr().As4()
	return netip.AddrFrom4([4]byte{a[0], a[1] + byte(i>>16), byte(i >> 8), byte(i)})
}

// namesWorld is a world with a host for name servers.
type namesWorld struct {
	world
	resolver *lab.Host
}

func newNamesWorld(t *testing.T) *namesWorld {
	t.Helper()
	w := &namesWorld{world: newWorld(t, lab.Options{})}
	var err error
	if w.resolver, err = w.AddServer(t.Context(), "resolver"); err != nil {
		t.Fatal(err)
	}
	return w
}

// serveNames has unbound know records; with doh also by HTTPS.
func (w *namesWorld) serveNames(t *testing.T, doh bool, records ...string) {
	t.Helper()
	_, err := w.resolver.StartUnbound(t.Context(), lab.UnboundOptions{Records: records, Secure: doh, Names: []string{"dns.test"}})
	need(t, err)
}

// serveSites has nginx show sites on all of the server's addresses, and quic-go the same by HTTP/3.
func (w *namesWorld) serveSites(t *testing.T, names ...string) {
	t.Helper()
	var sites []lab.Site
	for _, name := range names {
		sites = append(sites, lab.Site{Name: name})
	}
	_, err := w.server().StartNginx(t.Context(), lab.NginxOptions{HTTP: 80, HTTPS: 443, HTTP2: 8080, Sites: sites})
	need(t, err)
	if _, err := w.server().StartHTTP3(t.Context(), 443, names...); err != nil {
		t.Fatal(err)
	}
	if err := w.server().OwnPrefix(far); err != nil {
		t.Fatal(err)
	}
}

// startWith runs the gateway with a SOCKS5 server as "hk", the resolver as its DNS, and what config adds.
func (w *namesWorld) startWith(t *testing.T, config ...string) {
	t.Helper()
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{Resolver: w.resolver.Addr4()})
	need(t, err)
	w.start(t, fmt.Sprintf(`interfaces: { lan: auto }
outbounds: { hk: { url: %q } }
dns: { upstreams: { up: "udp://%s" }, default: up }
%s
`, dante.URL("socks5", lab.Credentials{}), w.resolver.Addr4(), strings.Join(config, "\n")))
}

// outcome is which rule a visit was subject to, by who the server saw: "direct", "proxied", or "blocked" where there was
// no visit. TCP that was sniffed and is direct is relayed by the gateway, with its address.
func (w *namesWorld) outcome(v lab.Visit, err error) string {
	switch v.Address {
	case netip.Addr{}:
		return "blocked"
	case w.upstream().Addr4(), w.upstream().Addr6():
		return "proxied"
	case w.sidegate().Addr4(), w.sidegate().Addr6():
		return "direct"
	}
	for _, h := range w.Hosts() {
		if v.Address == h.Addr4() || v.Address == h.Addr6() {
			return "direct"
		}
	}
	return fmt.Sprintf("%v, %v", v, err)
}

// visit opens a URL with curl, which asks a resolver that does not exist, unless args say otherwise.
func (w *namesWorld) visit(t *testing.T, from *lab.Host, url string, args ...string) (lab.Visit, error) {
	t.Helper()
	text, err := from.Curl(within(t, 20*time.Second), somewhere, append(args, url)...)
	if err != nil {
		needInstalled(t, err)
		return lab.Visit{}, err
	}
	v, err := lab.ParseVisit(text)
	if err != nil {
		t.Fatal(err)
	}
	return v, nil
}

// domainOf is the domain that the rules look at: what must become of a site.
func domainOf(name string) string {
	labels := strings.Split(name, ".")
	return labels[len(labels)-2]
}
