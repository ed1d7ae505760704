package lab

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// skipMissing skips a test whose peer is not installed.
func skipMissing(t *testing.T, err error) {
	t.Helper()
	if missing, ok := errors.AsType[MissingError](err); ok {
		t.Skip("needs a program: ", missing)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestProxies asks real proxies for a page with curl: with the right password, where there is one, and with a wrong one.
func TestProxies(t *testing.T) {
	l := newLab(t, Options{})
	up := l.Host(Upstream)
	files, err := l.Host(Server).StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	squid := func(tls bool) func(Credentials) (*Daemon, error) {
		return func(c Credentials) (*Daemon, error) {
			return up.StartSquid(t.Context(), SquidOptions{Credentials: c, TLS: tls})
		}
	}
	for _, proxy := range []struct {
		name, scheme string
		start        func(Credentials) (*Daemon, error)
	}{
		{"dante", "socks5", func(c Credentials) (*Daemon, error) {
			return up.StartDante(t.Context(), DanteOptions{Credentials: c})
		}},
		{"microsocks", "socks5", func(c Credentials) (*Daemon, error) { return up.StartMicrosocks(t.Context(), 1090, c) }},
		{"squid", "http", squid(false)},
		{"squid-tls", "https", squid(true)},
	} {
		for _, c := range []Credentials{{}, {"alice", "secret"}} {
			t.Run(proxy.name+"/"+c.User, func(t *testing.T) {
				d, err := proxy.start(c)
				skipMissing(t, err)
				ask := func(c Credentials, to netip.AddrPort) (string, error) {
					return l.Host(Laptop).Exec(brief(t), "curl", "-sSgp", "--max-time", "5", "-x", d.URL(proxy.scheme, c),
						"--proxy-cacert", d.CA, "http://"+to.String()+"/whoami")
				}
				for to, want := range map[netip.AddrPort]netip.Addr{files.Addr4(): up.Addr4(), files.Addr6(): up.Addr6()} {
					answer, err := ask(c, to)
					if err != nil {
						t.Fatal(err)
					}
					if from, err := netip.ParseAddrPort(strings.TrimSpace(answer)); err != nil || from.Addr() != want {
						t.Errorf("%s was asked by %q, want the upstream %s", to, answer, want)
					}
				}
				if c.User != "" {
					answer, err := ask(Credentials{c.User, "wrong"}, files.Addr4())
					if err == nil {
						t.Errorf("a wrong password got %q", answer)
					}
				}
				if err := d.Kill(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestDanteUDP speaks SOCKS5 UDP ASSOCIATE (RFC 1928) by hand.
func TestDanteUDP(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	d, err := l.Host(Upstream).StartDante(ctx, DanteOptions{})
	skipMissing(t, err)
	echo, err := l.Host(Server).StartEcho(ctx, 7)
	if err != nil {
		t.Fatal(err)
	}
	control, err := l.Host(Laptop).Dial(ctx, "tcp", d.Addr4.String())
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	control.SetDeadline(time.Now().Add(5 * time.Second))
	reply := make([]byte, 10)
	control.Write([]byte{5, 1, 0})
	if _, err := io.ReadFull(control, reply[:2]); err != nil || reply[1] != 0 {
		t.Fatalf("greeting: %v %v", reply[:2], err)
	}
	control.Write([]byte{5, 3, 0, 1, 0, 0, 0, 0, 0, 0})
	if _, err := io.ReadFull(control, reply); err != nil || reply[1] != 0 || reply[3] != 1 {
		t.Fatalf("associate: %v %v", reply, err)
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[4:8])), uint16(reply[8])<<8|uint16(reply[9]))
	c, err := l.Host(Laptop).Dial(ctx, "udp", relay.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	to := echo.Addr4().Addr().As4()
	message := append([]byte{0, 0, 0, 1, to[0], to[1], to[2], to[3], 0, 7}, "hello"...)
	if _, err := c.Write(message); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 100)
	n, err := c.Read(answer)
	if err != nil || !bytes.Equal(answer[:n], message) {
		t.Fatalf("got %q, %v, want %q", answer[:n], err, message)
	}
	if s := echo.Senders(); len(s) != 1 || s[0].Addr() != l.Host(Upstream).Addr4() {
		t.Errorf("the echo server saw %v, want the upstream once", s)
	}
}

func TestIperf3(t *testing.T) {
	l := newLab(t, Options{})
	d, err := l.Host(Server).StartIperf3(t.Context(), 5201)
	skipMissing(t, err)
	out, err := l.Host(Laptop).Exec(brief(t), "iperf3", "-c", d.Addr4.Addr().String(), "-t1", "-J")
	if err != nil || !strings.Contains(out, "bits_per_second") {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestMissing(t *testing.T) {
	l := newLab(t, Options{})
	if err := os.Mkdir(l.Dir()+"/empty", 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := find("no-such-proxy", "no-such-package")
	if _, ok := errors.AsType[MissingError](err); !ok || !strings.Contains(err.Error(), "no-such-package") {
		t.Errorf("got %v, want a MissingError that names the package", err)
	}
	_, err = l.Host(Laptop).startDaemon(l.Host(Laptop).Command(t.Context(), "sh", "-c", "echo no luck today; exit 3"), 99)
	if err == nil || !strings.Contains(err.Error(), "no luck today") {
		t.Errorf("got %v, want the last words of a server that cannot start", err)
	}
}

// TestFiles checks what the file server serves, takes and remembers.
func TestFiles(t *testing.T) {
	l := newLab(t, Options{})
	files, err := l.Host(Server).StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	const size = 1_234_567
	client := l.Host(Laptop).HTTP()
	response, err := client.Get("http://" + files.Addr6().String() + "/bytes/1234567")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || len(body) != size {
		t.Fatalf("got %d bytes, %v", len(body), err)
	}
	response, err = client.Post("http://"+files.Addr4().String()+"/upload", "", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	sum, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || response.StatusCode != http.StatusOK || strings.TrimSpace(string(sum)) != Digest(size) {
		t.Errorf("uploading what was downloaded gives %q, %v, want %s", sum, err, Digest(size))
	}
	requests := files.Requests()
	if len(requests) != 2 {
		t.Fatalf("the server remembers %v", requests)
	}
	for i, want := range []Request{
		{netip.AddrPortFrom(l.Host(Laptop).Addr6(), 0), "GET", "/bytes/1234567", size},
		{netip.AddrPortFrom(l.Host(Laptop).Addr4(), 0), "POST", "/upload", size},
	} {
		got := requests[i]
		got.From = netip.AddrPortFrom(got.From.Addr(), 0)
		if got != want {
			t.Errorf("request %d was %v, want %v", i, got, want)
		}
	}
}

// TestEcho checks datagrams, and that a half-closed connection gets its bytes back and then the end.
func TestEcho(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	echo, err := l.Host(Server).StartEcho(ctx, 7)
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		u, err := l.Host(Laptop).Dial(ctx, "udp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		took, err := PingPong(ctx, u, 3000, 10)
		if err != nil || len(took) != 10 {
			t.Errorf("3000-byte datagrams to %s: %v %v", to, took, err)
		}
		c, err := l.Host(Laptop).Dial(ctx, "tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("all of it")); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); string(got) != "all of it" || err != nil {
			t.Errorf("%s sent back %q, %v", to, got, err)
		}
	}
	if n := len(echo.Senders()); n != 4 || echo.Datagrams() != 20 {
		t.Errorf("saw %d senders and %d datagrams, want 4 and 20", n, echo.Datagrams())
	}
}
