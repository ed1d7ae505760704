package proxy

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sidegate/appliance/outbound"
)

// BenchmarkUDP sends 64-byte datagrams that come back, and reports the processor time of the relay's
// threads per datagram that it delivered, up and down counted alike.
func BenchmarkUDP(b *testing.B) {
	for _, shape := range []struct{ endpoints, remotes int }{{1, 1}, {1, 512}, {512, 1}} {
		b.Run(fmt.Sprintf("endpoints=%d/remotes=%d", shape.endpoints, shape.remotes), func(b *testing.B) {
			r := newRig(b, Options{}, nil)
			upstream := r.socksServer(netip.AddrPortFrom(proxy4, 1081))
			r.outbounds.set("up", r.socks5(upstream.address()))
			var clients []*udpClientSocket
			var remotes []netip.AddrPort
			for range shape.endpoints {
				clients = append(clients, r.udpClient(client4, 0))
			}
			for i := range shape.remotes {
				remotes = append(remotes, netip.AddrPortFrom(server4, uint16(10000+i)))
			}
			payload := pattern(64, 1)
			for _, c := range clients {
				for _, to := range remotes {
					if err := c.exchange(to, payload); err != nil {
						b.Fatal(err)
					}
				}
			}
			g := newGenerator(b, clients, remotes)
			before, cpu := r.server.Stats().Outbounds["up"], relayTime(b)
			b.ResetTimer()
			g.run(b.N, payload)
			b.StopTimer()
			used, after := relayTime(b)-cpu, r.server.Stats().Outbounds["up"]
			delivered := after.PacketsUp + after.PacketsDown - before.PacketsUp - before.PacketsDown
			b.ReportMetric(float64(used.Microseconds())/float64(delivered), "cpu-µs/packet")
			b.ReportMetric(float64(g.lost)/float64(b.N)*100, "%lost")
		})
	}
}

// generator keeps a window of datagrams under way.
type generator struct {
	b       *testing.B
	clients []*udpClientSocket
	fds     []int
	remotes []sockaddr
	in      *batch
	out     *sender
	lost    int
}

func newGenerator(b *testing.B, clients []*udpClientSocket, remotes []netip.AddrPort) *generator {
	in, err := newBatch()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(in.close)
	g := &generator{b: b, clients: clients, in: in, out: new(sender)}
	for _, c := range clients {
		raw, err := c.SyscallConn()
		if err != nil {
			b.Fatal(err)
		}
		raw.Control(func(fd uintptr) { g.fds = append(g.fds, int(fd)) })
	}
	for _, to := range remotes {
		name := sockaddr{Family: unix.AF_INET, Port: to.Port()<<8 | to.Port()>>8}
		(*unix.RawSockaddrInet4)(unsafe.Pointer(&name)).Addr = to.Addr().As4()
		g.remotes = append(g.remotes, name)
	}
	return g
}

// run sends n datagrams, each socket's turn being a burst of 32, and waits until each turn came back.
func (g *generator) run(n int, payload []byte) {
	const burst, window = 32, 512
	client, remote, under := 0, 0, 0
	waiting := make(map[int]int)
	for sent := 0; sent < n; {
		// no segmentation here: a client's datagrams arrive one by one
		socket := udpSocket{registration: registration{fd: g.fds[client]}, noSegmentation: 1}
		g.out.begin(&socket)
		for range min(burst, n-sent) {
			g.out.add(nil, payload, &g.remotes[remote], unix.SizeofSockaddrInet4)
			remote = (remote + 1) % len(g.remotes)
			sent++
			under++
			waiting[client]++
		}
		if lost := g.out.end().lost; lost > 0 {
			g.b.Fatalf("the generator could not send %d datagrams", lost)
		}
		client = (client + 1) % len(g.fds)
		if under >= window || sent >= n {
			for c, count := range waiting {
				g.lost += g.collect(c, count)
			}
			clear(waiting)
			under = 0
		}
	}
}

// collect waits for datagrams, and returns how many did not come.
func (g *generator) collect(client, count int) (missing int) {
	poll := []unix.PollFd{{Fd: int32(g.fds[client]), Events: unix.POLLIN}}
	for count > 0 {
		g.in.empty()
		if _, n := g.in.receive(g.fds[client]); n > 0 {
			count -= n
			continue
		}
		if n, err := unix.Poll(poll, 1000); n == 0 && err == nil {
			return count
		}
	}
	return 0
}

// relayTime is the processor time of the relay's threads so far.
func relayTime(b *testing.B) time.Duration { return relayTimeOf(b, "relay-") }

// relayTimeOf is that of the threads whose names begin so.
func relayTimeOf(t testing.TB, prefix string) (total time.Duration) {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		name, _ := os.ReadFile(task + "/comm")
		if !strings.HasPrefix(string(name), prefix) {
			continue
		}
		var running int64
		if stat, err := os.ReadFile(task + "/schedstat"); err != nil {
			t.Fatal(err)
		} else if _, err := fmt.Sscan(string(stat), &running); err != nil {
			t.Fatal(err)
		}
		total += time.Duration(running)
	}
	if total == 0 {
		t.Fatalf("no thread %s… was found", prefix)
	}
	return total
}

// BenchmarkTCPRoundTrip measures a small request and response through a SOCKS5 server, once with the
// relay in between and once by a client that speaks SOCKS5 itself, in turns.
func BenchmarkTCPRoundTrip(b *testing.B) {
	r := newNetwork(b)
	r.serve(Options{}, map[string]outbound.Outbound{"up": r.dante()})
	(*namespace)(nil).run(b, "sysctl -qw net.ipv4.ip_forward=1")
	r.internet.run(b, "ip route add default via 203.0.113.2")
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { io.Copy(c, onlyReader{c}) })
	var itself net.Conn
	var err error
	r.client.do(b, func() {
		itself, err = r.socks5(netip.AddrPortFrom(proxy4, 1080)).DialTCP(b.Context(), outbound.Destination{Addr: address})
	})
	if err != nil {
		b.Fatal(err)
	}
	ways := []struct {
		name  string
		c     net.Conn
		times []time.Duration
	}{{name: "relay", c: r.dial(address)}, {name: "itself", c: itself}}
	cpu := relayTime(b)
	for b.Loop() {
		for i := range ways {
			w := &ways[i]
			for range 100 {
				start := time.Now()
				if err := roundTrip(w.c, "sixty-four bytes, more or less, of a request that is quite short"); err != nil {
					b.Fatal(err)
				}
				w.times = append(w.times, time.Since(start))
			}
		}
	}
	b.ReportMetric(float64((relayTime(b)-cpu).Microseconds())/float64(len(ways[0].times)), "cpu-µs/trip")
	var p50, p5 [2]float64
	for i, w := range ways {
		slices.Sort(w.times)
		p50[i] = float64(w.times[len(w.times)/2].Nanoseconds()) / 1000
		p5[i] = float64(w.times[len(w.times)/20].Nanoseconds()) / 1000
		b.ReportMetric(p50[i], w.name+"-p50-µs")
		b.ReportMetric(p5[i], w.name+"-p5-µs")
		w.c.Close()
	}
	b.ReportMetric(p50[0]/p50[1], "p50-ratio")
	b.ReportMetric(p5[0]/p5[1], "p5-ratio")
}
