package datapath

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

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
	want := Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}}
	apply(t, d, want)
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
		"link pin removed":      func() { os.Remove(filepath.Join(d.state.dir, "links", "lan-lan0")) },
		"interface recreated":   recreate,
		"all link pins removed": func() { os.RemoveAll(filepath.Join(d.state.dir, "links")) },
	} {
		edit()
		apply(t, d, want)
		if n := len(attached(t, want.Interfaces[0])); n != 1 {
			t.Errorf("%s: %d programs attached", name, n)
		}
		if n := ours(t); n != oursApplied {
			t.Errorf("%s: %d rules and routes", name, n)
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
