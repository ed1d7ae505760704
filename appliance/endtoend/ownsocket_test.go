package endtoend

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// The tests of the box's own sockets make them themselves, in the box's network and in a cgroup of the test's, so that each
// system call is seen and its error is known. What becomes of a flow is told by its port.
const (
	proxiedPort = 7001
	directPort  = 7002
	blockedPort = 7003
	rejectPort  = 7004
)

const portRules = `rules:
  - { name: proxied, port: 7001, outbound: hk }
  - { name: direct, port: 7002, outbound: direct }
  - { name: blocked, port: 7003, outbound: block }
  - { name: rejected, port: 7004, outbound: block, reject: true }
`

// socketWorld is a world whose box is subject to its own rules, and what leaves it is watched.
type socketWorld struct {
	*namesWorld
	cgroup  string
	leaving *lab.Capture // on the box's only interface

	mu        sync.Mutex
	datagrams map[uint16][]netip.AddrPort // whom the witnesses saw send each, by port
}

// newSocketWorld has the test's process in a cgroup of its own, which the gateway's hooks are on.
func newSocketWorld(t *testing.T) *socketWorld {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: builds network namespaces and loads BPF programs")
	}
	w := &socketWorld{cgroup: enterCgroup(t), datagrams: map[uint16][]netip.AddrPort{}}
	w.namesWorld = newNamesWorld(t)
	w.leaving = captureOn(t, w.sidegate(), "eth0")
	t.Cleanup(func() { w.nothingLeaks(t) })
	return w
}

// cgroupMount is where the machine has the hierarchy of cgroup v2.
func cgroupMount(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	need(t, err)
	for line := range strings.Lines(string(mounts)) {
		place, kind, _ := strings.Cut(line, " - ")
		if strings.HasPrefix(kind, "cgroup2 ") {
			return strings.Fields(place)[4]
		}
	}
	t.Skip("needs cgroup v2, which is not mounted: mount -t cgroup2 none DIRECTORY")
	return ""
}

// enterCgroup puts the test's process into a new cgroup; afterwards it is where it was.
func enterCgroup(t *testing.T) string {
	t.Helper()
	mount := cgroupMount(t)
	before, err := os.ReadFile("/proc/self/cgroup")
	need(t, err)
	_, path, _ := strings.Cut("\n"+string(before), "\n0::")
	path, _, _ = strings.Cut(path, "\n")
	cgroup, err := os.MkdirTemp(mount, "sidegate-test-*.service")
	need(t, err)
	move := func(to string) error {
		return os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	}
	need(t, move(cgroup))
	t.Cleanup(func() {
		err := move(filepath.Join(mount, path))
		if err == nil {
			err = os.Remove(cgroup)
		}
		if err != nil {
			t.Errorf("leaving the test's cgroup: %v", err)
		}
	})
	return cgroup
}

// startOwn runs the gateway with the box's own sockets in it, a SOCKS5 server as "hk", and what config adds.
func (w *socketWorld) startOwn(t *testing.T, config ...string) {
	t.Helper()
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{Resolver: w.resolver.Addr4()})
	need(t, err)
	w.start(t, fmt.Sprintf(`interfaces: { lan: auto }
gateway: { local: true, cgroup: %q }
outbounds: { hk: { url: %q } }
%s
`, w.cgroup, dante.URL("socks5", lab.Credentials{}), strings.Join(config, "\n")))
}

// startPorts does that with a policy of ports, and servers behind them.
func (w *socketWorld) startPorts(t *testing.T, config ...string) {
	t.Helper()
	for _, port := range []uint16{proxiedPort, directPort, blockedPort, rejectPort} {
		w.serveWitness(t, port)
	}
	w.startOwn(t, append([]string{portRules, "default: block"}, config...)...)
}

// nothingLeaks: addresses that only the box has for itself have not left it, nor has anything of a flow that is not direct.
func (w *socketWorld) nothingLeaks(t *testing.T) {
	t.Helper()
	internal := []netip.Prefix{
		netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fd53:4753::/32"),
	}
	never(t, w.leaving, "an address of the box's inside left it", func(p lab.Packet) bool {
		for _, prefix := range internal {
			if p.Out && (prefix.Contains(p.Src.Addr()) || prefix.Contains(p.Dst.Addr())) {
				return true
			}
		}
		return false
	})
	never(t, w.leaving, "a flow that is not direct left the box", func(p lab.Packet) bool {
		ours := p.Dst.Addr() == w.server().Addr4() || p.Dst.Addr() == w.server().Addr6()
		return p.Out && ours && (p.Dst.Port() == proxiedPort || p.Dst.Port() == blockedPort || p.Dst.Port() == rejectPort)
	})
}

// status is what the gateway says of itself.
func (w *socketWorld) status(t *testing.T) (status admin.Status) {
	t.Helper()
	need(t, json.Unmarshal([]byte(w.cli(t, "status", "--json")), &status))
	return status
}

// family is what differs between IPv4, IPv6, and IPv4 by sockets of IPv6.
type family struct {
	name                  string
	domain                int
	box, server, upstream netip.Addr
}

func (w *socketWorld) families() []family {
	return []family{
		{"v4", unix.AF_INET, w.sidegate().Addr4(), w.server().Addr4(), w.upstream().Addr4()},
		{"mapped", unix.AF_INET6, w.sidegate().Addr4(), w.server().Addr4(), w.upstream().Addr4()},
		{"v6", unix.AF_INET6, w.sidegate().Addr6(), w.server().Addr6(), w.upstream().Addr6()},
	}
}

// inAll runs a test in each family.
func (w *socketWorld) inAll(t *testing.T, name string, f func(t *testing.T, f family)) {
	t.Helper()
	for _, family := range w.families() {
		t.Run(name+" "+family.name, func(t *testing.T) { f(t, family) })
	}
}

func (f family) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(f.server, port) }

// saw fails unless the server saw whom it should: of a direct flow the box itself, at the socket's own port.
func (f family) saw(t *testing.T, verdict string, saw netip.AddrPort, s *boxSocket) {
	t.Helper()
	switch verdict {
	case "proxied":
		if saw.Addr() != f.upstream {
			t.Errorf("the server saw %s, want the upstream %s", saw, f.upstream)
		}
	case "direct":
		if want := netip.AddrPortFrom(f.box, s.name(t).Port()); saw != want {
			t.Errorf("the server saw %s, want %s", saw, want)
		}
	}
}

// What a TCP client may ask of a witness, instead of its bytes back.
const (
	leave = "leave\n" // close, before the client does
	pour  = "pour\n"  // send without end
)

// serveWitness tells each client at a port as whom it sees it: a TCP client at once, then it sends back what it gets; a UDP client
// in answer to each datagram, with the datagram's length.
func (w *socketWorld) serveWitness(t *testing.T, port uint16) {
	t.Helper()
	l, err := w.server().Listen(t.Context(), "tcp", fmt.Sprintf(":%d", port))
	need(t, err)
	u, err := w.server().ListenUDP(t.Context(), "udp", fmt.Sprintf(":%d", port))
	need(t, err)
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(30 * time.Second))
				from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
				fmt.Fprintf(c, "%s\n", netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
				b := make([]byte, 64<<10)
				for {
					n, err := c.Read(b)
					if err != nil || string(b[:n]) == leave {
						return
					}
					for string(b[:n]) == pour && err == nil {
						_, err = c.Write(make([]byte, 16<<10))
					}
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	tasks.Go(func() {
		b := make([]byte, 64<<10)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // an ICMP error that an earlier answer caused
			}
			saw := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			w.mu.Lock()
			w.datagrams[port] = append(w.datagrams[port], saw)
			w.mu.Unlock()
			u.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %d", saw, n), from)
		}
	})
	t.Cleanup(func() {
		l.Close()
		u.Close()
		tasks.Wait()
	})
}

// witnessed are those whom the witness at a port saw send datagrams, in order.
func (w *socketWorld) witnessed(port uint16) []netip.AddrPort {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.datagrams[port])
}

// awaitWitness waits until the witness at a port has seen more than so many datagrams, and returns who sent the next one.
func (w *socketWorld) awaitWitness(t *testing.T, port uint16, seen int) netip.AddrPort {
	t.Helper()
	need(t, lab.Wait(within(t, 3*time.Second), fmt.Sprintf("a datagram at port %d", port), func() error {
		if len(w.witnessed(port)) <= seen {
			return errors.New("none came")
		}
		return nil
	}))
	return w.witnessed(port)[seen]
}

// boxSocket is a socket of the box, used by system calls that wait for three seconds.
type boxSocket struct {
	fd     int
	domain int
}

// socket opens a socket of the box, with options.
func (w *socketWorld) socket(t *testing.T, domain, kind, protocol int, options ...option) *boxSocket {
	t.Helper()
	s := &boxSocket{domain: domain}
	need(t, w.sidegate().Do(func() (err error) {
		s.fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
		return err
	}))
	t.Cleanup(s.close)
	patience := &unix.Timeval{Sec: 3}
	need(t, errors.Join(
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, patience),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, patience),
	))
	for _, o := range options {
		if err := unix.SetsockoptInt(s.fd, o.level, o.name, o.value); err != nil {
			t.Fatalf("setting option %d of level %d to %d: %v", o.name, o.level, o.value, err)
		}
	}
	return s
}

type option struct{ level, name, value int }

func (w *socketWorld) tcp(t *testing.T, f family, options ...option) *boxSocket {
	t.Helper()
	return w.socket(t, f.domain, unix.SOCK_STREAM, 0, options...)
}

func (w *socketWorld) udp(t *testing.T, f family, options ...option) *boxSocket {
	t.Helper()
	return w.socket(t, f.domain, unix.SOCK_DGRAM, 0, options...)
}

func (s *boxSocket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
	s.fd = -1
}

// sockaddr is an address for a socket of this domain: an IPv4 one is mapped for a socket of IPv6.
func (s *boxSocket) sockaddr(a netip.AddrPort) unix.Sockaddr {
	if s.domain == unix.AF_INET6 {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func (s *boxSocket) bind(t *testing.T, a netip.AddrPort) {
	t.Helper()
	if err := unix.Bind(s.fd, s.sockaddr(a)); err != nil {
		t.Fatalf("binding to %s: %v", a, err)
	}
}

// persist makes a system call again that a signal interrupted. The kernel does not, of a socket that waits only so long (signal(7)).
func persist(call func() error) (err error) {
	for err = unix.EINTR; err == unix.EINTR; err = call() {
	}
	return err
}

func (s *boxSocket) connect(to netip.AddrPort) error {
	return persist(func() error { return unix.Connect(s.fd, s.sockaddr(to)) })
}

// Read is read(2): nothing and no error at the end.
func (s *boxSocket) Read(b []byte) (n int, err error) {
	err = persist(func() (err error) { n, err = unix.Read(s.fd, b); return err })
	return n, err
}

func (s *boxSocket) Write(b []byte) (n int, err error) {
	err = persist(func() (err error) { n, err = unix.Write(s.fd, b); return err })
	return n, err
}

// from is recvfrom(2).
func (s *boxSocket) from(b []byte) (n int, from unix.Sockaddr, err error) {
	err = persist(func() (err error) { n, from, err = unix.Recvfrom(s.fd, b, 0); return err })
	return n, from, err
}

// disconnect makes a UDP socket one without a peer (connect(2), AF_UNSPEC).
func (s *boxSocket) disconnect(t *testing.T) {
	t.Helper()
	unspecified := make([]byte, unix.SizeofSockaddrInet6) // AF_UNSPEC is 0
	if err := rawConnect(s.fd, unspecified); err != nil {
		t.Fatalf("disconnecting: %v", err)
	}
}

// name is what getsockname(2) says.
func (s *boxSocket) name(t *testing.T) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(s.fd)
	need(t, err)
	return addrPortOf(sa)
}

func (s *boxSocket) peer(t *testing.T) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getpeername(s.fd)
	need(t, err)
	return addrPortOf(sa)
}

func (s *boxSocket) mark(t *testing.T) int {
	t.Helper()
	mark, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MARK)
	need(t, err)
	return mark
}

// greeting reads as whom a TCP server sees the socket.
func (s *boxSocket) greeting() (netip.AddrPort, error) {
	var line []byte
	for b := []byte{0}; b[0] != '\n'; line = append(line, b[0]) { // no more than the line: what follows is an answer
		n, err := s.Read(b)
		if err == nil && n == 0 {
			err = errors.New("it has ended")
		}
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("reading as whom the server sees us: %w", err)
		}
	}
	return netip.ParseAddrPort(strings.TrimSuffix(string(line), "\n"))
}

// mirror sends something on a TCP connection and wants it back.
func (s *boxSocket) mirror(size int) error {
	sent := make([]byte, size)
	for i := range sent {
		sent[i] = byte(i * 7)
	}
	done := make(chan error, 1)
	go func() {
		for rest := sent; len(rest) > 0; {
			n, err := s.Write(rest)
			if err != nil {
				done <- fmt.Errorf("sending: %w", err)
				return
			}
			rest = rest[n:]
		}
		done <- nil
	}()
	got := make([]byte, 0, size)
	b := make([]byte, 64<<10)
	for len(got) < size {
		n, err := s.Read(b)
		if err == nil && n == 0 {
			err = errors.New("it has ended")
		}
		if err != nil {
			return fmt.Errorf("reading back what was sent, after %d of %d bytes: %w", len(got), size, err)
		}
		got = append(got, b[:n]...)
	}
	if string(got) != string(sent) {
		return errors.New("what came back is not what was sent")
	}
	return <-done
}

// answer reads a datagram: who sent it, as whom he saw the socket, and the length of what he got.
func (s *boxSocket) answer() (from, saw netip.AddrPort, length int, err error) {
	var b [128]byte
	n, sa, err := s.from(b[:])
	if err != nil {
		return from, saw, 0, fmt.Errorf("reading an answer: %w", err)
	}
	address, count, _ := strings.Cut(string(b[:n]), " ")
	if saw, err = netip.ParseAddrPort(address); err == nil {
		length, err = strconv.Atoi(count)
	}
	return addrPortOf(sa), saw, length, err
}

// sendTo sends a datagram to somebody; without an address, to the socket's peer.
func (s *boxSocket) sendTo(to netip.AddrPort, size int) error {
	if !to.IsValid() {
		_, err := s.Write(make([]byte, size))
		return err
	}
	return unix.Sendto(s.fd, make([]byte, size), 0, s.sockaddr(to))
}

// ask sends a datagram and returns as whom its receiver saw the socket, who must be the one that it was for.
func (s *boxSocket) ask(to netip.AddrPort, size int) (saw netip.AddrPort, err error) {
	if err := s.sendTo(to, size); err != nil {
		return saw, err
	}
	from, saw, length, err := s.answer()
	switch {
	case err != nil:
		return saw, err
	case to.IsValid() && from != to:
		return saw, fmt.Errorf("%s answered for %s", from, to)
	case length != size:
		return saw, fmt.Errorf("%d bytes arrived of %d", length, size)
	}
	return saw, nil
}
