package endtoend

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sidegate/appliance/lab"
)

// TestTwoNamesOnOneAddress: two sites with opposite rules share an address; two clients that each know one of them and
// one client that goes from one to the other get what the rules say, by TLS, HTTP and QUIC. What breaks it is any
// decision by address alone: with `sniff: off` the client that knows both is wrong about one, as it must be.
func TestTwoNamesOnOneAddress(t *testing.T) {
	for _, mode := range []string{"ambiguous", "off"} {
		t.Run(mode, func(t *testing.T) {
			w := newNamesWorld(t)
			shared := w.server().Addr4()
			sites := []string{"one.direct.test", "two.proxied.test"}
			w.serveNames(t, false, sites[0]+". 300 A "+shared.String(), sites[1]+". 300 A "+shared.String())
			w.serveSites(t, sites...)
			phone, err := w.AddClient(t.Context(), "phone")
			need(t, err)
			w.startWith(t, "sniff: "+mode, nameRules, "default: direct")

			const rounds = 40
			wrong := make(map[string]*tally)
			var clients errgroup.Group
			for _, c := range []struct {
				who   string
				host  *lab.Host
				sites []string
			}{
				{"the client of the first", w.laptop(), sites[:1]},
				{"the client of the second", phone, sites[1:]},
			} {
				wrong[c.who] = w.goAround(t, &clients, c.host, shared, rounds, c.sites...)
			}
			if err := clients.Wait(); err != nil {
				t.Fatal(err)
			}
			both, err := w.AddClient(t.Context(), "both")
			need(t, err)
			wrong["the client of both"] = w.goAround(t, &clients, both, shared, rounds, sites...)
			if err := clients.Wait(); err != nil {
				t.Fatal(err)
			}
			for who, n := range wrong {
				t.Logf("%s: %v", who, n)
				if n.right == 0 {
					t.Errorf("%s was never right", who)
				}
				if mode == "ambiguous" && n.wrong > 0 {
					t.Errorf("%s got a wrong verdict: %v", who, n)
				}
			}
			if mode == "off" && wrong["the client of both"].wrong == 0 {
				t.Error("without sniffing the client of both got every verdict right: this test proves nothing")
			}
		})
	}
}

// TestPortUsedAgain: a client's next QUIC connection on the ports of its last one, as it happens by chance once in some thousand and
// always to programs that have many on one socket, is decided by its own name where the last one was direct, and stays proxied where
// that was. What breaks it is to take the ports for the connection (UDP has no SYN that would tell): what should be proxied leaks.
func TestPortUsedAgain(t *testing.T) {
	w := newNamesWorld(t)
	shared := w.server().Addr4()
	visits := []struct{ site, want string }{
		{"one.direct.test", "direct"},
		{"three.direct.test", "direct"},
		{"one.direct.test", "direct"},
		{"two.proxied.test", "proxied"},
		{"four.proxied.test", "proxied"},
		{"one.direct.test", "proxied"},
	}
	var zone, sites []string
	for _, v := range visits {
		zone = append(zone, v.site+". 300 A "+shared.String())
		sites = append(sites, v.site)
	}
	slices.Sort(sites)
	w.serveNames(t, false, zone...)
	w.serveSites(t, slices.Compact(sites)...)
	w.startWith(t, nameRules, "default: direct")
	for i, visit := range visits {
		need(t, lookUp(t.Context(), w.laptop(), visit.site, shared))
		v, _, err := w.laptop().VisitHTTP3(within(t, 10*time.Second), 40000, visit.site, netip.AddrPortFrom(shared, 443))
		need(t, err)
		if got := w.outcome(v, nil); got != visit.want {
			t.Errorf("visit %d, of %s: %s, want %s", i+1, visit.site, got, visit.want)
		}
	}
}

// tally counts verdicts; last is a wrong one.
type tally struct {
	right, wrong int
	last         string
}

func (n *tally) String() string {
	return fmt.Sprintf("%d right, %d wrong (%s)", n.right, n.wrong, n.last)
}

func (n *tally) add(what, got, want string) {
	if got == want {
		n.right++
		return
	}
	n.wrong++
	n.last = fmt.Sprintf("%s was %s", what, got)
}

// goAround has a client visit sites in turn, by each protocol, asking for the name first each time.
func (w *namesWorld) goAround(t *testing.T, tasks *errgroup.Group, from *lab.Host, at netip.Addr, rounds int, sites ...string) *tally {
	n := new(tally)
	port := uint16(20000) // each QUIC connection has its own: see TestPortUsedAgain
	tasks.Go(func() error {
		for range rounds {
			for _, site := range sites {
				if err := lookUp(t.Context(), from, site, at); err != nil {
					return err
				}
				for _, protocol := range []string{"https", "http", "h3"} {
					port++
					v, _, err := w.visitFrom(t.Context(), port, from, protocol, site, at)
					if err != nil {
						return fmt.Errorf("%s visiting %s by %s: %w", from.Name(), site, protocol, err)
					}
					n.add(site+" by "+protocol, w.outcome(v, nil), domainOf(site))
				}
			}
		}
		return nil
	})
	return n
}

// TestLiveFlowsKeepTheirVerdict: a connection that was decided by a name stays where it is when its address gets another
// name with another verdict, and when the name's TTL is over. What breaks it is deciding again in mid-life: the server
// would then see somebody new.
func TestLiveFlowsKeepTheirVerdict(t *testing.T) {
	w := newNamesWorld(t)
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	shared := w.server().Addr4()
	answer, err := lab.Zone("one.direct.test. 1 A "+shared.String(), "two.proxied.test. 1 A "+shared.String())
	need(t, err)
	names, err := w.resolver.StartNameserver(t.Context(), 53, answer)
	need(t, err)
	w.startWith(t, nameRules, "default: block")

	lives := make(map[string]net.Conn)
	open := func(what string) {
		for _, network := range []string{"tcp", "udp"} {
			c, err := w.laptop().Dial(within(t, 5*time.Second), network, echo.Addr4().String())
			if err != nil {
				t.Fatalf("%s by %s: %v", what, network, err)
			}
			t.Cleanup(func() { c.Close() })
			exchange(t, c, 100)
			lives[what+" by "+network] = c
		}
	}
	need(t, lookUp(t.Context(), w.laptop(), "two.proxied.test", shared))
	open("the first name's")
	seen := echo.Senders()
	if len(seen) != 2 || seen[0].Addr() != w.upstream().Addr4() {
		t.Fatalf("the server saw %v, want the upstream twice", seen)
	}
	need(t, lookUp(t.Context(), w.laptop(), "one.direct.test", shared)) // whose rule comes first
	asked := len(names.Questions())
	err = lab.Wait(within(t, 10*time.Second), "the TTL to be over", func() error {
		if err := lookUp(t.Context(), w.laptop(), "one.direct.test", shared); err != nil {
			return err
		}
		if len(names.Questions()) == asked {
			return fmt.Errorf("the gateway answers from its cache")
		}
		return nil
	})
	need(t, err)
	for what, c := range lives {
		if err := tryExchange(c, 100); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if now := echo.Senders(); len(now) != 2 {
		t.Errorf("the server saw %v: a flow changed sides", now)
	}
}
