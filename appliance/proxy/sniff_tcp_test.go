package proxy

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

// Real clients reach real servers after their names were read, which the outbound is told, and every
// byte arrives.
func TestSniffTCP(t *testing.T) {
	r := newNetwork(t)
	notes := &noting{Outbound: r.dante()}
	r.serve(Options{}, map[string]outbound.Outbound{"up": notes, policy.OutboundDirect: directly(t)["up"]})
	for _, client := range []struct {
		protocol string
		scheme   string
		protos   func(*http.Protocols)
		counted  func(Sniffed) uint64
	}{
		{"TLS", "https", func(p *http.Protocols) { p.SetHTTP1(true); p.SetHTTP2(true) }, func(s Sniffed) uint64 { return s.TLS }},
		{"HTTP/1", "http", func(p *http.Protocols) { p.SetHTTP1(true) }, func(s Sniffed) uint64 { return s.HTTP1 }},
		{"HTTP/2", "http", func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) }, func(s Sniffed) uint64 { return s.HTTP2 }},
	} {
		for _, at := range []netip.Addr{server4, server6} {
			for _, through := range []string{"up", policy.OutboundDirect} {
				t.Run(fmt.Sprint(client.protocol, " ", at, " ", through), func(t *testing.T) {
					r.verdicts.sniff(func(_ context.Context, _ policy.Network, _, _ netip.AddrPort, name string) (Route, bool) {
						return Route{Outbound: through, Name: "verified." + name}, true
					})
					before := client.counted(r.server.Stats().Sniffed)
					name := "www.example.com"
					address := r.webServer(t, at, client.scheme == "https")
					body := bytes.Repeat([]byte(client.protocol), 50_000)
					got, err := r.post(client.scheme, client.protos, name, address, body)
					if err != nil || !bytes.Equal(got, body) {
						t.Fatalf("%d bytes came back, %v", len(got), err)
					}
					if asked := r.verdicts.asks(); !slices.Equal(asked, []string{name}) {
						t.Errorf("the policy was asked with %q", asked)
					}
					if n := client.counted(r.server.Stats().Sniffed) - before; n != 1 {
						t.Errorf("counted %d", n)
					}
					if through == "up" {
						if to := notes.last(); to.Name != "verified."+name || to.Addr != address {
							t.Errorf("the upstream was told %s and %s", to.Name, to.Addr)
						}
					}
				})
			}
		}
	}
}

// noting notes the destinations, and dials their addresses.
type noting struct {
	outbound.Outbound
	mu sync.Mutex
	to outbound.Destination
}

func (n *noting) DialTCP(ctx context.Context, to outbound.Destination) (net.Conn, error) {
	n.mu.Lock()
	n.to = to
	n.mu.Unlock()
	return n.Outbound.DialTCP(ctx, outbound.Destination{Addr: to.Addr})
}

func (n *noting) last() outbound.Destination {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.to
}

// webServer answers with what it is sent.
func (r *rig) webServer(t *testing.T, at netip.Addr, secure bool) netip.AddrPort {
	t.Helper()
	var l net.Listener
	var err error
	r.internet.do(t, func() { l, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String()) })
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }), Protocols: new(http.Protocols)}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetHTTP2(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	var served sync.WaitGroup
	served.Go(func() {
		if secure {
			s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate(t)}}
			s.ServeTLS(l, "", "")
			return
		}
		s.Serve(l)
	})
	t.Cleanup(func() {
		s.Close()
		served.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// certificate is one that nobody trusts.
func certificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}
}

// post has a client of its own send a body by name to an address.
func (r *rig) post(scheme string, protos func(*http.Protocols), name string, address netip.AddrPort, body []byte) ([]byte, error) {
	transport := &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return r.tryDial(address, sameFamily(address.Addr()))
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		Protocols:       new(http.Protocols),
	}
	defer transport.CloseIdleConnections()
	protos(transport.Protocols)
	c := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	response, err := c.Post(fmt.Sprintf("%s://%s:%d/", scheme, name, address.Port()), "text/plain", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return io.ReadAll(response.Body)
}

func sameFamily(to netip.Addr) netip.Addr {
	if to.Is6() {
		return client6
	}
	return client4
}

// A hello that comes in pieces is waited for, wherever it was cut, and arrives whole; what is no hello
// is passed on at once or when the time is up, whole as well.
func TestSniffTCPPieces(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: 2 * time.Second}, directly(t))
	server := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { io.Copy(c, onlyReader{c}) })
	hello := clientHello(t, "pieces.example.com")
	request := []byte("GET / HTTP/1.1\r\nUser-Agent: x\r\nHost: pieces.example.com\r\n\r\n")
	long := append([]byte("GET /"), bytes.Repeat([]byte("a"), 40_000)...)
	for _, c := range []struct {
		what   string
		first  []byte
		step   int           // bytes in a piece
		pause  time.Duration // after each
		name   string
		counts func(Sniffed) uint64
	}{
		{"TLS, every 20 bytes", hello, 20, time.Millisecond, "pieces.example.com", func(s Sniffed) uint64 { return s.TLS }},
		{"TLS, all but one byte and that", hello, len(hello) - 1, 100 * time.Millisecond, "pieces.example.com", func(s Sniffed) uint64 { return s.TLS }},
		{"HTTP, every byte", request, 1, time.Millisecond, "pieces.example.com", func(s Sniffed) uint64 { return s.HTTP1 }},
		{"SSH", []byte("SSH-2.0-x\r\n"), 4, 100 * time.Millisecond, "", func(s Sniffed) uint64 { return s.Nothing }},
		{"endless", long, len(long), 0, "", func(s Sniffed) uint64 { return s.Nothing }},
		{"half a TLS hello", hello[:100], 100, 0, "", func(s Sniffed) uint64 { return s.TimedOut }},
		{"nothing", nil, 1, 0, "", func(s Sniffed) uint64 { return s.TimedOut }},
	} {
		t.Run(c.what, func(t *testing.T) {
			r.verdicts.sniffTo(Route{Outbound: "up"})
			before := c.counts(r.server.Stats().Sniffed)
			client := r.dial(server)
			defer client.Close()
			for piece := range slices.Chunk(c.first, c.step) {
				if _, err := client.Write(piece); err != nil {
					t.Fatal(err)
				}
				time.Sleep(c.pause)
			}
			eventually(t, "the policy is asked", func() bool { return len(r.verdicts.asks()) == 1 })
			if name := r.verdicts.asks()[0]; name != c.name {
				t.Errorf("asked with the name %q, want %q", name, c.name)
			}
			if n := c.counts(r.server.Stats().Sniffed) - before; n != 1 {
				t.Errorf("counted %d times: %+v", n, r.server.Stats().Sniffed)
			}
			last := pattern(100_000, 1)
			go func() {
				client.Write(last)
				client.CloseWrite()
			}()
			got, err := io.ReadAll(client)
			if err != nil || !bytes.Equal(got, append(slices.Clone(c.first), last...)) {
				t.Errorf("%d bytes came back of %d, or others, %v", len(got), len(c.first)+len(last), err)
			}
		})
	}
}

// A connection that this box makes in the client's place goes the way that the rule's mark stands for, and is marked as
// the daemon's own as ever; what the datapath itself marks a flow with is none of its business.
func TestSniffTCPMark(t *testing.T) {
	r := newNetwork(t)
	set, err := outbound.NewSet(outbound.Options{Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(testMark)) })
		return err
	}})
	if err != nil {
		t.Fatal(err)
	}
	direct, _ := set.Outbound(policy.OutboundDirect)
	r.serve(Options{RuleMarks: 0xf0ffffff}, map[string]outbound.Outbound{policy.OutboundDirect: direct})
	(*namespace)(nil).run(t, `nft -f - <<END
table inet look {
	set seen { type mark; flags dynamic; }
	chain output { type filter hook output priority 0; oifname "wan" tcp flags syn / syn,ack add @seen { meta mark }; }
}
END`)
	server := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { io.Copy(c, onlyReader{c}) })
	for _, mark := range []uint32{0x04000000, 0x14000107} {
		r.verdicts.sniffTo(Route{Outbound: policy.OutboundDirect, Mark: mark})
		client := r.dial(server)
		defer client.Close()
		if err := roundTrip(client, "SSH-2.0-hello"); err != nil {
			t.Error(err)
		}
	}
	out, err := exec.Command("nft", "list", "set", "inet", "look", "seen").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []uint32{0x02000000, 0x12000107} {
		if !strings.Contains(string(out), fmt.Sprintf("%#08x", want)) {
			t.Errorf("no connection had the mark %#08x: %s", want, out)
		}
	}
	if n := strings.Count(string(out), "0x"); n != 2 {
		t.Errorf("connections had %d marks, want 2: %s", n, out)
	}
}

// clientHello is what crypto/tls says first.
func clientHello(t *testing.T, name string) []byte {
	t.Helper()
	here, there := net.Pipe()
	go func() {
		tls.Client(there, &tls.Config{ServerName: name}).Handshake()
	}()
	defer here.Close()
	b := make([]byte, 16<<10)
	n, err := here.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// Who ends his stream is decided on at once, with what is there, and may still be answered; who resets
// is forgotten, and nobody is asked.
func TestSniffTCPEnds(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: time.Hour}, directly(t))
	server := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		all, _ := io.ReadAll(c)
		c.Write(append([]byte("got "), all...))
	})
	for _, sent := range []string{"", "GET / HT", string(clientHello(t, "ended.example.com")[:50])} {
		for _, pause := range []time.Duration{0, 50 * time.Millisecond} {
			r.verdicts.sniffTo(Route{Outbound: "up"})
			c := r.dial(server)
			c.Write([]byte(sent))
			time.Sleep(pause)
			c.CloseWrite()
			if got, err := io.ReadAll(c); err != nil || string(got) != "got "+sent {
				t.Errorf("after %q: %q, %v", sent, got, err)
			}
			c.Close()
		}
	}
	r.verdicts.sniffTo(Route{Outbound: "up"})
	before := r.server.Stats()
	for _, sent := range []string{"", "GET / HT"} {
		c := r.dial(server)
		c.Write([]byte(sent))
		eventually(t, "it is accepted", func() bool { return r.server.Stats().Connections == 1 })
		reset(c)
		eventually(t, "it is gone", func() bool { return r.server.Stats().Connections == 0 })
	}
	if asked := r.verdicts.asks(); len(asked) != 0 {
		t.Errorf("the policy was asked with %q", asked)
	}
	after := r.server.Stats()
	for reason, n := range after.Refused {
		if n != before.Refused[reason] {
			t.Errorf("%v was counted", reason)
		}
	}
}

// The answers that are no way out.
func TestSniffTCPRefusals(t *testing.T) {
	r := newRig(t, Options{}, directly(t))
	address := netip.AddrPortFrom(server4, 80)
	for _, refusal := range []struct {
		reason Reason
		route  Route
		ok     bool
	}{
		{Blocked, Route{Outbound: policy.OutboundBlock}, true},
		{NotProxied, Route{Outbound: "up"}, false},
		{NoOutbound, Route{Outbound: "gone"}, true},
	} {
		t.Run(refusal.reason.String(), func(t *testing.T) {
			r.verdicts.sniff(func(context.Context, policy.Network, netip.AddrPort, netip.AddrPort, string) (Route, bool) {
				return refusal.route, refusal.ok
			})
			c := r.dial(address)
			c.Write([]byte("GET / HTTP/1.1\r\nHost: blocked.example.com\r\n\r\n"))
			expectReset(t, c, nil)
			if n := r.server.Stats().Refused[refusal.reason]; n != 1 {
				t.Errorf("counted %d", n)
			}
			eventually(t, "it is gone", func() bool { return r.server.Stats().Connections == 0 })
		})
	}
}

// A reload between the first question and the second: the route is looked up among the outbounds that
// there are by then.
func TestSniffTCPReload(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: time.Hour}, nil)
	server := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { io.Copy(c, onlyReader{c}) })
	r.verdicts.sniffTo(Route{Outbound: "old"})
	c := r.dial(server)
	defer c.Close()
	eventually(t, "it is accepted", func() bool { return r.server.Stats().Connections == 1 })
	r.verdicts.sniffTo(Route{Outbound: "new"})
	r.outbounds.set("new", directly(t)["up"])
	if err := roundTrip(c, "GET / HTTP/1.1\r\nHost: new.example.com\r\n\r\n"); err != nil {
		t.Error(err)
	}
}

// Looking does not stop the policy from taking its time, but that ends too.
func TestSniffTCPSlowDecision(t *testing.T) {
	r := newRig(t, Options{DialTimeout: time.Second}, directly(t))
	r.verdicts.sniff(func(ctx context.Context, _ policy.Network, _, _ netip.AddrPort, _ string) (Route, bool) {
		<-ctx.Done()
		return Route{}, false
	})
	c := r.dial(netip.AddrPortFrom(server4, 80))
	c.Write([]byte("GET / HTTP/1.1\r\nHost: slow.example.com\r\n\r\n"))
	expectReset(t, c, nil)
}

// 5,000 connections that say nothing cost another client's connections little, and end.
func TestSniffTCPSilent(t *testing.T) {
	if testing.Short() {
		t.Skip("short: it takes some seconds")
	}
	r := newNetwork(t)
	const silent = 5000
	r.descriptors = connectionDescriptors * (silent + 100) // they are not going to open so many
	r.serve(Options{SniffTimeout: time.Hour}, directly(t))
	r.server.tcp.mu.Lock()
	r.server.options.Limits.Connections = silent // it was made to fit what the process may open
	r.server.tcp.mu.Unlock()
	r.verdicts.sniffTo(Route{Outbound: "up"})
	server := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { io.Copy(c, onlyReader{c}) })
	measure := func() (median, p99 time.Duration) {
		var times []time.Duration
		for range 300 {
			start := time.Now()
			c, err := r.tryDial(server, other4)
			if err != nil {
				t.Fatal(err)
			}
			if err := roundTrip(c, "GET / HTTP/1.1\r\nHost: quick.example.com\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			times = append(times, time.Since(start))
			reset(c)
		}
		slices.Sort(times)
		return times[len(times)/2], times[len(times)*99/100]
	}
	measure()
	idle, idleP99 := measure()
	before := heap()
	var all []*net.TCPConn
	r.client.do(t, func() {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(client4, 0))}
		d.SetMultipathTCP(false)
		for range silent {
			c, err := d.Dial("tcp", server.String())
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, c.(*net.TCPConn))
		}
	})
	eventually(t, "all are waited for", func() bool { return r.server.Stats().Connections >= silent })
	memory := (heap() - before) / silent
	cpu := cpuTime()
	time.Sleep(300 * time.Millisecond)
	if used := cpuTime() - cpu; used > 60*time.Millisecond {
		t.Errorf("waiting used %v of processor time in 300 ms", used)
	}
	busy, busyP99 := measure()
	t.Logf("another client's connections: median %v, p99 %v beside none; %v, %v beside %d silent ones, which hold %d bytes each, both ends counted", idle, idleP99, busy, busyP99, silent, memory)
	// The median: what else runs on the machine makes the p99 of a moment.
	if limit := max(2*idle, 10*time.Millisecond); busy > limit {
		t.Errorf("another client's median rose from %v to %v", idle, busy)
	}
	if memory > 16<<10 {
		t.Errorf("a silent connection holds %d bytes", memory)
	}
	c, err := r.tryDial(server, client4)
	expectReset(t, c, err)
	if n := r.server.Stats().Refused[ClientLimit]; n != 1 {
		t.Errorf("one more than the limit: refused %d", n)
	}
	for _, c := range all {
		reset(c)
	}
	eventually(t, "all are gone", func() bool { return r.server.Stats().Connections == 0 })
}

// heap is the memory in use by objects and stacks.
func heap() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

// Serve ends at once while connections are being looked at, and leaves nothing of them.
func TestSniffLeavesNothing(t *testing.T) {
	r := newNetwork(t)
	round := func() {
		r.serve(Options{SniffTimeout: time.Hour}, directly(t))
		r.verdicts.sniffTo(Route{Outbound: "up"})
		c := r.dial(netip.AddrPortFrom(server4, 80))
		c.Write([]byte("GET /"))
		u := r.udpClient(client4, 0)
		defer u.Close()
		u.send(netip.AddrPortFrom(server4, 443), initials(t, "www.example.com")[0])
		eventually(t, "both are held", func() bool { return r.server.Stats().Connections == 1 && r.held() == 1 })
		start := time.Now()
		r.stop()
		expectReset(t, c, nil)
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("stopping took %v", d)
		}
		if s := r.server.Stats(); s.Connections+s.Sessions+s.Flows != 0 || r.server.descriptors.used.Load() != 0 || r.held() != 0 {
			t.Errorf("left: %+v, %d descriptors, %d held", s, r.server.descriptors.used.Load(), r.held())
		}
		if asked := r.verdicts.asks(); len(asked) != 0 {
			t.Errorf("the policy was asked with %q", asked)
		}
	}
	round()
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	for range 3 {
		round()
	}
	eventually(t, "goroutines and descriptors are as before", func() bool {
		return runtime.NumGoroutine() <= goroutines && openFiles(t) <= files
	})
}

// An outbound that is no plain socket reads through the runtime, with the deadline of the sniffing gone.
func TestSniffTCPStream(t *testing.T) {
	r := newRig(t, Options{SniffTimeout: 200 * time.Millisecond}, nil)
	r.outbounds.set("up", wrapping{directly(t)["up"]})
	r.verdicts.sniffTo(Route{Outbound: "up"})
	var received atomic.Int64
	server := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		n, _ := io.Copy(c, onlyReader{c})
		received.Add(n)
	})
	c := r.dial(server)
	if err := roundTrip(c, "GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(time.Second))
	var timeout net.Error
	if _, err := c.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("idle for longer than the sniffing may take: %v; want it to live on", err)
	}
	if err := roundTrip(c, "later"); err != nil {
		t.Error(err)
	}
	c.Close()
	eventually(t, "it ended", func() bool { return received.Load() > 0 })
}
