package dns

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/dns/exchange"
)

// unbound runs one with the records in the gateway's namespace, and returns what stops it.
func unbound(t *testing.T, at netip.AddrPort, records ...string) (stop func()) {
	t.Helper()
	if _, err := exec.LookPath("unbound"); err != nil {
		t.Skipf("needs unbound: %v", err)
	}
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	config := filepath.Join(dir, "unbound.conf")
	text := fmt.Sprintf(`
server:
  interface: %s
  port: %d
  access-control: 127.0.0.0/8 allow
  chroot: ""
  username: ""
  use-syslog: no
  pidfile: ""
  directory: %q
  module-config: iterator
  local-zone: "example." static
  local-zone: "test." static
`, at.Addr(), at.Port(), dir)
	for _, r := range records {
		text += fmt.Sprintf("  local-data: '%s'\n", r)
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("unbound", "-d", "-c", config)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			c.Process.Kill()
			c.Wait()
		}
	}
	t.Cleanup(stop)
	eventually(t, "unbound answers", func() bool {
		m, err := dns.Exchange(question("www.example", dns.TypeA), at.String())
		return err == nil && m.Rcode == dns.RcodeSuccess
	})
	return stop
}

// From dig to unbound and back, with every part of ours between.
func TestRealUpstream(t *testing.T) {
	n := newNetwork(t)
	at := netip.MustParseAddrPort("127.0.0.1:5300")
	long := strings.Repeat("x", 200)
	records := []string{
		"www.example. 300 A 203.0.113.9", "www.example. 300 AAAA 2001:db8::9",
		"www.example. 300 HTTPS 1 . alpn=h2 ipv4hint=203.0.113.9,192.168.0.1",
		"evil.example. 300 A 192.168.0.1", "example. 300 SOA ns.example. x.example. 1 2 3 4 60",
		"short.example. 1 A 203.0.113.7",
	}
	for i := range 10 {
		records = append(records, fmt.Sprintf(`long.example. 300 TXT "%d%s"`, i, long))
	}
	stop := unbound(t, at, records...)
	for _, scheme := range []string{"udp", "tcp"} {
		up, err := exchange.New("up", scheme+"://"+at.String(), exchange.Options{Dialer: exchange.Direct(nil), BootstrapDialer: exchange.Direct(nil)})
		if err != nil {
			t.Fatal(err)
		}
		p := new(pupil)
		r := newResolver(t, Settings{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Upstreams: map[string]Exchanger{"up": up}, Default: "up", Cache: Cache{Stale: time.Hour, MinTTL: time.Second}})
		n.serve(Options{Learner: p}, r)
		dig := func(arguments string) string {
			return n.client.run(t, "dig +time=3 +tries=1 @8.8.8.8 "+arguments)
		}
		for arguments, want := range map[string]string{
			"+short www.example A":                    "203.0.113.9\n",
			"+short www.example AAAA":                 "2001:db8::9\n",
			"+short WWW.Example TYPE65":               "ipv4hint=203.0.113.9\n",
			"+short evil.example A":                   "",
			"+short short.example A":                  "203.0.113.7\n",
			"+short +ignore +noedns long.example TXT": "",
			"+noall +comments gone.example A":         "status: NXDOMAIN",
			"+noall +comments evil.example A":         "status: NOERROR",
			"+noall +authority gone.example A":        "SOA",
		} {
			if out := dig(arguments); !strings.Contains(out, want) || want == "" && out != "" {
				t.Errorf("%s: dig %s:\n%s", scheme, arguments, out)
			}
		}
		if out := dig("+short long.example TXT"); strings.Count(out, long) != 10 { // dig comes back by TCP
			t.Errorf("%s: a long answer:\n%s", scheme, out)
		}
		if p.knows(client4, "evil.example", addrs("192.168.0.1")[0]) || !p.knows(client4, "www.example", addrs("2001:db8::9")[0]) {
			t.Errorf("%s: taught %v", scheme, p.taughtPairs())
		}
		if scheme == "tcp" {
			stop()
			for name, want := range map[string]string{"www.example": "203.0.113.9", "new.example": "SERVFAIL"} {
				start := time.Now()
				if out := dig(name); !strings.Contains(out, want) {
					t.Errorf("while the upstream is gone: %s", out)
				}
				t.Logf("%s took %v while the upstream was gone", name, time.Since(start))
			}
		}
		n.stop()
		r.Close()
		up.Close()
	}
}
