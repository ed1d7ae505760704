package proxy

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestBucket(t *testing.T) {
	r := rate{interval: 10 * time.Millisecond, burst: 5}
	var b bucket
	now := int64(time.Hour)
	count := func() (n int) {
		for b.take(now, r) {
			n++
		}
		return n
	}
	if n := count(); n != 5 {
		t.Errorf("a full bucket gave %d, want 5", n)
	}
	now += int64(10 * time.Millisecond)
	if n := count(); n != 1 {
		t.Errorf("after one interval: %d, want 1", n)
	}
	now += int64(25 * time.Millisecond)
	if n := count(); n != 2 {
		t.Errorf("after two and a half intervals: %d, want 2", n)
	}
	if b.full(now) {
		t.Error("an empty bucket says that it is full")
	}
	now += int64(time.Hour)
	if !b.full(now) {
		t.Error("an idle bucket does not say that it is full")
	}
	if n := count(); n != 5 {
		t.Errorf("after an hour: %d, want 5", n)
	}
}

func TestList(t *testing.T) {
	type member struct {
		node node[member]
		name string
	}
	var l list[member]
	a, b, c := &member{name: "a"}, &member{name: "b"}, &member{name: "c"}
	for _, m := range []*member{a, b, c} {
		l.push(&m.node, m)
	}
	a.node.touch()
	b.node.touch()
	b.node.touch()
	var order string
	for m := l.oldest(); m != nil; m = l.oldest() {
		order += m.name
		m.node.leave()
		m.node.leave()
	}
	if order != "cab" || l.length != 0 {
		t.Errorf("oldest first: %q, %d left; want cab, 0", order, l.length)
	}
}

func TestLimitsFit(t *testing.T) {
	l := Limits{Connections: 1 << 20, Sessions: 10, Flows: 1 << 20}
	l.fit(8000)
	if l != (Limits{Connections: 1000, Sessions: 10, Flows: 1000}) {
		t.Errorf("got %+v", l)
	}
}

// pair is a UDP socket of ours, connected to one that receives.
func pair(t *testing.T) (*udpSocket, *net.UDPConn) {
	t.Helper()
	to, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { to.Close() })
	to.SetReadBuffer(4 << 20)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Connect(fd, endpointOf(udpAddr(to)).sockaddr()); err != nil {
		t.Fatal(err)
	}
	return &udpSocket{registration: registration{fd: fd}}, to
}

// Datagrams arrive as they were added, whatever runs of equal lengths they form, and are counted
// without their headers.
func TestSender(t *testing.T) {
	socket, to := pair(t)
	out := new(sender)
	header := []byte("header")
	for _, lengths := range [][]int{
		{0},
		{1},
		{0, 0, 5, 0},
		{100, 100, 100},
		{100, 100, 50, 50, 100},
		{50, 100, 100, 99, 100},
		{1472, 1472, 1473, 1473},
		{65000, 65000},
		{60000, 10},
	} {
		for _, h := range [][]byte{nil, header} {
			out.begin(socket)
			bytesWant := 0
			for i, n := range lengths {
				out.add(h, pattern(n, byte(i)), nil, 0)
				bytesWant += n
			}
			if r := out.end(); r != (sent{packets: len(lengths), bytes: bytesWant}) {
				t.Errorf("%v: %+v", lengths, r)
			}
			b := make([]byte, 65536)
			for i, n := range lengths {
				to.SetReadDeadline(time.Now().Add(10 * time.Second))
				got, err := to.Read(b)
				if err != nil || !bytes.Equal(b[:got], append(h[:len(h):len(h)], pattern(n, byte(i))...)) {
					t.Fatalf("%v: datagram %d: %d bytes, %v", lengths, i, got, err)
				}
			}
		}
	}
}

// More than one call's worth, in groups and out of them.
func TestSenderManyMessages(t *testing.T) {
	socket, to := pair(t)
	out := new(sender)
	const count = 2000
	for _, step := range []int{0, 1} {
		out.begin(socket)
		for i := range count {
			out.add([]byte("h"), pattern(10+i*step%50, byte(i)), nil, 0)
		}
		if r := out.end(); r.packets != count || r.lost != 0 {
			t.Fatalf("%+v", r)
		}
		b := make([]byte, 2048)
		for i := range count {
			to.SetReadDeadline(time.Now().Add(10 * time.Second))
			n, err := to.Read(b)
			if err != nil || !bytes.Equal(b[1:n], pattern(10+i*step%50, byte(i))) {
				t.Fatalf("datagram %d of %d: %d bytes, %v", i, count, n, err)
			}
		}
	}
}

// One datagram that cannot be sent costs only itself; a port that is closed costs nothing.
func TestSenderRefusals(t *testing.T) {
	socket, to := pair(t)
	out := new(sender)
	out.begin(socket)
	for _, n := range []int{10, 65508, 20} {
		out.add(nil, pattern(n, 1), nil, 0)
	}
	if r := out.end(); r != (sent{packets: 2, bytes: 30, lost: 1}) {
		t.Errorf("with a datagram that is too long: %+v", r)
	}
	to.Close()
	for range 3 { // what ICMP says about one call's datagrams is told to the next call
		out.begin(socket)
		for i := range 5 {
			out.add(nil, pattern(10+i, 1), nil, 0) // not equal: five messages
		}
		if r := out.end(); r.packets != 5 || r.lost != 0 {
			t.Errorf("to a closed port: %+v", r)
		}
	}
}

// recorder notes what it was called with, and may do something then.
type recorder struct {
	calls int
	then  func()
}

func (r *recorder) ready(uint32) {
	r.calls++
	if r.then != nil {
		r.then()
	}
}

// An event that epoll reported for a descriptor does not reach the handler of its successor.
func TestLoopStaleEvents(t *testing.T) {
	l, err := newLoop("loop-test")
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	eventfd := func(count uint) int {
		fd, err := unix.Eventfd(count, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	var a, b registration
	first, second, successor := &recorder{}, &recorder{}, &recorder{}
	replace := func(victim *registration) func() {
		return func() {
			index := victim.index
			l.remove(victim)
			r, err := l.add(eventfd(0), unix.EPOLLIN, successor)
			if err != nil || r.index != index {
				t.Errorf("the slot was not used again: %v", err)
			}
			l.stop()
		}
	}
	first.then, second.then = replace(&b), replace(&a)
	if a, err = l.add(eventfd(1), unix.EPOLLIN, first); err != nil {
		t.Fatal(err)
	}
	if b, err = l.add(eventfd(1), unix.EPOLLIN, second); err != nil {
		t.Fatal(err)
	}
	if err := l.run(); err != nil {
		t.Fatal(err)
	}
	if first.calls+second.calls == 0 || successor.calls != 0 {
		t.Errorf("calls: %d, %d, and %d of the successor", first.calls, second.calls, successor.calls)
	}
}

func TestPlausible(t *testing.T) {
	clients := map[bool]netip.AddrPort{true: netip.MustParseAddrPort("192.168.0.3:53"), false: netip.MustParseAddrPort("[fd07::3]:53")}
	for text, want := range map[string]bool{
		"203.0.113.1:53": true, "192.168.0.9:5000": true, "[2001:db8::1]:53": true,
		"192.168.0.3:53": false, "192.168.0.3:54": false, "[fd07::3]:53": false,
		"127.0.0.1:53": false, "224.0.0.251:5353": false, "0.0.0.0:53": false, "169.254.1.1:53": false, "203.0.113.1:0": false,
		"[::1]:53": false, "[fe80::1]:53": false, "[ff02::1]:53": false,
		"255.255.255.255:53": false,
	} {
		remote := netip.MustParseAddrPort(text)
		if got := plausible(flowKey{endpointOf(clients[remote.Addr().Is4()]), endpointOf(remote)}); got != want {
			t.Errorf("%s: %v", text, got)
		}
		if plausible(flowKey{endpointOf(clients[remote.Addr().Is6()]), endpointOf(remote)}) {
			t.Errorf("%s to a client of the other family", text)
		}
	}
}

// stuck is a relay between two connections, and its upstream side takes little.
type stuck struct {
	loop           *relayLoop
	server         *Server
	client, remote *net.TCPConn // the far ends
	relay          *relay
}

func newStuck(t *testing.T) *stuck {
	t.Helper()
	l, err := newLoop("relay-test")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{options: Options{}}
	s.options.setDefaults()
	s.log = s.options.Log
	s.tcp = &tcp{server: s, clients: make(map[netip.Addr]int)}
	x := &stuck{loop: newRelayLoop(l, s), server: s}
	client, ours := tcpPair(t)
	upstream, remote := tcpPair(t)
	upstream.SetWriteBuffer(4096)
	remote.SetReadBuffer(4096)
	x.client, x.remote = client, remote
	c := &connection{tcp: s.tcp, client: addrPort(client.LocalAddr()), traffic: s.traffic("up")}
	if reason := s.tcp.admit(c.client.Addr()); reason != Descriptors { // no budget
		t.Fatal(reason)
	}
	s.descriptors.limit = 100
	if reason := s.tcp.admit(c.client.Addr()); reason != 0 {
		t.Fatal(reason)
	}
	if err := x.loop.start(c, ours, upstream); err != nil {
		t.Fatal(err)
	}
	x.relay = x.loop.slots[0].handler.(*side).relay
	ended := make(chan error)
	go func() { ended <- x.loop.run() }()
	t.Cleanup(func() {
		x.loop.stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		x.loop.resetAll()
		x.loop.close()
		if n := s.connections.Load() + s.descriptors.used.Load(); n != 0 {
			t.Errorf("%d left", n)
		}
	})
	return x
}

func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	if b, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	return a, b
}

// fill sends small messages until one is held, and returns how many bytes were sent.
func (x *stuck) fill(t *testing.T) (total int) {
	t.Helper()
	message := pattern(500, 1)
	held := func() (moved, pending int) {
		x.loop.mu.Lock()
		defer x.loop.mu.Unlock()
		return int(x.relay.connection.up), x.relay.client.pending
	}
	for {
		if _, err := x.client.Write(message); err != nil {
			t.Fatal(err)
		}
		total += len(message)
		stop := false
		eventually(t, "the message is passed on or held", func() bool {
			moved, pending := held()
			stop = pending > 0
			return moved+pending == total
		})
		if stop {
			return total
		}
	}
}

// stuff sends until nothing more is taken, so that the relay stays stuck until remote reads.
func (x *stuck) stuff(t *testing.T) {
	t.Helper()
	x.client.SetWriteDeadline(time.Now().Add(time.Second))
	for err := error(nil); err == nil; {
		_, err = x.client.Write(pattern(64<<10, 1))
	}
}

// What the peer does not take waits in a pipe, and nothing is lost.
func TestRelayHoldsSmallMessages(t *testing.T) {
	x := newStuck(t)
	total := x.fill(t)
	x.client.CloseWrite()
	got, err := io.ReadAll(x.remote)
	if err != nil || len(got) != total {
		t.Fatalf("%d bytes of %d arrived, %v", len(got), total, err)
	}
	for i := 0; i < total; i += 500 {
		if !bytes.Equal(got[i:i+500], pattern(500, 1)) {
			t.Fatalf("something else arrived at %d", i)
		}
	}
}

// A client that resets while its data is held is not waited for in a busy loop, and the server's own
// end ends it all.
func TestRelayResetWhileHeld(t *testing.T) {
	x := newStuck(t)
	x.stuff(t)
	reset(x.client)
	eventually(t, "the reset was noticed", func() bool {
		x.loop.mu.Lock()
		defer x.loop.mu.Unlock()
		return x.relay.client.events == parked
	})
	cpu := relayTimeOf(t, "relay-test")
	time.Sleep(200 * time.Millisecond)
	if used := relayTimeOf(t, "relay-test") - cpu; used > 50*time.Millisecond {
		t.Errorf("waiting used %v of processor time in 200 ms", used)
	}
	reset(x.remote)
	eventually(t, "the relay is gone", func() bool { return x.server.connections.Load() == 0 })
}
