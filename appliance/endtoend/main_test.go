// Package endtoend holds the tests that see the built program do its work: real traffic through real
// servers in the lab's namespaces. Each file is one promise to the people behind the gateway.
//
// The scenarios (scenarios_test.go) are played with any box that can stand in the place of the lab's side router. What a box is made
// of, and where it is to be found, the environment says:
//
//   - SIDEGATE_TEST_BINARY: the program under test, where there is no Go to build it.
//   - SIDEGATE_IMAGE, SIDEGATE_OCI: the appliance's disk (gzip) and OCI image, as make image builds them;
//     SIDEGATE_IMAGE_KERNEL: the package of the disk's kernel.
//   - SIDEGATE_BOX_INTERFACE, SIDEGATE_BOX_SHELL, SIDEGATE_BOX_CONFIG: a box that stands outside of the lab (TestElsewhere).
//
// The last three belong together. INTERFACE is an interface of this machine that leads to the box's LAN interface: the lab takes it, until it
// ends. SHELL is a command, without quoting, that runs its standard input as a shell script on the box, as root, and ends as the script does,
// such as "ssh box sh": it must go another way than INTERFACE. CONFIG is the path of the file on the box that the daemon was started with and
// "sidegate reload" reads again; what is written there must outlast a reboot. On its LAN interface the box has 192.168.0.2/24 and
// fd00:c0a8::2/64, the default routes by 192.168.0.1 and fd00:c0a8::1, and the hardware address 02:00:c0:a8:00:02. It has sidegate, busybox,
// ip, pidof and reboot, and an init that starts the daemon and starts it again. When the test begins the daemon serves, whatever its
// configuration.
package endtoend

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

var binary string // the program under test, built once

func TestMain(m *testing.M) {
	if runMode() {
		return
	}
	code, err := func() (int, error) {
		dir, err := os.MkdirTemp("", "sidegate-endtoend")
		if err != nil {
			return 1, err
		}
		defer os.RemoveAll(dir)
		if binary = os.Getenv("SIDEGATE_TEST_BINARY"); binary != "" { // where there is no Go
			return m.Run(), nil
		}
		binary = filepath.Join(dir, "sidegate")
		if out, err := exec.Command("go", "build", "-o", binary, "sidegate/appliance/sidegate").CombinedOutput(); err != nil {
			return 1, fmt.Errorf("building sidegate: %w\n%s", err, out)
		}
		return m.Run(), nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// world is a lab with a gateway in it.
type world struct {
	*lab.Lab
	gateway *lab.Gateway
	path    string // PATH of doctor; empty: that of the tests
	cgroup  string // of those programs of the box that are decided for; see box
}

func (w world) laptop() *lab.Host   { return w.Host(lab.Laptop) }
func (w world) sidegate() *lab.Host { return w.Host(lab.Sidegate) }
func (w world) router() *lab.Host   { return w.Host(lab.Router) }
func (w world) server() *lab.Host   { return w.Host(lab.Server) }
func (w world) upstream() *lab.Host { return w.Host(lab.Upstream) }

func newWorld(t *testing.T, o lab.Options) world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: builds network namespaces and loads BPF programs")
	}
	l, err := lab.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
	})
	return world{Lab: l}
}

// start runs the gateway with this configuration; its log is shown if the test fails.
func (w *world) start(t *testing.T, config string, args ...string) {
	t.Helper()
	g, err := w.sidegate().StartGateway(t.Context(), lab.GatewayOptions{Binary: binary, Config: config, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	w.gateway = g
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the gateway's last words:\n%s", g.Tail(20))
		}
	})
}

// startProxied starts a SOCKS5 server at the upstream, and the gateway with everything proxied through it.
func (w *world) startProxied(t *testing.T, more ...string) {
	t.Helper()
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	w.start(t, fmt.Sprintf("interfaces: { lan: auto }\noutbounds:\n  hk: { url: %q }\n%s\ndefault: hk\n",
		dante.URL("socks5", lab.Credentials{}), strings.Join(more, "\n")))
}

// need fails the test, or skips it where a server is not installed.
func need(t *testing.T, err error) {
	t.Helper()
	needInstalled(t, err)
	if err != nil {
		t.Fatal(err)
	}
}

// needInstalled skips the test where err says that a program is not installed.
func needInstalled(t *testing.T, err error) {
	t.Helper()
	var missing lab.MissingError
	if errors.As(err, &missing) {
		t.Skipf("needs %s: install the package %s", missing.Binary, missing.Package)
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// cli runs a command of the program against the running gateway.
func (w world) cli(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), binary, append(args, "--socket", w.gateway.Socket)...).CombinedOutput()
	if err != nil {
		t.Fatalf("sidegate %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// both is what a test does for IPv4 and IPv6: the client's address and the server's.
func both(client, server *lab.Host) map[string][2]netip.Addr {
	return map[string][2]netip.Addr{
		"v4": {client.Addr4(), server.Addr4()},
		"v6": {client.Addr6(), server.Addr6()},
	}
}

func captureOn(t *testing.T, h *lab.Host, name string) *lab.Capture {
	t.Helper()
	c, err := h.CaptureOn(name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// packets counts what a capture saw; a capture that lost packets fails the test.
func packets(t *testing.T, c *lab.Capture, match func(lab.Packet) bool) uint64 {
	t.Helper()
	n, err := c.Count(match)
	if err != nil {
		t.Fatal(err)
	}
	return n.Packets
}

// never fails with what was seen if anything matches.
func never(t *testing.T, c *lab.Capture, what string, match func(lab.Packet) bool) {
	t.Helper()
	if packets(t, c, match) == 0 {
		return
	}
	for p, n := range c.All() {
		if match(p) {
			t.Errorf("%s: %d × %s", what, n.Packets, p)
		}
	}
}
