package endtoend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"sidegate/appliance/lab"
)

const unitRules = `rules:
  - { name: red, unit: [red.service], outbound: direct }
  - { name: blue, unit: [blue.service], outbound: hk }
`

// TestOwnCrash kills the daemon. What is direct goes on, connections that live and those that begin. What is to be proxied fails and
// nothing of it leaves the box, or, where the owner chose so, begins directly. A restart takes over: all is as before, the hooks are
// those that were there, and after the stop nothing is left of them.
func TestOwnCrash(t *testing.T) {
	for _, onFailure := range []string{"block", "direct"} {
		t.Run(onFailure, func(t *testing.T) {
			b := newBox(t)
			w := startWitness(t, b.server(), 7)
			clean := b.traces(t)
			config := b.config("on_failure: "+onFailure, unitRules, "default: block")
			b.start(t, config)
			red, blue := b.agent(t, "/proc/self/exe", b.unit(t, "red.service")), b.agent(t, "/proc/self/exe", b.unit(t, "blue.service"))
			by := map[*agent]func(s sight) bool{
				red:  func(s sight) bool { return s.Error == "" && is(b.sidegate(), s.Seen.Addr()) },
				blue: func(s sight) bool { return s.Error == "" && is(b.upstream(), s.Seen.Addr()) },
			}
			const loose = 100 // the numbers of sockets that are not connected
			begin := func(a *agent, first int, right func(sight) bool, patience time.Duration) {
				t.Helper()
				for i, to := range w.addrs() {
					for j, network := range []string{"tcp", "udp"} {
						n := first + 2*i + j
						s := a.tell(t, order{Do: "open", Conn: n, Network: network, To: to, Timeout: patience})
						if s.Error == "" {
							s = a.tell(t, order{Do: "say", Conn: n, Timeout: patience})
						}
						if !right(s) {
							t.Errorf("%s to %s: %+v", network, to, s)
						}
					}
					a.tell(t, order{Do: "open", Conn: loose + first + i, Network: "udp"})
					if s := a.tell(t, order{Do: "say", Conn: loose + first + i, To: to, Timeout: patience}); !right(s) {
						t.Errorf("udp, not connected, to %s: %+v", to, s)
					}
				}
			}
			goOn := func(a *agent, numbers []int, right func(sight) bool, patience time.Duration) {
				t.Helper()
				for _, n := range numbers {
					o := order{Do: "say", Conn: n, Timeout: patience}
					if n >= loose {
						o.To = w.addrs()[n-loose]
					}
					if s := a.tell(t, o); !right(s) {
						t.Errorf("number %d: %+v", n, s)
					}
				}
			}
			begin(red, 0, by[red], forAnswer)
			begin(blue, 0, by[blue], forAnswer)
			during := b.traces(t)
			if during == clean {
				t.Fatal("the gateway leaves no trace: this test looks in the wrong place")
			}
			atRouter := captureOn(t, b.router(), "lan")

			need(t, b.gateway.Kill())
			failed := func(s sight) bool { return s.Error != "" }
			if got := b.traces(t); got != during {
				t.Errorf("with the daemon these went or came: were\n%s\nare\n%s", during, got)
			}
			goOn(blue, []int{0, 1, 2, 3}, failed, forNone) // connected ones cannot change sides
			if onFailure == "block" {
				goOn(blue, []int{loose, loose + 1}, failed, forNone)
				begin(blue, 10, failed, forNone)
				never(t, atRouter, "what is to be proxied left the box", func(p lab.Packet) bool { return p.Dst.Port() == 7 })
			} else {
				goOn(blue, []int{loose, loose + 1}, by[red], forAnswer)
				begin(blue, 10, by[red], forAnswer)
			}
			goOn(red, []int{0, 1, 2, 3, loose, loose + 1}, by[red], forAnswer)
			begin(red, 10, by[red], forAnswer)

			b.start(t, config)
			if got := b.traces(t); got != during {
				t.Errorf("after the restart they were\n%s\nare\n%s", during, got)
			}
			goOn(red, []int{0, 1, 2, 3, 10, 11, 12, 13, loose, loose + 1}, by[red], forAnswer)
			begin(red, 20, by[red], forAnswer)
			begin(blue, 20, by[blue], forAnswer)

			need(t, b.gateway.Signal(syscall.SIGTERM))
			need(t, b.gateway.Wait())
			if got := b.traces(t); got != clean {
				t.Errorf("after the stop there is\n%s\nand before there was\n%s", got, clean)
			}
			if _, err := os.Lstat(b.gateway.State); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left behind (%v)", b.gateway.State, err)
			}
			begin(red, 30, by[red], forAnswer)
			begin(blue, 30, by[red], forAnswer) // plainly
		})
	}
}

// traces are what the gateway has in the kernel for the box's own sockets: rules and routes, and the links on lo and the cgroup.
func (b *box) traces(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	for _, args := range []string{"rule", "-6 rule", "route show table all", "-6 route show table all"} {
		out, err := b.sidegate().Exec(t.Context(), "ip", strings.Fields(args)...)
		need(t, err)
		for line := range strings.Lines(out) {
			if strings.Contains(args, "rule") || strings.Contains(line, " table 21319 ") {
				fmt.Fprintln(&text, strings.TrimSpace(line))
			}
		}
	}
	note := func(where string, o link.QueryOptions) {
		result, err := link.QueryPrograms(o)
		need(t, err)
		for _, p := range result.Programs {
			id, _ := p.LinkID()
			fmt.Fprintf(&text, "%s %d: link %d\n", where, o.Attach, id)
		}
	}
	need(t, b.sidegate().Do(func() error {
		note("lo", link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
		return nil
	}))
	dir, err := os.Open(b.cgroup)
	need(t, err)
	defer dir.Close()
	for _, at := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
		ebpf.AttachCgroupInet4GetSockname, ebpf.AttachCgroupInet6GetSockname,
	} {
		note("cgroup", link.QueryOptions{Target: int(dir.Fd()), Attach: at})
	}
	if b.gateway != nil {
		pins, err := filepath.Glob(filepath.Join(b.gateway.State, "links", "own-*"))
		need(t, err)
		for _, p := range pins {
			fmt.Fprintln(&text, filepath.Base(p))
		}
	}
	return text.String()
}

// TestOwnSwitchedByReload: gateway.local comes and goes by a reload, with all that it has in the kernel; the programs need not start
// again.
func TestOwnSwitchedByReload(t *testing.T) {
	b := newBox(t)
	w := startWitness(t, b.server(), 7)
	on, off := b.configOf("local: true", unitRules, "default: block"), b.configOf("local: false", unitRules, "default: block")
	b.start(t, off)
	blue := b.agent(t, "/proc/self/exe", b.unit(t, "blue.service"))
	number := 0
	seenBy := func(h *lab.Host) {
		t.Helper()
		for _, to := range w.addrs() {
			for _, network := range []string{"tcp", "udp"} {
				number++
				if s := blue.visit(t, number, network, to); s.Error != "" || !is(h, s.Seen.Addr()) {
					t.Errorf("%s to %s: %+v, want %s to be seen", network, to, s, h.Name())
				}
			}
		}
	}
	without := b.traces(t)
	var with string
	for range 3 {
		seenBy(b.sidegate())
		b.reload(t, on)
		seenBy(b.upstream())
		with = b.traces(t)
		if strings.Count(with, "link") != strings.Count(without, "link")+7 {
			t.Fatalf("there are not seven links more:\n%s", with)
		}
		b.reload(t, off)
		if got := b.traces(t); got != without {
			t.Fatalf("it was\n%s\nand is\n%s", without, got)
		}
	}
	seenBy(b.sidegate())
}
