package outbound

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestNewRefuses(t *testing.T) {
	junk := filepath.Join(t.TempDir(), "junk.pem")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
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
	long := strings.Repeat("x", 256)
	for _, row := range []struct {
		name, url   string
		credentials Credentials
		want        string
	}{
		{"hk", "sock5://10.0.0.7:1080", Credentials{}, `outbound "hk": unknown scheme "sock5" (have: socks5, http, https)`},
		{"hk", "//10.0.0.7:1080", Credentials{}, `outbound "hk": the url has no scheme (have: socks5, http, https)`},
		{"hk", "", Credentials{}, `outbound "hk": the url has no scheme (have: socks5, http, https)`},
		{"hk", "localhost:1080", Credentials{}, `outbound "hk": unknown scheme "localhost" (have: socks5, http, https)`},
		{"hk", "10.0.0.7:1080", Credentials{}, `outbound "hk": the url cannot be parsed (want scheme://host:port)`},
		{"hk", "socks5:10.0.0.7", Credentials{}, `outbound "hk": the url has more than a host and a port (want socks5://host:port)`},
		{"hk", "socks5://10.0.0.7:1080/x", Credentials{}, `outbound "hk": the url has more than a host and a port (want socks5://host:port)`},
		{"hk", "http://10.0.0.7:3128#x", Credentials{}, `outbound "hk": the url has more than a host and a port (want http://host:port)`},
		{"hk", "http://10.0.0.7", Credentials{}, `outbound "hk": the url has no port (want http://host:port)`},
		{"hk", "https://10.0.0.7:", Credentials{}, `outbound "hk": the url has no port (want https://host:port)`},
		{"hk", "socks5://10.0.0.7:0", Credentials{}, `outbound "hk": bad port "0" (want 1-65535)`},
		{"hk", "socks5://10.0.0.7:65536", Credentials{}, `outbound "hk": bad port "65536" (want 1-65535)`},
		{"hk", "socks5://:1080", Credentials{}, `outbound "hk": the url has no host`},
		{"hk", "socks5://0.0.0.0:1080", Credentials{}, `outbound "hk": 0.0.0.0 is not the address of a server`},
		{"hk", "socks5://[ff02::1]:1080", Credentials{}, `outbound "hk": ff02::1 is not the address of a server`},
		{"hk", "socks5://10.0.0.300:1080", Credentials{}, `outbound "hk": bad host: "10.0.0.300" is not a DNS name`},
		{"hk", "socks5://a!b:1080", Credentials{}, `outbound "hk": bad host: "a!b" is not a DNS name`},
		{"direct", "socks5://10.0.0.7", Credentials{}, `outbound "direct": the name is built in: choose another one`},
		{"block", "socks5://10.0.0.7", Credentials{}, `outbound "block": the name is built in: choose another one`},
		{"", "socks5://10.0.0.7", Credentials{}, `outbound "": the name is empty`},

		{"hk", "socks5://me:" + password + "@10.0.0.7", Credentials{}, `outbound "hk": the url contains a password: put it into password_file`},
		{"hk", "socks5://me:/" + password + "@10.0.0.7", Credentials{}, `outbound "hk": the url has more than a host and a port (want socks5://host:port)`},
		{"hk", "socks5://me:1/" + password + "@10.0.0.7", Credentials{}, `outbound "hk": the url has more than a host and a port (want socks5://host:port)`},
		{"hk", "socks5://me:%zz" + password + "@10.0.0.7", Credentials{}, `outbound "hk": the url cannot be parsed (want scheme://host:port)`},
		{"hk", "socks5://me@10.0.0.7", Credentials{"you", password}, `outbound "hk": the username is given twice, in the url and beside it`},
		{"hk", "socks5://me@10.0.0.7", Credentials{}, `outbound "hk": there is a username but no password: set password_file`},
		{"hk", "socks5://10.0.0.7", Credentials{"", password}, `outbound "hk": there is a password but no username: set username`},
		{"hk", "socks5://10.0.0.7", Credentials{long, password}, `outbound "hk": the username is longer than 255 bytes, which socks5 cannot send`},
		{"hk", "socks5://10.0.0.7", Credentials{"me", long}, `outbound "hk": the password is longer than 255 bytes, which socks5 cannot send`},
		{"hk", "http://10.0.0.7:3128", Credentials{"m:e", password}, `outbound "hk": the username contains a colon, which basic authentication cannot send`},
		{"hk", "http://10.0.0.7:3128", Credentials{"me", password + "\n"}, `outbound "hk": the username or password contains a control character, such as a line break`},

		{"hk", "socks5://10.0.0.7?ca_file=x", Credentials{}, `outbound "hk": unknown url parameter "ca_file" (socks5 has: none)`},
		{"hk", "https://10.0.0.7?insecure=1", Credentials{}, `outbound "hk": unknown url parameter "insecure" (https has: ca_file, server_name)`},
		{"hk", "https://10.0.0.7?server_name=a&server_name=b", Credentials{}, `outbound "hk": the url parameter server_name wants one value`},
		{"hk", "https://10.0.0.7?server_name=", Credentials{}, `outbound "hk": the url parameter server_name wants one value`},
		{"hk", "https://10.0.0.7?server_name=a%20b", Credentials{}, `outbound "hk": server_name: bad host: "a b" is not a DNS name`},
		{"hk", "https://10.0.0.7?ca_file=/nonexistent/ca.pem", Credentials{}, `outbound "hk": reading ca_file: open /nonexistent/ca.pem: no such file or directory`},
		{"hk", "https://10.0.0.7?ca_file=" + junk, Credentials{}, `outbound "hk": reading ca_file: ` + junk + ` contains no PEM certificate`},
		{"hk", "https://10.0.0.7?ca_file=" + pipe, Credentials{}, `outbound "hk": reading ca_file: ` + pipe + ` is not a regular file`},
		{"hk", "https://10.0.0.7?ca_file=/dev/zero", Credentials{}, `outbound "hk": reading ca_file: /dev/zero is not a regular file`},
		{"hk", "https://10.0.0.7?ca_file=" + large, Credentials{}, `outbound "hk": reading ca_file: ` + large + ` has more than 1 MiB: leave only the authorities' certificates in it`},
		{"hk", "https://10.0.0.7?%zz", Credentials{}, `outbound "hk": the parameters after ? cannot be parsed`},
	} {
		o, err := New(row.name, row.url, row.credentials, Options{})
		if err == nil || o != nil || err.Error() != row.want {
			t.Errorf("%s: %v\n%*s %s", row.url, err, len(row.url), "want", row.want)
		}
		noSecret(t, err)
	}
}

func TestNewAccepts(t *testing.T) {
	for _, row := range []struct {
		url, host string
		port      uint16
	}{
		{"socks5://10.0.0.7", "10.0.0.7", 1080},
		{"socks5://10.0.0.7:1081/", "10.0.0.7", 1081},
		{"SOCKS5://Proxy.Example", "proxy.example", 1080},
		{"socks5://[fd00::7]:1080", "fd00::7", 1080},
		{"socks5://[::ffff:10.0.0.7]", "10.0.0.7", 1080},
		{"socks5://[fe80::7%25eth0]", "fe80::7%eth0", 1080},
		{"http://me@proxy:8080", "proxy", 8080},
		{"https://proxy.example?server_name=other.example", "proxy.example", 443},
	} {
		o, err := New("hk", row.url, Credentials{}, Options{})
		if err != nil {
			t.Error(err)
			continue
		}
		if host, port, ok := o.Upstream(); host != row.host || port != row.port || !ok || o.Name() != "hk" {
			t.Errorf("%s: %s %q:%d %v", row.url, o.Name(), host, port, ok)
		}
	}
}

// TestSecretsDoNotPrint tries the ways in which a careless log line would show an outbound.
func TestSecretsDoNotPrint(t *testing.T) {
	var list []Outbound
	for i, url := range []string{"socks5://10.0.0.7", "http://10.0.0.7:3128", "https://10.0.0.7"} {
		o, err := New(fmt.Sprint("hk", i), url, secret, Options{})
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, o)
	}
	set, err := NewSet(Options{}, list...)
	if err != nil {
		t.Fatal(err)
	}
	for _, thing := range []any{list, list[0], list[1], list[2], set, secret, &secret, struct{ C Credentials }{secret}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
			noSecret(t, errors.New(strings.ReplaceAll(fmt.Sprintf(verb, thing), "\n", " ")))
		}
	}
}

func TestSet(t *testing.T) {
	var list []Outbound
	for name, url := range map[string]string{
		"a": "socks5://proxy.example", "b": "socks5://PROXY.example:1080", "c": "http://proxy.example:3128", "d": "socks5://[::ffff:10.0.0.7]",
	} {
		o, err := New(name, url, Credentials{}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, o)
	}
	set, err := NewSet(Options{}, list...)
	if err != nil {
		t.Fatal(err)
	}
	if got := set.Names(); !slices.Equal(got, []string{"a", "b", "block", "c", "d", "direct"}) {
		t.Errorf("names: %q", got)
	}
	if got := set.Upstreams(); !slices.Equal(got, []Upstream{{"10.0.0.7", 1080}, {"proxy.example", 1080}, {"proxy.example", 3128}}) {
		t.Errorf("upstreams: %v", got)
	}
	for _, name := range set.Names() {
		if o, ok := set.Outbound(name); !ok || o.Name() != name {
			t.Errorf("%q is %v, %v", name, o, ok)
		}
	}
	if _, ok := set.Outbound("e"); ok {
		t.Error("found what is not there")
	}
	if _, err := NewSet(Options{}, list[0], list[0]); err == nil || !strings.Contains(err.Error(), "is defined twice") {
		t.Errorf("twice: %v", err)
	}
}

func TestBlock(t *testing.T) {
	set, err := NewSet(Options{})
	if err != nil {
		t.Fatal(err)
	}
	o, _ := set.Outbound("block")
	if _, err := o.DialTCP(t.Context(), Destination{Addr: netip.MustParseAddrPort("1.2.3.4:443")}); !errors.Is(err, ErrBlocked) {
		t.Error(err)
	}
	if _, err := o.AssociateUDP(t.Context()); !errors.Is(err, ErrBlocked) {
		t.Error(err)
	}
	if _, _, ok := o.Upstream(); ok {
		t.Error("block has an upstream")
	}
}
