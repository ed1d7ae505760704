package admin

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"sidegate/appliance/policy"
)

// gatewayOf answers with fixed values.
type gatewayOf struct {
	status Status
	err    error
	asked  map[string][]string
}

func (g *gatewayOf) Status(context.Context) (Status, error) { return g.status, g.err }
func (g *gatewayOf) Flows(context.Context) ([]Flow, error)  { return []Flow{{Rule: "web"}}, g.err }

func (g *gatewayOf) Names(context.Context) ([]Name, error) {
	return []Name{{Client: "02:00:00:00:00:03", Address: netip.MustParseAddr("203.0.113.10"), Names: []string{"www.example", "cdn.example"}}}, g.err
}

func (g *gatewayOf) Rules(context.Context) ([]Rule, error)           { return []Rule{{Name: "web"}}, g.err }
func (g *gatewayOf) FlowCounts(context.Context) ([]FlowCount, error) { return nil, g.err }
func (g *gatewayOf) Reload(context.Context) (Reload, error)          { return Reload{OK: true}, g.err }

func (g *gatewayOf) Explain(_ context.Context, facts map[string][]string) (LiveExplanation, error) {
	g.asked = facts
	return LiveExplanation{Generation: 3, Policy: Explanation{Answer: Answer{Verdict: policy.Direct}}}, g.err
}

// serving starts the API and returns its client; it ends with the test.
func serving(t *testing.T, g Gateway) (*Client, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "admin.sock")
	s, err := Listen(SocketOptions{Path: path}, g, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket's directory is left behind: %v", err)
		}
	})
	<-s.Ready()
	return NewClient(path), path
}

func TestAPI(t *testing.T) {
	g := &gatewayOf{status: Status{Version: "v1", PID: 7}}
	c, _ := serving(t, g)
	ctx := t.Context()
	if s, err := c.Status(ctx); err != nil || s.Version != "v1" || s.PID != 7 {
		t.Errorf("status: %+v, %v", s, err)
	}
	if f, err := c.Flows(ctx); err != nil || len(f) != 1 || f[0].Rule != "web" {
		t.Errorf("flows: %+v, %v", f, err)
	}
	if n, err := c.Names(ctx); err != nil || len(n) != 1 || n[0].Address.String() != "203.0.113.10" || len(n[0].Names) != 2 {
		t.Errorf("names: %+v, %v", n, err)
	}
	if r, err := c.Rules(ctx); err != nil || len(r) != 1 || r[0].Name != "web" {
		t.Errorf("rules: %+v, %v", r, err)
	}
	if r, err := c.Reload(ctx); err != nil || !r.OK {
		t.Errorf("reload: %+v, %v", r, err)
	}
	facts := map[string][]string{"domain": {"a b&c=d", "é"}, "ip": {"2001:db8::1"}}
	if e, err := c.Explain(ctx, facts); err != nil || e.Generation != 3 {
		t.Errorf("explain: %+v, %v", e, err)
	}
	if len(g.asked) != 2 || g.asked["domain"][0] != "a b&c=d" || g.asked["domain"][1] != "é" || g.asked["ip"][0] != "2001:db8::1" {
		t.Errorf("the facts arrive as %q", g.asked)
	}
}

// TestErrors: what the gateway says arrives as it was said, with the right blame.
func TestErrors(t *testing.T) {
	g := &gatewayOf{err: errors.New("reading the drops: no such map")}
	c, path := serving(t, g)
	if _, err := c.Status(t.Context()); err == nil || err.Error() != g.err.Error() {
		t.Errorf("got %v", err)
	}
	for _, r := range []struct {
		method, path string
		err          error
		want         int
	}{
		{http.MethodGet, "/v1/status", g.err, http.StatusInternalServerError},
		{http.MethodGet, "/v1/explain", BadRequest{errors.New("ip is missing")}, http.StatusBadRequest},
		{http.MethodGet, "/v1/status", nil, http.StatusOK},
		{http.MethodPost, "/v1/status", nil, http.StatusNotFound},
		{http.MethodGet, "/v1/reload", nil, http.StatusNotFound}, // reading changes nothing
		{http.MethodGet, "/metrics", nil, http.StatusNotFound},
		{http.MethodGet, "/v1/explain?ip=" + strings.Repeat("1", 64<<10), nil, http.StatusRequestHeaderFieldsTooLarge},
	} {
		g.err = r.err
		request, err := http.NewRequestWithContext(t.Context(), r.method, "http://sidegate"+r.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := NewClient(path).http.Do(request)
		if err != nil {
			t.Fatalf("%s %.40s: %v", r.method, r.path, err)
		}
		body, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if response.StatusCode != r.want {
			t.Errorf("%s %.40s: %d, want %d: %s", r.method, r.path, response.StatusCode, r.want, body)
		}
	}
}

// TestNotRunning: a client says what to do where there is no socket, or one that nobody listens on.
func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	stale := staleSocket(t, filepath.Join(dir, "stale.sock"))
	for _, path := range []string{filepath.Join(dir, "none.sock"), stale} {
		_, err := NewClient(path).Status(t.Context())
		if !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "sidegate run") || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// staleSocket is what a daemon that was killed leaves behind.
func staleSocket(t *testing.T, path string) string {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	return path
}

func TestSocket(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	g := &gatewayOf{}
	path := filepath.Join(t.TempDir(), "deep", "admin.sock")

	first, err := Listen(SocketOptions{Path: path}, g, log)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("the socket's mode is %v, want 0660 (%v)", info.Mode(), err)
	}
	if dir, err := os.Stat(filepath.Dir(path)); err != nil || dir.Mode().Perm() != 0o755 {
		t.Errorf("the directory's mode is %v, want 0755 (%v)", dir.Mode(), err)
	}
	if _, err := Listen(SocketOptions{Path: path}, g, log); err == nil || !strings.Contains(err.Error(), "another sidegate answers") {
		t.Errorf("a second one on a live socket: %v", err)
	}
	first.Close()
	if _, err := os.Lstat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory stays after Close: %v", err)
	}

	dir := t.TempDir()
	second, err := Listen(SocketOptions{Path: staleSocket(t, filepath.Join(dir, "stale.sock"))}, g, log)
	if err != nil {
		t.Errorf("the socket of one that crashed is in the way: %v", err)
	} else {
		second.Close()
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("a directory of somebody else's was removed: %v", err)
	}

	file := filepath.Join(dir, "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(SocketOptions{Path: file}, g, log); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file in the way: %v", err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "x" {
		t.Errorf("the file was touched: %q, %v", text, err)
	}
	if _, err := Listen(SocketOptions{Path: filepath.Join(dir, "g.sock"), Group: "no-such-group"}, g, log); err == nil || !strings.Contains(err.Error(), "groupadd") {
		t.Errorf("an unknown group: %v", err)
	}
}

// TestSocketGroup needs root to give a file to a group that we are not in.
func TestSocketGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: changes the group of a file")
	}
	path := filepath.Join(t.TempDir(), "admin.sock")
	s, err := Listen(SocketOptions{Path: path, Group: "4242"}, &gatewayOf{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil || st.Gid != 4242 {
		t.Errorf("the group is %d (%v)", st.Gid, err)
	}
}

func TestLocalHost(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "localhost:9653": true, "127.0.0.1": true, "127.0.0.1:9653": true, "127.1.2.3:1": true,
		"[::1]:9653": true, "[::1]": true, "::1": true,
		"": false, "evil.example": false, "localhost.evil.example": false, "127.0.0.1.evil.example:9653": false,
		"192.168.0.2:9653": false, "0.0.0.0": false, "[::]:9653": false,
	} {
		if got := localHost(host); got != want {
			t.Errorf("Host %q: %t, want %t", host, got, want)
		}
	}
}
