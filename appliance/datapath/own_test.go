package datapath

import (
	"net/netip"
	"testing"
	"time"

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

// TestOwnConnectedForgotten: a policy that leaves the box's own connections alone takes its programs away, and with them what they would have
// removed from the list of connections; one that does not keeps the list.
func TestOwnConnectedForgotten(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "direct"}
	want := Desired{Policy: p, Own: &Own{}}
	apply(t, d, want)
	if err := d.OwnProblem(); err != nil {
		t.Skip("the box's own connections cannot be decided here: ", err)
	}
	if err := d.state.maps.OwnConnected.Put(uint64(1), gatewayOwnSocket{}); err != nil {
		t.Fatal(err)
	}
	var entry gatewayOwnSocket
	apply(t, d, want)
	if err := d.state.maps.OwnConnected.Lookup(uint64(1), &entry); err != nil {
		t.Errorf("after a reload the connection is not in the list: %v", err)
	}
	apply(t, d, Desired{Policy: p})
	if d.state.maps.OwnConnected.Lookup(uint64(1), &entry) == nil {
		t.Error("nothing takes the connection from the list when it is closed, and it is there")
	}
}
