package gateway

import (
	"net/netip"
	"testing"

	"sidegate/appliance/netstate"
)

// TestNeighbours: who may ask, which addresses are the box's own, and that a configuration that was not taken leaves what
// was before. Whom a configuration allows besides may ask while it is in force.
func TestNeighbours(t *testing.T) {
	s := &netstate.Snapshot{
		Addresses: []netstate.Address{
			{Prefix: netip.MustParsePrefix("198.51.100.2/24"), LinkIndex: 2},
			{Prefix: netip.MustParsePrefix("2001:db8:1::2/64"), LinkIndex: 2},
			{Prefix: netip.MustParsePrefix("203.0.113.2/24"), LinkIndex: 3},
		},
	}
	lans := []lan{{name: "eth0", device: "eth0", index: 2}, {name: "eth7"}}
	var g gateway
	n := &g.neighbours
	check := func(when string, want map[string]bool) {
		t.Helper()
		for text, may := range want {
			if got := g.mayAsk(netip.MustParseAddr(text)); got != may {
				t.Errorf("%s: %s may ask: %v, want %v", when, text, got, may)
			}
		}
	}
	private := map[string]bool{"192.168.77.1": true, "10.1.2.3": true, "fd00::1": true, "fe80::1": true, "169.254.1.1": true}
	check("before anything is known", private)
	check("before anything is known", map[string]bool{"198.51.100.9": false, "192.0.2.1": false})

	n.update(lans, s)
	known := map[string]bool{
		"198.51.100.9": true, "2001:db8:1::9": true, // the LAN's own
		"203.0.113.9": false, // of an interface that is no LAN
		"192.0.2.1":   false, "2001:db8:2::9": false, "8.8.8.8": false,
	}
	check("plain", private)
	check("plain", known)

	undo := n.update(nil, s)
	g.force.plan = &Plan{resolution: &resolution{allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/25")}}}
	check("allowed", private)
	check("allowed", map[string]bool{"192.0.2.1": true, "192.0.2.127": true, "192.0.2.128": false, "198.51.100.9": false})
	if n.link(2) != "" {
		t.Errorf("an interface that is no LAN any more is %q", n.link(2))
	}
	undo()
	g.force.plan = &Plan{}
	check("undone", known)
	if n.link(2) != "eth0" || n.link(3) != "" {
		t.Errorf("the interfaces are %q and %q", n.link(2), n.link(3))
	}
	for text, own := range map[string]bool{"198.51.100.2": true, "203.0.113.2": true, "2001:db8:1::2": true, "198.51.100.9": false} {
		if n.isOwn(netip.MustParseAddr(text)) != own {
			t.Errorf("%s is the box's own: %v", text, !own)
		}
	}
}
