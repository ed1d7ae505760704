package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// attached are the programs on the interface's tcx ingress, by identity.
func attached(t *testing.T, i Interface) []ebpf.ProgramID {
	t.Helper()
	q, err := link.QueryPrograms(link.QueryOptions{Target: i.Index, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		t.Fatal(err)
	}
	var ids []ebpf.ProgramID
	for _, p := range q.Programs {
		ids = append(ids, p.ID)
	}
	return ids
}

// ours counts the rules and routes that Close must remove.
func ours(t *testing.T) (n int) {
	t.Helper()
	for _, f := range families() {
		rules, err := netlink.RuleList(f.number)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			if r.Mask != nil && *r.Mask == uint32(gatewayMarkMARK_MASK) {
				n++
			}
		}
		routes, err := netlink.RouteListFiltered(f.number, &netlink.Route{Table: routeTable}, netlink.RT_FILTER_TABLE)
		if err != nil {
			t.Fatal(err)
		}
		n += len(routes)
	}
	return n
}

const oursApplied = 2 * (2 + 1) // for each family two rules and a route

func TestStateCloseRemovesEverything(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/state"
	lan := veth(t, "lan0")
	for range 3 {
		d := open(t, dir)
		want := Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}}
		apply(t, d, want)
		apply(t, d, want) // twice is once
		if n := ours(t); n != oursApplied {
			t.Errorf("%d rules and routes, want %d", n, oursApplied)
		}
		if n := len(attached(t, lan)); n != 1 {
			t.Errorf("%d programs attached", n)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if n := ours(t); n != 0 {
			t.Errorf("%d rules and routes are left", n)
		}
		if n := len(attached(t, lan)); n != 0 {
			t.Errorf("%d programs are left attached", n)
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the state directory is left: %v", err)
		}
	}
}

// TestStateOutlivesTheDaemon: after Detach (as after a crash) the program goes on with its flows; the
// successor replaces it in place and counts generations on.
func TestStateOutlivesTheDaemon(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/state"
	lan := veth(t, "lan0")
	want := Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}}
	d := open(t, dir)
	apply(t, d, want)
	d.run(t, udpPacket("192.168.0.3:5000", "203.0.113.10:443").bytes())
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	before := attached(t, lan)
	if len(before) != 1 || ours(t) != oursApplied {
		t.Fatalf("detaching took something away: %v, %d", before, ours(t))
	}
	d = open(t, dir)
	defer d.Close()
	if now := attached(t, lan); len(now) != 1 || now[0] != before[0] {
		t.Errorf("opening replaced the program before a policy was applied")
	}
	apply(t, d, want)
	if now := attached(t, lan); len(now) != 1 || now[0] == before[0] {
		t.Errorf("programs %v, before %v: want one, another", now, before)
	}
	if d.Generation() != 2 {
		t.Errorf("generation %d, want 2", d.Generation())
	}
	if flows, err := d.Flows(); err != nil || len(flows) != 1 {
		t.Errorf("%d flows survived, %v", len(flows), err)
	}
}

func TestStateOneDaemonPerNamespace(t *testing.T) {
	d := opened(t)
	_, err := Open(context.Background(), Options{StateDir: d.state.dir, Log: discard()})
	if err == nil || !strings.Contains(err.Error(), "another sidegate runs") {
		t.Errorf("a second daemon: %v", err)
	}
}

// TestStateReloadsHoldNothing: a generation that was replaced is let go at once, not when the garbage collector
// finds its handles.
func TestStateReloadsHoldNothing(t *testing.T) {
	d := opened(t)
	lan := veth(t, "lan0")
	reload := func() {
		apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}})
	}
	reload()
	reload()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	before := descriptors(t)
	for range 5 {
		reload()
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors after five reloads, %d before", n, before)
	}
	if pins := pinnedPrograms(t, d); len(pins) != 2 { // that of the interface, and that of the sockets
		t.Errorf("programs %v are pinned", pins)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

// TestStateLocksOfTheDead: a daemon that was killed leaves its lock's file; the next one removes it, and not that
// of one that lives.
func TestStateLocksOfTheDead(t *testing.T) {
	inNamespace(t)
	if err := os.MkdirAll(lockDir, 0o755); err != nil {
		t.Fatal(err)
	}
	dead, alive := filepath.Join(lockDir, "netns-1.lock"), filepath.Join(lockDir, "netns-2.lock")
	for _, path := range []string{dead, alive} {
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
		defer file.Close()
		if path == alive {
			if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := open(t, t.TempDir()+"/state").Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dead); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the dead one's lock is left: %v", err)
	}
	if _, err := os.Stat(alive); err != nil {
		t.Errorf("a living one's lock was removed: %v", err)
	}
}

// TestStateOfAnotherVersion: pins of another layout are not read, and are removed once the new ones serve.
func TestStateOfAnotherVersion(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/state"
	lan := veth(t, "lan0")
	want := Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}}
	d := open(t, dir)
	apply(t, d, want)
	d.run(t, udpPacket("192.168.0.3:5000", "203.0.113.10:443").bytes())
	old := filepath.Join(dir, "maps-v0")
	if err := os.Mkdir(old, 0o700); err != nil {
		t.Fatal(err)
	}
	// the same pin in the current version's place, but of another shape
	if err := d.state.maps.Flows.Unpin(); err != nil {
		t.Fatal(err)
	}
	odd, err := ebpf.NewMap(&ebpf.MapSpec{Name: "flows", Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := odd.Pin(filepath.Join(d.state.mapDir(), "flows")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(odd.Close(), d.Detach()); err != nil {
		t.Fatal(err)
	}
	before := attached(t, lan)

	d = open(t, dir)
	defer d.Close()
	if !d.state.rebuilt {
		t.Errorf("the other layout was not noticed")
	}
	if now := attached(t, lan); len(now) != 1 || now[0] != before[0] {
		t.Errorf("the old program was taken away before the new one serves")
	}
	apply(t, d, want)
	if flows, err := d.Flows(); err != nil || len(flows) != 0 {
		t.Errorf("flows of another layout were read: %v, %v", flows, err)
	}
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the other version's pins are left: %v", err)
	}
}

// TestStateHealsForeignEdits: Apply restores each thing that somebody took away.
func TestStateHealsForeignEdits(t *testing.T) {
	d := opened(t)
	lan := veth(t, "lan0")
	want := Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}, Sockets: udpListener(t)}
	apply(t, d, want)
	program, err := d.generation.objects.LanEthernet.Info()
	if err != nil {
		t.Fatal(err)
	}
	ourProgram, _ := program.ID()
	recreate := func() {
		l, err := netlink.LinkByName("lan0")
		if err == nil {
			err = netlink.LinkDel(l)
		}
		if err != nil {
			t.Fatal(err)
		}
		want.Interfaces[0] = veth(t, "lan0")
	}
	for name, edit := range map[string]func(){
		"rules and routes removed": func() {
			if err := removeRouting(); err != nil {
				t.Fatal(err)
			}
		},
		"a route of somebody else's in our table": func() {
			_, dst, err := net.ParseCIDR("203.0.113.0/24")
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Table: routeTable, Type: unix.RTN_BLACKHOLE}); err != nil {
				t.Fatal(err)
			}
		},
		"a listener taken out": func() {
			if err := d.state.maps.Sockets.Delete(uint32(gatewaySocketSlotSOCKET_PROXY_UDP4)); err != nil {
				t.Fatal(err)
			}
		},
		"a map's pin removed": func() { os.Remove(filepath.Join(d.state.mapDir(), "flows")) },
		"another program put in place": func() {
			l, err := link.LoadPinnedLink(filepath.Join(d.state.dir, "links", "lan-lan0"), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if err := l.Update(d.generation.objects.LanIp); err != nil {
				t.Fatal(err)
			}
		},
		"program's pin removed": func() { os.Remove(filepath.Join(d.links.programs.dir(), fmt.Sprint(ourProgram))) },
		"link pin removed":      func() { os.Remove(filepath.Join(d.state.dir, "links", "lan-lan0")) },
		"interface recreated":   recreate,
		"all link pins removed": func() { os.RemoveAll(filepath.Join(d.state.dir, "links")) },
	} {
		edit()
		apply(t, d, want)
		if ids := attached(t, want.Interfaces[0]); len(ids) != 1 || ids[0] != ourProgram {
			t.Errorf("%s: programs %v attached, want %d", name, ids, ourProgram)
		}
		var cookie uint64
		if err := d.state.maps.Sockets.Lookup(uint32(gatewaySocketSlotSOCKET_PROXY_UDP4), &cookie); err != nil {
			t.Errorf("%s: the listener is missing: %v", name, err)
		}
		if _, err := os.Stat(filepath.Join(d.state.mapDir(), "flows")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := ours(t); n != oursApplied {
			t.Errorf("%s: %d rules and routes", name, n)
		}
		if pins := pinnedPrograms(t, d); len(pins) != 2 || !slices.Contains(pins, ourProgram) {
			t.Errorf("%s: programs %v are pinned, want %d and that of the sockets", name, pins, ourProgram)
		}
		if _, err := os.Stat(filepath.Join(d.state.dir, "links", "lan-lan0")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestStateFailureChangesNothing: a policy that cannot be put in place everywhere is in place nowhere.
func TestStateFailureChangesNothing(t *testing.T) {
	d := opened(t)
	lan := veth(t, "lan0")
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}})
	before := attached(t, lan)
	missing := Interface{Name: "gone0", Index: 4711, Ethernet: true}
	bad := &policy.Policy{Default: "block"}
	if err := d.Apply(context.Background(), Desired{Policy: bad, Interfaces: []Interface{lan, missing}}); err == nil {
		t.Fatal("attaching to an interface that does not exist succeeded")
	} else if !strings.Contains(err.Error(), "gone0") {
		t.Errorf("the error does not name the interface: %v", err)
	}
	if now := attached(t, lan); len(now) != 1 || now[0] != before[0] {
		t.Errorf("programs %v, before %v", now, before)
	}
	if r := d.run(t, udpPacket("192.168.0.3:5000", "203.0.113.10:443").bytes()); r.code != tcxNext {
		t.Errorf("the failed policy decides: code %d", r.code)
	}
}

// TestStateFailedSuccessor: a successor whose first Apply fails leaves what its predecessor had in place, and needs no CAP_SYS_ADMIN for
// that. Where the predecessor pinned no programs, as older versions do not, it says what it could not take back; the next one that
// succeeds replaces that, too.
func TestStateFailedSuccessor(t *testing.T) {
	for name, older := range map[string]bool{"of this version": false, "of an older version": true} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t)
			dir := t.TempDir() + "/state"
			lan, other := veth(t, "lan0"), veth(t, "lan1")
			other.Ethernet = false // so that it has another program
			d := open(t, dir)
			apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}, Interfaces: []Interface{lan, other}})
			if older {
				if err := os.RemoveAll(d.links.programs.dir()); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.Detach(); err != nil {
				t.Fatal(err)
			}
			before := attached(t, lan)
			d = open(t, dir)
			defer func() { d.Close() }() // which unmounts
			defer withoutSysAdmin(t)()
			missing := Interface{Name: "gone0", Index: 4711, Ethernet: true}
			want := Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan, missing, other}}
			err := d.Apply(t.Context(), want)
			if err == nil {
				t.Fatal("attaching to an interface that does not exist succeeded")
			}
			now := attached(t, lan)
			if len(now) != 1 || older == (now[0] == before[0]) {
				t.Errorf("programs %v, before %v: %v", now, before, err)
			}
			if told := strings.Contains(err.Error(), "lan-lan0 keeps the new policy"); told != older {
				t.Errorf("the error is %v", err)
			}
			running := map[bool][]ebpf.ProgramID{true: now, false: slices.Concat(now, attached(t, other))}[older] // as far as they can be pinned
			if got := pinnedPrograms(t, d); len(got) != len(running)+1 || !slices.Contains(got, now[0]) || !slices.Contains(got, running[len(running)-1]) {
				t.Errorf("programs %v are pinned, want %v and that of the sockets", got, running)
			}
			if err := d.Detach(); err != nil {
				t.Fatal(err)
			}
			d = open(t, dir)
			want.Interfaces = []Interface{lan, other}
			apply(t, d, want)
			last := attached(t, lan)
			if len(last) != 1 || last[0] == now[0] || last[0] == before[0] {
				t.Errorf("programs %v, before %v", last, now)
			}
			if got := pinnedPrograms(t, d); len(got) != 3 || !slices.Contains(got, last[0]) {
				t.Errorf("programs %v are pinned, want %v, that of the other interface and that of the sockets", got, last)
			}
		})
	}
}

// pinnedPrograms are those of the pins beside the maps, by the numbers that they really have.
func pinnedPrograms(t *testing.T, d *Datapath) (ids []ebpf.ProgramID) {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(d.links.programs.dir(), "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		p, err := ebpf.LoadPinnedProgram(pin, nil)
		if err != nil {
			t.Fatal(err)
		}
		id, err := programID(p)
		if err := errors.Join(err, p.Close()); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	return ids
}

// withoutSysAdmin takes CAP_SYS_ADMIN from the calling thread, which is the test's own, until back is called.
func withoutSysAdmin(t *testing.T) (back func()) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var had [2]unix.CapUserData
	if err := unix.Capget(&header, &had[0]); err != nil {
		t.Fatal(err)
	}
	less := had
	less[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
	if err := unix.Capset(&header, &less[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := ebpf.NewProgramFromID(1); !errors.Is(err, unix.EPERM) {
		t.Fatalf("asking for a program by its number: %v: this test proves nothing", err)
	}
	return func() {
		if err := unix.Capset(&header, &had[0]); err != nil {
			t.Error(err)
		}
	}
}

// TestStateOpenFailureKeepsTheMount: pins that cannot be read are an error, and no reason to take away what is
// attached through them.
func TestStateOpenFailureKeepsTheMount(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/state"
	lan := veth(t, "lan0")
	d := open(t, dir)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}, Interfaces: []Interface{lan}})
	if err := d.state.maps.Flows.Unpin(); err != nil {
		t.Fatal(err)
	}
	pin := filepath.Join(d.state.mapDir(), "flows")
	if err := d.generation.objects.PolicyQuery.Pin(pin); err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Options{StateDir: dir, Log: discard()}); err == nil {
		t.Fatal("a program where a map should be was opened")
	}
	if n := len(attached(t, lan)); n != 1 {
		t.Errorf("%d programs attached after the failure, want 1", n)
	}
	if err := os.Remove(pin); err != nil {
		t.Fatal(err)
	}
	if err := open(t, dir).Close(); err != nil {
		t.Error(err)
	}
}

// TestStateMountTakesRoot: who may do all but mount is told what to do.
func TestStateMountTakesRoot(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/state"
	defer withoutSysAdmin(t)()
	d, err := Open(t.Context(), Options{StateDir: dir, Log: discard()})
	if err == nil {
		d.Close()
	}
	if err == nil || !strings.Contains(err.Error(), dir+": it lies in no BPF file system, and mounting one takes root") {
		t.Errorf("the error is %v", err)
	}
}

// TestStateKeepsOthersMount: a BPF file system that somebody else mounted stays mounted.
func TestStateKeepsOthersMount(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/bpf"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	if err := os.Mkdir(dir+"/other", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := open(t, dir).Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir + "/other"); err != nil {
		t.Errorf("closing took somebody else's mount away: %v", err)
	}
}

// TestStateWithoutIPv6: a box whose IPv6 is disabled is served in IPv4, and what IPv6 packet comes for the proxy
// all the same is refused.
func TestStateWithoutIPv6(t *testing.T) {
	inNamespace(t)
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0); err != nil {
		t.Skipf("this kernel has no IPv6 to disable: %v", err)
	}
	d := open(t, t.TempDir()+"/state")
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	if n := ours(t); n != oursApplied-1 {
		t.Errorf("%d rules and routes, want %d: no IPv6 route", n, oursApplied-1)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if n := ours(t); n != 0 {
		t.Errorf("%d rules and routes are left", n)
	}
}

// TestStateReadersDoNotWait: while a large policy is built, the proxy's question is answered.
func TestStateReadersDoNotWait(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}})
	d.applying.Lock() // as an Apply holds it that builds
	defer d.applying.Unlock()
	answered := make(chan struct{})
	go func() {
		d.Assigned(policy.TCP, client4, server4)
		d.Status()
		close(answered)
	}()
	select {
	case <-answered:
	case <-time.After(10 * time.Second):
		t.Error("no answer while an Apply builds")
	}
}

func TestKernelFloor(t *testing.T) {
	for release, ok := range map[string]bool{
		"6.6.0": true, "6.12.3-amd64": true, "7.3.0-rc1": true, "6.18.44-fc": true,
		"6.5.13": false, "6.1.0-30-cloud-amd64": false, "5.15.1": false, "x": false,
	} {
		err := checkRelease(release)
		if (err == nil) != ok {
			t.Errorf("%s: %v", release, err)
		}
		if err != nil && !strings.Contains(err.Error(), "6.6 or newer") {
			t.Errorf("%s: the error does not say what is needed: %v", release, err)
		}
	}
}
