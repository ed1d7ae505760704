package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// TestOwnSweep: who opened a flow of the box is known as long as the flow is in a table, whichever: that of a closed TCP connection for
// four minutes, that of UDP for ten, in the crowd's until others want its place; and no longer.
func TestOwnSweep(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	now, err := d.generation.now()
	if err != nil {
		t.Fatal(err)
	}
	key := func(protocol uint8, source string) gatewayFlowKey {
		from, to := addrPort(source), addrPort("203.0.113.10:443")
		return gatewayFlowKey{
			Source: addressOf(from.Addr()), Destination: addressOf(to.Addr()), Protocol: protocol,
			SourcePort: bigEndian(from.Port()), DestinationPort: bigEndian(to.Port()),
		}
	}
	flow := func(state gatewayFlowState) gatewayFlow {
		return gatewayFlow{FirstSeen: now, LastSeen: now, Packets: 3, Verdict: uint8(gatewayVerdictVERDICT_PROXY), State: uint8(state)}
	}
	closed, udp := key(unix.IPPROTO_TCP, "127.83.0.1:5000"), key(unix.IPPROTO_UDP, "127.83.0.1:5001")
	crowd, lost := key(unix.IPPROTO_UDP, "127.83.0.1:5002"), key(unix.IPPROTO_UDP, "127.83.0.1:5003")
	maps := d.state.maps
	for _, k := range []gatewayFlowKey{closed, udp, crowd, lost} {
		if err := maps.Origins.Put(k, gatewayOrigin{Pid: 1}); err != nil {
			t.Fatal(err)
		}
	}
	for _, put := range []error{
		maps.Flows.Put(closed, flow(gatewayFlowStateFLOW_CLOSING)),
		maps.Flows.Put(udp, flow(gatewayFlowStateFLOW_ESTABLISHED)),
		maps.CrowdFlows.Put(crowd, flow(gatewayFlowStateFLOW_ESTABLISHED)),
	} {
		if put != nil {
			t.Fatal(put)
		}
	}
	known := func(after time.Duration, want ...gatewayFlowKey) {
		t.Helper()
		d.sweepAfter(t, after)
		left := map[gatewayFlowKey]bool{}
		var k gatewayFlowKey
		var o gatewayOrigin
		for all := maps.Origins.Iterate(); all.Next(&k, &o); {
			left[k] = true
		}
		for _, k := range want {
			if !left[k] {
				t.Errorf("after %v nobody knows who opened %v", after, k)
			}
			delete(left, k)
		}
		for k := range left {
			t.Errorf("after %v it is still known who opened %v", after, k)
		}
	}
	known(0, closed, udp, crowd)
	known(3*time.Minute, closed, udp, crowd)
	known(5*time.Minute, udp, crowd)
	known(11*time.Minute, crowd)
	if err := maps.CrowdFlows.Delete(crowd); err != nil {
		t.Fatal(err)
	}
	known(11 * time.Minute)
}

// TestOwnAddressGoes: what is sent to the address by which the box is known passes at a glance; what is sent to the same address when it is
// somebody else's is decided like all else, whether the box has another one by then or its own connections are left alone.
func TestOwnAddressGoes(t *testing.T) {
	const box4, box6 = "192.168.0.9", "fd00::9"
	a4, a6 := netip.MustParseAddr(box4), netip.MustParseAddr(box6)
	moved4, moved6 := netip.MustParseAddr("192.168.0.10"), netip.MustParseAddr("fd00::10")
	p := &policy.Policy{Default: "block"}
	known := Desired{Policy: p, OwnAddresses: []netip.Addr{a4, a6}, Own: &Own{Source4: a4, Source6: a6}}
	for name, later := range map[string]Desired{
		"another address":                 {Policy: p, OwnAddresses: []netip.Addr{moved4, moved6}, Own: &Own{Source4: moved4, Source6: moved6}},
		"no address":                      {Policy: p, Own: &Own{}},
		"its own connections left alone":  {Policy: p},
		"left alone with another address": {Policy: p, OwnAddresses: []netip.Addr{moved4, moved6}},
	} {
		t.Run(name, func(t *testing.T) {
			d := opened(t)
			for _, to := range []string{box4 + ":5000", "[" + box6 + "]:5000"} {
				syn := synPacket("192.168.0.3:443", to)
				if syn.dst.Addr().Is6() {
					syn = synPacket("[fd00::3]:443", to)
				}
				answer := syn
				answer.tcpFlags = flagACK
				apply(t, d, known)
				if r := d.run(t, answer.bytes()); r.code != tcxNext || r.mark != 0 {
					t.Errorf("to the box at %s: code %d, mark %#x", to, r.code, r.mark)
				}
				apply(t, d, later)
				for _, p := range []packet{syn, answer} {
					if r := d.run(t, p.bytes()); r.code != tcxDrop {
						t.Errorf("to %s, which is not the box any more: code %d, mark %#x, want what is blocked", to, r.code, r.mark)
					}
				}
			}
		})
	}
}

// TestOwnLastingIsListed: a connection of the box stays in the list, with who opened it and by which rule, however many others come and go
// after the sweep that has met it, and goes from the list when it is closed or leads elsewhere.
func TestOwnLastingIsListed(t *testing.T) {
	d := deciding(t, rule(t, "lasting", "direct", "port", "7"))
	rules := func() (listed []string) {
		flows, err := d.Flows()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Process == nil || f.Process.PID != uint32(os.Getpid()) {
				t.Errorf("%+v is of %+v", f, f.Process)
			}
			listed = append(listed, fmt.Sprintf("%s %s", f.Destination, f.Rule))
		}
		return listed
	}
	others := func() {
		for range d.state.maps.OwnRecent.MaxEntries() {
			unix.Close(connected(t, "203.0.113.9:9"))
		}
	}
	want := func(when string, want ...string) {
		t.Helper()
		if listed := rules(); !slices.Equal(listed, want) {
			t.Errorf("%s the list is %q, want %q", when, listed, want)
		}
	}

	unmet := connected(t, "203.0.113.8:7")
	defer unix.Close(unmet)
	others()
	want("of what no sweep has met, after many others,")
	lasting := connected(t, "203.0.113.7:7")
	if err := d.sweep(); err != nil {
		t.Fatal(err)
	}
	others()
	want("after a sweep and many others", "203.0.113.7:7 lasting")
	if d.rules[d.generation.number] == nil {
		t.Error("the names of the rules are forgotten that a live connection was decided by")
	}
	connect(t, lasting, "203.0.113.6:6")
	want("of a socket that has connected again", "203.0.113.6:6 default")
	connect(t, lasting, "127.0.0.1:6")
	want("of a socket that has connected to the box itself")
	connect(t, lasting, "203.0.113.7:7")
	want("of a socket that is back", "203.0.113.7:7 lasting")
	unix.Close(lasting)
	want("of a socket that is closed")
}

// TestOwnRenamed: whose a connection is goes by the name that the executable has when it connects, whatever it was called before.
func TestOwnRenamed(t *testing.T) {
	d := deciding(t, rule(t, "renamed", "direct", "process_name", "renamed.test"))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(filepath.Dir(exe), "renamed.test")
	defer os.Rename(other, exe)
	for _, c := range []struct{ from, to, rule string }{{exe, exe, "default"}, {exe, other, "renamed"}, {other, exe, "default"}, {exe, other, "renamed"}} {
		if err := os.Rename(c.from, c.to); err != nil {
			t.Fatal(err)
		}
		for range 2 { // what is known by then, too
			fd := connected(t, "203.0.113.7:7")
			flows, err := d.Flows()
			unix.Close(fd)
			if err != nil {
				t.Fatal(err)
			}
			if len(flows) != 1 || flows[0].Process == nil || flows[0].Process.Name != filepath.Base(c.to) || flows[0].Rule != c.rule {
				t.Errorf("as %s: %+v", c.to, flows)
			}
		}
	}
}

// connected is a socket of UDP, which sends nothing.
func connected(t *testing.T, to string) (fd int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	connect(t, fd, to)
	return fd
}

func connect(t *testing.T, fd int, to string) {
	t.Helper()
	a := addrPort(to)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}); err != nil {
		t.Fatal("connecting to ", to, ": ", err)
	}
}

// deciding is a datapath that decides for the box's own connections, by a rule or direct, on a box with a default route.
func deciding(t *testing.T, r policy.Rule) *Datapath {
	t.Helper()
	d := opened(t)
	wan, err := netlink.LinkByIndex(veth(t, "wan").Index)
	if err == nil {
		err = netlink.AddrAdd(wan, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 168, 0, 2), Mask: net.CIDRMask(24, 32)}})
	}
	if err == nil {
		err = netlink.LinkSetUp(wan)
	}
	if err == nil {
		everything := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		err = netlink.RouteAdd(&netlink.Route{Dst: everything, LinkIndex: wan.Attrs().Index})
	}
	if err != nil {
		t.Fatalf("making a default route: %v", err)
	}
	own := &Own{}
	if err := own.Try(); err != nil {
		t.Skip("nothing can be attached to cgroups here: ", err)
	}
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct", Rules: []policy.Rule{r}}, Own: own})
	if err := d.OwnProblem(); err != nil {
		t.Fatal(err)
	}
	return d
}
