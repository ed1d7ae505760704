package datapath

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"sidegate/appliance/policy"
)

// TestDecideByEverything: the policy is asked again with all that the first packet told, and the name's aliases.
func TestDecideByEverything(t *testing.T) {
	d := opened(t)
	lan := veth(t, "lan0")
	p := &policy.Policy{Default: "block", Rules: []policy.Rule{
		rule(t, "unused", "block", "domain", "unused.test"), // so that each flow without a name is in doubt
		rule(t, "mac", "direct", "domain", "mac.test", "source_mac_address", laptop.String()),
		rule(t, "dscp", "direct", "domain", "dscp.test", "dscp", "46"),
		rule(t, "interface", "direct", "domain", "interface.test", "inbound_interface", "lan0"),
		rule(t, "alias", "direct", "domain", "edge.test", "port", "443"),
	}}
	apply(t, d, Desired{Policy: p, Interfaces: []Interface{lan}, Sniff: SniffUnknown})
	for _, name := range []string{"mac.test", "dscp.test", "interface.test", "www.alias.test"} {
		syn := from(laptop, synPacket("192.168.0.3:5000", "203.0.113.9:443"))
		syn.dscp = 46
		d.run(t, syn.bytes())
		a, ok := d.Assigned(policy.TCP, syn.src, syn.dst)
		if !ok || !a.Sniff {
			t.Fatalf("%s: %+v, %t", name, a, ok)
		}
		a.entry.Interface = uint32(lan.Index) // a test run arrives by lo
		if name == "www.alias.test" {
			l := lessonOf("192.168.0.3", name, "203.0.113.8")
			l.Names = append(l.Names, "edge.test")
			key := gatewayNameKey{Client: a.client, Address: a.key.Destination}
			d.learning.book.learn(key, lesson{names: l.Names, source: FromDNS, expires: time.Hour})
		}
		if outbound, _, err := d.Decide(a, name); err != nil || outbound != policy.OutboundDirect {
			t.Errorf("%s: %s, %v", name, outbound, err)
		}
	}
}

// TestAssigned: of direct flows only datagrams may still be under way.
func TestAssigned(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	for network, p := range map[policy.Network]packet{
		policy.TCP: synPacket("192.168.0.3:5000", "203.0.113.9:443"),
		policy.UDP: udpPacket("192.168.0.3:5000", "203.0.113.9:443"),
	} {
		d.run(t, p.bytes())
		if _, ok := d.Assigned(network, p.src, p.dst); ok != (network == policy.UDP) {
			t.Errorf("a direct flow of %s: %t", network, ok)
		}
	}
}

// TestAssignedOwn: what comes by the loopback device is the box's own, whatever its address; what comes by another is not.
func TestAssignedOwn(t *testing.T) {
	d := opened(t)
	lan := veth(t, "lan0")
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}})
	p := udpPacket("192.168.0.3:5000", "203.0.113.9:443")
	d.run(t, p.bytes()) // arrives by lo
	a, ok := d.Assigned(policy.UDP, p.src, p.dst)
	if !ok || !a.Own {
		t.Errorf("by lo: %+v, %t", a, ok)
	}
	a.entry.Interface = uint32(lan.Index)
	if err := d.state.maps.Flows.Put(a.key, a.entry); err != nil {
		t.Fatal(err)
	}
	if a, ok = d.Assigned(policy.UDP, p.src, p.dst); !ok || a.Own {
		t.Errorf("by the LAN's interface: %+v, %t", a, ok)
	}
}

// TestTrustIsInForceAtOnce: another trust is another generation, though the policy is the same.
func TestTrustIsInForceAtOnce(t *testing.T) {
	d := opened(t)
	p := namesPolicy(t)
	want := Desired{Policy: p, Sniff: SniffUnknown}
	apply(t, d, want)
	key := gatewayNameKey{
		Client:  clientOf(gatewayFlowKey{}, gatewayFlow{ClientMac: laptop}),
		Address: addressOf(addrPort("203.0.113.9:443").Addr()),
	}
	if err := d.learning.sniffed(key, "near.test", true); err != nil {
		t.Fatal(err)
	}
	syn := from(laptop, synPacket("192.168.0.3:5000", "203.0.113.9:443"))
	if got := verdictOf(t, d, syn); got != gatewayVerdictVERDICT_SNIFF {
		t.Errorf("not trusted: verdict %d", got)
	}
	want.TrustSniffed = true
	apply(t, d, want)
	if got := verdictOf(t, d, syn); got != gatewayVerdictVERDICT_DIRECT {
		t.Errorf("trusted: verdict %d", got)
	}
}

// quic is a datagram of n bytes that begins like one of QUIC.
func quic(first byte, version uint32, n int) []byte {
	b := make([]byte, n)
	b[0] = first
	binary.BigEndian.PutUint32(b[1:], version)
	return b
}

// TestOnlyInitialsAreSniffed: what is shorter than any QUIC client's beginning, or has another header, has no name to
// tell.
func TestOnlyInitialsAreSniffed(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t), Sniff: SniffUnknown})
	for name, c := range map[string]struct {
		payload []byte
		want    gatewayVerdict
	}{
		"an Initial":          {quic(0xc0, 1, 1200), gatewayVerdictVERDICT_SNIFF},
		"QUIC 2":              {quic(0xd0, 0x6b3343cf, 1200), gatewayVerdictVERDICT_SNIFF},
		"0-RTT that overtook": {quic(0xd0, 1, 1200), gatewayVerdictVERDICT_SNIFF},
		"one byte less":       {quic(0xc0, 1, 1199), gatewayVerdictVERDICT_DIRECT},
		"a short header":      {quic(0x40, 1, 1200), gatewayVerdictVERDICT_DIRECT},
		"no fixed bit":        {quic(0x80, 1, 1200), gatewayVerdictVERDICT_DIRECT},
		"a draft's version":   {quic(0xc0, 0xff00001d, 1200), gatewayVerdictVERDICT_DIRECT},
	} {
		p := udpPacket("192.168.0.3:5000", "203.0.113.9:443")
		p.payload = c.payload
		if got := verdictOf(t, d, p); got != c.want {
			t.Errorf("%s: verdict %d, want %d", name, got, c.want)
		}
	}
}

// TestNextConnectionIsDecided: an Initial that comes after the handshake is another connection's, and is to be sniffed again; one that comes
// in the handshake is the same connection's, and stays with its verdict.
func TestNextConnectionIsDecided(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t), Sniff: SniffUnknown})
	for version, initial := range map[uint32]byte{1: 0xc0, 0x6b3343cf: 0xd0} {
		p := udpPacket(fmt.Sprintf("192.168.0.3:%d", 5000+version%10), "203.0.113.9:443")
		for i, c := range []struct {
			what  string
			first byte
			want  gatewayVerdict
		}{
			{"the first", initial, gatewayVerdictVERDICT_SNIFF},
			{"another, to be acknowledged", initial, gatewayVerdictVERDICT_DIRECT},
			{"of the handshake", 0xe0, gatewayVerdictVERDICT_DIRECT},
			{"an Initial beside it", initial, gatewayVerdictVERDICT_DIRECT},
			{"past it", 0x40, gatewayVerdictVERDICT_DIRECT},
			{"of the handshake, late", 0xe0, gatewayVerdictVERDICT_DIRECT},
			{"the next connection's", initial, gatewayVerdictVERDICT_SNIFF},
			{"and its second", initial, gatewayVerdictVERDICT_DIRECT},
			{"past its handshake, without the fixed bit", 0x00, gatewayVerdictVERDICT_DIRECT},
		} {
			p.payload = quic(c.first, version, 1200)
			d.run(t, p.bytes())
			a, ok := d.Assigned(policy.UDP, p.src, p.dst)
			if !ok || a.verdict != c.want {
				t.Fatalf("version %#x, packet %d, %s: verdict %d (%v), want %d", version, i+1, c.what, a.verdict, ok, c.want)
			}
			if a.Sniff {
				if outbound, _, err := d.Decide(a, ""); err != nil || outbound != policy.OutboundDirect {
					t.Fatalf("decided %s, %v", outbound, err)
				}
			}
		}
	}
}

// TestDoubtWithoutDaemon: where nobody can look, and the owner prefers a network, the address decides from the start: a
// connection does not change sides when the daemon comes back.
func TestDoubtWithoutDaemon(t *testing.T) {
	d := opened(t)
	for onFailure, want := range map[policy.Verdict]gatewayVerdict{
		policy.Block: gatewayVerdictVERDICT_SNIFF, policy.Direct: gatewayVerdictVERDICT_DIRECT,
	} {
		apply(t, d, Desired{Policy: namesPolicy(t), Sniff: SniffUnknown, OnFailure: onFailure})
		if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.9:443")); got != want {
			t.Errorf("on failure %s: verdict %d, want %d", onFailure, got, want)
		}
	}
}

// TestFlowsKeepNames: the sweep prolongs what live flows use, in either table, and a restart what is known.
func TestFlowsKeepNames(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/state"
	d := open(t, dir)
	apply(t, d, Desired{Policy: namesPolicy(t), ClientFlows: 1})
	// TTL zero and an hour: the first two of a client with a share of one flow, which goes to the tables one each
	for i, address := range []string{"203.0.113.1", "203.0.113.2", "203.0.113.3"} {
		learn(t, d, "192.168.0.3", "near.test", address)
		if i < 2 {
			d.run(t, synPacket("192.168.0.3:5000", address+":443").bytes())
		}
	}
	d.learning.mu.Lock()
	for _, client := range d.learning.book.pupils {
		for _, p := range client.pages {
			p.lessons[0].expires = 1 // long ago
		}
	}
	d.learning.mu.Unlock()
	if err := d.sweep(); err != nil {
		t.Fatal(err)
	}
	if known := d.Names(); len(known) != 2 {
		t.Errorf("%d names are left, want those of the two live flows: %+v", len(known), known)
	}
	d.learning.mu.Lock()
	for _, client := range d.learning.book.pupils {
		for _, p := range client.pages {
			p.lessons[0].expires = time.Second
			if err := d.learning.publish(p.key); err != nil {
				t.Error(err)
			}
		}
	}
	d.learning.mu.Unlock()
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	defer d.Close()
	for _, known := range d.Names() {
		if known.Expires < nameLife-time.Minute {
			t.Errorf("after a restart %s is kept for %v", known.Names, known.Expires)
		}
	}
	if len(d.Names()) != 2 {
		t.Errorf("%d names after a restart", len(d.Names()))
	}
}

// TestLearnAfterFailedApply: a generation that came to nothing is not taught, and what went before it is undone.
func TestLearnAfterFailedApply(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t)})
	failing := Desired{
		Policy:       namesPolicy(t),
		Interfaces:   []Interface{{Name: "gone", Index: 12345, Ethernet: true}},
		OwnAddresses: []netip.Addr{addrPort("203.0.113.9:1").Addr()}, Resolvers: []netip.Addr{addrPort("192.168.0.3:1").Addr()},
	}
	if err := d.Apply(t.Context(), failing); err == nil {
		t.Fatal("attached to an interface that is not there")
	}
	var there uint8
	if d.state.maps.Resolvers.Lookup(addressOf(failing.Resolvers[0]), &there) == nil {
		t.Error("the resolvers of a state that came to nothing are in force")
	}
	learn(t, d, "192.168.0.3", "bad.test", "203.0.113.9")
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.9:443")); got != gatewayVerdictVERDICT_BLOCK {
		t.Errorf("verdict %d", got)
	}
}

// TestLookupLeavesOtherResolvers: a resolver on this box, asked by its own programs, is none of ours.
func TestLookupLeavesOtherResolvers(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}, DNS: udpListener(t), Interfaces: []Interface{veth(t, "lan0")}})
	resolver, err := net.ListenPacket("udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	defer resolver.Close()
	asker, err := net.Dial("udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	defer asker.Close()
	if _, err := asker.Write([]byte("who?")); err != nil {
		t.Fatal(err)
	}
	resolver.SetReadDeadline(time.Now().Add(5 * time.Second))
	var question [16]byte
	if n, _, err := resolver.ReadFrom(question[:]); err != nil || string(question[:n]) != "who?" {
		t.Errorf("%q, %v", question[:n], err)
	}
}
