package endtoend

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sidegate/appliance/lab"
)

// restless visits servers again and again, as the clients of a household do, until the test ends. It tells how many visits came to
// something.
func restless(t *testing.T, visit func(context.Context, netip.AddrPort) error, to ...netip.AddrPort) (succeeded func() int) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var visiting sync.WaitGroup
	var mu sync.Mutex
	n := 0
	for _, address := range to {
		visiting.Go(func() {
			for ctx.Err() == nil {
				err := visit(ctx, address)
				mu.Lock()
				if err == nil {
					n++
				}
				mu.Unlock()
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	t.Cleanup(func() {
		stop()
		visiting.Wait()
	})
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return n
	}
}

// visit makes one connection, with a person's patience.
func (w world) visit(ctx context.Context, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return converse(ctx, w.laptop(), "tcp", to)
}

// manyServers are several hosts that echo, IPv4 and IPv6.
func (w world) manyServers(t *testing.T) (to []netip.AddrPort) {
	t.Helper()
	hosts := []*lab.Host{w.server()}
	for i := range 2 {
		h, err := w.AddServer(t.Context(), fmt.Sprint("other", i))
		need(t, err)
		hosts = append(hosts, h)
	}
	for _, h := range hosts {
		echo, err := h.StartEcho(t.Context(), 7)
		need(t, err)
		to = append(to, echo.Addr4(), echo.Addr6())
	}
	return to
}

// TestDroppedConnectionsAreDiagnosed: within 30 s the gateway says what is the matter, by name, in its status and to the doctor.
func TestDroppedConnectionsAreDiagnosed(t *testing.T) {
	for name, hinder := range hindrances {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, lab.Options{})
			to := w.manyServers(t)
			w.start(t, everythingDirect)
			need(t, hinder(t.Context(), w))
			restless(t, w.visit, to...)
			need(t, lab.Wait(within(t, 30*time.Second), "the diagnosis", func() error {
				status := w.cli(t, "status")
				if !strings.Contains(status, "the network drops asymmetric connections") || !strings.Contains(status, "return_path: symmetric") {
					return errors.New(status)
				}
				return nil
			}))
			found, status := w.examine(t, "")
			if len(found) != 1 || found[0].Check != "gateway" || !strings.Contains(found[0].Seen, "asymmetric") || status != 3 {
				t.Errorf("the doctor finds %+v, status %d", found, status)
			}
			w.reload(t, symmetric)
			need(t, lab.Wait(within(t, 10*time.Second), "the problem to be over", func() error {
				if status := w.cli(t, "status"); strings.Contains(status, "Problems") {
					return errors.New(status)
				}
				return nil
			}))
		})
	}
}

// TestHealthyNetworkIsNotSuspected: a server that is dead, alone or among others, is no reason to change anything.
func TestHealthyNetworkIsNotSuspected(t *testing.T) {
	w := newWorld(t, lab.Options{})
	to := w.manyServers(t)
	dead := netip.MustParseAddrPort("203.0.113.77:7")
	run(t, w.router(), "ip route add blackhole "+dead.Addr().String())
	w.start(t, auto)
	restless(t, w.visit, dead)
	if err := w.visit(within(t, 15*time.Second), dead); err == nil {
		t.Fatal("the dead server answers")
	}
	succeeded := restless(t, w.visit, to...)
	need(t, lab.Wait(within(t, 30*time.Second), "visits", func() error {
		if n := succeeded(); n < 100 {
			return fmt.Errorf("%d visits", n)
		}
		return nil
	}))
	if status := w.cli(t, "status"); !strings.Contains(status, "auto: asymmetric") || strings.Contains(status, "drops") {
		t.Error(status)
	}
}

const auto = "interfaces: { lan: auto }\nreturn_path: auto\ndefault: direct\n"

// TestServersThatComeBackAreNoProof: servers that are away, one or all of them, and are back as soon as the box has asked, are no reason
// to change anything. The first look of the box sees what it would see of a network that drops the laptop's packets.
func TestServersThatComeBackAreNoProof(t *testing.T) {
	for name, of := range map[string]int{"one": 1, "all": 6} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, lab.Options{})
			to := w.manyServers(t)[:of]
			laptop, box := w.laptop(), w.sidegate()
			// The router forgets that they are away when a connection of the box ends, which is after it has been answered.
			nft(t, w.router(), fmt.Sprintf(`table inet away {
				set back { type inet_service; flags dynamic; size 8; }
				chain forward {
					type filter hook forward priority 0
					ip saddr %s tcp flags & fin == fin add @back { tcp dport }
					ip6 saddr %s tcp flags & fin == fin add @back { tcp dport }
					ip saddr %s tcp dport != @back counter drop
					ip6 saddr %s tcp dport != @back counter drop
				}
			}
			`, box.Addr4(), box.Addr6(), laptop.Addr4(), laptop.Addr6()))
			w.start(t, auto)
			var visiting errgroup.Group
			for _, address := range to {
				visiting.Go(func() error { return converse(within(t, 30*time.Second), laptop, "tcp", address) })
			}
			need(t, visiting.Wait()) // by a later SYN
			if back, err := w.router().Exec(t.Context(), "nft", "list", "set", "inet", "away", "back"); err != nil || !strings.Contains(back, "elements") {
				t.Fatalf("the box has not asked, %v: this test proves nothing\n%s", err, back)
			}
			w.reload(t, auto) // after which whatever was found out is in force
			if status := w.cli(t, "status"); !strings.Contains(status, "auto: asymmetric") {
				t.Error(status)
			}
		})
	}
}

// TestOneConnectionIsEnough: a network that ties addresses to devices is found out by one connection to one server, which waits.
func TestOneConnectionIsEnough(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	need(t, w.TieAddresses(t.Context()))
	w.start(t, auto)
	ctx, giveUp := context.WithTimeout(t.Context(), 30*time.Second)
	defer giveUp()
	before := time.Now()
	waiting := make(chan error, 1)
	go func() { waiting <- converse(ctx, w.laptop(), "tcp", echo.Addr4()) }()
	need(t, lab.Wait(ctx, "it to change the return path", func() error {
		if status := w.cli(t, "status"); !strings.Contains(status, "auto: symmetric") {
			return errors.New(status)
		}
		return nil
	}))
	t.Logf("symmetric after %v", time.Since(before).Round(100*time.Millisecond))
	giveUp()
	if err := <-waiting; err == nil {
		t.Error("the connection that waited opened: nothing hindered it")
	}
	need(t, w.visit(t.Context(), echo.Addr4()))
}

// TestAuto: return_path auto finds the way that works, for new flows, says so, and knows it after a restart.
func TestAuto(t *testing.T) {
	for name, hinder := range hindrances {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, lab.Options{})
			to := w.manyServers(t)
			w.start(t, auto)
			for _, address := range to {
				need(t, w.visit(t.Context(), address))
			}
			if status := w.cli(t, "status"); !strings.Contains(status, "auto: asymmetric") {
				t.Error(status)
			}
			need(t, hinder(t.Context(), w))
			before := time.Now()
			restless(t, w.visit, to...)
			symmetric := func() error {
				if status := w.cli(t, "status"); !strings.Contains(status, "auto: symmetric") {
					return errors.New(status)
				}
				return nil
			}
			need(t, lab.Wait(within(t, 30*time.Second), "it to change the return path", symmetric))
			t.Logf("symmetric after %v", time.Since(before).Round(100*time.Millisecond))
			for range 20 {
				for _, address := range to {
					need(t, w.visit(t.Context(), address))
				}
			}

			need(t, w.gateway.Kill())
			w.start(t, auto)
			need(t, symmetric())
			for _, address := range to {
				need(t, w.visit(t.Context(), address))
			}
		})
	}
}

// TestFirewallOfTheBoxIsExempted: where the box's own firewall drops half-seen connections they are not tracked, and arrive; also when
// the firewall comes while the gateway runs, and the exemption goes with it.
func TestFirewallOfTheBoxIsExempted(t *testing.T) {
	w := newWorld(t, lab.Options{})
	to := w.manyServers(t)
	need(t, w.sidegate().DropHalfSeen(t.Context()))
	if err := w.visit(within(t, 3*time.Second), to[0]); err == nil {
		t.Fatal("the firewall drops nothing: this test proves nothing")
	}
	w.start(t, everythingDirect)
	for range 50 {
		for _, address := range to {
			need(t, w.visit(t.Context(), address))
		}
	}
	if status := w.cli(t, "status"); strings.Contains(status, "Problems") {
		t.Error(status)
	}
	exempted := func(want bool) func() error {
		return func() error {
			out, err := w.sidegate().Exec(t.Context(), "nft", "list", "ruleset")
			if err == nil && strings.Contains(string(out), "notrack") != want {
				err = fmt.Errorf("the ruleset is\n%s", out)
			}
			return err
		}
	}
	need(t, exempted(true)())
	run(t, w.sidegate(), "nft delete table inet half-seen")
	need(t, lab.Wait(within(t, 10*time.Second), "the exemption to go", exempted(false)))
	need(t, w.sidegate().DropHalfSeen(t.Context()))
	need(t, lab.Wait(within(t, 10*time.Second), "the exemption to come", exempted(true)))
	for _, address := range to {
		need(t, w.visit(t.Context(), address))
	}
	w.reload(t, symmetric)
	for _, address := range to {
		completeAll(t, w.laptop(), address, 100)
	}
}

// TestRouterThatSeesBothHalves: a stateful router minds nothing where all passes it, as in a LAN with one router: both halves of an
// asymmetric connection do.
func TestRouterThatSeesBothHalves(t *testing.T) {
	w := newWorld(t, lab.Options{})
	to := w.manyServers(t)
	need(t, w.router().DropHalfSeen(t.Context()))
	w.start(t, everythingDirect)
	for range 20 {
		for _, address := range to {
			need(t, w.visit(t.Context(), address))
		}
	}
}
