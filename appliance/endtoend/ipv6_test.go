package endtoend

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// ipv6World is a LAN whose main router advertises itself, and a laptop that believes advertisements.
type ipv6World struct {
	world
	blocked, open *lab.Echo
	atRouter      *lab.Capture
}

func newIPv6World(t *testing.T, o lab.RadvdOptions) *ipv6World {
	t.Helper()
	w := &ipv6World{world: newWorld(t, lab.Options{LinkLocalGateways: true})}
	_, err := w.router().StartRadvd(t.Context(), o)
	need(t, err)
	need(t, w.laptop().Autoconfigure(t.Context()))
	w.blocked, err = w.server().StartEcho(t.Context(), 7)
	need(t, err)
	w.open, err = w.upstream().StartEcho(t.Context(), 7)
	need(t, err)
	w.routedBy(t, w.router())
	w.atRouter = captureOn(t, w.router(), "lan")
	return w
}

// policy blocks the server, and nothing else.
func (w *ipv6World) policy(more string) string {
	return fmt.Sprintf("interfaces: { lan: [eth0] }\n%s\nrules: [ { name: server, ip_cidr: %q, outbound: block, reject: true } ]\ndefault: direct\n",
		more, w.server().Addr6())
}

func (w *ipv6World) reach(t *testing.T, e *lab.Echo) error {
	t.Helper()
	c, err := w.laptop().Dial(within(t, 5*time.Second), "tcp", e.Addr6().String())
	if err != nil {
		return err
	}
	defer c.Close()
	return tryExchange(c, 100)
}

// leaked is how many packets of the laptop the router has got for the blocked server.
func (w *ipv6World) leaked(t *testing.T) uint64 {
	t.Helper()
	return packets(t, w.atRouter, func(p lab.Packet) bool { return !p.Out && p.Dst.Addr() == w.server().Addr6() })
}

// obeys: the policy decides, nothing leaks, and what is direct flows.
func (w *ipv6World) obeys(t *testing.T) {
	t.Helper()
	before := w.leaked(t)
	for range 20 {
		if err := w.reach(t, w.blocked); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the blocked server: %v, want a refusal", err)
		}
	}
	if err := w.reach(t, w.open); err != nil {
		t.Errorf("the server that is direct: %v", err)
	}
	if n := w.leaked(t) - before; n != 0 {
		t.Errorf("%d packets for the blocked server reached the router", n)
	}
}

// bypasses: the laptop goes by the main router, and nobody decides.
func (w *ipv6World) bypasses(t *testing.T) {
	t.Helper()
	before := w.leaked(t)
	if err := w.reach(t, w.blocked); err != nil {
		t.Errorf("past the box: %v", err)
	}
	if w.leaked(t) == before {
		t.Error("the router saw nothing: the captures prove nothing")
	}
}

func (w *ipv6World) rewrite(t *testing.T, config string) {
	t.Helper()
	next := filepath.Join(t.TempDir(), "next.yaml")
	need(t, os.WriteFile(next, []byte(config), 0o644))
	need(t, os.Rename(next, w.gateway.Config))
	need(t, w.gateway.Signal(syscall.SIGHUP))
}

// TestIPv6Advertise: while the main router advertises itself IPv6 goes past the box; with `ipv6: advertise` it does
// not, through a crash, a hand-over and reloads; and a gateway that stops gives it back at once.
func TestIPv6Advertise(t *testing.T) {
	w := newIPv6World(t, lab.RadvdOptions{})
	w.start(t, w.policy("ipv6: unmanaged"))
	w.bypasses(t)
	if s := w.cli(t, "status"); !strings.Contains(s, "unmanaged") {
		t.Errorf("status:\n%s", s)
	}

	// The box itself lives by advertisements.
	need(t, w.sidegate().SetSysctl("net.ipv6.conf.eth0.accept_ra", "2"))
	_, err := w.sidegate().Exec(t.Context(), "ip", "-6", "route", "delete", "default")
	need(t, err)
	need(t, lab.Wait(t.Context(), "the box to take the router's advertisement", func() error {
		_, err := w.sidegate().RouteTo(t.Context(), w.server().Addr6())
		return err
	}))
	w.rewrite(t, w.policy("ipv6: advertise"))
	w.routedBy(t, w.sidegate())
	w.obeys(t)
	if s := w.cli(t, "status"); !strings.Contains(s, "advertise, on eth0") || strings.Contains(s, "advertises itself") {
		t.Errorf("status:\n%s", s)
	}
	if out, err := w.sidegate().Exec(t.Context(), "ip", "-6", "route", "show", "default"); err != nil || strings.Contains(out, w.sidegate().Interface().LinkLocal().String()) || !strings.Contains(out, "proto ra") {
		t.Errorf("the box's own routes, %v:\n%s", err, out)
	}

	// a crash: what is direct goes on by the box, and what it keeps in stays in
	need(t, w.gateway.Kill())
	w.routedBy(t, w.sidegate())
	w.obeys(t)
	w.start(t, w.policy("ipv6: advertise"))
	w.obeys(t)
	withdrawn := func(p lab.Packet) bool { return p.Out && p.Protocol == lab.ICMPv6 && p.ICMPType == 134 }
	atBox := captureOn(t, w.sidegate(), "eth0")
	need(t, w.gateway.Signal(syscall.SIGUSR2)) // a hand-over
	need(t, w.gateway.Wait())
	if n := packets(t, atBox, withdrawn); n > 1 { // it may just have been due
		t.Errorf("%d advertisements at a hand-over: was it withdrawn?", n)
	}
	w.routedBy(t, w.sidegate())
	w.obeys(t)
	w.start(t, w.policy("ipv6: advertise"))
	w.obeys(t)

	w.rewrite(t, w.policy("ipv6: unmanaged"))
	w.routedBy(t, w.router())
	w.bypasses(t)
	w.rewrite(t, w.policy("ipv6: advertise"))
	w.routedBy(t, w.sidegate())
	w.obeys(t)

	need(t, w.gateway.Signal(syscall.SIGTERM))
	need(t, w.gateway.Wait())
	w.routedBy(t, w.router())
	w.bypasses(t)
}

// TestIPv6Flap: an interface that goes down and comes back is advertised on again, for a client that has lost its route.
func TestIPv6Flap(t *testing.T) {
	w := newIPv6World(t, lab.RadvdOptions{})
	w.start(t, w.policy("ipv6: advertise"))
	w.routedBy(t, w.sidegate())
	set := func(h *lab.Host, args string) {
		t.Helper()
		_, err := h.Exec(t.Context(), "ip", strings.Fields(args)...)
		need(t, err)
	}
	set(w.sidegate(), "link set eth0 down")
	set(w.laptop(), "-6 route delete default via "+w.sidegate().Interface().LinkLocal().String()+" dev eth0")
	need(t, lab.Wait(t.Context(), "the gateway to notice", func() error {
		if s := w.cli(t, "status"); !strings.Contains(s, "nowhere at present") {
			return errors.New(s)
		}
		return nil
	}))
	w.routedBy(t, w.router())
	set(w.sidegate(), "link set eth0 up")
	set(w.sidegate(), "-6 route replace default via "+w.router().Interface().LinkLocal().String()+" dev eth0")
	w.routedBy(t, w.sidegate())
}

// TestIPv6Rivals: what the main router says that leads clients past the box is told, with the fix; its DHCPv6 flag is
// repeated; and DNS at the box's advertised address is answered.
func TestIPv6Rivals(t *testing.T) {
	w := newIPv6World(t, lab.RadvdOptions{Preference: "high", Managed: true, Resolver: netip.MustParseAddr("fd00:c0a8::1")})
	w.start(t, w.policy("ipv6: advertise\ndns: { upstreams: { main: \"udp://192.168.0.1\" }, default: main, hosts: { box.test: [192.168.0.2] } }"))
	need(t, lab.Wait(t.Context(), "the rival to be named", func() error {
		s := w.cli(t, "status")
		for _, want := range []string{"the router fe80::c0ff:fea8:1 (02:00:c0:a8:00:01) advertises itself with preference high", "names fd00:c0a8::1 as DNS server"} {
			if !strings.Contains(s, want) {
				return fmt.Errorf("it does not say %q:\n%s", want, s)
			}
		}
		return nil
	}))
	reply, err := w.laptop().Dig(t.Context(), w.sidegate().Interface().LinkLocal().WithZone("eth0"), "box.test")
	need(t, err)
	if got := reply.Data("A"); len(got) != 1 || got[0] != "192.168.0.2" {
		t.Errorf("box.test at the box's link-local address: %v", got)
	}
}

// TestIPv6Own: the box's kernel, and so whoever listens beside it, hears nothing of its own advertisements.
func TestIPv6Own(t *testing.T) {
	w := newWorld(t, lab.Options{})
	w.start(t, "interfaces: { lan: [eth0] }\nipv6: advertise\ndefault: direct\n")
	need(t, lab.Wait(t.Context(), "an advertisement", func() error {
		if s := w.cli(t, "status"); !strings.Contains(s, "advertise, on eth0") {
			return errors.New(s)
		}
		return nil
	}))
	for host, want := range map[*lab.Host]bool{w.laptop(): true, w.sidegate(): false} {
		n, err := host.Counter("", "Icmp6InRouterAdvertisements")
		if err != nil || (n > 0) != want {
			t.Errorf("%s has got %d (%v)", host.Name(), n, err)
		}
	}
}

// TestIPv6Absent: a box without IPv6 says so in one line, and decides IPv4.
func TestIPv6Absent(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	need(t, w.sidegate().SetSysctl("net.ipv6.conf.eth0.disable_ipv6", "1"))
	w.start(t, "interfaces: { lan: [eth0] }\nipv6: advertise\ndefault: direct\n")
	s := w.cli(t, "status")
	if strings.Count(s, "\n  ") != 1 || !strings.Contains(s, "eth0 has no IPv6 link-local address") || !strings.Contains(s, "nowhere at present") {
		t.Errorf("status:\n%s", s)
	}
	c, err := w.laptop().Dial(within(t, 5*time.Second), "tcp", echo.Addr4().String())
	need(t, err)
	defer c.Close()
	exchange(t, c, 100)
}
