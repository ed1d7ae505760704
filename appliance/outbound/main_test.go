package outbound

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests run in network, mount and process namespaces of their own where root allows: servers then
// have fixed addresses and ports, dante finds a user in an /etc/passwd that only it sees, and nothing
// can outlive the run. The loopback interface has an Ethernet's MTU, so that large datagrams are
// fragmented as they are on a LAN.
const (
	proxy4  = "10.0.0.7"
	proxy6  = "fd00::7"
	server4 = "203.0.113.10"
	server6 = "2001:db8:113::10"
	dead4   = "10.0.0.9"  // an address where nothing ever listens
	dns4    = "10.0.0.53" // the nameserver of resolv.conf
)

// The user of the real servers. No error and no log may ever show the password.
const (
	user     = "sidegate-test"
	password = "hunter2-canary"
	// sha512crypt of the password.
	passwordHash = "$6$sidegate$DymyFHNY4C4GwOjRwvRlfB6f4MNKVg0IAVYqjUe0kk65hyGTo7KPPY1bnJUx9qS1Gd5Zxtq1dR7r.JvE2mmxe/"
)

// systemFiles are laid over the machine's own, inside the mount namespace only.
var systemFiles = map[string]string{
	"/etc/passwd": "root:x:0:0:root:/:/bin/sh\nproxy:x:13:13:proxy:/:/usr/sbin/nologin\n" +
		user + ":x:4711:4711::/:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
	"/etc/shadow": "root:*:19000:0:99999:7:::\n" + user + ":" + passwordHash + ":19000:0:99999:7:::\n",
	"/etc/hosts": "127.0.0.1 localhost\n" + server4 + " server.example\n" + server6 + " server.example\n" +
		proxy4 + " proxy.example\n" + dead4 + " twin.example\n" + proxy4 + " twin.example\n",
	"/etc/resolv.conf": "nameserver " + dns4 + "\noptions timeout:30\n",
}

const insideVariable = "SIDEGATE_OUTBOUND_TEST_INSIDE"

func inside() bool { return os.Getenv(insideVariable) != "" }

func TestMain(m *testing.M) {
	if os.Getuid() == 0 && !inside() {
		if code, ok := rerunInside(); ok {
			os.Exit(code)
		}
	}
	if inside() {
		if err := furnish(); err != nil {
			fmt.Fprintln(os.Stderr, "furnishing the test's namespace:", err)
			os.Exit(1)
		}
	}
	// The runtime opens its poller with the first socket: before anybody counts descriptors.
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close()
	}
	os.Exit(m.Run())
}

// rerunInside runs this test binary again in namespaces of its own; ok is false where that is forbidden.
func rerunInside() (code int, ok bool) {
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Args[0] = os.Args[0]
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), insideVariable+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	if err := c.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "running without namespaces:", err)
		return 0, false
	}
	c.Wait()
	return c.ProcessState.ExitCode(), true
}

// furnish prepares the namespaces. A fuzzing worker finds them prepared.
func furnish() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if lo.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	dir, err := os.MkdirTemp("", "sidegate-outbound")
	if err != nil {
		return err
	}
	for path, content := range systemFiles {
		cover := filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(cover, []byte(content), 0o644); err != nil {
			return err
		}
		if err := syscall.Mount(cover, path, "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("covering %s: %w", path, err)
		}
	}
	// A bind mount holds on to its file: the directory need not stay.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := netlink.LinkSetMTU(lo, 1500); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, a := range []string{proxy4, proxy6, server4, server6, dead4, dns4} {
		// Without NODAD an IPv6 address can be bound a moment later only, even on loopback.
		address := &netlink.Addr{IPNet: netlink.NewIPNet(net.ParseIP(a)), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(lo, address); err != nil {
			return fmt.Errorf("adding %s: %w", a, err)
		}
	}
	return nil
}

// needNamespaces skips a test outside of the namespaces, and where a server that it talks to is missing.
func needNamespaces(t *testing.T, binaries ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it runs in namespaces of its own")
	}
	if !inside() {
		t.Skip("needs namespaces, which this machine forbids")
	}
	for _, b := range binaries {
		if _, err := exec.LookPath(b); err != nil {
			t.Skipf("needs %s: %v", b, err)
		}
	}
}

// noLeaks fails the test if it leaves goroutines or descriptors behind.
func noLeaks(t *testing.T) {
	t.Helper()
	// The collector would close a forgotten socket for us.
	percent := debug.SetGCPercent(-1)
	t.Cleanup(func() { debug.SetGCPercent(percent) })
	goroutines, descriptors := runtime.NumGoroutine(), countDescriptors(t)
	t.Cleanup(func() {
		if !eventually(5*time.Second, func() bool {
			return runtime.NumGoroutine() <= goroutines && countDescriptors(t) <= descriptors
		}) {
			stacks := make([]byte, 1<<16)
			t.Errorf("left behind: goroutines %d, were %d; descriptors %d, were %d\n%s", runtime.NumGoroutine(), goroutines,
				countDescriptors(t), descriptors, stacks[:runtime.Stack(stacks, true)])
		}
	})
}

func countDescriptors(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// eventually polls a condition that nothing announces, until it holds or the time is over.
func eventually(limit time.Duration, holds func() bool) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if holds() {
			return true
		}
	}
	return holds()
}

// noSecret fails the test if the error shows what it must not.
func noSecret(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	for _, secret := range []string{password, basicAuthorization(Credentials{user, password})} {
		if strings.Contains(err.Error(), secret) {
			t.Errorf("the error shows a secret: %v", err)
		}
	}
	if strings.ContainsAny(err.Error(), "\r\n") {
		t.Errorf("the error has several lines: %q", err)
	}
}

func mustNew(t *testing.T, url string, c Credentials, o Options) Outbound {
	t.Helper()
	made, err := New("hk", url, c, o)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// serve accepts on a loopback address and gives each connection to handle, which is also told when
// the test is over. Everything has ended when the test's cleanup is through.
func serve(t *testing.T, address string, handle func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	finished := make(chan struct{})
	connections := make(chan *net.TCPConn, 1024)
	go func() {
		defer close(finished)
		defer close(connections)
		ended := make(chan struct{})
		running := 0
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			running++
			connections <- c.(*net.TCPConn)
			go func() {
				defer func() { ended <- struct{}{} }()
				defer c.Close()
				handle(c.(*net.TCPConn))
			}()
		}
		for ; running > 0; running-- {
			<-ended
		}
	}()
	t.Cleanup(func() {
		l.Close()
		for c := range connections {
			c.Close()
		}
		<-finished
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func echoTCP(c *net.TCPConn) {
	io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) // hidden, since splice keeps its pipes
	c.CloseWrite()
}

// serveEchoUDP sends each datagram back to where it came from, from where it went to.
func serveEchoUDP(t *testing.T, address string) netip.AddrPort {
	t.Helper()
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(b[:n], from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-finished
	})
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}
