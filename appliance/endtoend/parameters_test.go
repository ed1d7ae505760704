package endtoend

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

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

// TestBoxThatForwardsNothingBefore: a box that --apply-sysctls has made forward does so no longer when the gateway is stopped, and the log
// says that. With the parameters kept by the file that `sysctls` prints it forwards plainly, and says so.
func TestBoxThatForwardsNothingBefore(t *testing.T) {
	if _, err := exec.LookPath("sysctl"); err != nil {
		t.Skip("needs sysctl: install the package procps")
	}
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	box := w.sidegate()
	for _, forwarding := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		need(t, box.SetSysctl(forwarding, "0"))
	}
	forwards := func(when string, want bool) {
		t.Helper()
		for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
			if err := converse(within(t, patience(want)), w.laptop(), "tcp", to); (err == nil) != want {
				t.Errorf("%s, to %s: %v; it forwards: %t", when, to, err, want)
			}
		}
	}
	lastWords := func(want ...string) {
		t.Helper()
		need(t, w.gateway.Signal(syscall.SIGTERM))
		need(t, w.gateway.Wait())
		for _, text := range want {
			if said := w.gateway.Tail(1); !strings.Contains(said, text) {
				t.Errorf("it does not say %q last:\n%s", text, w.gateway.Tail(5))
			}
		}
	}
	w.start(t, everythingDirect, "--apply-sysctls")
	forwards("while it runs", true)
	lastWords("the box does not forward plainly: net.ipv4.ip_forward is 0", "net.ipv6.conf.all.forwarding is 0", "sidegate sysctls --conf >/etc/sysctl.d/")
	forwards("after the stop", false)

	conf, err := box.Exec(t.Context(), binary, "sysctls", "--conf")
	need(t, err)
	file := filepath.Join(t.TempDir(), "60-sidegate.conf")
	need(t, os.WriteFile(file, []byte(conf), 0o644))
	run(t, box, "sysctl -p "+file)
	forwards("with the file", true)
	need(t, box.SetSysctl("net.ipv4.conf.all.send_redirects", "1")) // which is put back, and forwards all the same
	w.start(t, everythingDirect, "--apply-sysctls")
	lastWords("the box forwards plainly")
	forwards("after the other stop", true)
}

// TestNoClientIsRedirected: with what distributions set, send_redirects under all, and set again, no client is told of the router.
func TestNoClientIsRedirected(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	redirects := func() uint64 {
		n, err := w.sidegate().Counter("Icmp", "OutRedirects")
		need(t, err)
		return n
	}
	// Of a datagram nothing comes late, as the last packets of a connection do: while the parameters are wrong it is quiet.
	visit := func() { need(t, converse(within(t, 5*time.Second), w.laptop(), "udp", echo.Addr4())) }
	distribution := func() {
		for _, of := range []string{"all", "eth0"} {
			need(t, w.sidegate().SetSysctl("net.ipv4.conf."+of+".send_redirects", "1"))
		}
	}
	distribution()
	visit()
	before := redirects()
	if before == 0 {
		t.Fatal("nothing is redirected without the gateway: this test proves nothing")
	}
	run(t, w.laptop(), "ip route flush cache")
	w.start(t, everythingDirect, "--apply-sysctls")
	for range 10 {
		visit()
	}
	distribution()
	need(t, lab.Wait(within(t, 10*time.Second), "both to be set again", func() error {
		for _, of := range []string{"all", "eth0"} { // either is enough for the kernel
			if value, err := w.sidegate().Sysctl("net.ipv4.conf." + of + ".send_redirects"); err != nil || value != "0" {
				return fmt.Errorf("that of %s is %s, %v", of, value, err)
			}
		}
		return nil
	}))
	for range 10 {
		visit()
	}
	if n := redirects() - before; n != 0 {
		t.Errorf("%d redirects were sent", n)
	}
}

// TestSysctlsAreRestoredByASuccessor: who puts the originals back need not be who set the parameters, nor have been told to set any;
// SIGUSR2 leaves them. What an interface that comes later needs is set and put back, too.
func TestSysctlsAreRestoredByASuccessor(t *testing.T) {
	w := newWorld(t, lab.Options{})
	box := w.sidegate()
	wrong := map[string]string{
		"net.ipv4.ip_forward": "0", "net.ipv6.conf.all.forwarding": "0",
		"net.ipv4.conf.all.send_redirects": "1", "net.ipv4.conf.eth0.send_redirects": "1",
	}
	for name, value := range wrong {
		need(t, box.SetSysctl(name, value))
	}
	values := func(when string, want func(name string) string) {
		t.Helper()
		for name := range wrong {
			if value, err := box.Sysctl(name); err != nil || value != want(name) {
				t.Errorf("%s, %s is %s, %v; want %s", when, name, value, err, want(name))
			}
		}
	}
	right := func(name string) string { return map[string]string{"0": "1", "1": "0"}[wrong[name]] }
	start := func(args ...string) *lab.Gateway {
		t.Helper()
		g, err := box.StartGateway(t.Context(), lab.GatewayOptions{
			Binary: binary, Config: "interfaces: { lan: [eth0, lan1] }\ndefault: direct\n", Args: args,
		})
		need(t, err)
		return g
	}
	first := start("--apply-sysctls")
	values("after the start", right)
	for name := range wrong {
		if n := strings.Count(first.Tail(100), "parameter="+name+" "); n != 1 {
			t.Errorf("%s is logged %d times", name, n)
		}
	}
	secondLAN(t, w)
	need(t, box.SetSysctl("net.ipv4.conf.lan1.send_redirects", "1"))
	need(t, lab.Wait(within(t, 20*time.Second), "the later interface's parameter", func() error {
		value, err := box.Sysctl("net.ipv4.conf.lan1.send_redirects")
		if err == nil && value != "0" {
			err = errors.New("it is " + value)
		}
		return err
	}))

	need(t, first.Kill())
	values("after a crash", right)
	second := start("--apply-sysctls")
	need(t, second.Signal(syscall.SIGUSR2))
	<-second.Done()
	values("after SIGUSR2", right)
	third := start()
	need(t, third.Signal(syscall.SIGTERM))
	if err := third.Wait(); err != nil {
		t.Error(err)
	}
	values("after the stop", func(name string) string { return wrong[name] })
	if value, err := box.Sysctl("net.ipv4.conf.lan1.send_redirects"); err != nil || value != "1" {
		t.Errorf("after the stop, the later interface's is %s, %v", value, err)
	}
}

// TestSysctlsKeepTheAdvertisedRoute: the order in which parameters are set is part of the list. IPv6 forwarding would take the box's own
// route away at once, if accept_ra did not come first.
func TestSysctlsKeepTheAdvertisedRoute(t *testing.T) {
	w := newWorld(t, lab.Options{})
	box := w.sidegate()
	advertisedUplink(t, w)
	need(t, box.SetSysctl("net.ipv6.conf.up0.accept_ra", "1"))
	need(t, box.SetSysctl("net.ipv6.conf.all.forwarding", "0"))
	route := func() error {
		out, err := box.Exec(t.Context(), "ip", "-6", "route", "show", "default", "proto", "ra")
		if err == nil && out == "" {
			err = errors.New("the box has no advertised route")
		}
		return err
	}
	need(t, lab.Wait(within(t, 20*time.Second), "the route", route))
	watch := box.Command(t.Context(), "ip", "-6", "monitor", "route")
	var seen bytes.Buffer
	watch.Stdout = &seen
	monitor, err := watch.Start()
	need(t, err)
	w.start(t, everythingDirect, "--apply-sysctls")
	need(t, route())
	need(t, monitor.Kill())
	if strings.Contains(seen.String(), "Deleted default") {
		t.Errorf("the route was lost meanwhile:\n%s", seen.String())
	}
	for name, want := range map[string]string{"net.ipv6.conf.up0.accept_ra": "2", "net.ipv6.conf.all.forwarding": "1"} {
		if is, err := box.Sysctl(name); err != nil || is != want {
			t.Errorf("%s is %s, %v", name, is, err)
		}
	}
	need(t, w.gateway.Signal(syscall.SIGTERM)) // it would else leave its record on the machine
	need(t, w.gateway.Wait())
}
