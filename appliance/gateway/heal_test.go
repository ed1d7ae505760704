package gateway_test

import (
	"context"
	"errors"
	"fmt"
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

// TestForeignEdits removes what the gateway owns, one after the other, as a firewall script or a network
// manager may: each is back within five seconds, and told.
func TestForeignEdits(t *testing.T) {
	w := newWorld(t)
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	hk := w.dante(t)
	w.start(t, hk+"interfaces: { lan: [eth0] }\ndefault: hk\n")
	upstream := w.Host("upstream").Addr4().String()
	proxied := func() error {
		who, err := w.ask(t.Context(), files)
		if err == nil && who != upstream {
			t.Errorf("the server saw %s: a flow went direct that is to be proxied", who)
		}
		return err
	}
	need(t, proxied())
	intact, links := network(t, w.box()), w.pinnedLinks(t)

	for name, edit := range map[string]struct {
		remove func(t *testing.T)
		told   string
	}{
		"rule":        {func(t *testing.T) { w.ip(t, w.box(), "rule delete priority 500") }, "IPv4 rule of mark"},
		"rule v6":     {func(t *testing.T) { w.ip(t, w.box(), "-6 rule delete priority 500") }, "IPv6 rule of mark"},
		"reject rule": {func(t *testing.T) { w.ip(t, w.box(), "rule delete priority 501") }, "IPv4 rule of mark 0x8000000"},
		"all rules": {func(t *testing.T) {
			w.ip(t, w.box(), "rule flush")
			w.ip(t, w.box(), "rule add priority 32766 table main")
			w.ip(t, w.box(), "rule add priority 32767 table default")
		}, "IPv4 rule of mark"},
		"route":    {func(t *testing.T) { w.ip(t, w.box(), "route flush table 21319") }, "IPv4 route"},
		"route v6": {func(t *testing.T) { w.ip(t, w.box(), "-6 route flush table 21319") }, "IPv6 route"},
		"route of another kind": {func(t *testing.T) {
			w.ip(t, w.box(), "route flush table 21319")
			w.ip(t, w.box(), "route add blackhole default table 21319")
		}, "IPv4 route"},
		"pin of the LAN link": {func(t *testing.T) {
			need(t, os.Remove(filepath.Join(w.State, "links", "lan-eth0")))
		}, "lan-eth0"},
		"pin of the look-up": {func(t *testing.T) {
			need(t, os.Remove(filepath.Join(w.State, "links", "proxy-lookup")))
		}, "proxy-lookup"},
		"pin of what keeps redirects in": {func(t *testing.T) {
			need(t, os.Remove(filepath.Join(w.State, "links", "no-redirects")))
		}, "no-redirects"},
	} {
		t.Run(name, func(t *testing.T) {
			edit.remove(t)
			if network(t, w.box()) == intact && w.pinnedLinks(t) == links {
				t.Fatal("nothing was removed: this test proves nothing")
			}
			awaitWithin(t, 5*time.Second, "everything to be back", func() error {
				if got := w.pinnedLinks(t); got != links {
					return different("links", links, got)
				}
				if got := network(t, w.box()); got != intact {
					return different("network", intact, got)
				}
				return nil
			})
			if log := w.Tail(20); !strings.Contains(log, edit.told) {
				t.Errorf("the log does not tell of %q:\n%s", edit.told, log)
			}
			if err := proxied(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDetachedPrograms: without the programs, as after `bpftool link detach`, the box forwards plainly, at once, what lives and what
// begins then, and the daemon is not needed for it; it has all of them back within five seconds.
func TestDetachedPrograms(t *testing.T) {
	w := newWorld(t)
	servers := map[string]*lab.FileServer{}
	for _, name := range []string{"plain", "abroad", "shut"} {
		h, err := w.AddServer(t.Context(), name)
		need(t, err)
		servers[name], err = h.StartFiles(t.Context(), 80)
		need(t, err)
	}
	echo, err := w.Host("plain").StartEcho(t.Context(), 7)
	need(t, err)
	w.start(t, w.dante(t)+fmt.Sprintf(`interfaces: { lan: [eth0] }
rules:
  - { name: plain, ip_cidr: %s, outbound: direct }
  - { name: shut, ip_cidr: %s, outbound: block, reject: true }
default: hk
`, w.Host("plain").Addr4(), w.Host("shut").Addr4()))
	laptop, upstream := w.laptop().Addr4().String(), w.Host(lab.Upstream).Addr4().String()
	decided := func() error {
		for name, want := range map[string]string{"plain": laptop, "abroad": upstream} {
			if who, err := w.ask(t.Context(), servers[name]); err != nil || who != want {
				return fmt.Errorf("%s sees %q, %v; want %s", name, who, err, want)
			}
		}
		return w.inForce(t.Context(), servers["shut"])
	}
	converse := func() (speak func()) {
		t.Helper()
		c, err := w.laptop().Dial(t.Context(), "tcp", echo.Addr4().String())
		need(t, err)
		t.Cleanup(func() { c.Close() })
		return func() {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if _, err := lab.PingPong(ctx, c, 100, 3); err != nil {
				t.Error(err)
			}
		}
	}
	links := strings.Fields(w.pinnedLinks(t))
	if len(links) != 3 {
		t.Fatalf("the links are %q", links)
	}
	need(t, decided())
	old := converse()
	old()

	w.signal(t, syscall.SIGSTOP) // so that it can put nothing back
	for _, name := range links {
		w.detach(t, name)
	}
	for name, s := range servers {
		if who, err := w.ask(t.Context(), s); err != nil || who != laptop {
			t.Errorf("without the programs, %s sees %q, %v; want %s", name, who, err, laptop)
		}
	}
	old()
	young := converse()
	young()
	w.signal(t, syscall.SIGCONT)
	awaitWithin(t, 5*time.Second, "the policy to be in force", decided)
	old()
	young()

	for _, name := range links {
		t.Run(name, func(t *testing.T) {
			detached := w.detach(t, name)
			if w.attached(t, name) {
				t.Fatal("it is not detached: this test proves nothing")
			}
			awaitWithin(t, 5*time.Second, "another link to be in its place", func() error {
				l, err := link.LoadPinnedLink(filepath.Join(w.State, "links", name), nil)
				if err != nil {
					return err
				}
				defer l.Close()
				if info, err := l.Info(); err != nil || info.ID == detached {
					return fmt.Errorf("it is still link %d, %v", detached, err)
				}
				return nil
			})
			if !w.attached(t, name) {
				t.Error("it is not attached")
			}
			if err := decided(); err != nil {
				t.Error(err)
			}
			old()
			young()
		})
	}
	for _, name := range links {
		if !strings.Contains(w.Tail(100), "the link "+name) {
			t.Errorf("the log does not tell of %s", name)
		}
	}
}

// pinned is the link of that name, for as long as the test runs.
func (w *world) pinned(t *testing.T, name string) (link.Link, *link.Info) {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(w.State, "links", name), nil)
	need(t, err)
	t.Cleanup(func() { l.Close() })
	info, err := l.Info()
	need(t, err)
	return l, info
}

// detach takes a program from where it is attached. The link stays, and so does its pin.
func (w *world) detach(t *testing.T, name string) link.ID {
	t.Helper()
	l, info := w.pinned(t, name)
	need(t, l.Detach())
	return info.ID
}

// attached reports whether the kernel runs the link's program. A link of netfilter does not say so; then no second one finds room.
func (w *world) attached(t *testing.T, name string) (yes bool) {
	t.Helper()
	_, info := w.pinned(t, name)
	switch {
	case info.TCX() != nil:
		return info.TCX().Ifindex != 0
	case info.NetNs() != nil:
		return info.NetNs().NetnsInode != 0
	}
	program, err := ebpf.NewProgramFromID(info.Program)
	need(t, err)
	defer program.Close()
	at := info.Netfilter()
	need(t, w.box().Do(func() error {
		l, err := link.AttachNetfilter(link.NetfilterOptions{
			Program: program, ProtocolFamily: at.ProtocolFamily, Hook: at.Hook, Priority: at.Priority,
		})
		if yes = errors.Is(err, syscall.EBUSY); yes {
			return nil
		}
		if err != nil {
			return err
		}
		return errors.Join(l.Detach(), l.Close())
	}))
	return yes
}

type differs struct{ what, want, got string }

func (d differs) Error() string { return d.what + " were\n" + d.want + "\nare\n" + d.got }

func different(what, want, got string) error { return differs{what, want, got} }
