package gateway_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const everythingDirect = "interfaces: { lan: auto }\ndefault: direct\n"

// TestStopLeavesNothing: after each of 100 starts and stops the box is as it was: no map, program, link,
// pin, rule, route, socket.
func TestStopLeavesNothing(t *testing.T) {
	w := newWorld(t)
	before := network(t, w.box())
	cycles := 100
	if testing.Short() {
		cycles = 10
	}
	var used []object
	for range cycles {
		w.start(t, everythingDirect)
		objects := bpfObjects(t, w.Pid())
		if len(objects) < 10 {
			t.Fatalf("the gateway has %d BPF objects: this test looks in the wrong place", len(objects))
		}
		used = append(used, objects...)
		if during := network(t, w.box()); !strings.Contains(during, "fwmark 0x1000000/0xf000000") {
			t.Fatalf("the gateway has no rule: this test looks in the wrong place:\n%s", during)
		}
		w.stop(t)
		if after := network(t, w.box()); after != before {
			t.Fatalf("the network was\n%s\nand is\n%s", before, after)
		}
		for _, path := range []string{w.State, w.Socket} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("%s is left behind (%v)", path, err)
			}
		}
	}
	awaitGone(t, used)
}

// TestReplaceKeepsDirect: SIGUSR2 leaves the kernel's state, and the successor takes it over: flows keep
// their entries, direct ones never wait.
func TestReplaceKeepsDirect(t *testing.T) {
	w := newWorld(t)
	before := network(t, w.box())
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.start(t, everythingDirect)
	c, err := w.laptop().Dial(t.Context(), "tcp", echo.Addr4().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	say := func() {
		t.Helper()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		if _, err := c.Write([]byte("still there?")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 12)); err != nil {
			t.Fatal(err)
		}
	}
	say()
	first := w.status(t).Generation
	pins := func() int {
		links, err := filepath.Glob(filepath.Join(w.State, "links", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(links)
	}
	attached := pins()

	w.signal(t, syscall.SIGUSR2)
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := pins(); n != attached || n == 0 {
		t.Errorf("%d links are left pinned, want %d", n, attached)
	}
	say()
	w.start(t, everythingDirect)
	say()
	if n := pins(); n != attached {
		t.Errorf("the successor has %d links pinned, want %d", n, attached)
	}
	flows, err := w.api.Flows(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(flows) != 1 || flows[0].Generation != first || flows[0].Packets < 3 {
		t.Errorf("the flow's entry was not taken over: %+v", flows)
	}
	w.stop(t)
	if after := network(t, w.box()); after != before {
		t.Errorf("the network was\n%s\nand is\n%s", before, after)
	}
}
