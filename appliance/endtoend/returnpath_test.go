package endtoend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

const (
	asymmetric = everythingDirect
	symmetric  = everythingDirect + "return_path: symmetric\n"
)

// hindrances are networks that drop connections of which they see one half.
var hindrances = map[string]func(context.Context, world) error{
	"the router ties addresses to MAC addresses": func(ctx context.Context, w world) error { return w.TieAddresses(ctx) },
	"a firewall before the router sees one half": func(ctx context.Context, w world) error {
		_, err := w.AddFirewall(ctx)
		return err
	},
}

// TestHalfSeenConnections: where the network minds half-seen connections, asymmetric ones fail, and symmetric ones do not: all
// of a thousand, IPv4 and IPv6.
func TestHalfSeenConnections(t *testing.T) {
	for what, hinder := range hindrances {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t, lab.Options{})
			need(t, hinder(t.Context(), w))
			echo, err := w.server().StartEcho(t.Context(), 7)
			need(t, err)
			w.start(t, asymmetric)
			for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
				if err := converse(within(t, time.Second), w.laptop(), "tcp", to); err == nil {
					t.Errorf("asymmetric: a connection to %s works: nothing hinders it, and this test proves nothing", to)
				}
			}
			w.reload(t, symmetric)
			for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
				completeAll(t, w.laptop(), to, 500)
			}
		})
	}
}

// converse opens a connection, has something echoed and closes it.
func converse(ctx context.Context, from *lab.Host, network string, to netip.AddrPort) error {
	c, err := from.Dial(ctx, network, to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	return tryExchange(c, 1000)
}

// completeAll wants every one of n connections to work.
func completeAll(t *testing.T, from *lab.Host, to netip.AddrPort, n int) {
	t.Helper()
	ctx := within(t, time.Minute)
	var failed atomic.Int64
	var last atomic.Value
	var tasks sync.WaitGroup
	for worker := range 20 {
		tasks.Go(func() {
			for i := worker; i < n; i += 20 {
				if err := converse(ctx, from, "tcp", to); err != nil {
					failed.Add(1)
					last.Store(err)
				}
			}
		})
	}
	tasks.Wait()
	if failed.Load() > 0 {
		t.Errorf("%d of %d connections to %s failed: %v", failed.Load(), n, to, last.Load())
	}
}

// reload writes another configuration and puts it in force.
func (w world) reload(t *testing.T, config string) {
	t.Helper()
	need(t, os.WriteFile(w.gateway.Config, []byte(config), 0o644))
	w.cli(t, "reload")
}

// TestSymmetric: everything goes both ways through the gateway, and the server sees its address: TCP, UDP, ping, datagrams in
// fragments, and the ICMP errors that path MTU discovery needs.
func TestSymmetric(t *testing.T) {
	w := newWorld(t, lab.Options{MTU: 1500, InternetMTU: 1400})
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	w.start(t, symmetric)
	atGateway := captureOn(t, w.sidegate(), w.sidegate().Interface().Name)
	atServer := captureOn(t, w.server(), w.server().Interface().Name)
	own := both(w.sidegate(), w.server())
	for family, addr := range both(w.laptop(), w.server()) {
		client, server, gateway := addr[0], addr[1], own[family][0]
		before := len(files.Requests())
		need(t, download(t, w.laptop().HTTP(), netip.AddrPortFrom(server, files.Addr4().Port()), 4<<20))
		if from := requestAfter(t, files, before).From; from.Addr() != gateway {
			t.Errorf("%s: the server saw %s, want the gateway's %s", family, from, gateway)
		}
		pathMTU(t, w.laptop(), family, server) // IPv6 fragments at the sender only, which now knows
		c, err := w.laptop().Dial(within(t, 5*time.Second), "udp", netip.AddrPortFrom(server, echo.Addr4().Port()).String())
		need(t, err)
		for _, size := range []int{100, 3000, 60_000} {
			exchange(t, c, size)
		}
		if _, err := w.laptop().Ping(within(t, 5*time.Second), server); err != nil {
			t.Errorf("%s: %v", family, err)
		}
		never(t, atServer, family+": the client's address reached the server", lab.From(client))
		if packets(t, atGateway, func(p lab.Packet) bool { return p.Out && p.Src.Addr() == server && p.Dst.Addr() == client }) == 0 {
			t.Errorf("%s: no reply crossed the gateway", family)
		}
	}
	if flows := w.cli(t, "flows"); !strings.Contains(flows, "direct, translated") {
		t.Errorf("the flows do not say so:\n%s", flows)
	}
	if status := w.cli(t, "status"); !strings.Contains(status, "return path symmetric") {
		t.Errorf("the status does not say so:\n%s", status)
	}
	answer := w.cli(t, "explain", "ip="+w.server().Addr4().String(), "port=80", "network=tcp")
	if !strings.Contains(answer, "direct, translated, by default") || !strings.Contains(answer, "kernel says the same") {
		t.Errorf("the explanation does not say so:\n%s", answer)
	}
}

// TestSymmetricByRule: a rule that says whether it translates prevails over the return path, either way.
func TestSymmetricByRule(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	other, err := w.server().StartEcho(t.Context(), 8)
	need(t, err)
	for path, snat := range map[string]bool{"asymmetric": true, "symmetric": false} {
		config := fmt.Sprintf("return_path: %s\nrules:\n  - { name: other, port: 8, outbound: direct, snat: %t }\n", path, snat) + everythingDirect
		if w.gateway == nil {
			w.start(t, config)
		} else {
			w.reload(t, config)
		}
		for family, addr := range both(w.laptop(), w.sidegate()) {
			client, gateway := addr[0], addr[1]
			for server, translated := range map[*lab.Echo]bool{echo: !snat, other: snat} {
				to, want := server.Addr4(), client
				if family == "v6" {
					to = server.Addr6()
				}
				if translated {
					want = gateway
				}
				c, err := w.laptop().Dial(within(t, 5*time.Second), "udp", to.String())
				need(t, err)
				exchange(t, c, 100)
				if seen := server.Senders(); seen[len(seen)-1].Addr() != want {
					t.Errorf("%s, snat %t for port 8: %s saw %s, want %s", path, snat, to, seen[len(seen)-1], want)
				}
			}
		}
		if rules := w.cli(t, "rules"); strings.Count(rules, "direct, translated") != 1 {
			t.Errorf("%s: the rules do not say which one translates:\n%s", path, rules)
		}
	}
}

// TestReturnPathReload: live flows keep the return path that they began with, whichever way it is switched; new ones have
// the new one.
func TestReturnPathReload(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	w.start(t, asymmetric)
	var live []net.Conn
	begin := func(network string, to netip.AddrPort, is netip.Addr) {
		t.Helper()
		c, err := w.laptop().Dial(within(t, 5*time.Second), network, to.String())
		need(t, err)
		t.Cleanup(func() { c.Close() })
		exchange(t, c, 500)
		if network == "udp" {
			if seen := echo.Senders(); seen[len(seen)-1].Addr() != is {
				t.Errorf("a new flow to %s comes from %s, want %s", to, seen[len(seen)-1], is)
			}
		}
		live = append(live, c)
	}
	for _, config := range []string{asymmetric, symmetric, asymmetric, symmetric} {
		w.reload(t, config)
		source := w.laptop()
		if config == symmetric {
			source = w.sidegate()
		}
		for range 3 {
			for _, network := range []string{"tcp", "udp"} {
				begin(network, echo.Addr4(), source.Addr4())
				begin(network, echo.Addr6(), source.Addr6())
			}
		}
		for _, c := range live {
			if err := tryExchange(c, 1000); err != nil {
				t.Errorf("%s %s → %s: %v", c.LocalAddr().Network(), c.LocalAddr(), c.RemoteAddr(), err)
			}
		}
	}
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		if from := flowsFrom(echo.Senders(), to.Addr().Is4()); from < 2 {
			t.Errorf("%d senders in all: nothing was switched, and this test proves nothing", from)
		}
	}
}

func flowsFrom(senders []netip.AddrPort, v4 bool) int {
	all := map[netip.Addr]bool{}
	for _, s := range senders {
		if s.Addr().Is4() == v4 {
			all[s.Addr()] = true
		}
	}
	return len(all)
}

// TestSymmetricSurvives: the table outlives a crash of the daemon with the flows that it translates, is put back within
// seconds when somebody removes it, and is gone after a stop, when the box forwards plainly.
func TestSymmetricSurvives(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	table := func() string {
		out, err := w.sidegate().Exec(t.Context(), "nft", "list", "ruleset")
		need(t, err)
		return out
	}
	w.start(t, symmetric)
	c, err := w.laptop().Dial(within(t, 5*time.Second), "tcp", echo.Addr4().String())
	need(t, err)
	exchange(t, c, 1000)

	_, err = w.sidegate().Exec(t.Context(), "nft", "flush", "ruleset")
	need(t, err)
	need(t, lab.Wait(within(t, 10*time.Second), "the table to be back", func() error {
		if !strings.Contains(table(), "masquerade") {
			return errors.New("it is not there")
		}
		return nil
	}))
	exchange(t, c, 1000)

	need(t, w.gateway.Kill())
	exchange(t, c, 1000)
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		need(t, converse(within(t, 5*time.Second), w.laptop(), "tcp", to))
		if err := converse(within(t, 5*time.Second), w.laptop(), "udp", to); err != nil {
			t.Error(err)
		}
	}
	for _, from := range echo.Senders() {
		if from.Addr() == w.laptop().Addr4() || from.Addr() == w.laptop().Addr6() {
			t.Errorf("the server saw %s", from)
		}
	}
	w.start(t, symmetric)
	exchange(t, c, 1000)
	need(t, w.gateway.Stop())
	if rules := table(); rules != "" {
		t.Errorf("left behind:\n%s", rules)
	}
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		need(t, converse(within(t, 5*time.Second), w.laptop(), "udp", to))
		if seen := echo.Senders(); seen[len(seen)-1].Addr() != w.laptop().Addr4() && seen[len(seen)-1].Addr() != w.laptop().Addr6() {
			t.Errorf("after a stop the server sees %s", seen[len(seen)-1])
		}
	}
}

// TestSymmetricWithoutARule: what goes direct otherwise than by the first look of a rule is translated too: QUIC that was held back
// until its name was read, and flows whose proxy is dead.
func TestSymmetricWithoutARule(t *testing.T) {
	w := newNamesWorld(t)
	const site = "one.direct.test"
	w.serveNames(t, false, site+". 300 A "+farAddress(1).String())
	w.serveSites(t, site)
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	w.startWith(t, "sniff: unknown", "on_failure: direct", "return_path: symmetric", nameRules, "default: hk")
	v, _, err := w.visitAt(t.Context(), w.laptop(), "h3", site, farAddress(1))
	need(t, err)
	if v.Address != w.sidegate().Addr4() {
		t.Errorf("QUIC: the server saw %s", v.Address)
	}
	if flows := w.cli(t, "flows", "network=udp", "port=443"); !strings.Contains(flows, "direct, translated") {
		t.Errorf("the kernel does not carry it:\n%s", flows)
	}
	proxied, err := w.laptop().Dial(within(t, 5*time.Second), "udp", echo.Addr4().String())
	need(t, err)
	defer proxied.Close()
	exchange(t, proxied, 100)
	before := len(echo.Senders())
	if before != 1 || echo.Senders()[0].Addr() != w.upstream().Addr4() {
		t.Errorf("by the proxy the server saw %v", echo.Senders())
	}
	need(t, w.gateway.Kill())
	exchange(t, proxied, 100)
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		for _, network := range []string{"tcp", "udp"} {
			need(t, converse(within(t, 5*time.Second), w.laptop(), network, to))
		}
	}
	seen := echo.Senders()[before:]
	for _, from := range seen {
		if from.Addr() != w.sidegate().Addr4() && from.Addr() != w.sidegate().Addr6() {
			t.Errorf("without its proxy: the server saw %s", from)
		}
	}
	if len(seen) != 5 {
		t.Errorf("the server saw %d clients, want 5", len(seen))
	}
}
