package endtoend

import (
	"fmt"
	"net/netip"
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
