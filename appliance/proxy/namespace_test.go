package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
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

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

// The tests run in a network namespace of their own, which is the gateway; two more hang off it:
//
//	client 192.168.7.3 .4 ── lan 192.168.7.2 gateway wan 203.0.113.2 ── internet 203.0.113.10 …
//
// nftables' tproxy does what the BPF program does in the product: a mark that leads to the loopback
// device, and the assignment of a connected socket or else of the listener.

const insideVariable = "SIDEGATE_PROXY_TEST_INSIDE"

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
	dir, err := os.MkdirTemp("", "sidegate-proxy")
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

// run runs commands, one a line, in the namespace (the gateway's if nil).
func (ns *namespace) run(t testing.TB, script string) {
	t.Helper()
	execute := func() {
		c := exec.Command("sh", "-e", "-c", script)
		if out, err := c.CombinedOutput(); err != nil {
			panic(fmt.Sprintf("%v: %s\n%s", err, out, script))
		}
	}
	if ns == nil {
		execute()
		return
	}
	ns.do(t, execute)
}

var (
	client4  = netip.MustParseAddr("192.168.7.3")
	client6  = netip.MustParseAddr("fd07::3")
	other4   = netip.MustParseAddr("192.168.7.4")
	server4  = netip.MustParseAddr("203.0.113.10")
	server6  = netip.MustParseAddr("2001:db8:113::10")
	proxy4   = netip.MustParseAddr("203.0.113.20")
	third4   = netip.MustParseAddr("203.0.113.30")
	mtu      = 1500
	testMark = uint32(0x02000000)
)

// rig is the network, and a Server in it.
type rig struct {
	t                testing.TB
	client, internet *namespace
	server           *Server
	verdicts         *verdicts
	outbounds        outbounds
	descriptors      int64 // the budget, unless 0
	stop             func()
	stopped          func() // called when Serve has ended, while the rules are still there; may be nil
	served           chan error
}

// newRig builds the network and serves with the options, through the outbounds by name. The default
// verdict is the outbound "up".
func newRig(t testing.TB, o Options, outbounds map[string]outbound.Outbound) *rig {
	t.Helper()
	r := newNetwork(t)
	r.serve(o, outbounds)
	return r
}

func needsRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it builds network namespaces")
	}
}

func newNetwork(t testing.TB) *rig {
	t.Helper()
	needsRoot(t)
	r := &rig{t: t, client: newNamespace(t), internet: newNamespace(t)}
	pid := os.Getpid()
	(*namespace)(nil).run(t, fmt.Sprintf(`
ip link add lan mtu %[1]d type veth peer name eth0 mtu %[1]d netns /proc/%[2]d/fd/%[3]d
ip link add wan mtu %[1]d type veth peer name eth0 mtu %[1]d netns /proc/%[2]d/fd/%[4]d
ip addr add 192.168.7.2/24 dev lan
ip addr add fd07::2/64 dev lan nodad
ip addr add 203.0.113.2/24 dev wan
ip addr add 2001:db8:113::2/64 dev wan nodad
# or else neighbours could not be asked for during the first seconds
sysctl -qw net.ipv6.conf.lan.accept_dad=0 net.ipv6.conf.wan.accept_dad=0
ip link set lan up
ip link set wan up
for v in -4 -6; do
	ip $v rule add fwmark 0x01000000/0x0f000000 lookup 77
	ip $v route add local default dev lo table 77
done
`, mtu, pid, r.client.fd, r.internet.fd))
	t.Cleanup(func() {
		(*namespace)(nil).run(t, `
ip link del lan
ip link del wan
for v in -4 -6; do
	ip $v rule del lookup 77
	ip $v route flush table 77
done
nft flush ruleset`)
	})
	r.client.run(t, `
ip link set lo up
for a in 192.168.7.3/24 192.168.7.4/24; do ip addr add $a dev eth0; done
for a in fd07::3/64 fd07::4/64; do ip addr add $a dev eth0 nodad; done
ip link set eth0 up
ip route add default via 192.168.7.2
ip -6 route add default via fd07::2`)
	r.internet.run(t, `
ip link set lo up
for n in 10 20 30; do
	ip addr add 203.0.113.$n/24 dev eth0
	ip addr add 2001:db8:113::$n/64 dev eth0 nodad
done
ip link set eth0 up`)
	return r
}

// serve starts a Server and steers the client's traffic to it.
func (r *rig) serve(o Options, outbounds map[string]outbound.Outbound) {
	t := r.t
	t.Helper()
	r.verdicts = &verdicts{}
	r.verdicts.set(func(policy.Network, netip.AddrPort, netip.AddrPort) (string, bool) { return "up", true })
	r.verdicts.forward = r.forward
	for name, o := range outbounds {
		r.outbounds.set(name, o)
	}
	o.Verdicts, o.Outbounds, o.Mark = r.verdicts, &r.outbounds, testMark
	o.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	var err error
	if r.server, err = Listen(o); err != nil {
		t.Fatal(err)
	}
	if r.descriptors > 0 {
		r.server.descriptors.limit = r.descriptors
	}
	s := r.server.Sockets()
	(*namespace)(nil).run(t, fmt.Sprintf(`nft -f - <<END
table inet steer {
	set direct4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; }
	set direct6 { type ipv6_addr . inet_service . ipv6_addr . inet_service; }
	chain prerouting {
		type filter hook prerouting priority mangle
		iifname != "lan" return
		ip daddr 192.168.7.2 return
		ip daddr 203.0.113.20 tcp dport 1080 return
		ip6 daddr { fd07::2, fe80::/10, ff00::/8 } return
		ip saddr . udp sport . ip daddr . udp dport @direct4 counter accept
		ip6 saddr . udp sport . ip6 daddr . udp dport @direct6 counter accept
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:%d meta mark set 0x01000000 accept
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:%d meta mark set 0x01000000 accept
		meta nfproto ipv4 meta l4proto udp tproxy ip to 127.0.0.1:%d meta mark set 0x01000000 accept
		meta nfproto ipv6 meta l4proto udp tproxy ip6 to [::1]:%d meta mark set 0x01000000 accept
	}
}
END`, port(t, s.TCP4), port(t, s.TCP6), port(t, s.UDP4), port(t, s.UDP6)))

	ctx, cancel := context.WithCancel(context.Background())
	r.served = make(chan error, 1)
	go func() { r.served <- r.server.Serve(ctx) }()
	stopped := false
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := within(30*time.Second, r.served); err != nil {
			t.Errorf("Serve: %v", err)
		}
		if r.stopped != nil {
			r.stopped()
		}
		(*namespace)(nil).run(t, "nft flush ruleset")
	}
	t.Cleanup(r.stop)
}

// forward has the kernel forward a UDP flow from now on, as it does what the policy left direct.
func (r *rig) forward(_ policy.Network, client, destination netip.AddrPort) {
	family := 6
	if client.Addr().Is4() {
		family = 4
	}
	element := fmt.Sprintf("{ %s . %d . %s . %d }", client.Addr(), client.Port(), destination.Addr(), destination.Port())
	out, err := exec.Command("nft", "add", "element", "inet", "steer", fmt.Sprint("direct", family), element).CombinedOutput()
	if err != nil {
		r.t.Errorf("nft add element %s: %v: %s", element, err, out)
	}
}

// forwarding lets flows pass that are not steered, and their answers.
func (r *rig) forwarding() {
	(*namespace)(nil).run(r.t, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	r.internet.run(r.t, "ip route replace default via 203.0.113.2; ip -6 route replace default via 2001:db8:113::2")
}

// markSocket gives sockets a firewall mark.
func markSocket(mark uint32) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)) })
		return errors.Join(err, failed)
	}
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

// port is the port that a listening socket is bound to.
func port(t testing.TB, s syscall.Conn) int {
	t.Helper()
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var name unix.Sockaddr
	raw.Control(func(fd uintptr) { name, err = unix.Getsockname(int(fd)) })
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return name.Port
	case *unix.SockaddrInet6:
		return name.Port
	}
	t.Fatal("no socket name: ", err)
	return 0
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

// program runs a server in the internet namespace until the test ends, and returns when it accepts
// connections at address.
func (r *rig) program(address netip.AddrPort, name string, args ...string) {
	t := r.t
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	var output bytes.Buffer
	c := exec.Command(name, args...)
	c.Stdout, c.Stderr = &output, &output
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var err error
	r.internet.do(t, func() { err = c.Start() })
	if err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		c.Wait()
	}()
	t.Cleanup(func() {
		syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
		<-exited
		if t.Failed() {
			lines := strings.Split(output.String(), "\n")
			t.Logf("%s said:\n%s", name, strings.Join(lines[max(0, len(lines)-30):], "\n"))
		}
	})
	eventually(t, name+" listens at "+address.String(), func() bool {
		select {
		case <-exited:
			t.Fatalf("%s ended by itself:\n%s", name, output.String())
		default:
		}
		probe, err := (&net.Dialer{Control: markSocket(testMark)}).Dial("tcp", address.String())
		if err == nil {
			probe.Close()
		}
		return err == nil
	})
}

// dante runs Debian's SOCKS5 server and returns the outbound that goes through it. Its UDP mapping is
// full-cone (udp.connectdst: no).
func (r *rig) dante() outbound.Outbound {
	t := r.t
	t.Helper()
	dir, err := os.MkdirTemp("", "dante")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	config := filepath.Join(dir, "danted.conf")
	content := fmt.Sprintf(`
logoutput: stderr
internal: %s port = 1080
external.protocol: ipv4 ipv6
external: eth0
socksmethod: none
clientmethod: none
user.privileged: root
user.unprivileged: nobody
udp.connectdst: no
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
`, proxy4)
	if err := os.WriteFile(config, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	address := netip.AddrPortFrom(proxy4, 1080)
	r.program(address, "danted", "-f", config, "-p", filepath.Join(dir, "pid"))
	return r.socks5(address)
}

func (r *rig) socks5(address netip.AddrPort) outbound.Outbound {
	r.t.Helper()
	o, err := outbound.New("up", "socks5://"+address.String(), outbound.Credentials{}, outbound.Options{Control: markSocket(testMark)})
	if err != nil {
		r.t.Fatal(err)
	}
	return o
}
