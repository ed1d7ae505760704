package endtoend

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"sidegate/appliance/lab"
)

// TestOwnHooksCannotBeAttached: where the programs of the box cannot be decided for, log and status say why in one line each, nothing
// of it is half done, and the LAN is served. When it becomes possible it is done within five seconds.
func TestOwnHooksCannotBeAttached(t *testing.T) {
	var include func() error
	for _, c := range []struct {
		name   string
		says   string
		cgroup func(b *box) string // of the configuration; empty: none
		before func(t *testing.T, b *box) (binary string)
		heal   func(t *testing.T, b *box)
	}{
		{
			name: "no such directory", says: "no such file or directory",
			cgroup: func(b *box) string { return filepath.Join(b.cgroup, "blue.service") },
			before: func(*testing.T, *box) string { return binary },
			heal:   func(t *testing.T, b *box) { b.unit(t, "blue.service") },
		},
		{
			name: "a directory of something else", says: "is no directory of cgroup v2",
			cgroup: func(b *box) string { return filepath.Join(b.Dir(), "link") },
			before: func(t *testing.T, b *box) string {
				need(t, os.Symlink(b.Dir(), filepath.Join(b.Dir(), "link")))
				return binary
			},
			heal: func(t *testing.T, b *box) {
				need(t, os.Remove(filepath.Join(b.Dir(), "link")))
				need(t, os.Symlink(b.cgroup, filepath.Join(b.Dir(), "link")))
			},
		},
		{
			name: "not mounted", says: "cgroup v2 is not mounted",
			cgroup: func(*box) string { return "" },
			before: func(t *testing.T, b *box) string {
				script := fmt.Sprintf("#!/bin/sh\nexec unshare --mount sh -ec 'umount -l %s; exec \"$0\" \"$@\"' %s \"$@\"\n", filepath.Dir(b.cgroup), binary)
				path := filepath.Join(t.TempDir(), "without-cgroup")
				need(t, os.WriteFile(path, []byte(script), 0o755))
				return path
			},
			heal: func(t *testing.T, b *box) {
				run(t, b.sidegate(), fmt.Sprintf("nsenter -t %d -m mount -t cgroup2 none %s", b.gateway.Pid(), filepath.Dir(b.cgroup)))
			},
		},
		{
			name: "somebody else's program, exclusive", says: "operation not permitted",
			before: func(t *testing.T, b *box) string {
				include = exclude(t, b.cgroup)
				return binary
			},
			cgroup: func(b *box) string { return filepath.Join(b.cgroup, "below") },
			heal:   func(t *testing.T, _ *box) { need(t, include()) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBox(t)
			b.unit(t, "below")
			w := startWitness(t, b.server(), 7)
			config, named := b.config(unitRules, "default: hk"), ""
			if dir := c.cgroup(b); dir != "" {
				named = ", cgroup: " + dir
			}
			config = strings.ReplaceAll(config, ", cgroup: "+b.cgroup, named)
			g, err := b.sidegate().StartGateway(t.Context(), lab.GatewayOptions{Binary: c.before(t, b), Config: config})
			need(t, err)
			b.gateway = g
			problem := func() string {
				problems := b.status(t).Problems
				i := slices.IndexFunc(problems, func(p string) bool { return strings.Contains(p, c.says) })
				if i < 0 || len(problems) != 1 {
					return ""
				}
				return problems[i]
			}
			said := problem()
			t.Logf("it says: %s", said)
			if !strings.Contains(said, "the box's own connections") {
				t.Errorf("the status does not say in one line what is wrong:\n%s", b.cli(t, "status"))
			}
			if got := b.traces(t); ours.MatchString(got) {
				t.Errorf("it is half done: there is\n%s", got)
			}
			for _, to := range w.addrs() {
				for _, network := range []string{"tcp", "udp"} {
					seen := w.seenBy(t, b.laptop(), network, to)
					if !is(b.upstream(), seen) {
						t.Errorf("the laptop by %s to %s is seen as %s", network, to, seen)
					}
				}
			}
			need(t, lab.Wait(within(t, 5*time.Second), "another look", func() error { // and no other word
				if n := strings.Count(b.gateway.Tail(100), c.says); n != 1 {
					return fmt.Errorf("the log says so %d times", n)
				}
				return nil
			}))
			c.heal(t, b)
			need(t, lab.Wait(within(t, 5*time.Second), "the hooks", func() error {
				if problems := b.status(t).Problems; len(problems) > 0 {
					return fmt.Errorf("%v", problems)
				}
				return nil
			}))
			if log := b.gateway.Tail(100); !strings.Contains(log, "solved") || strings.Count(log, c.says) != 2 {
				t.Errorf("the log does not tell it once each:\n%s", log)
			}
			below := b.unit(t, "below")
			if c.name == "no such directory" {
				below = b.unit(t, "blue.service")
			}
			if s := b.agent(t, "/proc/self/exe", below).visit(t, 1, "tcp", w.addr4); !is(b.upstream(), s.Seen.Addr()) {
				t.Errorf("a program of the box: %+v", s)
			}
		})
	}
}

// ours are links that box.traces tells of, and their pins. What is attached without a link is somebody else's.
var ours = regexp.MustCompile(`: link [1-9]|own-`)

// exclude attaches a program to a cgroup, as tools of old do, in a way that the kernel refuses all others below; it returns how to take
// it away again.
func exclude(t *testing.T, cgroup string) (include func() error) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "exclusive", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	need(t, err)
	t.Cleanup(func() { p.Close() })
	dir, err := os.Open(cgroup)
	need(t, err)
	t.Cleanup(func() { dir.Close() })
	need(t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect}))
	return func() error {
		return link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect})
	}
}

// seenBy is as whom the witness sees a host that asks.
func (w *witness) seenBy(t *testing.T, client *lab.Host, network string, to netip.AddrPort) netip.Addr {
	t.Helper()
	c, err := client.Dial(within(t, forAnswer), network, to.String())
	need(t, err)
	defer c.Close()
	s, err := order{Timeout: forAnswer}.say(c)
	need(t, err)
	return s.Seen.Addr()
}
