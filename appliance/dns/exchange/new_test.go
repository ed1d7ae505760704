package exchange

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func addresses(list ...string) (parsed []netip.Addr) {
	for _, a := range list {
		parsed = append(parsed, netip.MustParseAddr(a))
	}
	return parsed
}

// TestNew makes upstreams of URLs, without any traffic.
func TestNew(t *testing.T) {
	noLeaks(t)
	for _, row := range []struct {
		url, text, request string
		lookedUp           bool
	}{
		{"udp://192.0.2.53", "udp://192.0.2.53:53", "", false},
		{"udp://[2001:db8::53]:5353/", "udp://[2001:db8::53]:5353", "", false},
		{"udp://[::ffff:192.0.2.53]", "udp://192.0.2.53:53", "", false},
		{"udp://[fe80::53%25eth0]", "udp://[fe80::53%eth0]:53", "", false},
		{"udp://169.254.1.1", "udp://169.254.1.1:53", "", false},
		{"tcp://DNS.example.", "tcp://dns.example:53", "", true},
		{"tls://dns.example", "tls://dns.example:853", "", true},
		{"quic://dns.example:8853", "quic://dns.example:8853", "", true},
		{"https://dns.example", "https://dns.example:443", "https://dns.example/dns-query", true},
		{"https://dns.example:8443/", "https://dns.example:8443", "https://dns.example:8443/", true},
		{"https://dns.example/sec%2Fret?x=1", "https://dns.example:443", "https://dns.example/sec%2Fret?x=1", true},
		{"h3://[2001:db8::53]/q", "h3://[2001:db8::53]:443", "https://[2001:db8::53]/q", false},
	} {
		u, err := New("doh", row.url, Options{})
		if err != nil {
			t.Error(err)
			continue
		}
		if _, lookedUp := u.Host(); u.String() != row.text || lookedUp != row.lookedUp || u.Name() != "doh" {
			t.Errorf("%s became %s, looked up %v", row.url, u, lookedUp)
		}
		where := mustURL(t, row.url)
		for _, s := range schemes {
			if s.name == u.scheme && s.path != "" && s.request(where, u.endpoint) != row.request {
				t.Errorf("%s asks %s; want %s", row.url, s.request(where, u.endpoint), row.request)
			}
		}
		u.Close()
	}

	u, err := New("doh", "tls://dns.example", Options{Addresses: addresses("2001:db8::1", "192.0.2.1")})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if _, lookedUp := u.Host(); lookedUp || len(u.Addresses()) != 2 {
		t.Errorf("looked up %v, addresses %v", lookedUp, u.Addresses())
	}
}

// TestRefused wants one line for each mistake, that says what is wrong.
func TestRefused(t *testing.T) {
	noLeaks(t)
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, []byte("nothing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(t.TempDir(), "pipe.pem")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(t.TempDir(), "large.pem")
	if err := os.WriteFile(large, make([]byte, 1<<20+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		url  string
		o    Options
		want string
	}{
		{"", Options{}, "the url has no scheme (have: udp, tcp, tls, https, h3, quic; for example udp://192.0.2.53)"},
		{"192.0.2.53", Options{}, "the url has no scheme"},
		{"dns.example:53", Options{}, "the url has no scheme"},
		{"sdns://AQcAAA", Options{}, `unknown scheme "sdns" (have: udp, tcp, tls, https, h3, quic)`},
		{"http://192.0.2.53", Options{}, `unknown scheme "http"`},
		{"udp://", Options{}, "the url has no host"},
		{"udp://:53", Options{}, "the url has no host"},
		{"udp://0.0.0.0", Options{}, "0.0.0.0 is not the address of a server"},
		{"udp://[ff02::fb]", Options{}, "ff02::fb is not the address of a server"},
		{"udp://192.0.2.300", Options{}, `"192.0.2.300" is neither an address nor a host name`},
		{"udp://dns..example", Options{}, "neither an address nor a host name"},
		{"udp://dns.example:0", Options{}, `bad port "0" (want 1-65535)`},
		{"udp://dns.example:65536", Options{}, `bad port "65536" (want 1-65535)`},
		{"udp://dns.example/path", Options{}, "the url has more than a host and a port (want udp://host:port)"},
		{"tls://dns.example?x=1", Options{}, "the url has more than a host and a port"},
		{"https://dns.example#x", Options{}, "the url has more than a host and a port"},
		{"https://dns.example/dns-query{?dns}", Options{}, "the url is a template: leave out the part in braces"},
		{"https://me:secret@dns.example", Options{}, "the url has a user name, which no dns upstream wants"},
		{"https://dns.example/\x7fsecret", Options{}, "the url cannot be parsed (want scheme://host)"},
		{"udp://192.0.2.53", Options{CAFile: empty}, "udp has no certificate to verify: leave out ca_file"},
		{"tcp://192.0.2.53", Options{ServerName: "x"}, "tcp has no certificate to verify: leave out server_name"},
		{"tls://192.0.2.53", Options{CAFile: "/does/not/exist"}, "reading ca_file: open /does/not/exist: no such file"},
		{"tls://192.0.2.53", Options{CAFile: empty}, "empty.pem contains no PEM certificate"},
		{"tls://192.0.2.53", Options{CAFile: pipe}, "reading ca_file: " + pipe + " is not a regular file"},
		{"tls://192.0.2.53", Options{CAFile: "/dev/zero"}, "reading ca_file: /dev/zero is not a regular file"},
		{"tls://192.0.2.53", Options{CAFile: filepath.Dir(pipe)}, filepath.Dir(pipe) + " is not a regular file"},
		{"tls://192.0.2.53", Options{CAFile: large}, large + " has more than 1 MiB: leave only the authorities' certificates in it"},
		{"tls://192.0.2.53", Options{ServerName: "a b"}, `server_name: "a b" is neither an address nor a host name`},
		{"udp://192.0.2.53", Options{Addresses: addresses("192.0.2.1")}, "the host 192.0.2.53 is an address already: leave out addresses and bootstrap"},
		{"udp://192.0.2.53", Options{Bootstrap: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}}, "the host 192.0.2.53 is an address already"},
		{"udp://[fe80::1]", Options{}, "fe80::1 is on every link: write the server's global or unique local address, or [fe80::1%25eth0] with its interface"},
		{"tls://dns.example", Options{Addresses: addresses("192.0.2.1", "fe80::1")}, "addresses: fe80::1 is on every link: write the server's global or unique local address"},
		{"tls://dns.example", Options{Bootstrap: []netip.AddrPort{netip.MustParseAddrPort("[fe80::1]:53")}}, "bootstrap: fe80::1 is on every link: write the server's global or unique local address"},
		{"udp://dns.example", Options{Addresses: addresses("::")}, "addresses: "},
		{"udp://dns.example", Options{Bootstrap: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:0")}}, "bootstrap: 192.0.2.1:0 is not the address and port of a server"},
	} {
		u, err := New("doh", row.url, row.o)
		if err == nil {
			u.Close()
			t.Errorf("%q was taken", row.url)
			continue
		}
		if text := err.Error(); !strings.HasPrefix(text, `dns upstream "doh": `) || !strings.Contains(text, row.want) || strings.Contains(text, "\n") || strings.Contains(text, "secret") {
			t.Errorf("%q: %v; want %q", row.url, err, row.want)
		}
	}
}
