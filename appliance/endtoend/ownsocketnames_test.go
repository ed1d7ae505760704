package endtoend

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// domains are what nameRules tell apart.
var domains = []string{"direct", "proxied", "blocked"}

// connectedPacketConn is a UDP socket that is connected, for those who name the receiver all the same.
type connectedPacketConn struct {
	net.PacketConn
	peer net.Conn
}

func (c connectedPacketConn) WriteTo(b []byte, _ net.Addr) (int, error) { return c.peer.Write(b) }

// ownVisit visits a site from the box, where it is blocked with little patience: nobody answers.
func (w *socketWorld) ownVisit(t *testing.T, protocol, site string, at netip.Addr) string {
	t.Helper()
	patience := 10 * time.Second
	if domainOf(site) == "blocked" {
		patience = 2 * time.Second
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if protocol != "h3, connected" {
		v, _, err := w.visitAt(ctx, w.sidegate(), protocol, site, at)
		return w.outcome(v, err)
	}
	c, err := w.sidegate().Dial(ctx, "udp", netip.AddrPortFrom(at, 443).String())
	if err != nil {
		return w.outcome(lab.Visit{}, err)
	}
	defer c.Close()
	v, _, err := w.sidegate().VisitHTTP3By(ctx, connectedPacketConn{c.(*net.UDPConn), c}, site, netip.AddrPortFrom(at, 443))
	return w.outcome(v, err)
}

// startNames runs the gateway with rules on names, the resolver as its DNS server, and what config adds.
func (w *socketWorld) startNames(t *testing.T, config ...string) {
	t.Helper()
	w.startOwn(t, append([]string{fmt.Sprintf(`dns: { upstreams: { up: "udp://%s" }, default: up }`, w.resolver.Addr4()), nameRules}, config...)...)
}

// TestOwnSniffed: connections of the box itself are decided by the names that their first bytes tell, where its address has no name or
// several that differ: TLS, HTTP, and QUIC by sockets that are connected and that are not. UDP that is no QUIC goes by its address.
// What breaks it is a socket that is taken for direct, or blocked, before it has said anything.
func TestOwnSniffed(t *testing.T) {
	protocols := append(slices.Clone(protocols), "h3, connected")
	for _, mode := range []string{"unknown", "ambiguous"} {
		t.Run(mode, func(t *testing.T) {
			w := newSocketWorld(t)
			w.serveWitness(t, directPort)
			var sites, records []string
			for i := range protocols {
				for _, domain := range domains {
					site := fmt.Sprintf("n%d.%s.test", i, domain)
					sites = append(sites, site)
					records = append(records, fmt.Sprintf("%s. 300 A %s", site, farAddress(i)))
				}
			}
			w.serveNames(t, false, records...)
			w.serveSites(t, sites...)
			w.startNames(t, "sniff: "+mode, "default: direct")
			for i, protocol := range protocols {
				for _, domain := range domains {
					site := fmt.Sprintf("n%d.%s.test", i, domain)
					if mode == "ambiguous" {
						need(t, lookUp(t.Context(), w.sidegate(), site, farAddress(i)))
					}
				}
				for _, domain := range domains {
					site := fmt.Sprintf("n%d.%s.test", i, domain)
					if got := w.ownVisit(t, protocol, site, farAddress(i)); got != domain {
						t.Errorf("%s by %s: it was %s", site, protocol, got)
					}
				}
			}
			f := w.families()[0]
			for _, connected := range []bool{false, true} {
				s := w.udp(t, f)
				to := f.at(directPort)
				if connected {
					need(t, s.connect(to))
					to = netip.AddrPort{}
				}
				for range 2 {
					if saw, err := s.ask(to, 100); err != nil || saw.Addr() != f.box {
						t.Errorf("UDP that tells no name: the server saw %s, %v", saw, err)
					}
				}
			}
		})
	}
}

// TestOwnDNS: what the box's own programs ask of any resolver, by UDP or TCP, on the LAN, beyond it, or in a file that getaddrinfo
// reads, is answered by the gateway, teaches names to the box as a client, and rules on names hold for what they do next. What breaks
// it is a question that leaves by itself, or a name that is learned for nobody.
func TestOwnDNS(t *testing.T) {
	w := newSocketWorld(t)
	var sites, records []string
	for i, domain := range domains {
		site := "www." + domain + ".test"
		sites = append(sites, site)
		records = append(records, fmt.Sprintf("%s. 300 A %s", site, farAddress(i)))
	}
	w.serveNames(t, false, records...)
	w.serveSites(t, sites...)
	w.startNames(t, "default: block")
	for _, resolver := range []string{"8.8.8.8", "2001:4860:4860::8888", w.router().Addr4().String(), w.router().Addr6().String()} {
		for _, transport := range []string{"+notcp", "+tcp"} {
			r, err := w.sidegate().Dig(within(t, 10*time.Second), netip.MustParseAddr(resolver), sites[0], transport)
			needInstalled(t, err)
			if err != nil || !slices.Equal(r.Data("A"), []string{farAddress(0).String()}) {
				t.Errorf("asking %s, %s: %+v, %v", resolver, transport, r, err)
			}
		}
	}
	found, err := w.sidegate().Getent(within(t, 10*time.Second), somewhere, sites[1])
	if err != nil || !slices.Contains(found, farAddress(1)) {
		t.Errorf("getaddrinfo: %v, %v", found, err)
	}
	for i, site := range sites {
		v, err := w.visit(t, w.sidegate(), "http://"+site+"/whoami")
		if got := w.outcome(v, err); got != domains[i] {
			t.Errorf("curl to %s: it was %s", site, got)
		}
	}
	names := w.cli(t, "names")
	for _, site := range sites {
		if !strings.Contains(names, site) {
			t.Errorf("sidegate names has no %s:\n%s", site, names)
		}
	}
	w.asksOnly(t, w.resolver.Addr4())
}

// asksOnly: questions have left the box for nobody but those that the gateway asks.
func (w *socketWorld) asksOnly(t *testing.T, resolver netip.Addr) {
	t.Helper()
	never(t, w.leaving, "a question left the box for somebody else", func(p lab.Packet) bool {
		return p.Out && p.Dst.Port() == 53 && p.Dst.Addr() != resolver
	})
}

// onlyHere is a name that the box's own resolver knows, and nobody else.
const onlyHere = "only.here.test"

// startLocalResolver starts dnsmasq on a loopback address of the box, which asks another, as systemd-resolved does.
func (w *socketWorld) startLocalResolver(t *testing.T, at string, asks netip.Addr) {
	t.Helper()
	_, err := w.sidegate().Command(t.Context(), "/usr/sbin/dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=",
		"--log-facility=-", "--user=root", "--no-resolv", "--no-hosts", "--bind-interfaces", "--cache-size=0",
		"--listen-address="+at, "--server="+asks.String(), "--host-record="+onlyHere+",192.0.2.7").Start()
	need(t, err)
	need(t, lab.Wait(t.Context(), "dnsmasq to listen", func() error {
		return w.sidegate().Do(func() error {
			c, err := net.Dial("tcp", net.JoinHostPort(at, "53"))
			if err == nil {
				c.Close()
			}
			return err
		})
	}))
}

// TestOwnLocalResolver: a resolver on the box's loopback answers its programs as ever; what it asks itself is answered by the gateway, so
// that rules on names hold for those programs.
func TestOwnLocalResolver(t *testing.T) {
	w := newSocketWorld(t)
	w.serveNames(t, false, fmt.Sprintf("www.proxied.test. 300 A %s", farAddress(1)))
	w.serveSites(t, "www.proxied.test")
	w.startNames(t, "default: block")
	w.startLocalResolver(t, "127.0.0.53", somewhere)
	for _, transport := range []string{"+notcp", "+tcp"} {
		r, err := w.sidegate().Dig(within(t, 10*time.Second), netip.MustParseAddr("127.0.0.53"), "www.proxied.test", transport)
		needInstalled(t, err)
		if err != nil || !slices.Equal(r.Data("A"), []string{farAddress(1).String()}) {
			t.Errorf("asking the box's own resolver, %s: %+v, %v", transport, r, err)
		}
		r, err = w.sidegate().Dig(within(t, 10*time.Second), netip.MustParseAddr("127.0.0.53"), onlyHere, transport)
		if err != nil || !slices.Equal(r.Data("A"), []string{"192.0.2.7"}) {
			t.Errorf("another answered in place of the box's own resolver, %s: %+v, %v", transport, r, err)
		}
	}
	text, err := w.sidegate().Curl(within(t, 20*time.Second), netip.MustParseAddr("127.0.0.53"), "http://www.proxied.test/whoami")
	need(t, err)
	v, err := lab.ParseVisit(text)
	if got := w.outcome(v, err); got != "proxied" {
		t.Errorf("it was %s", got)
	}
	w.asksOnly(t, w.resolver.Addr4())
}

// TestOwnUpstreamOnTheBox: where the gateway asks a resolver on the box itself, that one's questions are left alone, for they would come
// back to it; the LAN is served, and status says what does not hold.
func TestOwnUpstreamOnTheBox(t *testing.T) {
	w := newSocketWorld(t)
	w.serveNames(t, false, fmt.Sprintf("www.direct.test. 300 A %s", farAddress(1)))
	w.startLocalResolver(t, "127.0.0.1", w.resolver.Addr4())
	w.startOwn(t, `dns: { upstreams: { up: "udp://127.0.0.1" }, default: up }`, nameRules, "default: direct")
	for _, h := range []*lab.Host{w.laptop(), w.sidegate()} {
		resolver := somewhere
		if h == w.sidegate() {
			resolver = w.resolver.Addr4()
		}
		r, err := h.Dig(within(t, 10*time.Second), resolver, "www.direct.test")
		needInstalled(t, err)
		if err != nil || !slices.Equal(r.Data("A"), []string{farAddress(1).String()}) {
			t.Errorf("%s: %+v, %v", h.Name(), r, err)
		}
	}
	if problems := strings.Join(w.status(t).Problems, "\n"); !strings.Contains(problems, "127.0.0.1") {
		t.Errorf("status says nothing of it: %q", problems)
	}
}
