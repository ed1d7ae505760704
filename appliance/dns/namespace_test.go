package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests run in a network namespace of their own, which is the gateway; the client's hangs off it:
//
//	client 192.168.7.3 .4 ── lan 192.168.7.2 gateway
//
// nftables' tproxy does what the BPF program does in the product: a mark that leads to the loopback device,
// and the assignment of the listener.

const insideVariable = "SIDEGATE_DNS_TEST_INSIDE"

func TestMain(m *testing.M) {
	if os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	if os.Getenv(insideVariable) != "" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "setting lo up: %v: %s\n", err, out)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	os.Exit(runInside())
}

// runInside runs the tests in a child, and ends what they leave behind when they panic or time out.
func runInside() int {
	unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	dir, err := os.MkdirTemp("", "sidegate-dns")
	if err != nil {
		fmt.Fprintln(os.Stderr, "making a directory for the tests:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // servers drop their privileges
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), insideVariable+"=1", "TMPDIR="+dir)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig looks at the thread
	if err := c.Run(); c.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "starting the tests in a network namespace:", err)
		return 1
	}
	for {
		threads, _ := filepath.Glob("/proc/self/task/*/children")
		for _, thread := range threads {
			left, _ := os.ReadFile(thread)
			for _, pid := range strings.Fields(string(left)) {
				if n, err := strconv.Atoi(pid); err == nil {
					syscall.Kill(n, syscall.SIGKILL)
				}
			}
		}
		if _, err := syscall.Wait4(-1, nil, 0, nil); errors.Is(err, syscall.ECHILD) {
			return c.ProcessState.ExitCode()
		}
	}
}

// namespace is a network namespace that lives as long as its descriptor.
type namespace struct{ fd int }

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	ns := &namespace{}
	var err error
	excursion(t, func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			ns.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
	})
	if err != nil {
		t.Fatal("creating a network namespace: ", err)
	}
	t.Cleanup(func() { unix.Close(ns.fd) })
	return ns
}

// do runs f in the namespace; what f creates there stays there.
func (ns *namespace) do(t testing.TB, f func()) {
	t.Helper()
	excursion(t, func() {
		if err := unix.Setns(ns.fd, unix.CLONE_NEWNET); err != nil {
			panic(err)
		}
		f()
	})
}

func excursion(t testing.TB, f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(home)
	defer func() {
		if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
			panic(err)
		}
	}()
	f()
}

// run runs commands, one a line, in the namespace (the gateway's if nil), and returns their output.
func (ns *namespace) run(t testing.TB, script string) string {
	t.Helper()
	var output string
	execute := func() {
		c := exec.Command("sh", "-e", "-c", script)
		out, err := c.CombinedOutput()
		if err != nil {
			panic(fmt.Sprintf("%v: %s\n%s", err, out, script))
		}
		output = string(out)
	}
	if ns == nil {
		execute()
	} else {
		ns.do(t, execute)
	}
	return output
}

var (
	client4 = netip.MustParseAddr("192.168.7.3")
	client6 = netip.MustParseAddr("fd07::3")
	other4  = netip.MustParseAddr("192.168.7.4")
	asked4  = netip.MustParseAddr("8.8.8.8")
	asked6  = netip.MustParseAddr("2001:4860:4860::8888")
)

func needsRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it builds network namespaces")
	}
}

// network is the client and the way to it; serve adds a Server.
type network struct {
	t      testing.TB
	client *namespace
	server *Server
	stop   func()
}

func newNetwork(t testing.TB) *network {
	t.Helper()
	needsRoot(t)
	n := &network{t: t, client: newNamespace(t)}
	(*namespace)(nil).run(t, fmt.Sprintf(`
ip link add lan type veth peer name eth0 netns /proc/%d/fd/%d
ip addr add 192.168.7.2/24 dev lan
ip addr add fd07::2/64 dev lan nodad
ip link set lan up
for v in -4 -6; do
	ip $v rule add fwmark 0x01000000/0x0f000000 lookup 77
	ip $v route add local default dev lo table 77
done
`, os.Getpid(), n.client.fd))
	t.Cleanup(func() {
		(*namespace)(nil).run(t, `
ip link del lan
for v in -4 -6; do
	ip $v rule del lookup 77
	ip $v route flush table 77
done
nft flush ruleset`)
	})
	n.client.run(t, `
ip link set lo up
for a in 192.168.7.3/24 192.168.7.4/24; do ip addr add $a dev eth0; done
for a in fd07::3/64; do ip addr add $a dev eth0 nodad; done
ip link set eth0 up
ip route add default via 192.168.7.2
ip -6 route add default via fd07::2`)
	return n
}

// serve starts a Server with the resolver, and steers the client's queries to it.
func (n *network) serve(o Options, r *Resolver) {
	t := n.t
	t.Helper()
	o.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	var err error
	if n.server, err = Listen(o); err != nil {
		t.Fatal(err)
	}
	if r != nil {
		n.server.Use(r)
	}
	s := n.server.Sockets()
	udp4, udp6, tcp4, tcp6 := bound(t, s.UDP4), bound(t, s.UDP6), bound(t, s.TCP4), bound(t, s.TCP6)
	(*namespace)(nil).run(t, fmt.Sprintf(`nft -f - <<END
table inet steer {
	chain prerouting {
		type filter hook prerouting priority mangle
		iifname != "lan" return
		meta nfproto ipv4 udp dport 53 tproxy ip to %s meta mark set 0x01000000 accept
		meta nfproto ipv6 udp dport 53 tproxy ip6 to %s meta mark set 0x01000000 accept
		meta nfproto ipv4 tcp dport 53 tproxy ip to %s meta mark set 0x01000000 accept
		meta nfproto ipv6 tcp dport 53 tproxy ip6 to %s meta mark set 0x01000000 accept
	}
}
END`, udp4, udp6, tcp4, tcp6))
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- n.server.Serve(ctx) }()
	stopped := false
	n.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := within(30*time.Second, served); err != nil {
			t.Errorf("Serve: %v", err)
		}
		(*namespace)(nil).run(t, "nft flush ruleset")
	}
	t.Cleanup(n.stop)
}

func within(d time.Duration, result chan error) error {
	select {
	case err := <-result:
		return err
	case <-time.After(d):
		buffer := make([]byte, 1<<20)
		return fmt.Errorf("no result within %v\n%s", d, buffer[:runtime.Stack(buffer, true)])
	}
}

// bound is where a listening socket is bound.
func bound(t testing.TB, s syscall.Conn) netip.AddrPort {
	t.Helper()
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var name unix.Sockaddr
	raw.Control(func(fd uintptr) { name, err = unix.Getsockname(int(fd)) })
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(name.Addr), uint16(name.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(name.Addr), uint16(name.Port))
	}
	t.Fatal("no socket name: ", err)
	return netip.AddrPort{}
}

// eventually polls a condition that something else brings about.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
