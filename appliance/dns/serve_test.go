package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/policy"
)

// dig asks as users do, by UDP and TCP, IPv4 and IPv6, whatever resolver they mean.
func TestDig(t *testing.T) {
	n := newNetwork(t)
	z := newZone(t, "www.example.com. 300 A 203.0.113.9", "www.example.com. 300 AAAA 2001:db8::9")
	p := new(pupil)
	n.serve(Options{Learner: p}, newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}))
	for range 2 { // asked, then cached
		for _, server := range []string{asked4.String(), asked6.String(), "192.168.7.2", "fd07::2"} {
			for _, transport := range []string{"+notcp", "+tcp"} {
				out := n.client.run(t, fmt.Sprintf("dig +time=2 +tries=1 %s @%s www.example.com A", transport, server))
				if !strings.Contains(out, "203.0.113.9") || !strings.Contains(out, "SERVER: "+server+"#53") {
					t.Errorf("%s %s:\n%s", server, transport, out)
				}
			}
		}
	}
	if q := z.questions(); len(q) != 1 {
		t.Errorf("the upstream was asked %q, want once", q)
	}
	if !p.knows(client4, "www.example.com", addrs("203.0.113.9")[0]) || !p.knows(client6, "www.example.com", addrs("203.0.113.9")[0]) {
		t.Errorf("taught: %v", p.all())
	}
}

// connect opens a connection to whatever resolver the client means.
func (n *network) connect(from, to netip.Addr) *dns.Conn {
	n.t.Helper()
	c, err := n.dial(from, to)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

func (n *network) dial(from, to netip.Addr) (*dns.Conn, error) {
	n.t.Helper()
	var c net.Conn
	var err error
	n.client.do(n.t, func() {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: 5 * time.Second}
		c, err = d.Dial("tcp", netip.AddrPortFrom(to, 53).String())
	})
	if err != nil {
		return nil, err
	}
	n.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return &dns.Conn{Conn: c}, nil
}

// Several questions share a connection, and a slow one does not hold up the next.
func TestConnection(t *testing.T) {
	n := newNetwork(t)
	slow, fast := newZone(t, "four.slow.example. 60 A 192.0.2.2", "six.slow.example. 60 A 192.0.2.2"), newZone(t, "www.fast.example. 60 A 192.0.2.1")
	n.serve(Options{Learner: new(pupil)}, newResolver(t, Settings{
		Upstreams: map[string]Exchanger{"slow": slow, "fast": fast}, Default: "slow",
		Rules: []Rule{{Match: match(t, "domain_suffix: fast.example"), Upstream: "fast"}},
	}))
	for _, way := range []struct {
		from, to netip.Addr
		name     string
	}{{client4, asked4, "four.slow.example"}, {client6, asked6, "six.slow.example"}} {
		hold := make(chan struct{})
		slow.set(func(z *zone) { z.hold = hold })
		c := n.connect(way.from, way.to)
		questions := []*dns.Msg{question(way.name, dns.TypeA), question("www.fast.example", dns.TypeA)}
		for _, q := range questions {
			b, _ := q.Pack()
			b = append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
			for i := range b { // in pieces of one byte
				if _, err := c.Conn.Write(b[i : i+1]); err != nil {
					t.Fatal(err)
				}
			}
		}
		first, err := c.ReadMsg()
		if err != nil || first.Id != questions[1].Id || brief(first) != "NOERROR 192.0.2.1" {
			t.Fatalf("first: %v, %v", first, err)
		}
		// The client has no more to ask, but still waits.
		if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		n.client.run(t, "dig +time=5 +tries=1 @8.8.8.8 www.fast.example") // meanwhile the server sees that
		close(hold)
		second, err := c.ReadMsg()
		if err != nil || second.Id != questions[0].Id || brief(second) != "NOERROR 192.0.2.2" {
			t.Fatalf("second: %v, %v", second, err)
		}
		if _, err := c.Conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the connection ended with %v", err)
		}
	}
	eventually(t, "no connection is left", func() bool { return n.server.Stats().Connections == 0 })
}

// A client has so many connections and no more, and nobody else has fewer for it.
func TestConnectionLimit(t *testing.T) {
	n := newNetwork(t)
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	n.serve(Options{Learner: new(pupil), Limits: Limits{Connections: 3}}, newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}))
	asks := func(c *dns.Conn) error {
		if err := c.WriteMsg(question("www.example", dns.TypeA)); err != nil {
			return err
		}
		_, err := c.ReadMsg()
		return err
	}
	var open []*dns.Conn
	for range 3 {
		c := n.connect(client4, asked4)
		if err := asks(c); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	if c, err := n.dial(client4, asked4); err == nil && asks(c) == nil { // the reset may overtake connect
		t.Error("one too many was served")
	}
	if err := asks(n.connect(other4, asked4)); err != nil {
		t.Errorf("the other client: %v", err)
	}
	open[0].Close()
	eventually(t, "the closed one is counted off", func() bool { return n.server.Stats().Connections == 3 }) // with the other client's
	if err := asks(n.connect(client4, asked4)); err != nil {
		t.Errorf("after one was closed: %v", err)
	}
	if d := n.server.Stats().Dropped[ClientLimit]; d != 1 {
		t.Errorf("%d counted, want 1", d)
	}
}

// Nobody is served who talks to our own sockets: only what was steered to them is a query of the LAN.
func TestOwnSockets(t *testing.T) {
	n := newNetwork(t)
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	n.serve(Options{Learner: new(pupil), Allow: func(netip.Addr) bool { return true }}, newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}))
	s := n.server.Sockets()
	u, err := net.Dial("udp", bound(t, s.UDP4).String())
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	(&dns.Conn{Conn: u}).WriteMsg(question("www.example", dns.TypeA))
	if c, err := net.Dial("tcp", bound(t, s.TCP4).String()); err == nil { // the reset may overtake connect
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		(&dns.Conn{Conn: c}).WriteMsg(question("www.example", dns.TypeA))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the connection was not reset: %v", err)
		}
	}
	eventually(t, "both are counted", func() bool { return n.server.Stats().Dropped[NotAllowed] == 2 })
	if q := z.questions(); len(q) > 0 {
		t.Errorf("asked %q", q)
	}
}

// A burst of many questions, more than a batch holds, is answered whole, each to its own socket and from
// the address that was asked.
func TestBurst(t *testing.T) {
	n := newNetwork(t)
	n.serve(Options{Learner: new(pupil), Limits: Limits{Outstanding: 4096}}, newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": exchangeFunc(anyAnswer)}, Default: "up"}))
	const sockets, questions = 4, 500
	for round := range 2 { // asked, then cached
		for i := range sockets {
			from, to := client4, netip.AddrFrom4([4]byte{8, 8, 8, byte(round*sockets + i)})
			network := "udp4"
			if i%2 == 1 {
				from, to, network = client6, asked6, "udp6"
			}
			var c *net.UDPConn
			var err error
			n.client.do(t, func() { c, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))) })
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetReadBuffer(4 << 20)
			want := map[uint16]string{}
			for j := range questions {
				q := question(fmt.Sprintf("host-%d-%d.example", i, j), dns.TypeA)
				q.Id = uint16(j)
				want[q.Id] = q.Question[0].Name
				b, _ := q.Pack()
				if _, err := c.WriteToUDPAddrPort(b, netip.AddrPortFrom(to, 53)); err != nil {
					t.Fatal(err)
				}
			}
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			b := make([]byte, 65536)
			for len(want) > 0 {
				length, source, err := c.ReadFromUDPAddrPort(b)
				if err != nil {
					t.Fatalf("%d answers are missing: %v, %+v", len(want), err, n.server.Stats())
				}
				m := new(dns.Msg)
				if err := m.Unpack(b[:length]); err != nil {
					t.Fatal(err)
				}
				if source.Addr().Unmap() != to || source.Port() != 53 || want[m.Id] != m.Question[0].Name || brief(m) != "NOERROR 203.0.113.9" {
					t.Fatalf("from %s:\n%v", source, m)
				}
				delete(want, m.Id)
			}
		}
	}
}

// Serve leaves no descriptor and no goroutine behind.
func TestServeLeavesNothing(t *testing.T) {
	n := newNetwork(t)
	round := func() {
		z := newZone(t)
		z.hold = make(chan struct{}) // never: what waits must be ended
		r, err := NewResolver(Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"})
		if err != nil {
			t.Fatal(err)
		}
		n.serve(Options{Learner: new(pupil)}, r)
		c := n.connect(client4, asked4)
		defer c.Close()
		c.WriteMsg(question("www.example", dns.TypeA))
		n.client.run(t, "dig +time=1 +tries=1 @8.8.8.8 other.example >/dev/null || true")
		eventually(t, "both are asked", func() bool { return len(z.questions()) == 2 })
		n.stop()
		r.Close()
		if s := n.server.Stats(); s.Connections != 0 || n.server.clients.outstanding != 0 || n.server.strangers.Load() != 0 {
			t.Errorf("left: %+v", s)
		}
	}
	round() // the runtime opens what it keeps
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	for range 3 {
		round()
	}
	eventually(t, "goroutines and descriptors are as before", func() bool {
		return runtime.NumGoroutine() <= goroutines && openFiles(t) <= files
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range list {
		// The runtime's own poller may appear between two looks.
		if target, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && !strings.Contains(target, "/proc/") {
			n++
		}
	}
	return n
}

func TestCloseWithoutServe(t *testing.T) {
	newNetwork(t)
	files := openFiles(t)
	s, err := Listen(Options{Learner: new(pupil)})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if n := openFiles(t); n != files {
		t.Errorf("%d descriptors, %d before", n, files)
	}
	if err := s.Serve(t.Context()); err == nil {
		t.Error("Serve after Close succeeded")
	}
	if _, err := Listen(Options{}); err == nil {
		t.Error("Listen without a learner succeeded")
	}
}

// A resolver that holds the port on every address is named, and one on its own address is no conflict.
func TestOtherResolvers(t *testing.T) {
	newNetwork(t)
	for _, c := range []struct{ at, want string }{{"0.0.0.0:53", "bind it to its own"}, {"127.0.0.1:53", ""}, {"[::1]:53", ""}} {
		other, err := net.ListenPacket("udp", c.at)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Listen(Options{Learner: new(pupil)})
		switch {
		case c.want == "" && err != nil:
			t.Errorf("beside %s: %v", c.at, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("beside %s: %v, want: %s", c.at, err, c.want)
		}
		if err == nil {
			s.Close()
		}
		other.Close()
	}
}

// slowToEnd is a Learner that takes its time when it is interrupted.
type slowToEnd struct{ began, ended atomic.Int64 }

func (l *slowToEnd) Learn(ctx context.Context, _ netip.Addr, _ []string, _ []netip.Addr, _ time.Duration) error {
	l.began.Add(1)
	<-ctx.Done()
	time.Sleep(100 * time.Millisecond)
	l.ended.Add(1)
	return ctx.Err()
}

// Serve returns when nothing of it calls anybody any more.
func TestServeWaits(t *testing.T) {
	n := newNetwork(t)
	l := new(slowToEnd)
	n.serve(Options{Learner: l}, newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": exchangeFunc(anyAnswer)}, Default: "up"}))
	var u net.Conn
	var err error
	n.client.do(t, func() { u, err = net.Dial("udp", netip.AddrPortFrom(asked4, 53).String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if err := (&dns.Conn{Conn: u}).WriteMsg(question("www.example", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is learning", func() bool { return l.began.Load() == 1 })
	n.stop()
	if l.ended.Load() != 1 {
		t.Error("Serve returned before Learn did")
	}
}

// A device's connections are counted together, from whichever of its addresses they come.
func TestConnectionLimitIsOfADevice(t *testing.T) {
	n := newNetwork(t)
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	facts := func(a netip.Addr) (policy.MAC, string) {
		if a == other4 {
			return policy.MAC{2, 0, 0, 0, 0, 4}, ""
		}
		return policy.MAC{2, 0, 0, 0, 0, 3}, ""
	}
	n.serve(Options{Learner: new(pupil), ClientFacts: facts, Limits: Limits{Connections: 1}}, newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}))
	asks := func(c *dns.Conn) error {
		if err := c.WriteMsg(question("www.example", dns.TypeA)); err != nil {
			return err
		}
		_, err := c.ReadMsg()
		return err
	}
	if err := asks(n.connect(client4, asked4)); err != nil {
		t.Fatal(err)
	}
	if c, err := n.dial(client6, asked6); err == nil && asks(c) == nil { // the reset may overtake connect
		t.Error("a second connection was served to the device's other address")
	}
	if err := asks(n.connect(other4, asked4)); err != nil {
		t.Errorf("the other device: %v", err)
	}
}
