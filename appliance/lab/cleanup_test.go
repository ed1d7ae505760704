package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// crashEnv makes this test binary build a lab and wait to be killed, for TestCrash.
const crashEnv = "SIDEGATE_LAB_TEST_CRASH"

func TestMain(m *testing.M) {
	if os.Getenv(crashEnv) != "" {
		waitForCrash()
	}
	os.Exit(m.Run())
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

// TestStray finds a namespace whose lab has no directory any more, and leaves alone what only looks similar.
func TestStray(t *testing.T) {
	l := newLab(t, Options{})
	stray, err := newNamespace("sg-1.99-stray")
	if err != nil {
		t.Fatal(err)
	}
	stray.handle.Close() // closed, but still named
	other, err := newNamespace("sg-mine")
	if err != nil {
		t.Fatal(err)
	}
	defer other.close()
	if err := Cleanup(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"sg-1.99-stray": false, "sg-mine": true, l.Host(Laptop).Namespace(): true} {
		if _, err := os.Stat(filepath.Join(namesRoot, name)); (err == nil) != want {
			t.Errorf("after the clean-up %s is there: %v, want %v", name, err == nil, want)
		}
	}
}
