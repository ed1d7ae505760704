package netstate

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// freshNamespace moves the test's thread into a network of its own, for good: the thread ends with the test.
func freshNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it creates a network namespace")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("needs a kernel with network namespaces: ", err)
	}
}

// log keeps what a Watcher says.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *log) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// run runs a Watcher until the end of the test, and checks that it leaves no goroutine and no descriptor.
func run(t *testing.T, w *Watcher) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("Run does not return")
		}
		for range w.Changes() {
			t.Error("a change after the end")
		}
	})
}

func start(t *testing.T, o options) (*Watcher, *log) {
	t.Helper()
	l := new(log)
	w, err := watch(t.Context(), l.logger(), o)
	if err != nil {
		t.Fatal(err)
	}
	run(t, w)
	return w, l
}

// next returns the next change.
func next(t *testing.T, w *Watcher) Delta {
	t.Helper()
	select {
	case d, ok := <-w.Changes():
		if !ok {
			t.Fatal("the Watcher has ended")
		}
		return d
	case <-time.After(10 * time.Second):
		t.Fatal("no change was told")
		panic("unreachable")
	}
}

// until joins changes until the Snapshot is as wanted, and returns the texts of all reasons on the way.
func until(t *testing.T, w *Watcher, what string, want func(*Snapshot) bool) string {
	t.Helper()
	var reasons []string
	for {
		d := next(t, w)
		for _, r := range d.Reasons {
			reasons = append(reasons, r.String())
		}
		if want(d.Snapshot) {
			return strings.Join(reasons, "\n")
		}
		t.Logf("on the way to %s: %v", what, d.Reasons)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// addPair makes the veth pair name and name+"-peer"; a veth is up when both ends are.
func addPair(t *testing.T, name string) netlink.Link {
	t.Helper()
	a := netlink.NewLinkAttrs()
	a.Name = name
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: name + "-peer"}))
	peer, err := netlink.LinkByName(name + "-peer")
	must(t, err)
	must(t, netlink.LinkSetUp(peer))
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

func addAddress(t *testing.T, l netlink.Link, text string, flags int) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(text)
	must(t, err)
	a.Flags = flags
	must(t, netlink.AddrAdd(l, a))
	return a
}

func expect(t *testing.T, reasons string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(reasons, want) {
			t.Errorf("%q is missing among\n%s", want, reasons)
		}
	}
}

// TestWatch does to a real network what happens to a side router.
func TestWatch(t *testing.T) {
	freshNamespace(t)
	w, _ := start(t, defaults())
	if s := w.Snapshot(); len(s.Links) != 1 || s.Links[0].Name != "lo" || s.Links[0].Up || s.Links[0].Ethernet || len(s.Defaults) != 0 {
		t.Fatalf("a fresh namespace is %+v", s)
	}

	eth0 := addPair(t, "eth0")
	reasons := until(t, w, "eth0", func(s *Snapshot) bool { _, ok := s.LinkByName("eth0"); return ok })
	expect(t, reasons, "link added on eth0")
	index := eth0.Attrs().Index
	l, _ := w.Snapshot().LinkByName("eth0")
	if l.Index != index || l.MTU != 1500 || !l.Ethernet || l.Up || l.MAC.String() != eth0.Attrs().HardwareAddr.String() {
		t.Errorf("eth0 is %+v", l)
	}

	must(t, netlink.LinkSetUp(eth0))
	expect(t, until(t, w, "up", func(s *Snapshot) bool { l, _ := s.Link(index); return l.Up }), "link up on eth0")

	own := addAddress(t, eth0, "192.168.0.2/24", 0)
	addAddress(t, eth0, "fd00:c0a8::2/64", unix.IFA_F_NODAD)
	reasons = until(t, w, "addresses", func(s *Snapshot) bool { return len(s.AddressesOf(index)) == 3 }) // with fe80::
	expect(t, reasons, "address added on eth0: 192.168.0.2/24", "address added on eth0: fd00:c0a8::2/64")

	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: index, Gw: net.ParseIP("192.168.0.1"), Priority: 100}))
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: index, Gw: net.ParseIP("192.168.0.9"), Priority: 50}))
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: index, Gw: net.ParseIP("fd00:c0a8::1")}))
	// None of these is a default route.
	elsewhere, _ := netlink.ParseIPNet("10.0.0.0/8")
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: elsewhere, Gw: net.ParseIP("192.168.0.1")}))
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: index, Gw: net.ParseIP("192.168.0.3"), Table: 100}))
	all, _ := netlink.ParseIPNet("0.0.0.0/0")
	must(t, netlink.RouteAdd(&netlink.Route{Type: unix.RTN_UNREACHABLE, Dst: all, Priority: 5}))
	reasons = until(t, w, "routes", func(s *Snapshot) bool { return len(s.Defaults) == 3 })
	expect(t, reasons, "default route changed on eth0: no IPv6 default → via fd00:c0a8::1 dev eth0 metric 1024")
	want := []Route{
		{Gateway: addr("192.168.0.9"), LinkIndex: index, Metric: 50},
		{Gateway: addr("192.168.0.1"), LinkIndex: index, Metric: 100},
		{IPv6: true, Gateway: addr("fd00:c0a8::1"), LinkIndex: index, Metric: 1024},
	}
	if got := w.Snapshot().Defaults; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("default routes are %v, want %v", got, want)
	}

	// DHCP gives another address and gateway.
	addAddress(t, eth0, "10.1.0.2/24", 0)
	must(t, netlink.RouteReplace(&netlink.Route{LinkIndex: index, Gw: net.ParseIP("10.1.0.1"), Priority: 50}))
	must(t, netlink.AddrDel(eth0, own))
	reasons = until(t, w, "renumbering", func(s *Snapshot) bool {
		r, ok := s.Default(false)
		return ok && r.Gateway == addr("10.1.0.1") && len(s.AddressesOf(index)) == 3
	})
	expect(t, reasons, "address added on eth0: 10.1.0.2/24", "address removed on eth0: 192.168.0.2/24", "via 10.1.0.1 dev eth0 metric 50")
	must(t, netlink.RouteDel(&netlink.Route{LinkIndex: index, Gw: net.ParseIP("10.1.0.1"), Priority: 50}))
	must(t, netlink.RouteDel(&netlink.Route{LinkIndex: index, Gw: net.ParseIP("192.168.0.1"), Priority: 100}))
	expect(t, until(t, w, "no route", func(s *Snapshot) bool { _, ok := s.Default(false); return !ok }), "→ no IPv4 default")

	must(t, netlink.LinkSetMTU(eth0, 1400))
	must(t, netlink.LinkSetHardwareAddr(eth0, net.HardwareAddr{2, 0, 0, 0, 0, 7}))
	reasons = until(t, w, "MTU and MAC", func(s *Snapshot) bool {
		l, _ := s.Link(index)
		return l.MTU == 1400 && l.MAC == MAC{2, 0, 0, 0, 0, 7}
	})
	expect(t, reasons, "MTU changed on eth0: 1500 → 1400", "MAC address changed on eth0", "02:00:00:00:00:07")

	a := netlink.NewLinkAttrs()
	a.Name = "br0"
	bridge := &netlink.Bridge{LinkAttrs: a}
	must(t, netlink.LinkAdd(bridge))
	must(t, netlink.LinkSetMaster(eth0, bridge))
	reasons = until(t, w, "bridge", func(s *Snapshot) bool { l, _ := s.Link(index); return l.MasterIndex != 0 })
	expect(t, reasons, "link added on br0", "master changed on eth0")

	peer, err := netlink.LinkByName("eth0-peer")
	must(t, err)
	must(t, netlink.LinkSetDown(peer)) // the cable is pulled
	expect(t, until(t, w, "down", func(s *Snapshot) bool { l, _ := s.Link(index); return !l.Up }), "link down on eth0")

	must(t, netlink.LinkDel(eth0))
	addPair(t, "eth0") // at once, as a hypervisor does
	reasons = until(t, w, "a new eth0", func(s *Snapshot) bool {
		l, ok := s.LinkByName("eth0")
		return ok && l.Index != index
	})
	if !strings.Contains(reasons, "link recreated on eth0") && !strings.Contains(reasons, "link removed on eth0") {
		t.Errorf("a new eth0 is told as\n%s", reasons)
	}
	must(t, netlink.LinkDel(bridge))
	expect(t, until(t, w, "no bridge", func(s *Snapshot) bool { _, ok := s.LinkByName("br0"); return !ok }), "link removed on br0")
}

// TestTentative adds an address that is asked about first, one that somebody else has, and a deprecated one.
func TestTentative(t *testing.T) {
	freshNamespace(t)
	eth0 := addPair(t, "eth0")
	must(t, netlink.LinkSetUp(eth0))
	peer, err := netlink.LinkByName("eth0-peer")
	must(t, err)
	addAddress(t, peer, "fd00::9/64", unix.IFA_F_NODAD)
	w, _ := start(t, defaults())
	state := func(s *Snapshot, a string) (Address, bool) {
		return find(s.Addresses, func(x Address) bool { return x.Prefix.Addr() == addr(a) && x.LinkIndex == eth0.Attrs().Index })
	}

	addAddress(t, eth0, "fd00::2/64", 0)
	until(t, w, "the tentative address", func(s *Snapshot) bool { a, ok := state(s, "fd00::2"); return ok && a.Tentative })
	reasons := until(t, w, "the usable address", func(s *Snapshot) bool { a, _ := state(s, "fd00::2"); return !a.Tentative })
	expect(t, reasons, "address changed on eth0: fd00::2/64: tentative → usable")

	addAddress(t, eth0, "fd00::9/64", 0)
	until(t, w, "the duplicate", func(s *Snapshot) bool { a, _ := state(s, "fd00::9"); return a.DADFailed })

	old, err := netlink.ParseAddr("fd00::3/64")
	must(t, err)
	old.Flags, old.PreferedLft, old.ValidLft = unix.IFA_F_NODAD, 0, 1000
	must(t, netlink.AddrAdd(eth0, old))
	until(t, w, "the deprecated address", func(s *Snapshot) bool { a, _ := state(s, "fd00::3"); return a.Deprecated })
}

// TestOverrun lets more news come than the socket can hold, before anybody reads.
func TestOverrun(t *testing.T) {
	freshNamespace(t)
	o := defaults()
	o.receiveBuffer = 1 // the kernel takes its minimum, some 2 KB
	o.resync = time.Hour
	l := new(log)
	w, err := watch(t.Context(), l.logger(), o)
	must(t, err)
	for i := range 100 {
		addPair(t, fmt.Sprintf("v%d", i))
	}
	run(t, w)
	until(t, w, "all links", func(s *Snapshot) bool { return len(s.Links) == 201 })
	if !strings.Contains(l.String(), "more news than the socket could hold") {
		t.Error("nothing was lost: this test shows nothing")
	}
	// The socket still works.
	addPair(t, "last")
	until(t, w, "one more", func(s *Snapshot) bool { _, ok := s.LinkByName("last"); return ok })
}

// TestResync hears no news at all.
func TestResync(t *testing.T) {
	freshNamespace(t)
	o := defaults()
	o.groups = nil
	o.resync = 20 * time.Millisecond
	w, _ := start(t, o)
	addPair(t, "eth0")
	until(t, w, "eth0", func(s *Snapshot) bool { _, ok := s.LinkByName("eth0"); return ok })
}

// TestCoalesce makes a burst: it is told in one piece if it ends, and within the limit if it does not.
func TestCoalesce(t *testing.T) {
	freshNamespace(t)
	o := defaults()
	o.quiet, o.limit, o.resync = 2*time.Second, time.Hour, time.Hour
	w, _ := start(t, o)
	first := make(chan Delta, 1)
	go func() { first <- <-w.Changes() }()
	for i := range 20 {
		addPair(t, fmt.Sprintf("v%d", i))
	}
	if d := <-first; len(d.Snapshot.Links) != 41 || len(d.Reasons) < 40 {
		t.Errorf("a burst of 40 links was told in pieces: first %d links, %v", len(d.Snapshot.Links), d.Reasons)
	}

	o.quiet, o.limit = time.Hour, 100*time.Millisecond // as if the burst never ended
	endless, _ := start(t, o)
	addPair(t, "eth0")
	until(t, endless, "eth0", func(s *Snapshot) bool { _, ok := s.LinkByName("eth0"); return ok })
}

// TestJoin changes a link back and forth while nobody receives: what is over is not told, what remains is.
func TestJoin(t *testing.T) {
	freshNamespace(t)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	w, _ := start(t, defaults())
	set := func(mtu int) {
		t.Helper()
		must(t, netlink.LinkSetMTU(lo, mtu))
		deadline := time.Now().Add(10 * time.Second)
		for l, _ := w.Snapshot().LinkByName("lo"); l.MTU != mtu; l, _ = w.Snapshot().LinkByName("lo") {
			if time.Now().After(deadline) {
				t.Fatalf("the Snapshot still has MTU %d", l.MTU)
			}
			time.Sleep(time.Millisecond)
		}
	}
	set(2000)
	set(3000)
	set(65536)
	addPair(t, "eth0")
	reasons := until(t, w, "eth0", func(s *Snapshot) bool { _, ok := s.LinkByName("eth0"); return ok })
	if strings.Contains(reasons, "MTU") {
		t.Errorf("what was over has been told:\n%s", reasons)
	}
	set(4000)
	set(5000)
	expect(t, until(t, w, "MTU 5000", func(s *Snapshot) bool { l, _ := s.LinkByName("lo"); return l.MTU == 5000 }), "MTU changed on lo: 65536 → 5000")
}

// TestSilence makes noise that changes nothing of interest: nothing may be told.
func TestSilence(t *testing.T) {
	freshNamespace(t)
	o := defaults()
	o.quiet = time.Millisecond
	w, _ := start(t, o)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	until(t, w, "lo", func(s *Snapshot) bool { l, _ := s.LinkByName("lo"); return l.Up && len(s.Addresses) == 2 })
	for i := range 20 {
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: 1, Table: 1000 + i, Dst: &net.IPNet{IP: net.IP{10, 0, byte(i), 0}, Mask: net.CIDRMask(24, 32)}}))
	}
	must(t, netlink.LinkSetMTU(lo, 9000)) // the end of the noise
	if d := next(t, w); len(d.Reasons) != 1 || d.Reasons[0].Kind != MTUChanged {
		t.Errorf("noise was told: %v", d.Reasons)
	}
}

// TestLeak watches and ends often: goroutines and descriptors stay as many as they were.
func TestLeak(t *testing.T) {
	freshNamespace(t)
	count := func() (int, int) {
		fds, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return runtime.NumGoroutine(), len(fds)
	}
	once := func() {
		w, err := Watch(t.Context(), slog.New(slog.DiscardHandler))
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- w.Run(ctx) }()
		cancel()
		must(t, <-ended)
		never, err := Watch(t.Context(), slog.New(slog.DiscardHandler))
		must(t, err)
		never.Close()
		never.Close()
	}
	once()
	goroutines, fds := count()
	for range 20 {
		once()
	}
	if g, f := count(); g != goroutines || f != fds {
		t.Errorf("%d goroutines and %d descriptors became %d and %d", goroutines, fds, g, f)
	}
}

// TestDefaultForms reads the forms that a default route can have.
func TestDefaultForms(t *testing.T) {
	freshNamespace(t)
	one, two := addPair(t, "one"), addPair(t, "two")
	for i, l := range []netlink.Link{one, two} {
		must(t, netlink.LinkSetUp(l))
		addAddress(t, l, fmt.Sprintf("192.168.%d.2/24", i), 0)
	}
	addAddress(t, one, "192.168.0.3/24", 0) // a secondary address, whose flag means "temporary" for IPv6
	for _, route := range []string{
		"metric 3 nexthop via 192.168.0.1 dev one nexthop via 192.168.1.1 dev two",
		"metric 2 dev two",
		"metric 1 via inet6 fe80::1 dev one",
	} {
		// The thread's namespace is the child's; netlink's Go library cannot express them all.
		if out, err := exec.Command("ip", append([]string{"-4", "route", "add", "default"}, strings.Fields(route)...)...).CombinedOutput(); err != nil {
			t.Fatalf("adding a default route %s: %v: %s", route, err, out)
		}
	}
	w, err := Watch(t.Context(), slog.New(slog.DiscardHandler))
	must(t, err)
	defer w.Close()
	want := []Route{
		{Gateway: addr("fe80::1"), LinkIndex: one.Attrs().Index, Metric: 1},
		{LinkIndex: two.Attrs().Index, Metric: 2},
		{Gateway: addr("192.168.0.1"), LinkIndex: one.Attrs().Index, Metric: 3},
		{Gateway: addr("192.168.1.1"), LinkIndex: two.Attrs().Index, Metric: 3},
	}
	if got := w.Snapshot().Defaults; !slices.Equal(got, want) {
		t.Errorf("default routes are %v, want %v", got, want)
	}
	for _, a := range w.Snapshot().Addresses {
		if a.Temporary {
			t.Errorf("%v is not temporary", a)
		}
	}
}
