package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

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

func cgroupForTest(t *testing.T) string {
	c, err := NewCgroup("sidegate-lab-test-")
	if err != nil {
		t.Skip("needs a writable cgroup v2: ", err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return string(c)
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
