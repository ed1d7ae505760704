package endtoend

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/lab"
)

const (
	raceConnections = 100_000
	raceWorkers     = 48 // clients that ask and connect at once
	racePort        = 7000
)

// far6 is what far is, in IPv6.
var far6 = netip.MustParsePrefix("2001:db8:5::/48")

// raceName is the name of a number, and raceAddress its address. Every tenth is proxied, every second is IPv6.
func raceName(i int) string {
	if i%10 == 0 {
		return fmt.Sprintf("n%06d.proxied.test", i)
	}
	return fmt.Sprintf("n%06d.direct.test", i)
}

func raceAddress(i int) netip.Addr {
	if i%2 == 0 {
		return farAddress(i)
	}
	a := far6.Addr().As16()
	a[13], a[14], a[15] = byte(i>>16), byte(i>>8), byte(i)
	return netip.AddrFrom16(a)
}

// raceNumber is the number of a name.
func raceNumber(name string) (int, bool) {
	digits, _, _ := strings.Cut(strings.TrimPrefix(strings.ToLower(name), "n"), ".")
	i, err := strconv.Atoi(digits)
	return i, err == nil && strings.EqualFold(strings.TrimSuffix(name, "."), raceName(i))
}

// TestConnectOnTheAnswer: 100,000 connections, each begun by the thread that just read the DNS answer with its address,
// get the verdict of their name. Each has a name and an address that nobody has seen before, in IPv4 and IPv6, so that
// nothing but this answer could have told the kernel; without the name the policy refuses. What breaks it is teaching the
// kernel after the answer, or beside it.
func TestConnectOnTheAnswer(t *testing.T) {
	w := newNamesWorld(t)
	for _, prefix := range []netip.Prefix{far, far6} {
		need(t, w.server().OwnPrefix(prefix))
	}
	for _, h := range w.Hosts() {
		need(t, h.SetSysctl("net.ipv4.ip_local_port_range", "1024 65535"))
	}
	startMirror(t, w.server(), racePort)
	_, err := w.resolver.StartNameserver(t.Context(), 53, func(q *dns.Msg, asked lab.Question) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		i, ok := raceNumber(asked.Name)
		if !ok {
			m.Rcode = dns.RcodeNameError
			return m
		}
		header := dns.RR_Header{Name: asked.Name, Rrtype: asked.Qtype, Class: dns.ClassINET, Ttl: 300}
		switch a := raceAddress(i); {
		case a.Is4() && asked.Qtype == dns.TypeA:
			m.Answer = []dns.RR{&dns.A{Hdr: header, A: a.AsSlice()}}
		case a.Is6() && asked.Qtype == dns.TypeAAAA:
			m.Answer = []dns.RR{&dns.AAAA{Hdr: header, AAAA: a.AsSlice()}}
		}
		return m
	})
	need(t, err)
	proxy, at := startSocks(t, w.upstream(), func(name string) (netip.Addr, bool) {
		i, ok := raceNumber(name)
		return raceAddress(i), ok
	})
	w.start(t, fmt.Sprintf(`interfaces: { lan: auto }
outbounds: { hk: { url: "socks5://%s" } }
dns: { upstreams: { up: "udp://%s" }, default: up }
%s  - { name: nameless, network: [tcp, udp], outbound: block, reject: true }
default: block
`, at, w.resolver.Addr4(), nameRules))

	begun := time.Now()
	out := w.runInClient(t, w.laptop(), "race", raceOrder{
		Direct:  []netip.Addr{w.laptop().Addr4(), w.laptop().Addr6()},
		Proxied: []netip.Addr{w.upstream().Addr4(), w.upstream().Addr6()},
		Count:   raceConnections,
	})
	var r raceResult
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	took := time.Since(begun)
	t.Logf("%d connections in %v, %.0f a second: %d direct, %d proxied (%d by name), %d questions asked again; from the answer to the SYN %v at the median",
		raceConnections, took.Round(time.Second), raceConnections/took.Seconds(), r.Direct, r.Proxied, proxy.named.Load(), r.Again, r.Delay)
	if r.Wrong > 0 || r.Failed > 0 {
		t.Errorf("%d wrong verdicts, %d without one:\n%s", r.Wrong, r.Failed, strings.Join(r.Examples, "\n"))
	}
	if r.Direct+r.Proxied != raceConnections || r.Direct == 0 || r.Proxied == 0 {
		t.Errorf("%d direct and %d proxied are not %d", r.Direct, r.Proxied, raceConnections)
	}
	if n := proxy.named.Load(); n != int64(r.Proxied) {
		t.Errorf("the upstream was told %d names for %d connections", n, r.Proxied)
	}
}

// startMirror tells each TCP client its address as the server sees it, and waits until it leaves.
func startMirror(t *testing.T, on *lab.Host, port int) {
	t.Helper()
	l, err := on.Listen(t.Context(), "tcp", ":"+strconv.Itoa(port))
	if err != nil {
		t.Fatal(err)
	}
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer c.Close()
				c.SetLinger(0)
				fmt.Fprintln(c, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
				c.SetReadDeadline(time.Now().Add(30 * time.Second))
				c.Read(make([]byte, 1))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		tasks.Wait()
	})
}

// modes are what the test binary does instead of tests when it runs as a client of its own, in a host's network: with
// blocking system calls, on threads that share a processor with nothing of the lab's.
var modes = map[string]func(in *json.Decoder, out *json.Encoder) error{
	"race": answering(runRace), "hold": answering(runHold), "churn": answering(runChurn), "agent": runAgent,
}

const modeVariable = "SIDEGATE_ENDTOEND_MODE"

// answering is a mode that reads one order and writes one result.
func answering(f func(order []byte) (any, error)) func(*json.Decoder, *json.Encoder) error {
	return func(in *json.Decoder, out *json.Encoder) error {
		var order json.RawMessage
		if err := in.Decode(&order); err != nil {
			return err
		}
		result, err := f(order)
		if err != nil {
			return err
		}
		return out.Encode(result)
	}
}

// runMode runs the mode that the environment asks for, if it does.
func runMode() bool {
	mode, ok := modes[os.Getenv(modeVariable)]
	if !ok {
		return false
	}
	if err := mode(json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

func (w *world) runInClient(t *testing.T, on *lab.Host, mode string, order any) string {
	t.Helper()
	out, err := inClient(t, on, mode, order).Output()
	need(t, err)
	return out
}

// startInClient does not wait for its end.
func (w *world) startInClient(t *testing.T, on *lab.Host, mode string, order any) *lab.Process {
	t.Helper()
	p, err := inClient(t, on, mode, order).Start()
	need(t, err)
	return p
}

func inClient(t *testing.T, on *lab.Host, mode string, order any) *lab.Command {
	t.Helper()
	text, err := json.Marshal(order)
	need(t, err)
	c := on.Command(t.Context(), "/proc/self/exe")
	c.Env = []string{modeVariable + "=" + mode, "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=" + strconv.Itoa(runtime.NumCPU()+raceWorkers)}
	c.Stdin = strings.NewReader(string(text))
	return c
}
