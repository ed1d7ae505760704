package outbound

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// recorder is a Control function that marks sockets and remembers them.
type recorder struct {
	sync.Mutex
	seen []string
}

const testMark = 0x02000000

func (r *recorder) control(network, address string, c syscall.RawConn) error {
	r.Lock()
	defer r.Unlock()
	r.seen = append(r.seen, network+" "+address)
	var failed error
	err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, testMark) })
	return errors.Join(err, failed)
}

func option(t *testing.T, fd, level, name int) int {
	t.Helper()
	value, err := unix.GetsockoptInt(fd, level, name)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// TestSockets looks at the sockets themselves.
func TestSockets(t *testing.T) {
	needNamespaces(t)
	noLeaks(t)
	relay := serveEchoUDP(t, "127.0.0.2:0")
	server := serve(t, "127.0.0.2:0", func(c *net.TCPConn) {
		reply := append([]byte("\x05\x00\x05\x00\x00"), appendAddress(nil, netip.AddrPortFrom(netip.IPv4Unspecified(), relay.Port()))...)
		c.Write(reply)
		io.Copy(io.Discard, c)
	})
	http := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
		io.WriteString(c, httpConnected)
		io.Copy(io.Discard, c)
	})
	var r recorder
	set, err := NewSet(Options{Control: r.control}, mustNew(t, "socks5://"+server.String(), Credentials{}, Options{Control: r.control}))
	if err != nil {
		t.Fatal(err)
	}
	straight, _ := set.Outbound("direct")
	through, _ := set.Outbound("hk")
	web := mustNew(t, "http://"+http.String(), Credentials{}, Options{Control: r.control})

	for name, dial := range map[string]func() (net.Conn, error){
		"direct": func() (net.Conn, error) { return straight.DialTCP(t.Context(), Destination{Addr: server}) },
		"socks5": func() (net.Conn, error) { return through.DialTCP(t.Context(), destination) },
		"http":   func() (net.Conn, error) { return web.DialTCP(t.Context(), destination) },
	} {
		c, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			for what, row := range map[string][3]int{
				"mark":       {unix.SOL_SOCKET, unix.SO_MARK, testMark},
				"protocol":   {unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP},
				"keep-alive": {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				"idle":       {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
				"no delay":   {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			} {
				if got := option(t, int(fd), row[0], row[1]); got != row[2] {
					t.Errorf("%s: %s is %#x, want %#x", name, what, got, row[2])
				}
			}
		})
		c.Close()
	}

	for _, o := range []Outbound{straight, through} {
		a, err := o.AssociateUDP(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if got := option(t, a.FD, unix.SOL_SOCKET, unix.SO_MARK); got != testMark {
			t.Errorf("%s: the udp mark is %#x", o.Name(), got)
		}
		for _, buffer := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
			if got := option(t, a.FD, unix.SOL_SOCKET, buffer); got < udpBuffer {
				t.Errorf("%s: a udp buffer is %d bytes", o.Name(), got)
			}
		}
		flags, err := unix.FcntlInt(uintptr(a.FD), unix.F_GETFL, 0)
		if err != nil || flags&unix.O_NONBLOCK == 0 {
			t.Errorf("%s: the udp socket blocks: %#x, %v", o.Name(), flags, err)
		}
		flags, err = unix.FcntlInt(uintptr(a.FD), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s: programs would inherit the udp socket: %#x, %v", o.Name(), flags, err)
		}
		if a.Connected != (o == through) || (a.HeaderRoom > 0) != a.Connected {
			t.Errorf("%s: connected %v, header room %d", o.Name(), a.Connected, a.HeaderRoom)
		}
		if a.Connected {
			peer, err := unix.Getpeername(a.FD)
			if four, ok := peer.(*unix.SockaddrInet4); err != nil || !ok || four.Port != int(relay.Port()) || four.Addr != [4]byte{127, 0, 0, 2} {
				t.Errorf("connected to %v, %v; want the server's own address", peer, err)
			}
		}
		select {
		case <-a.Done():
			t.Errorf("%s: done at birth", o.Name())
		default:
		}
	}
	// Three TCP connections, one control connection, two UDP sockets.
	if len(r.seen) != 6 {
		t.Errorf("the control function saw %d sockets: %q", len(r.seen), r.seen)
	}
}

// TestDestinationMark: a destination's mark comes on top of the options' own, and only where the flow's own packets are
// to go the way that it stands for.
func TestDestinationMark(t *testing.T) {
	needNamespaces(t)
	noLeaks(t)
	server := serve(t, "127.0.0.2:0", func(c *net.TCPConn) {
		io.WriteString(c, socksConnected)
		io.Copy(io.Discard, c)
	})
	var r recorder
	for _, c := range []struct {
		through string
		control func(network, address string, c syscall.RawConn) error
		mark    uint32
		want    int
	}{
		{"direct", r.control, 0x10000104, testMark | 0x10000104},
		{"direct", r.control, 0, testMark},
		{"direct", nil, 0x104, 0x104},
		{"hk", r.control, 0x104, testMark},
	} {
		o := Options{Control: c.control}
		set, err := NewSet(o, mustNew(t, "socks5://"+server.String(), Credentials{}, o))
		if err != nil {
			t.Fatal(err)
		}
		out, _ := set.Outbound(c.through)
		conn, err := out.DialTCP(t.Context(), Destination{Addr: server, Mark: c.mark})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			if got := option(t, int(fd), unix.SOL_SOCKET, unix.SO_MARK); got != c.want {
				t.Errorf("%s to a destination with the mark %#x: the socket has %#x, want %#x", c.through, c.mark, got, c.want)
			}
		})
		conn.Close()
	}
}

// TestLookupIsMarkedAndBounded has a nameserver that never answers.
func TestLookupIsMarkedAndBounded(t *testing.T) {
	needNamespaces(t)
	noLeaks(t)
	silent, err := net.ListenPacket("udp", hostPort(dns4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	var r recorder
	o := mustNew(t, "socks5://nowhere.example", Credentials{}, Options{Control: r.control, DialTimeout: 300 * time.Millisecond})
	begun := time.Now()
	_, err = o.DialTCP(t.Context(), destination)
	if err == nil || !strings.Contains(err.Error(), "socks5 server nowhere.example:1080 cannot be reached: lookup nowhere.example") {
		t.Error(err)
	}
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("took %v", took)
	}
	r.Lock()
	defer r.Unlock()
	if !slices.Contains(r.seen, "udp4 "+hostPort(dns4, 53)) {
		t.Errorf("the query was not marked: %q", r.seen)
	}
}

// TestControlFails wants the error of the control function, and nothing opened.
func TestControlFails(t *testing.T) {
	noLeaks(t)
	broken := Options{Control: func(string, string, syscall.RawConn) error { return errors.New("no mark today") }}
	onlyUDP := Options{Control: func(network, _ string, _ syscall.RawConn) error {
		if strings.HasPrefix(network, "udp") {
			return errors.New("no mark today")
		}
		return nil
	}}
	server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
		io.WriteString(c, socksConnected)
		io.Copy(io.Discard, c)
	})
	_, err := mustNew(t, "socks5://"+server.String(), Credentials{}, onlyUDP).AssociateUDP(t.Context())
	if err == nil || !strings.Contains(err.Error(), "named a udp relay that cannot be used: connecting to 10.0.0.7:4660: no mark today") {
		t.Error(err)
	}
	set, err := NewSet(broken, mustNew(t, "socks5://127.0.0.1", Credentials{}, broken))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"direct", "hk"} {
		o, _ := set.Outbound(name)
		if _, err := o.DialTCP(t.Context(), destination); err == nil || !strings.Contains(err.Error(), "no mark today") {
			t.Errorf("%s tcp: %v", name, err)
		}
		if _, err := o.AssociateUDP(t.Context()); err == nil || !strings.Contains(err.Error(), "no mark today") {
			t.Errorf("%s udp: %v", name, err)
		}
	}
}

// TestRelayGone wants an association to outlive single errors: an unreachable relay port may come back.
func TestRelayGone(t *testing.T) {
	noLeaks(t)
	gone, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
		c.Write(append([]byte("\x05\x00\x05\x00\x00"), appendAddress(nil, gone.LocalAddr().(*net.UDPAddr).AddrPort())...))
		io.Copy(io.Discard, c)
	})
	a, err := mustNew(t, "socks5://"+server.String(), Credentials{}, Options{}).AssociateUDP(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	gone.Close()
	if _, err := unix.Write(a.FD, a.Header(destination.Addr)); err != nil {
		t.Fatal(err)
	}
	unix.Poll([]unix.PollFd{{Fd: int32(a.FD), Events: unix.POLLIN}}, 5000)
	if _, err := unix.Read(a.FD, make([]byte, 1)); err != unix.ECONNREFUSED {
		t.Errorf("reading gave %v; want the relay's refusal", err)
	}
	select {
	case <-a.Done():
		t.Error("the association ended")
	default:
	}
}

// TestAssociationAddresses looks at both ends of the UDP socket, for servers that name their relay in
// different ways.
func TestAssociationAddresses(t *testing.T) {
	needNamespaces(t)
	noLeaks(t)
	for _, row := range []struct{ server, answer, from, to string }{
		{proxy4, "0.0.0.0:4660", proxy4, proxy4},
		{proxy6, "[::]:4660", proxy6, proxy6},
		{proxy6, "0.0.0.0:4660", proxy6, proxy6},
		{proxy4, proxy4 + ":4660", proxy4, proxy4},
		// Left to the kernel it would be the other address, from which the server takes nothing.
		{proxy4, server4 + ":4660", proxy4, server4},
		{proxy6, "[" + server6 + "]:4660", proxy6, server6},
		// The families differ: there is no such choice.
		{proxy6, server4 + ":4660", server4, server4},
	} {
		server := serve(t, hostPort(row.server, 0), func(c *net.TCPConn) {
			c.Write(append([]byte("\x05\x00\x05\x00\x00"), appendAddress(nil, netip.MustParseAddrPort(row.answer))...))
			io.Copy(io.Discard, c)
		})
		a, err := mustNew(t, "socks5://"+server.String(), Credentials{}, Options{}).AssociateUDP(t.Context())
		if err != nil {
			t.Error(err)
			continue
		}
		from, err1 := unix.Getsockname(a.FD)
		to, err2 := unix.Getpeername(a.FD)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if from, to := sockaddr(from), sockaddr(to); from.Addr().String() != row.from || to != netip.AddrPortFrom(netip.MustParseAddr(row.to), 4660) {
			t.Errorf("a server at %s that names %s: from %v to %v", row.server, row.answer, from, to)
		}
		a.Close()
	}
}

func sockaddr(s unix.Sockaddr) netip.AddrPort {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	return netip.AddrPort{}
}

// TestCloseWaits holds that nothing of an association is at work when Close returns.
func TestCloseWaits(t *testing.T) {
	noLeaks(t)
	server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
		c.Write([]byte("\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x12\x34"))
		io.Copy(io.Discard, c)
	})
	o := mustNew(t, "socks5://"+server.String(), Credentials{}, Options{})
	for range 200 {
		a, err := o.AssociateUDP(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-a.Done():
		default:
			t.Fatal("closed, but its goroutine still runs")
		}
	}
}
