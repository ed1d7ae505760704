package endtoend

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sidegate/appliance/lab"
)

var protocols = []string{"https", "http", "h2c", "h3"}

// TestOwnResolver: a client that asks nobody here — curl with its own DNS over HTTPS, and one that knows its addresses
// already — is subject to the rules on names, by TLS, HTTP/1.1, HTTP/2 with and without TLS, and QUIC. What breaks it
// is a name that is not read from the first bytes: without `sniff: unknown` each site is direct, as the default says.
func TestOwnResolver(t *testing.T) {
	for _, mode := range []string{"unknown", "ambiguous"} {
		t.Run(mode, func(t *testing.T) {
			w := newNamesWorld(t)
			var sites, records []string
			var addresses []netip.Addr
			for _, domain := range []string{"direct", "proxied", "blocked"} {
				for i := range 2 * len(protocols) {
					site := fmt.Sprintf("n%d.%s.test", i, domain)
					sites = append(sites, site)
					addresses = append(addresses, farAddress(len(sites)))
					records = append(records, fmt.Sprintf("%s. 300 A %s", site, addresses[len(addresses)-1]))
				}
			}
			w.serveNames(t, true, records...)
			w.serveSites(t, sites...)
			w.startWith(t, "sniff: "+mode, nameRules, "default: direct")

			doh := []string{"--doh-url", "https://" + w.resolver.Addr4().String() + "/dns-query"}
			curl := map[string]struct {
				url  string
				args []string
			}{
				"https": {"https://%s/whoami", doh},
				"http":  {"http://%s/whoami", doh},
				"h2c":   {"http://%s:8080/whoami", append(doh, "--http2-prior-knowledge")},
			}
			wrong := 0
			for i, site := range sites {
				protocol := protocols[i%len(protocols)]
				asOne, how := i/len(protocols)%2 == 0, "curl with its own DoH"
				var v lab.Visit
				var err error
				if c, ok := curl[protocol]; ok && asOne {
					v, err = w.visit(t, w.laptop(), fmt.Sprintf(c.url, site), c.args...)
				} else {
					how = "a client that knows the address"
					ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
					if protocol == "h3" && domainOf(site) == "blocked" {
						ctx, cancel = context.WithTimeout(t.Context(), 2*time.Second) // nobody answers
					}
					v, _, err = w.visitAt(ctx, w.laptop(), protocol, site, addresses[i])
					cancel()
				}
				if err == nil && v.Site != site {
					t.Errorf("%s: %s answered %s by %s", site, v.Site, how, protocol)
				}
				if got := w.outcome(v, err); got != domainOf(site) {
					wrong++
					if mode == "unknown" {
						t.Errorf("%s by %s, %s: it was %s (%v)", site, protocol, how, got, err)
					}
				}
			}
			if mode == "unknown" {
				t.Log(w.cli(t, "status"))
			} else if want := len(sites) * 2 / 3; wrong != want {
				t.Errorf("without sniffing %d of %d sites were wrong, want %d: this test proves nothing", wrong, len(sites), want)
			}
		})
	}
}

// TestSniffedFirstByte: what reading the name costs. Visits to sites that nobody here has a name for alternate with visits
// to sites that the client has asked for, direct or proxied alike; each has a name and an address of its own. The bound is
// far above the promise of one round trip on the LAN and 2 ms, which the log shows: what breaks it is waiting for anything.
func TestSniffedFirstByte(t *testing.T) {
	w := newNamesWorld(t)
	const pairs = 60
	var records []string
	next := 0
	fresh := func(domain string) (site string, at netip.Addr) {
		next++
		return fmt.Sprintf("n%d.%s.test", next, domain), farAddress(next)
	}
	domains, protocols := []string{"direct", "proxied"}, []string{"https", "http", "h3"}
	for _, domain := range domains {
		for range 2 * pairs * len(protocols) {
			site, at := fresh(domain)
			records = append(records, fmt.Sprintf("%s. 300 A %s", site, at))
		}
	}
	w.serveNames(t, false, records...)
	w.serveSites(t, "*.direct.test", "*.proxied.test")
	w.startWith(t, "sniff: unknown", nameRules, "default: block")

	var trips []time.Duration
	for range 51 {
		trip, err := w.laptop().Ping(within(t, 5*time.Second), w.sidegate().Addr4())
		need(t, err)
		trips = append(trips, trip)
	}
	// The promise is a round trip and 2 ms, which the log is held against; on a busy machine a median is above it now and then.
	// What the test must notice is a wait: for the deadline, for a look-up, for a timer.
	promised, bound := median(trips)+2*time.Millisecond, median(trips)+20*time.Millisecond
	next = 0
	for _, domain := range domains {
		for _, protocol := range protocols {
			var known, unknown []time.Duration
			for range pairs {
				for _, times := range []*[]time.Duration{&known, &unknown} {
					site, at := fresh(domain)
					if times == &known {
						need(t, lookUp(t.Context(), w.laptop(), site, at))
					}
					v, took, err := w.visitAt(t.Context(), w.laptop(), protocol, site, at)
					if got := w.outcome(v, err); got != domain {
						t.Fatalf("%s by %s was %s: %v", site, protocol, got, err)
					}
					*times = append(*times, took)
				}
			}
			added := median(unknown) - median(known)
			t.Logf("%s by %s: %v to the first byte with the name known, %v with it read: %v more (promised: less than %v)", domain, protocol, median(known), median(unknown), added, promised)
			if added > bound {
				t.Errorf("%s by %s: reading the name adds %v at the median, more than %v", domain, protocol, added, bound)
			}
		}
	}
}

func median(d []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(d))[len(d)/2]
}

// TestSilentConnections: thousands of connections that say nothing, because their servers speak first, are decided by their
// addresses when the wait is over, and meanwhile another client's visits get the verdicts of their names, and get them as
// soon as ever. What breaks it is waiting for ever, or a wait that takes something away from others.
func TestSilentConnections(t *testing.T) {
	w := newNamesWorld(t)
	const visits = 60
	// A process may have 20,000 descriptors on many a machine, a connection takes up to four of the gateway's, and one client
	// gets half of what there is.
	const silent, crowds = 4400, 2
	startMirror(t, w.server(), racePort)
	records := make([]string, 2*visits)
	for i := range records {
		records[i] = fmt.Sprintf("%s. 300 A %s", silentSite(i), farAddress(10_000+i))
	}
	w.serveNames(t, false, records...)
	w.serveSites(t, "*.direct.test", "*.proxied.test")
	var phones []*lab.Host
	for i := range crowds {
		phone, err := w.AddClient(t.Context(), fmt.Sprintf("phone%d", i))
		need(t, err)
		phones = append(phones, phone)
	}
	w.startWith(t, "sniff: unknown", nameRules, "default: direct")

	next := 0
	visit := func() (all []time.Duration) {
		for range visits {
			site := silentSite(next)
			v, took, err := w.visitAt(t.Context(), w.laptop(), "https", site, farAddress(10_000+next))
			next++
			if got := w.outcome(v, err); got != domainOf(site) {
				t.Fatalf("%s was %s: %v", site, got, err)
			}
			all = append(all, took)
		}
		return all
	}
	alone := visit()

	stop := make(chan struct{})
	var crowd errgroup.Group
	for i := range silent {
		crowd.Go(func() error { return beSilent(t.Context(), phones[i%crowds], farAddress(i), stop) })
	}
	beside := visit()
	close(stop)
	if err := crowd.Wait(); err != nil {
		t.Error(err)
		t.Log(w.cli(t, "status"))
	}
	t.Logf("time to the first byte at the median and at most: %v and %v alone, %v and %v beside %d silent connections",
		median(alone), slices.Max(alone), median(beside), slices.Max(beside), silent)
}

// silentSite is a site of the client that is not silent.
func silentSite(i int) string {
	return fmt.Sprintf("n%d.%s.test", i, []string{"direct", "proxied"}[i%2])
}

// beSilent opens a connection whose server speaks first, hears that it is direct, and keeps it until stop.
func beSilent(ctx context.Context, from *lab.Host, to netip.Addr, stop <-chan struct{}) error {
	c, err := from.Dial(ctx, "tcp", netip.AddrPortFrom(to, racePort).String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	heard := make([]byte, 64)
	n, err := c.Read(heard)
	if err != nil {
		return fmt.Errorf("a silent connection: %w", err)
	}
	if got := strings.TrimSpace(string(heard[:n])); got != "192.168.0.2" {
		return fmt.Errorf("a silent connection came to its server from %s, want the gateway", got)
	}
	<-stop
	return nil
}
