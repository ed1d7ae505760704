package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

var binary string // the program under test, built once

func TestMain(m *testing.M) {
	code, err := func() (int, error) {
		if os.Geteuid() != 0 {
			return m.Run(), nil // what needs the program needs root
		}
		dir, err := os.MkdirTemp("", "sidegate-gateway")
		if err != nil {
			return 1, err
		}
		defer os.RemoveAll(dir)
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

// world is a lab with a gateway in it, and servers that are reached directly or through an upstream.
type world struct {
	*lab.Lab
	*lab.Gateway
	api *admin.Client
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: builds network namespaces and loads BPF programs")
	}
	l, err := lab.New(t.Context(), lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
	})
	return &world{Lab: l}
}

func (w *world) laptop() *lab.Host { return w.Host(lab.Laptop) }
func (w *world) box() *lab.Host    { return w.Host(lab.Sidegate) }
func (w *world) router() *lab.Host { return w.Host(lab.Router) }
func (w *world) server() *lab.Host { return w.Host(lab.Server) }

// start runs the gateway. A second start on the same box finds what the first one left.
func (w *world) start(t *testing.T, config string) {
	t.Helper()
	w.startWith(t, lab.GatewayOptions{Config: config})
}

func (w *world) startWith(t *testing.T, o lab.GatewayOptions) {
	t.Helper()
	o.Binary = binary
	g, err := w.box().StartGateway(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	w.Gateway, w.api = g, admin.NewClient(g.Socket)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the gateway's last words:\n%s", g.Tail(20))
		}
	})
}

// stop ends the gateway as a service manager does, and expects it to succeed.
func (w *world) stop(t *testing.T) {
	t.Helper()
	w.signal(t, syscall.SIGTERM)
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
}

func (w *world) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := w.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// rewrite replaces the configuration file, as an editor does: by renaming.
func (w *world) rewrite(t *testing.T, config string) {
	t.Helper()
	next := w.Config + ".new"
	if err := os.WriteFile(next, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, w.Config); err != nil {
		t.Fatal(err)
	}
}

func (w *world) status(t *testing.T) admin.Status {
	t.Helper()
	s, err := w.api.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// hangUp sends SIGHUP and waits until the gateway has read its configuration again.
func (w *world) hangUp(t *testing.T) admin.Reload {
	t.Helper()
	before := w.status(t).LastReload.Time
	w.signal(t, syscall.SIGHUP)
	var last admin.Reload
	await(t, "the configuration to be read again", func() error {
		if last = w.status(t).LastReload; !last.Time.After(before) {
			return errors.New("it has not been")
		}
		return nil
	})
	return last
}

// dante starts a SOCKS5 server at the upstream and returns the outbound "hk" that leads through it.
func (w *world) dante(t *testing.T) string {
	t.Helper()
	d, err := w.Host(lab.Upstream).StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	return fmt.Sprintf("outbounds: { hk: { url: %q } }\n", d.URL("socks5", lab.Credentials{}))
}

// ask asks the file server who we are, by a new connection: the laptop if the flow went direct, the
// upstream if it was proxied.
func (w *world) ask(ctx context.Context, server *lab.FileServer) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+server.Addr4().String()+"/whoami", nil)
	if err != nil {
		return "", err
	}
	response, err := w.laptop().HTTP().Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	host, _, _ := strings.Cut(string(body), ":")
	return host, err
}

// need fails the test, or skips it where a server is not installed.
func need(t *testing.T, err error) {
	t.Helper()
	var missing lab.MissingError
	if errors.As(err, &missing) {
		t.Skipf("needs %s: install the package %s", missing.Binary, missing.Package)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func await(t *testing.T, what string, condition func() error) {
	t.Helper()
	if err := lab.Wait(t.Context(), what, condition); err != nil {
		t.Fatal(err)
	}
}

// awaitWithin is await with a promise about the time.
func awaitWithin(t *testing.T, d time.Duration, what string, condition func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := lab.Wait(ctx, what, condition); err != nil {
		t.Fatal(err)
	}
}
