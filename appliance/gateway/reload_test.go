package gateway_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// TestReloadUnderNewFlows alternates between a policy that is direct, one that proxies, and files that are
// refused, while flows begin all the time: each is decided by the old policy or the new one, none fails, a
// connection that is being proxied lives on, and nothing piles up.
func TestReloadUnderNewFlows(t *testing.T) {
	w := newWorld(t)
	hk := w.dante(t)
	files, err := w.server().StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	const rules = "interfaces: { lan: auto }\nrules: [ { name: echo, port: 7, outbound: hk } ]\n"
	direct, proxied := hk+rules+"default: direct\n", hk+rules+"default: hk\n"
	w.start(t, direct)

	// A connection that lives through all.
	live, err := w.laptop().Dial(t.Context(), "tcp", echo.Addr4().String())
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	talk := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := lab.PingPong(ctx, live, 1000, 3); err != nil {
			t.Fatalf("the live connection: %v", err)
		}
	}
	talk()

	laptop, upstream := w.laptop().Addr4().String(), w.Host(lab.Upstream).Addr4().String()
	seen := map[string]int{} // who the server saw
	ctx, stop := context.WithCancel(t.Context())
	var flows sync.WaitGroup
	var mu sync.Mutex
	for range 2 {
		flows.Go(func() {
			for ctx.Err() == nil {
				who, err := w.ask(t.Context(), files)
				mu.Lock()
				switch {
				case err != nil:
					t.Errorf("a new connection failed: %v", err)
				case who != laptop && who != upstream:
					t.Errorf("the server saw %s", who)
				}
				seen[who]++
				mu.Unlock()
			}
		})
	}
	reloads := 200
	if testing.Short() {
		reloads = 20
	}
	w.warmUp(t, proxied, direct)
	fds, objects := descriptors(t, w.Pid()), len(bpfObjects(t, w.Pid()))
	for i := range reloads {
		switch i % 4 {
		case 0, 2:
			w.rewrite(t, map[int]string{0: proxied, 2: direct}[i%4])
			if r, err := w.api.Reload(t.Context()); err != nil || !r.OK {
				t.Fatalf("reload %d: %+v, %v", i, r, err)
			}
		default:
			before := w.status(t)
			w.rewrite(t, direct+"defualt: hk\n")
			r, err := w.api.Reload(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if r.OK || !strings.Contains(r.Error, `did you mean "default"?`) || r.Generation != before.Generation {
				t.Fatalf("a broken file gave %+v", r)
			}
		}
	}
	stop()
	flows.Wait()
	talk()
	if seen[laptop] == 0 || seen[upstream] == 0 {
		t.Errorf("the server saw %v: one policy was never in force", seen)
	}
	t.Logf("%d reloads, the server saw %v", reloads, seen)
	// The relay's connections are gone when both ends have closed; nothing else may come on top.
	await(t, "descriptors and BPF objects to be as many as before", func() error {
		if f, o := descriptors(t, w.Pid()), len(bpfObjects(t, w.Pid())); f > fds || o > objects {
			return fmt.Errorf("%d descriptors, were %d; %d BPF objects, were %d", f, fds, o, objects)
		}
		return nil
	})
}

// warmUp reloads once each way, so that what is opened once is open.
func (w *world) warmUp(t *testing.T, configs ...string) {
	t.Helper()
	for _, c := range configs {
		w.rewrite(t, c)
		if r, err := w.api.Reload(t.Context()); err != nil || !r.OK {
			t.Fatalf("%+v, %v", r, err)
		}
	}
}

// TestHangUp: SIGHUP reads the file again, and a broken one is told in one line, in the log and the status,
// while the policy before stays in force.
func TestHangUp(t *testing.T) {
	w := newWorld(t)
	w.start(t, everythingDirect)
	files, err := w.server().StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	w.rewrite(t, "interfaces: { lan: auto }\nrules: [ { name: web, port: 80, outbound: block, reject: true } ]\ndefault: direct\n")
	if r := w.hangUp(t); !r.OK || r.Generation != 2 {
		t.Fatalf("%+v", r)
	}
	if who, err := w.ask(t.Context(), files); err == nil {
		t.Errorf("the new policy is not in force: the server saw %s", who)
	}

	w.rewrite(t, "rules: [ { outbound: tokyo } ]\ndefault: direct\n")
	r := w.hangUp(t)
	if want := w.Config + ":1: rule"; r.OK || r.Generation != 2 || !strings.HasPrefix(r.Error, want) {
		t.Errorf("%+v", r)
	}
	if log := w.Tail(1); !strings.Contains(log, "tokyo") || !strings.Contains(log, "stays in force") {
		t.Errorf("the log ends %q", log)
	}
	if who, err := w.ask(t.Context(), files); err == nil {
		t.Errorf("the policy before is not in force any more: the server saw %s", who)
	}
	w.rewrite(t, everythingDirect)
	if r := w.hangUp(t); !r.OK {
		t.Fatalf("%+v", r)
	}
	if _, err := w.ask(t.Context(), files); err != nil {
		t.Error(err)
	}
}
