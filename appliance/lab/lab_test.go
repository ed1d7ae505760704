package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// crashEnv makes this test binary build a lab and wait to be killed, for TestCrash.
const crashEnv = "SIDEGATE_LAB_TEST_CRASH"

func TestMain(m *testing.M) {
	if os.Getenv(crashEnv) != "" {
		waitForCrash()
	}
	os.Exit(m.Run())
}

// newLab builds a lab that ends with the test.
func newLab(t *testing.T, o Options) *Lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the lab creates network namespaces")
	}
	l, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// brief bounds a test's waits.
func brief(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestPaths sends through plain forwarding and counts at sidegate's interface: requests pass it, replies do not.
func TestPaths(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	files, err := l.Host(Server).StartFiles(ctx, 80)
	if err != nil {
		t.Fatal(err)
	}
	phone, err := l.AddClient(ctx, "phone")
	if err != nil {
		t.Fatal(err)
	}
	mirror, err := l.AddServer(ctx, "mirror")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := mirror.StartFiles(ctx, 80)
	if err != nil {
		t.Fatal(err)
	}
	for _, client := range []*Host{l.Host(Laptop), phone} {
		for _, to := range []netip.AddrPort{files.Addr4(), files.Addr6(), elsewhere.Addr4(), elsewhere.Addr6()} {
			t.Run(fmt.Sprintf("%s to %s", client.Name(), to), func(t *testing.T) {
				own := client.Addr4()
				if to.Addr().Is6() {
					own = client.Addr6()
				}
				atSidegate, err := l.Host(Sidegate).Capture()
				if err != nil {
					t.Fatal(err)
				}
				atClient, err := client.Capture()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := client.Exec(ctx, "curl", "-sSgo", "/dev/null", "http://"+to.String()+"/bytes/5000000"); err != nil {
					t.Fatal(err)
				}
				count := func(c *Capture, match func(Packet) bool) uint64 {
					t.Helper()
					n, err := c.Count(match)
					if err != nil {
						t.Fatal(err)
					}
					return n.Packets
				}
				request := func(out bool) func(Packet) bool {
					return func(p Packet) bool { return p.Out == out && p.Src.Addr() == own && p.Dst == to }
				}
				// The last packets may still be on their way when curl has ended.
				err = Wait(ctx, "sidegate to have forwarded all of the request", func() error {
					if in, out := count(atSidegate, request(false)), count(atSidegate, request(true)); in < 5 || in != out {
						return fmt.Errorf("it received %d packets and sent %d", in, out)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				if n := count(atSidegate, To(own)); n != 0 {
					t.Errorf("%d reply packets crossed sidegate, want 0", n)
				}
				if n := count(atClient, From(to.Addr())); n < 10 {
					t.Errorf("the client's capture saw %d reply packets: it cannot tell", n)
				}
				// One hop less behind sidegate, and sidegate's MAC in place of the client's.
				for p := range atSidegate.All() {
					if p.Dst == to && (p.TTL == 64 == p.Out || p.SrcMAC == MAC(client.MAC()) == p.Out) {
						t.Errorf("unexpected at sidegate: %s", p)
					}
				}
				if _, err := atSidegate.Close(); err != nil {
					t.Error(err)
				}
				sum, err := atClient.Close()
				if err != nil || sum.Bytes < 5_000_000 {
					t.Errorf("the client's capture counted %d bytes of 5000000, %v", sum.Bytes, err)
				}
			})
		}
	}
	if n := len(files.Requests()) + len(elsewhere.Requests()); n != 8 {
		t.Errorf("the servers saw %d requests, want 8", n)
	}
	for _, counter := range [][2]string{{"Icmp", "OutRedirects"}, {"", "Icmp6OutRedirects"}} {
		if n, err := l.Host(Sidegate).Counter(counter[0], counter[1]); n != 0 || err != nil {
			t.Errorf("sidegate's %s is %d, %v, want 0", counter[1], n, err)
		}
	}
}

// TestRedirects shows that the lab notices a gateway that sends redirects: IPv4 ones if the sysctl is set under the
// interface only, IPv6 ones if gateways are known by link-local addresses, against which there is no sysctl.
func TestRedirects(t *testing.T) {
	l := newLab(t, Options{LinkLocalGateways: true})
	ctx := brief(t)
	side := l.Host(Sidegate)
	if err := side.SetSysctl("net.ipv4.conf.eth0.send_redirects", "1"); err != nil {
		t.Fatal(err)
	}
	for to, counter := range map[netip.Addr][2]string{
		l.Host(Upstream).Addr4(): {"Icmp", "OutRedirects"},
		l.Host(Upstream).Addr6(): {"", "Icmp6OutRedirects"},
	} {
		if _, err := l.Host(Laptop).Ping(ctx, to); err != nil {
			t.Fatal(err)
		}
		if n, err := side.Counter(counter[0], counter[1]); n == 0 || err != nil {
			t.Errorf("%s is %d, %v after a ping to %s, want more than 0", counter[1], n, err, to)
		}
		// The laptop believes it and goes around sidegate.
		c, err := side.Capture()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Host(Laptop).Ping(ctx, to); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Count(To(to)); n.Packets != 0 || err != nil {
			t.Errorf("%d packets to %s passed sidegate after the redirect, %v", n.Packets, to, err)
		}
	}
}

// TestMTU sends what fits and what does not: the router must answer with an ICMP error.
func TestMTU(t *testing.T) {
	l := newLab(t, Options{MTU: 9000, InternetMTU: 1400})
	ctx := brief(t)
	if got := l.Host(Laptop).Interface().MTU; got != 9000 {
		t.Errorf("the laptop's MTU is %d, want 9000", got)
	}
	for to, header := range map[netip.Addr]int{l.Host(Server).Addr4(): 28, l.Host(Server).Addr6(): 48} {
		ping := func(size int) (string, error) {
			return l.Host(Laptop).Exec(ctx, "ping", "-c1", "-W2", "-Mdo", "-s", fmt.Sprint(size-header), to.String())
		}
		c, err := l.Host(Laptop).Capture()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ping(1400); err != nil {
			t.Errorf("1400 bytes to %s: %v", to, err)
		}
		if out, err := ping(1401); err == nil {
			t.Errorf("1401 bytes to %s passed: %s", to, out)
		}
		tooBig, err := c.Count(func(p Packet) bool {
			return !p.Out && (p.Protocol == ICMP && p.ICMPType == 3 && p.ICMPCode == 4 || p.Protocol == ICMPv6 && p.ICMPType == 2)
		})
		if tooBig.Packets != 1 || err != nil {
			t.Errorf("%d ICMP errors arrived, %v, want 1", tooBig.Packets, err)
		}
	}
	if _, err := New(ctx, Options{MTU: 1000}); err == nil || !strings.Contains(err.Error(), "1280") {
		t.Errorf("MTU 1000 gives %v, want an error that says what IPv6 needs", err)
	}
}

func TestNames(t *testing.T) {
	l := newLab(t, Options{})
	for _, name := range []string{"", "Laptop", "far-too-long-a-name", "../x", Laptop, switchName} {
		if _, err := l.AddClient(brief(t), name); err == nil {
			t.Errorf("a host %q was added", name)
		}
	}
	if _, err := l.Host(Laptop).Dial(brief(t), "tcp", "example.com:80"); err == nil || !strings.Contains(err.Error(), "resolves no names") {
		t.Errorf("dialing a name: %v", err)
	}
}

func TestDescribe(t *testing.T) {
	l := newLab(t, Options{})
	text := l.Describe()
	for _, h := range l.Hosts() {
		for _, i := range h.Interfaces() {
			if !strings.Contains(text, i.Addr4.Addr().String()) || !strings.Contains(text, i.Addr6.Addr().String()) {
				t.Errorf("%s's addresses are missing in:\n%s", h.Name(), text)
			}
		}
	}
	// What it tells the reader to type must work.
	_, command, _ := strings.Cut(strings.SplitN(text, "\n", 2)[0], "with: ")
	out, err := exec.CommandContext(brief(t), "sh", "-c", command).CombinedOutput()
	if err != nil || !strings.Contains(string(out), l.Host(Laptop).Addr4().String()) {
		t.Errorf("%s: %v: %s", command, err, out)
	}
}

// TestCommand checks where a program runs, what its failure says, and that its group ends with it.
func TestCommand(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	h := l.Host(Laptop)
	cgroup := cgroupForTest(t)
	c := h.Command(ctx, "sh", "-c", `ip -o -4 address show eth0; cat /proc/self/cgroup; echo "$GREETING"; pwd`)
	c.Env, c.Dir, c.Cgroup = []string{"GREETING=hello"}, l.Dir(), cgroup
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"192.168.0.3/24", "0::/" + filepath.Base(cgroup) + "\n", "\nhello\n", l.Dir()} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in %q", want, out)
		}
	}

	if _, err := h.Exec(ctx, "sh", "-c", "echo it broke >&2; exit 7"); err == nil ||
		!strings.Contains(err.Error(), "it broke") || !strings.Contains(err.Error(), "sh on laptop: exit status 7") {
		t.Errorf("a failing program gives %v", err)
	}
	if _, err := h.Exec(ctx, "no-such-program"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("an absent program gives %v", err)
	}

	short, cancel := context.WithCancel(ctx)
	p, err := h.Command(short, "sh", "-c", "sleep 1000 & echo child $!; wait").Start()
	if err != nil {
		t.Fatal(err)
	}
	var child int
	err = Wait(ctx, "the child's number", func() error {
		_, err := fmt.Sscanf(p.Tail(1), "child %d", &child)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := p.Wait(); err == nil {
		t.Error("the killed program succeeded")
	}
	if err := Wait(ctx, "the child to end", gone(child)); err != nil {
		t.Error(err)
	}
}

// TestStop stops a program that ends in order and leaves a child which does not.
func TestStop(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	p, err := l.Host(Laptop).Command(ctx, "sh", "-c", `trap "exit 0" TERM
		sh -c 'trap "" TERM; echo child $$; while :; do sleep 1; done' & wait`).Start()
	if err != nil {
		t.Fatal(err)
	}
	var child int
	err = Wait(ctx, "the child's number", func() error {
		_, err := fmt.Sscanf(p.Tail(1), "child %d", &child)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("the program was not asked first: %v", err)
	}
	if err := gone(child)(); err != nil {
		t.Error(err)
	}
	if err := p.Stop(); err != nil {
		t.Errorf("stopping what has ended: %v", err)
	}
}

// cgroupForTest makes an empty cgroup v2.
func cgroupForTest(t *testing.T) string {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(root, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir, err := os.MkdirTemp(root, "sidegate-lab-test-")
		if err != nil {
			t.Skip("needs a writable cgroup v2: ", err)
		}
		t.Cleanup(func() {
			// The kernel may count an ended process for a moment longer.
			if err := Wait(context.Background(), "the cgroup to be empty", func() error { return os.Remove(dir) }); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	t.Skip("needs cgroup v2, which is not mounted")
	return ""
}

func gone(pid int) func() error {
	return func() error {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return nil
		}
		if _, after, _ := strings.Cut(string(state), ") "); strings.HasPrefix(after, "Z") {
			return nil // dead; its parent, not we, must take notice
		}
		return fmt.Errorf("process %d is alive", pid)
	}
}

// markForTest is in the environment of the processes that traces looks for.
func markForTest() string { return fmt.Sprintf("SIDEGATE_LAB_TEST_MARK=%d", os.Getpid()) }

// traces lists what a lab could leave behind on the machine.
func traces(t *testing.T) map[string][]string {
	t.Helper()
	found := make(map[string][]string)
	for _, pattern := range []string{namesRoot + "/sg-*", stateRoot + "/*"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			// Labs of other processes, tests of other packages for example, come and go.
			if strings.HasPrefix(strings.TrimPrefix(filepath.Base(p), "sg-"), fmt.Sprint(os.Getpid())) {
				found["files"] = append(found["files"], p)
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, fmt.Sprintf("%s/%d", stateRoot, os.Getpid())) || strings.Contains(line, fmt.Sprintf("/sg-%d", os.Getpid())) {
			found["mounts"] = append(found["mounts"], line)
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		found["links"] = append(found["links"], l.Attrs().Name)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			found["fds"] = append(found["fds"], strings.TrimRight(target, "0123456789[]"))
		}
	}
	slices.Sort(found["fds"])
	environments, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range environments {
		if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), markForTest()) {
			found["processes"] = append(found["processes"], path)
		}
	}
	return found
}

// TestClose uses everything that a lab has and compares the machine before and after.
func TestClose(t *testing.T) {
	l := newLab(t, Options{}) // opens what the Go runtime and libraries keep for good
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	before, goroutines := traces(t), runtime.NumGoroutine()

	l = newLab(t, Options{})
	ctx := brief(t)
	second := newLab(t, Options{}) // two at once, with the same addresses
	if l.ID() == second.ID() {
		t.Errorf("two labs are called %s", l.ID())
	}
	if _, err := l.AddClient(ctx, "phone"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host(Server).StartFiles(ctx, 80); err != nil {
		t.Fatal(err)
	}
	echo, err := l.Host(Server).StartEcho(ctx, 7)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host(Server).StartSink(ctx, 9); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host(Server).StartBulk(ctx, 10); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host(Router).CaptureOn("wan"); err != nil {
		t.Fatal(err)
	}
	dir, err := l.Host(Sidegate).MountBPF()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := l.Host(Sidegate).MountBPF(); again != dir || err != nil {
		t.Errorf("mounting again gives %q, %v, want %q", again, err, dir)
	}
	for _, h := range l.Hosts() {
		// One process that leaves its group, which must be found nevertheless.
		c := h.Command(ctx, "sh", "-c", "setsid sleep 1000 & sleep 1000")
		c.Env = []string{markForTest()}
		if _, err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	err = Wait(ctx, "three processes on each host", func() error {
		if n := len(traces(t)["processes"]); n < 3*len(l.Hosts()) {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Host(Laptop).Dial(ctx, "tcp", echo.Addr4().String())
	if err != nil {
		t.Fatal(err)
	}
	during := traces(t)
	if len(during["mounts"]) == 0 || len(during["files"]) == 0 {
		t.Errorf("traces sees no lab at all: %v", during)
	}

	if err := errors.Join(l.Close(), second.Close()); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := l.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	err = Wait(ctx, "all to be as before", func() error {
		runtime.GC() // the net package keeps pipes for splicing until then
		after := traces(t)
		for kind, now := range after {
			if !slices.Equal(now, before[kind]) {
				return fmt.Errorf("%s before: %q, after: %q", kind, before[kind], now)
			}
		}
		if n := runtime.NumGoroutine(); n > goroutines {
			stacks := make([]byte, 1<<20)
			return fmt.Errorf("%d goroutines instead of %d:\n%s", n, goroutines, stacks[:runtime.Stack(stacks, true)])
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}

	for name, err := range map[string]error{
		"Do":      l.Host(Laptop).Do(func() error { return nil }),
		"Command": l.Host(Laptop).Command(ctx, "true").Run(),
		"Capture": func() error { _, err := l.Host(Laptop).Capture(); return err }(),
		"Echo":    func() error { _, err := l.Host(Server).StartEcho(ctx, 7); return err }(),
		"Client":  func() error { _, err := l.AddClient(ctx, "late"); return err }(),
	} {
		if !errors.Is(err, errClosed) {
			t.Errorf("%s of a closed lab gives %v", name, err)
		}
	}
}

// waitForCrash builds a lab with a process and a mount in it, says so, and never returns.
func waitForCrash() {
	ctx := context.Background()
	l, err := New(ctx, Options{})
	if err == nil {
		_, err = l.Host(Sidegate).MountBPF()
	}
	var p *Process
	if err == nil {
		p, err = l.Host(Server).Command(ctx, "sh", "-c", "setsid sleep 1000 & echo $!; wait").Start()
	}
	var child int
	if err == nil {
		err = Wait(ctx, "the child's number", func() error {
			_, err := fmt.Sscan(p.Tail(1), &child)
			return err
		})
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	fmt.Println("ready", l.ID(), p.Pid(), child)
	select {}
}

// TestCrash kills a process that has a lab and finds everything gone after the next lab has begun.
func TestCrash(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: the lab creates network namespaces")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	victim := exec.Command(self)
	victim.Env = append(os.Environ(), crashEnv+"=1")
	out, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	var shell, child int
	_, err = fmt.Fscanf(out, "ready %s %d %d\n", &id, &shell, &child)
	if err != nil {
		victim.Process.Kill()
		t.Fatal(err)
	}
	left := func() (n int) {
		for _, pattern := range []string{namesRoot + "/sg-" + id + "-*", stateRoot + "/" + id} {
			paths, err := filepath.Glob(pattern)
			if err != nil {
				t.Fatal(err)
			}
			n += len(paths)
		}
		return n
	}
	newLab(t, Options{}) // must not touch a living one
	if n := left(); n != 7 {
		t.Errorf("the living lab has %d names, want 7", n)
	}
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	victim.Wait()
	if err := Wait(brief(t), "the shell to die with its parent", gone(shell)); err != nil {
		t.Error(err)
	}
	if gone(child)() == nil {
		t.Error("the child outside the group died as well: this test shows nothing")
	}

	newLab(t, Options{})
	if n := left(); n != 0 {
		t.Errorf("%d names are left of the crashed lab, want 0", n)
	}
	if err := gone(child)(); err != nil {
		t.Error(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), stateRoot+"/"+id) {
		t.Error("a mount of the crashed lab is left")
	}
}

func TestWait(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := Wait(ctx, "the cows", func() error { return net.ErrClosed })
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), "the cows") {
		t.Errorf("got %v", err)
	}
	tries := 0
	err = Wait(t.Context(), "the third try", func() error {
		if tries++; tries < 3 {
			return net.ErrClosed
		}
		return nil
	})
	if err != nil || tries != 3 {
		t.Errorf("got %v after %d tries", err, tries)
	}
}
