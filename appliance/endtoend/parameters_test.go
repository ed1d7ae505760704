package endtoend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// parameter is how one line of `sidegate sysctls` is tried: set wrong it does harm, and set right it does none.
type parameter struct {
	name, wrong string
	prepare     func(*testing.T, *parameterWorld) // makes the box one that needs it
	harm        func(*testing.T, *parameterWorld) error
}

// parameterWorld has an echo service that is direct, and another that is proxied.
type parameterWorld struct {
	world
	direct, proxied *lab.Echo
}

const lanInterface = "eth0"

func newParameterWorld(t *testing.T) *parameterWorld {
	w := &parameterWorld{world: newWorld(t, lab.Options{})}
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	w.direct, err = w.server().StartEcho(t.Context(), 7)
	need(t, err)
	w.proxied, err = w.server().StartEcho(t.Context(), 8)
	need(t, err)
	w.start(t, fmt.Sprintf("interfaces: { lan: [%s] }\noutbounds: { hk: { url: %q } }\nrules: [ { port: 8, outbound: hk } ]\ndefault: direct\n",
		lanInterface, dante.URL("socks5", lab.Credentials{})))
	return w
}

// silent is an error unless an exchange with the service comes to nothing.
func (w *parameterWorld) silent(t *testing.T, from *lab.Host, to netip.AddrPort) error {
	if err := w.exchanges(t, from, to); err == nil {
		return fmt.Errorf("%s answers", to)
	}
	return nil
}

func (w *parameterWorld) exchanges(t *testing.T, from *lab.Host, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = lab.PingPong(ctx, c, 10, 1)
	return err
}

func noForwarding(t *testing.T, w *parameterWorld) error {
	return w.silent(t, w.laptop(), w.direct.Addr4())
}

func noProxy(t *testing.T, w *parameterWorld) error {
	return w.silent(t, w.laptop(), w.proxied.Addr4())
}

// redirected is an error unless the box tells a client of the router.
func redirected(t *testing.T, w *parameterWorld) error {
	before, err := w.sidegate().Counter("Icmp", "OutRedirects")
	need(t, err)
	if err := w.exchanges(t, w.laptop(), w.direct.Addr4()); err != nil {
		return err
	}
	if after, err := w.sidegate().Counter("Icmp", "OutRedirects"); err != nil || after == before {
		return fmt.Errorf("no redirect was sent (%v)", err)
	}
	return nil
}

// localnet makes the laptop send to a loopback address of the box, and the box run a service there.
func localnet(t *testing.T, w *parameterWorld) {
	_, err := w.sidegate().StartEcho(t.Context(), 9)
	need(t, err)
	need(t, w.laptop().SetSysctl("net.ipv4.conf.all.route_localnet", "1"))
	run(t, w.laptop(), "ip route del local 127.0.0.0/8 table local")
	run(t, w.laptop(), "ip route add 127.0.0.2/32 via "+w.sidegate().Addr4().String()+" src "+w.laptop().Addr4().String())
}

func exposed(t *testing.T, w *parameterWorld) error {
	return w.exchanges(t, w.laptop(), netip.MustParseAddrPort("127.0.0.2:9"))
}

// bridged makes the LAN interface a bridge, with a second client at a port of its own, and a firewall that forwards nothing.
func bridged(t *testing.T, w *parameterWorld) {
	_, err := w.AddClient(t.Context(), "neighbour")
	need(t, err)
	box := w.sidegate()
	run(t, w.Host("switch"), "ip link set neighbour netns "+box.Namespace())
	for _, line := range []string{
		"ip link add br0 type bridge", "ip link set eth0 master br0", "ip link set neighbour master br0 up", "ip link set br0 up",
		"ip address flush dev eth0", "ip address add " + box.Interface().Addr4.String() + " dev br0",
		"ip -6 address add " + box.Interface().Addr6.String() + " dev br0 nodad",
		"iptables -P FORWARD DROP", "ip6tables -P FORWARD DROP",
	} {
		run(t, box, line)
	}
	need(t, box.SetSysctl("net.ipv4.conf.br0.send_redirects", "0"))
	for _, family := range []string{"ip", "ip6"} { // a new namespace begins with 1
		if err := box.SetSysctl("net.bridge.bridge-nf-call-"+family+"tables", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	run(t, box, fmt.Sprintf("sed -i s/\\[%s\\]/[br0]/ %s", lanInterface, w.gateway.Config))
	w.cli(t, "reload")
}

func separated(family int) func(*testing.T, *parameterWorld) error {
	return func(t *testing.T, w *parameterWorld) error {
		to := w.laptop().Addr4()
		if family == 6 {
			to = w.laptop().Addr6()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := w.Host("neighbour").Ping(ctx, to); err == nil {
			return errors.New("the clients reach each other")
		}
		return nil
	}
}

// advertised makes the box take its IPv6 route from the router's advertisements, before it forwards.
func advertised(t *testing.T, w *parameterWorld) {
	box := w.sidegate()
	_, err := w.router().StartRadvd(t.Context(), "lan")
	need(t, err)
	for name, value := range map[string]string{"accept_ra": "2", "accept_ra_rtr_pref": "1", "autoconf": "1"} {
		need(t, box.SetSysctl("net.ipv6.conf.eth0."+name, value))
	}
	run(t, box, "ip -6 route del default")
	need(t, lab.Wait(within(t, 20*time.Second), "the box to learn its route", func() error { return w.hasAdvertisedRoute(t) }))
}

func (w *parameterWorld) hasAdvertisedRoute(t *testing.T) error {
	out, err := w.sidegate().Exec(t.Context(), "ip", "-6", "route", "show", "default", "proto", "ra")
	if err == nil && len(strings.TrimSpace(string(out))) == 0 {
		err = errors.New("it has none")
	}
	return err
}

// routeless: the kernel forgets the advertised route, or takes none.
func routeless(t *testing.T, w *parameterWorld) error {
	run(t, w.sidegate(), "ip -6 route flush proto ra")
	seen := captureOn(t, w.sidegate(), lanInterface)
	// An advertisement has come, and the route has not.
	need(t, lab.Wait(within(t, 20*time.Second), "an advertisement", func() error {
		if packets(t, seen, func(p lab.Packet) bool { return !p.Out && p.Protocol == lab.ICMPv6 && p.ICMPType == 134 }) < 2 {
			return errors.New("none came")
		}
		return nil
	}))
	if w.hasAdvertisedRoute(t) == nil {
		return errors.New("it has its route")
	}
	return nil
}

var parameters = []parameter{
	{"net.ipv4.ip_forward", "0", nil, noForwarding},
	{"net.ipv4.conf.eth0.forwarding", "0", nil, noForwarding},
	{"net.ipv4.conf.all.send_redirects", "1", nil, redirected},
	{"net.ipv4.conf.eth0.send_redirects", "1", nil, redirected},
	{"net.ipv4.conf.all.src_valid_mark", "1", nil, noProxy},
	{"net.ipv4.conf.eth0.src_valid_mark", "1", nil, noProxy},
	{"net.ipv4.conf.all.route_localnet", "1", localnet, exposed},
	{"net.ipv4.conf.eth0.route_localnet", "1", localnet, exposed},
	{"net.ipv6.conf.all.forwarding", "0", nil, func(t *testing.T, w *parameterWorld) error {
		return w.silent(t, w.laptop(), w.direct.Addr6())
	}},
	{"net.ipv6.conf.eth0.accept_ra", "1", advertised, routeless},
	{"net.bridge.bridge-nf-call-iptables", "1", bridged, separated(4)},
	{"net.bridge.bridge-nf-call-ip6tables", "1", bridged, separated(6)},
}

// wrongParameters are what `sidegate sysctls` says is wrong, by name.
func (w *parameterWorld) wrongParameters(t *testing.T) map[string]bool {
	t.Helper()
	out, err := w.sidegate().Exec(t.Context(), binary, "sysctls", "-c", w.gateway.Config)
	need(t, err)
	wrong := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); f[0] == "!" {
			wrong[f[1]] = true
		}
	}
	return wrong
}

// TestKernelParameters: each parameter of the list does harm if it is wrong, and only then; it is named, and what is said helps.
func TestKernelParameters(t *testing.T) {
	for _, p := range parameters {
		t.Run(p.name, func(t *testing.T) {
			w := newParameterWorld(t)
			if p.prepare != nil {
				p.prepare(t, w)
			}
			right, err := w.sidegate().Sysctl(p.name)
			if err != nil {
				t.Skipf("this kernel has no %s", p.name)
			}
			if err := p.harm(t, w); err == nil {
				t.Fatalf("there is harm with %s=%s, as it should be", p.name, right)
			}
			if wrong := w.wrongParameters(t); len(wrong) > 0 {
				t.Errorf("all is well, and these are said to be wrong: %v", wrong)
			}

			need(t, w.sidegate().SetSysctl(p.name, p.wrong))
			if err := p.harm(t, w); err != nil {
				t.Errorf("%s=%s does no harm: %v", p.name, p.wrong, err)
			}
			if wrong := w.wrongParameters(t); !wrong[p.name] || len(wrong) > 2 { // ip_forward is also eth0's
				t.Errorf("with %s=%s these are said to be wrong: %v", p.name, p.wrong, wrong)
			}
			need(t, lab.Wait(within(t, 10*time.Second), "the gateway to say so", func() error {
				if status := w.cli(t, "status"); !strings.Contains(status, p.name+" is "+p.wrong) {
					return errors.New(status)
				}
				return nil
			}))

			run(t, w.sidegate(), "sysctl -q -w "+p.name+"="+right)
			if err := p.harm(t, w); err == nil {
				t.Errorf("there is harm after `sysctl -w %s=%s`", p.name, right)
			}
		})
	}
}

// TestKernelParametersAreListed: the list has no line that is not tried, and the README has them all.
func TestKernelParametersAreListed(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), binary, "sysctls", "--json").Output()
	need(t, err)
	var listed []struct{ Name, Value, When, Why, Source string }
	need(t, json.Unmarshal(out, &listed))
	tried := map[string]bool{}
	for _, p := range parameters {
		tried[strings.Replace(p.name, lanInterface, "<lan>", 1)] = true
		tried[strings.Replace(p.name, lanInterface, "<uplink>", 1)] = true
	}
	readme, err := os.ReadFile("../../README.md")
	need(t, err)
	for _, p := range listed {
		if line := fmt.Sprintf("| `%s` | %s | %s | %s |", p.Name, p.Value, p.When, p.Why); !strings.Contains(string(readme), line) {
			t.Errorf("the README's table of kernel parameters lacks\n%s", line)
		}
		if !tried[p.Name] {
			t.Errorf("%s is in the list, and no test shows what for", p.Name)
		}
		if p.Value == "" || p.Why == "" || p.Source == "" {
			t.Errorf("%+v lacks something", p)
		}
	}
}

// TestApplySysctls: --apply-sysctls sets what is wrong, for interfaces that come later too, and puts back what was there before, also
// after a crash.
func TestApplySysctls(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	box := w.sidegate()
	before := map[string]string{
		"net.ipv4.ip_forward": "0", "net.ipv6.conf.all.forwarding": "0", "net.ipv4.conf.all.send_redirects": "1", "net.ipv4.conf.eth0.send_redirects": "1",
	}
	need(t, box.SetSysctl("net.ipv4.ip_forward", "0")) // first: it resets others
	for name, value := range before {
		need(t, box.SetSysctl(name, value))
	}
	check := func(when string, restored bool) {
		t.Helper()
		for name, value := range before {
			is, err := box.Sysctl(name)
			need(t, err)
			if (is == value) != restored {
				t.Errorf("%s %s is %s; before the gateway it was %s", when, name, is, value)
			}
		}
	}
	start := func() { w.start(t, everythingDirect, "--apply-sysctls") }
	forwards := func() {
		t.Helper()
		for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
			c, err := w.laptop().Dial(within(t, 5*time.Second), "tcp", to.String())
			need(t, err)
			exchange(t, c, 100)
			c.Close()
		}
	}
	start()
	check("while it runs", false)
	forwards()
	if status := w.cli(t, "status"); strings.Contains(status, "net.ipv4") {
		t.Errorf("it is not content with what it has set:\n%s", status)
	}
	need(t, w.gateway.Kill())
	check("after a crash", false)
	start()
	forwards()
	need(t, box.SetSysctl("net.ipv4.conf.eth0.send_redirects", "1"))
	need(t, lab.Wait(within(t, 10*time.Second), "what others have changed to be set again", func() error {
		if is, err := box.Sysctl("net.ipv4.conf.eth0.send_redirects"); err != nil || is != "0" {
			return fmt.Errorf("it is %s, %v", is, err)
		}
		return nil
	}))
	need(t, w.gateway.Signal(syscall.SIGTERM))
	if err := w.gateway.Wait(); err != nil {
		t.Error(err)
	}
	check("after the stop", true)
}
