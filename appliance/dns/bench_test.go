package dns

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func anyAnswer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	m.Answer = []dns.RR{&dns.A{
		Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 86400},
		A:   net.IPv4(203, 0, 113, 9),
	}}
	return m
}

// BenchmarkDnsperf compares answers from the cache with unbound's, over the same wire, as queries per second.
func BenchmarkDnsperf(b *testing.B) {
	for _, program := range []string{"dnsperf", "unbound"} {
		if _, err := exec.LookPath(program); err != nil {
			b.Skipf("needs %s: %v", program, err)
		}
	}
	n := newNetwork(b)
	names := filepath.Join(b.TempDir(), "names")
	var list strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&list, "host-%d.example.com A\n", i)
	}
	if err := os.WriteFile(names, []byte(list.String()), 0o644); err != nil {
		b.Fatal(err)
	}
	measure := func(b *testing.B) {
		var out string
		for b.Loop() {
			n.client.run(b, fmt.Sprintf("dnsperf -s 192.168.7.2 -d %s -n 1 -c 8 -q 200", names)) // fill the cache
			out = n.client.run(b, fmt.Sprintf("dnsperf -s 192.168.7.2 -d %s -l 4 -c 8 -q 200", names))
		}
		for unit, pattern := range map[string]string{"queries/s": `Queries per second:\s+([\d.]+)`, "lost": `Queries lost:\s+(\d+)`, "s-latency": `Average Latency \(s\):\s+([\d.]+)`} {
			if m := regexp.MustCompile(pattern).FindStringSubmatch(out); m != nil {
				value, _ := strconv.ParseFloat(m[1], 64)
				b.ReportMetric(value, unit)
			}
		}
	}
	b.Run("sidegate", func(b *testing.B) {
		n.serve(Options{Learner: new(pupil)}, newResolver(b, Settings{Upstreams: map[string]Exchanger{"up": exchangeFunc(anyAnswer)}, Default: "up"}))
		measure(b)
		b.Logf("%+v", n.server.Stats())
		n.stop()
	})
	for _, threads := range []int{1, 2} {
		b.Run(fmt.Sprintf("unbound-%d", threads), func(b *testing.B) {
			backend := &dns.Server{Addr: "127.0.0.1:5399", Net: "udp", Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { w.WriteMsg(anyAnswer(q)) })}
			go backend.ListenAndServe()
			defer backend.Shutdown()
			config := filepath.Join(b.TempDir(), "unbound.conf")
			os.WriteFile(config, []byte(fmt.Sprintf(`
server:
  num-threads: %d
  interface: 192.168.7.2
  access-control: 192.168.7.0/24 allow
  do-not-query-localhost: no
  module-config: iterator
  chroot: ""
  username: ""
  use-syslog: no
  pidfile: ""
  directory: %q
  so-rcvbuf: 4m
forward-zone:
  name: "."
  forward-addr: 127.0.0.1@5399
`, threads, filepath.Dir(config))), 0o644)
			c := exec.Command("unbound", "-d", "-c", config)
			if err := c.Start(); err != nil {
				b.Fatal(err)
			}
			defer func() {
				c.Process.Kill()
				c.Wait()
			}()
			time.Sleep(time.Second)
			measure(b)
		})
	}
}

// quickQuery returns what answers one cached query, as the listener's thread does.
func quickQuery(t testing.TB) func() int {
	d := newDesk(t, Options{Limits: Limits{Queries: 1e9}}, Settings{Upstreams: map[string]Exchanger{"up": exchangeFunc(anyAnswer)}, Default: "up"})
	q := question("www.example.com", dns.TypeA)
	q.SetEdns0(1232, false)
	packet, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	d.wire(client4, packet)
	client, key, space := client4.As16(), []byte(nil), make([]byte, 0, maxReply)
	return func() int {
		var q query
		rcode, _ := q.parse(packet)
		answer, how, _ := d.server.quick(space, &q, rcode, &client, &key, q.limit(), monotonic())
		if how != answered {
			return 0
		}
		return len(answer)
	}
}

// A cached answer costs no memory: nothing is unpacked or packed.
func TestQuickAllocatesNothing(t *testing.T) {
	answer := quickQuery(t)
	if answer() == 0 {
		t.Fatal("not answered from the cache")
	}
	if n := testing.AllocsPerRun(1000, func() { answer() }); n != 0 {
		t.Errorf("%v allocations for each answer", n)
	}
}

// BenchmarkQuick is the processor's time for a cached answer, without the kernel's.
func BenchmarkQuick(b *testing.B) {
	answer := quickQuery(b)
	b.ReportAllocs()
	slow := 0
	for b.Loop() {
		if answer() == 0 {
			slow++ // the client is to be identified or taught again
		}
	}
	if slow > 0 && b.N < 1000 {
		b.Fatalf("%d of %d were not answered from the cache", slow, b.N)
	}
}
