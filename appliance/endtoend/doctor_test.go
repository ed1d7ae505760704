package endtoend

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// ailment is one thing that is wrong with a box, or its LAN.
type ailment struct {
	name    string
	lan     string // interfaces.lan of the configuration; empty: auto
	dns     bool   // the configuration has a dns section
	gateway bool   // it runs, and proxies everything
	direct  bool   // it runs, and everything is direct
	own     bool   // it runs, and proxies everything, of the box itself too; a witness is at port 7 of the server
	prepare func(*testing.T, world)
	cause   func(*testing.T, world)
	finding string // CHECK OBJECT of the one finding
	works   func(*testing.T, world) error
	byHand  bool                    // the fix is the command that the finding says
	cure    func(*testing.T, world) // what a person does, after that; without either, it is doctor --fix --yes

	only     []string // the box has these tools and no other
	withIPv6 bool     // the router's silence is found for IPv6, too
}

type finding struct {
	Check, Severity, Object, Seen, Why, Fix string
	Repair                                  *struct{ Does string }
}

// TestDoctor has one row for each thing that the doctor finds. It is silent and traffic works; then exactly that is broken, and
// doctor names it and nothing else, and traffic fails; with the fix, both are as before.
func TestDoctor(t *testing.T) {
	for _, a := range slices.Concat(parameterAilments, boxAilments, firewallAilments, ownAilments, lanAilments) {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel() // it waits more than it works
			w := a.world(t)
			config := a.config(t)
			if a.only != nil {
				w.path = tools(t, a.only)
			}
			if a.prepare != nil {
				a.prepare(t, w)
			}
			if a.gateway {
				w.startProxied(t)
			}
			if a.direct {
				w.start(t, everythingDirect)
			}
			if found, _ := w.examine(t, config); len(found) > 0 {
				t.Fatalf("doctor finds something before anything is broken: %+v", found)
			}
			if err := a.works(t, w); err != nil {
				t.Fatalf("before anything is broken: %v", err)
			}

			a.cause(t, w)
			found, status := w.examine(t, config)
			if a.withIPv6 { // what breaks, breaks for both
				found = slices.DeleteFunc(found, func(f finding) bool { return f.Check == "router-ipv6" })
			}
			if len(found) != 1 || found[0].Check+" "+found[0].Object != a.finding {
				t.Fatalf("doctor finds %+v, want one: %s", found, a.finding)
			}
			if want := map[string]int{"note": 0, "warning": 2, "failure": 3}[found[0].Severity]; status != want {
				t.Errorf("the exit status is %d, want %d", status, want)
			}
			err := lab.Wait(within(t, 20*time.Second), "the traffic to fail", func() error {
				if err := a.works(t, w); err == nil {
					return fmt.Errorf("it works, though %s", found[0].Why)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}

			switch {
			case a.byHand:
				run(t, w.sidegate(), found[0].Fix)
			case a.cure == nil && found[0].Repair == nil:
				t.Fatal("the finding has no repair")
			case a.cure == nil:
				w.examine(t, config, "--fix", "--yes")
			}
			if a.cure != nil {
				a.cure(t, w)
			}
			err = lab.Wait(within(t, 20*time.Second), "the traffic to work again", func() error { return a.works(t, w) })
			if err != nil {
				t.Error(err)
			}
			if found, status := w.examine(t, config); len(found) > 0 || status != 0 {
				t.Errorf("doctor finds something after the fix (status %d): %+v", status, found)
			}
		})
	}
}

// world is one without a gateway, or with one that decides for the box's own programs.
func (a *ailment) world(t *testing.T) world {
	t.Helper()
	if !a.own {
		return newWorld(t, lab.Options{})
	}
	b := newBox(t)
	startWitness(t, b.server(), 7)
	b.start(t, b.config("default: hk"))
	return b.world
}

// config writes the configuration that doctor is given; none beside a running gateway, which has its own.
func (a *ailment) config(t *testing.T) string {
	t.Helper()
	if a.gateway || a.direct || a.own {
		return ""
	}
	lan := a.lan
	if lan == "" {
		lan = "auto"
	} else {
		lan = "[" + lan + "]"
	}
	text := "interfaces: { lan: " + lan + " }\ndefault: direct\n"
	if a.dns {
		text += "dns: { upstreams: { isp: \"udp://203.0.113.10\" }, default: isp }\n"
	}
	path := filepath.Join(t.TempDir(), "sidegate.yaml")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// tools is a directory that has them.
func tools(t *testing.T, names []string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err == nil {
			err = os.Symlink(path, filepath.Join(dir, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// examine runs doctor on the box and returns its findings and exit status.
func (w world) examine(t *testing.T, config string, args ...string) ([]finding, int) {
	t.Helper()
	args = append([]string{"doctor", "--json"}, args...)
	if config != "" {
		args = append(args, "-c", config)
	}
	socket := filepath.Join(w.Dir(), "none.sock")
	if w.gateway != nil {
		socket = w.gateway.Socket
	}
	var out bytes.Buffer
	command := w.sidegate().Command(t.Context(), binary, append(args, "--socket", socket)...)
	command.Stdout = &out
	if w.path != "" {
		command.Env = []string{"PATH=" + w.path}
	}
	err := command.Run()
	status := 0
	if exited := (*exec.ExitError)(nil); errors.As(err, &exited) {
		status = exited.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	var result struct{ Findings []finding }
	if jsonErr := json.Unmarshal(out.Bytes(), &result); jsonErr != nil {
		t.Fatalf("sidegate %s: %v\n%v\n%s", strings.Join(args, " "), err, jsonErr, out.String())
	}
	return result.Findings, status
}

// TestDoctorOnAHealthyBox: nothing is found, before the first start and beside a running gateway, and it takes no two seconds.
func TestDoctorOnAHealthyBox(t *testing.T) {
	w := newWorld(t, lab.Options{})
	for range 2 {
		args := []string{"doctor"}
		if w.gateway != nil {
			args = append(args, "--socket", w.gateway.Socket)
		}
		start := time.Now()
		out, err := w.sidegate().Exec(t.Context(), binary, args...)
		took := time.Since(start)
		if err != nil || !strings.HasPrefix(out, "no finding: ") {
			t.Errorf("%v\n%s", err, out)
		}
		t.Logf("it took %v: %s", took, strings.TrimSpace(out))
		if took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		if w.gateway == nil {
			w.startProxied(t)
		}
	}
}

// pings works if the laptop reaches the server through the box.
func pings(of func(*lab.Host) netip.Addr) func(*testing.T, world) error {
	return func(t *testing.T, w world) error {
		_, err := w.laptop().Ping(t.Context(), of(w.server()))
		return err
	}
}

// proxies works if a connection through the upstream is answered.
func proxies(t *testing.T, w world) error {
	c, err := w.laptop().Dial(within(t, 2*time.Second), "tcp", netip.AddrPortFrom(w.server().Addr4(), 7).String())
	if err != nil {
		return err
	}
	defer c.Close()
	return tryExchange(c, 100)
}

func startEcho(t *testing.T, w world) {
	t.Helper()
	_, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
}

func sets(name, value string) func(*testing.T, world) {
	return func(t *testing.T, w world) {
		t.Helper()
		need(t, w.sidegate().SetSysctl(name, value))
	}
}

// run runs shell commands on a host.
func run(t *testing.T, h *lab.Host, script string) {
	t.Helper()
	_, err := h.Exec(t.Context(), "sh", "-ec", script)
	need(t, err)
}
