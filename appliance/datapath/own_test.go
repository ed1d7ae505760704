package datapath

import (
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
