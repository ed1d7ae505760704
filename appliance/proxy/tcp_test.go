package proxy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

func TestTCPThroughDante(t *testing.T) {
	r := newNetwork(t)
	r.serve(Options{}, map[string]outbound.Outbound{"up": r.dante()})
	for _, to := range []netip.Addr{server4, server6} {
		t.Run(to.String(), func(t *testing.T) {
			address := r.tcpServer(netip.AddrPortFrom(to, 0), func(c *net.TCPConn) {
				all, _ := io.ReadAll(c)
				c.Write(bytes.ToUpper(all))
				c.CloseWrite()
			})
			c := r.dial(address)
			defer c.Close()
			if _, err := c.Write([]byte("half closed")); err != nil {
				t.Fatal(err)
			}
			c.CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil || string(got) != "HALF CLOSED" {
				t.Fatalf("got %q, %v", got, err)
			}
			if c.RemoteAddr().String() != address.String() {
				t.Fatalf("the client sees %s", c.RemoteAddr())
			}
		})
	}
}

// The other half: the server ends first, and goes on receiving.
func TestTCPServerHalfCloses(t *testing.T) {
	r := newRig(t, Options{}, directly(t))
	received := make(chan []byte, 1)
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		c.Write([]byte("greeting"))
		c.CloseWrite()
		all, _ := io.ReadAll(c)
		received <- all
	})
	c := r.dial(address)
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "greeting" {
		t.Fatalf("got %q, %v", got, err)
	}
	late := bytes.Repeat([]byte("late "), 100000)
	if _, err := c.Write(late); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	if got := <-received; !bytes.Equal(got, late) {
		t.Fatalf("the server received %d bytes of %d", len(got), len(late))
	}
}

// 1,000 connections at once carry 200 MB up and 200 MB down.
func TestTCPManyConnections(t *testing.T) {
	const connections, size = 1000, 200_000
	r := newNetwork(t)
	r.serve(Options{}, map[string]outbound.Outbound{"up": r.dante()})

	// Each side sends a stream made from a seed, and replies at the end with the hash of the other's.
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		var seed [1]byte
		if _, err := io.ReadFull(c, seed[:]); err != nil {
			t.Error("server: ", err)
			return
		}
		if err := exchange(c, size, 1000+int(seed[0]), int(seed[0])); err != nil {
			t.Error("server: ", err)
		}
	})
	var done sync.WaitGroup
	start := make(chan struct{})
	for i := range connections {
		done.Go(func() {
			c, err := r.tryDial(address, client4)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			<-start
			seed := byte(i)
			c.Write([]byte{seed})
			if err := exchange(c, size, int(seed), 1000+int(seed)); err != nil {
				t.Error("client: ", err)
			}
		})
	}
	eventually(t, "all are open at once", func() bool {
		return r.server.Stats().Outbounds["up"].Connections == connections && r.server.Stats().Connections == connections
	})
	close(start)
	done.Wait()
	eventually(t, "the connections are gone", func() bool { return r.server.Stats().Connections == 0 })
	traffic := r.server.Stats().Outbounds["up"]
	if traffic.BytesUp != connections*(size+1) || traffic.BytesDown != connections*size {
		t.Errorf("counted %d bytes up and %d down", traffic.BytesUp, traffic.BytesDown)
	}
}

// exchange sends one stream and checks the other, both at once, each to its end.
func exchange(c *net.TCPConn, size, sendSeed, receiveSeed int) error {
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, io.LimitReader(stream(sendSeed), int64(size)))
		sent <- errors.Join(err, c.CloseWrite())
	}()
	got, want := sha256.New(), sha256.New()
	n, err := io.Copy(got, c)
	io.Copy(want, io.LimitReader(stream(receiveSeed), int64(size)))
	if err == nil && (n != int64(size) || !bytes.Equal(got.Sum(nil), want.Sum(nil))) {
		err = fmt.Errorf("received %d bytes of %d, or others than were sent", n, size)
	}
	return errors.Join(err, <-sent)
}

func stream(seed int) io.Reader { return rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1}) }

// A client must see that it failed, and not an empty success.
func TestTCPResetWhenDialFails(t *testing.T) {
	r := newNetwork(t)
	r.serve(Options{}, map[string]outbound.Outbound{"up": r.dante()})
	c, err := r.tryDial(netip.AddrPortFrom(server4, 9), client4) // nobody listens there
	expectReset(t, c, err)
	if n := r.server.Stats().Refused[UpstreamFailed]; n != 1 {
		t.Errorf("counted %d", n)
	}
}

// A reset of either side reaches the other one.
func TestTCPResetIsPassedOn(t *testing.T) {
	r := newRig(t, Options{}, directly(t))
	servers := make(chan *net.TCPConn, 1)
	done := make(chan struct{})
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		servers <- c
		<-done
	})
	defer close(done)
	for _, who := range []string{"client", "server"} {
		a := r.dial(address)
		b := <-servers
		if who == "server" {
			a, b = b, a
		}
		reset(a)
		if n, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reset by the %s: read %d, %v", who, n, err)
		}
		b.Close()
	}
	eventually(t, "the connections are gone", func() bool { return r.server.Stats().Connections == 0 })
}

// A receiver that does not read holds its own connection up, and nothing else; then all arrives.
func TestTCPBackPressure(t *testing.T) {
	r := newRig(t, Options{Threads: 1}, directly(t))
	const size = 64 << 20
	start := make(chan struct{})
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		<-start
		sum := sha256.New()
		io.Copy(sum, c)
		c.Write(sum.Sum(nil))
	})
	slow := r.dial(address)
	defer slow.Close()
	want := sha256.New()
	writing := make(chan error, 1)
	go func() {
		_, err := io.Copy(slow, io.TeeReader(io.LimitReader(stream(1), size), want))
		writing <- errors.Join(err, slow.CloseWrite())
	}()
	eventually(t, "the slow connection is stuck", func() bool {
		before := r.server.Stats().Outbounds["up"].BytesUp
		time.Sleep(100 * time.Millisecond)
		return before > 0 && r.server.Stats().Outbounds["up"].BytesUp == before
	})
	cpu := cpuTime()
	time.Sleep(300 * time.Millisecond)
	if used := cpuTime() - cpu; used > 100*time.Millisecond {
		t.Errorf("waiting for a slow receiver used %v of processor time in 300 ms", used)
	}

	echo := r.tcpServer(netip.AddrPortFrom(third4, 0), func(c *net.TCPConn) { io.Copy(c, onlyReader{c}) })
	quick := r.dial(echo)
	defer quick.Close()
	if err := roundTrip(quick, "beside it"); err != nil {
		t.Error(err)
	}
	close(start)
	if err := <-writing; err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(slow); err != nil || !bytes.Equal(got, want.Sum(nil)) {
		t.Errorf("the receiver got something else than was sent (%v)", err)
	}
}

func TestTCPHalfClosedExpires(t *testing.T) {
	r := newRig(t, Options{HalfClosed: 2 * time.Second}, directly(t))
	chatty := r.dial(r.tcpServer(netip.AddrPortFrom(third4, 0), func(c *net.TCPConn) {
		io.ReadAll(c)
		for range 10 { // longer than HalfClosed, but not silent
			time.Sleep(250 * time.Millisecond)
			c.Write([]byte("."))
		}
	}))
	chatty.CloseWrite()
	if got, err := io.ReadAll(chatty); err != nil || len(got) != 10 {
		t.Errorf("half closed but not silent: got %q, %v", got, err)
	}
	done := make(chan struct{})
	defer close(done)
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { <-done })
	open, half := r.dial(address), r.dial(address)
	defer open.Close()
	defer half.Close()
	eventually(t, "both are open", func() bool { return r.server.Stats().Outbounds["up"].Connections == 3 })
	half.CloseWrite()
	if n, err := half.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("half closed and silent: read %d, %v; want a reset", n, err)
	}
	eventually(t, "one is left", func() bool { return r.server.Stats().Connections == 1 })
	open.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	var timeout net.Error
	if _, err := open.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("idle but open: %v; want it to live on", err)
	}
}

func TestTCPRefusals(t *testing.T) {
	r := newRig(t, Options{Limits: Limits{Connections: 2}}, directly(t))
	done := make(chan struct{})
	defer close(done)
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { <-done })
	for _, refusal := range []struct {
		name   string
		reason Reason
		dial   func() (*net.TCPConn, error)
	}{
		{"connected to the listener itself", NotProxied, func() (*net.TCPConn, error) {
			return net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port(t, r.server.Sockets().TCP4)})
		}},
		{"not proxied", NotProxied, func() (*net.TCPConn, error) {
			r.verdicts.set(func(policy.Network, netip.AddrPort, netip.AddrPort) (string, bool) { return "", false })
			return r.tryDial(address, client4)
		}},
		{"no such outbound", NoOutbound, func() (*net.TCPConn, error) {
			r.verdicts.set(func(policy.Network, netip.AddrPort, netip.AddrPort) (string, bool) { return "gone", true })
			return r.tryDial(address, client4)
		}},
		{"client limit", ClientLimit, func() (*net.TCPConn, error) {
			r.verdicts.set(func(policy.Network, netip.AddrPort, netip.AddrPort) (string, bool) { return "up", true })
			a, b := r.dial(address), r.dial(address)
			t.Cleanup(func() { a.Close(); b.Close() })
			eventually(t, "two are open", func() bool { return r.server.Stats().Connections == 2 })
			return r.tryDial(address, client4)
		}},
	} {
		t.Run(refusal.name, func(t *testing.T) {
			before := r.server.Stats().Refused[refusal.reason]
			c, err := refusal.dial()
			expectReset(t, c, err)
			if n := r.server.Stats().Refused[refusal.reason] - before; n != 1 {
				t.Errorf("%v was counted %d times", refusal.reason, n)
			}
		})
	}
	c, err := r.tryDial(address, other4)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, "another client's is opened beside the full one's", func() bool { return r.server.Stats().Outbounds["up"].Connections == 3 })
}

// An outbound whose connections are no plain sockets is relayed through memory, with the same manners.
func TestTCPStream(t *testing.T) {
	r := newRig(t, Options{HalfClosed: 1500 * time.Millisecond}, nil)
	r.outbounds.set("up", wrapping{directly(t)["up"]})
	const size = 3_000_000
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		if err := exchange(c, size, 2, 1); err != nil {
			t.Error("server: ", err)
		}
	})
	if err := exchange(r.dial(address), size, 1, 2); err != nil {
		t.Error("client: ", err)
	}
	eventually(t, "the connection is gone and counted", func() bool {
		s := r.server.Stats()
		up := s.Outbounds["up"]
		return s.Connections == 0 && up.BytesUp == size && up.BytesDown == size
	})

	slow := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) {
		io.ReadAll(c)
		for range 6 { // longer than HalfClosed, but not silent
			time.Sleep(400 * time.Millisecond)
			c.Write([]byte("."))
		}
	})
	c := r.dial(slow)
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "......" {
		t.Errorf("half closed but not silent: got %q, %v", got, err)
	}

	done := make(chan struct{})
	defer close(done)
	silent := r.tcpServer(netip.AddrPortFrom(server4, 0), func(*net.TCPConn) { <-done })
	c = r.dial(silent)
	c.CloseWrite()
	expectReset(t, c, nil)

	c = r.dial(silent)
	eventually(t, "it is open", func() bool { return r.server.Stats().Outbounds["up"].Connections == 4 })
	r.stop()
	expectReset(t, c, nil)
}

// wrapping hides that the connections are sockets, as TLS does.
type wrapping struct{ outbound.Outbound }

func (w wrapping) DialTCP(ctx context.Context, to outbound.Destination) (net.Conn, error) {
	c, err := w.Outbound.DialTCP(ctx, to)
	if err != nil {
		return nil, err
	}
	return wrapped{c}, nil
}

type wrapped struct{ net.Conn }

func (w wrapped) CloseWrite() error { return w.Conn.(*net.TCPConn).CloseWrite() }

// expectReset takes the result of a dial: the reset may come while it still connects.
func expectReset(t *testing.T, c *net.TCPConn, err error) {
	t.Helper()
	if err == nil {
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
}

// directly is the outbound "up" that goes nowhere but out.
func directly(t testing.TB) map[string]outbound.Outbound {
	t.Helper()
	set, err := outbound.NewSet(outbound.Options{Control: markSocket(testMark)})
	if err != nil {
		t.Fatal(err)
	}
	direct, _ := set.Outbound(policy.OutboundDirect)
	return map[string]outbound.Outbound{"up": direct}
}

// tcpServer serves each connection to an address of the internet; port 0 means any.
func (r *rig) tcpServer(at netip.AddrPort, handle func(*net.TCPConn)) netip.AddrPort {
	t := r.t
	t.Helper()
	var l net.Listener
	var err error
	r.internet.do(t, func() {
		config := net.ListenConfig{}
		config.SetMultipathTCP(false)
		l, err = config.Listen(context.Background(), "tcp", at.String())
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.stop() // ends the connections
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// dial connects from the client.
func (r *rig) dial(to netip.AddrPort) *net.TCPConn {
	r.t.Helper()
	from := client4
	if to.Addr().Is6() {
		from = client6
	}
	c, err := r.tryDial(to, from)
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func (r *rig) tryDial(to netip.AddrPort, from netip.Addr) (*net.TCPConn, error) {
	var c net.Conn
	var err error
	r.client.do(r.t, func() {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: 20 * time.Second}
		d.SetMultipathTCP(false)
		c, err = d.Dial("tcp", to.String())
	})
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(time.Minute)) // so that a test fails instead of hanging
	return c.(*net.TCPConn), nil
}

func roundTrip(c net.Conn, message string) error {
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write([]byte(message)); err != nil {
		return err
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != message {
		return fmt.Errorf("got %q, %v; want %q", got, err, message)
	}
	return nil
}

// cpuTime is the processor time of this process so far.
func cpuTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
