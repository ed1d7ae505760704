package exchange

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// startUnbound serves example. by UDP and TCP, TLS and HTTPS, each on a port of its own.
func startUnbound(t *testing.T, a authority) (plain, secure, http uint16) {
	t.Helper()
	plain, secure, http = freePort(t), freePort(t), freePort(t)
	config := []string{
		"server:",
		"  chroot: \"\"", "  username: \"\"", "  pidfile: \"\"", "  directory: \"" + t.TempDir() + "\"",
		"  use-syslog: no", "  logfile: \"\"", "  do-daemonize: no", "  num-threads: 1",
		"  do-not-query-localhost: no", "  module-config: \"iterator\"",
		fmt.Sprintf("  interface: 127.0.0.1@%d", plain),
		fmt.Sprintf("  interface: 127.0.0.1@%d", secure),
		fmt.Sprintf("  interface: 127.0.0.1@%d", http),
		fmt.Sprintf("  tls-port: %d", secure),
		fmt.Sprintf("  https-port: %d", http),
		"  tls-service-key: \"" + a.key + "\"",
		"  tls-service-pem: \"" + a.certificate + "\"",
		"  local-zone: example. static",
		"  local-data: 'www.example. 300 A 192.0.2.1'",
	}
	for i := range 100 {
		config = append(config, fmt.Sprintf("  local-data: 'n%d.example. 300 A 192.0.2.1'", i))
	}
	for i := range 20 {
		config = append(config, fmt.Sprintf("  local-data: 'large.example. 300 TXT \"%d %s\"'", i, strings.Repeat("x", 200)))
	}
	path := filepath.Join(t.TempDir(), "unbound.conf")
	if err := os.WriteFile(path, []byte(strings.Join(config, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	program(t, loopback(plain).String(), "unbound", "-d", "-c", path)
	return plain, secure, http
}

func startDnsmasq(t *testing.T) uint16 {
	t.Helper()
	port := freePort(t)
	args := []string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts", "--user=root", "--bind-interfaces",
		"--listen-address=127.0.0.1", fmt.Sprintf("--port=%d", port), "--local=/example/", "--local-ttl=300", "--host-record=www.example,192.0.2.1",
	}
	for i := range 100 {
		args = append(args, fmt.Sprintf("--host-record=n%d.example,192.0.2.1", i))
	}
	for i := range 20 {
		args = append(args, fmt.Sprintf("--txt-record=large.example,%d %s", i, strings.Repeat("x", 200)))
	}
	program(t, loopback(port).String(), "dnsmasq", args...)
	return port
}

// TestRealServers asks servers that others wrote.
func TestRealServers(t *testing.T) {
	a := newAuthority(t)
	plain, secure, http := startUnbound(t, a)
	masq := startDnsmasq(t)
	for _, row := range []struct {
		name, scheme string
		port         uint16
	}{
		{"unbound udp", "udp", plain},
		{"unbound tcp", "tcp", plain},
		{"unbound tls", "tls", secure},
		{"unbound https", "https", http},
		{"dnsmasq udp", "udp", masq},
		{"dnsmasq tcp", "tcp", masq},
	} {
		t.Run(row.name, func(t *testing.T) {
			noLeaks(t)
			o := Options{}
			url := fmt.Sprintf("%s://127.0.0.1:%d", row.scheme, row.port)
			if row.scheme == "tls" || row.scheme == "https" {
				o = Options{CAFile: a.certificate, Addresses: []netip.Addr{loopback(0).Addr()}}
				url = fmt.Sprintf("%s://dns.example:%d", row.scheme, row.port)
			}
			all(t, upstream(t, url, o))
		})
	}
}

// TestOwnServers does the same with servers made of quic-go, since Debian has none for these two.
func TestOwnServers(t *testing.T) {
	a := newAuthority(t)
	for _, scheme := range []string{"h3", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			s := serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { return tell })
			all(t, upstream(t, s.url, Options{CAFile: a.certificate}))
			if n := s.connections.Load(); n > int32(multiplexLimits.width) {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// all is what every upstream must do.
func all(t *testing.T, u *Upstream) {
	t.Helper()
	var asking sync.WaitGroup
	for i := range 100 {
		asking.Go(func() {
			if err := askA(t.Context(), u, fmt.Sprintf("n%d.example.", i)); err != nil {
				t.Error(err)
			}
		})
	}
	asking.Wait()
	wantA(t, u, "www.example.")

	m, err := u.Exchange(t.Context(), query("large.example.", dns.TypeTXT))
	if err != nil {
		t.Error(err)
	} else if len(m.Answer) < 20 || m.Truncated {
		t.Errorf("a large answer has %d records, truncated %v", len(m.Answer), m.Truncated)
	}

	q := query("www.example.", dns.TypeA)
	q.SetEdns0(4096, true)
	m, err = u.Exchange(t.Context(), q)
	switch {
	case err != nil:
		t.Error(err)
	case q.IsEdns0() != nil && m.IsEdns0() == nil && u.scheme != "h3" && u.scheme != "quic":
		t.Errorf("the answer to a question with EDNS has none: %v", m)
	}
}
