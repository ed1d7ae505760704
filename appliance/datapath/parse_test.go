package datapath

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

const (
	tcxNext     = -1
	tcxDrop     = 2
	tcxRedirect = 7
)

var (
	client4, server4 = addrPort("192.168.0.3:40000"), addrPort("203.0.113.10:443")
	client6, server6 = addrPort("[fd00::3]:40000"), addrPort("[2001:db8::10]:443")
)

// shapes are all the ways in which a transport header can be reached.
func shapes() map[string]packet {
	hop := ext{unix.IPPROTO_HOPOPTS, []byte{5, 2, 0, 0, 0, 0}}
	dst := ext{unix.IPPROTO_DSTOPTS, make([]byte, 14)}
	routing := ext{unix.IPPROTO_ROUTING, make([]byte, 6)}
	ah := ext{unix.IPPROTO_AH, make([]byte, 22)}
	return map[string]packet{
		"v4 tcp":                   {src: client4, dst: server4, protocol: unix.IPPROTO_TCP, tcpFlags: flagSYN},
		"v4 udp":                   {src: client4, dst: server4, protocol: unix.IPPROTO_UDP, payload: []byte("x")},
		"v4 udp with options":      {src: client4, dst: server4, protocol: unix.IPPROTO_UDP, options: 40},
		"v4 tcp with options":      {src: client4, dst: server4, protocol: unix.IPPROTO_TCP, tcpFlags: flagSYN, options: 4},
		"v6 tcp":                   {src: client6, dst: server6, protocol: unix.IPPROTO_TCP, tcpFlags: flagSYN},
		"v6 udp":                   {src: client6, dst: server6, protocol: unix.IPPROTO_UDP, payload: []byte("x")},
		"v6 udp, one extension":    {src: client6, dst: server6, protocol: unix.IPPROTO_UDP, extensions: []ext{hop}},
		"v6 tcp, many extensions":  {src: client6, dst: server6, protocol: unix.IPPROTO_TCP, tcpFlags: flagSYN, extensions: []ext{hop, dst, routing, dst, ah}},
		"v6 udp, atomic fragment":  {src: client6, dst: server6, protocol: unix.IPPROTO_UDP, fragment: &fragmentV{id: 7}},
		"v4 udp, first fragment":   {src: client4, dst: server4, protocol: unix.IPPROTO_UDP, fragment: &fragmentV{id: 7, more: true}},
		"v6 udp, first fragment":   {src: client6, dst: server6, protocol: unix.IPPROTO_UDP, fragment: &fragmentV{id: 7, more: true}},
		"v4 udp, Ethernet padding": {src: client4, dst: server4, protocol: unix.IPPROTO_UDP},
	}
}

// TestParseEveryTruncation cuts every shape at every byte. Only the whole packet may become a flow; a cut
// one is dropped with a reason (or is no IP packet at all), and never read beyond its end.
func TestParseEveryTruncation(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	for name, p := range shapes() {
		whole := p.bytes()
		f := policy.Flow{Source: p.src, Destination: p.dst}
		for length := shortestTestRun(p); length < len(whole); length++ {
			r := d.run(t, whole[:length])
			if _, ok := d.flow(t, f, p.protocol); ok {
				t.Fatalf("%s cut to %d of %d bytes was taken as a flow", name, length, len(whole))
			}
			if r.code != tcxDrop {
				t.Fatalf("%s cut to %d of %d bytes: code %d, want a drop", name, length, len(whole), r.code)
			}
		}
		if name == "v4 udp, Ethernet padding" {
			whole = append(whole, make([]byte, 18)...)
		}
		if r := d.run(t, whole); r.code != tcxNext {
			t.Errorf("%s, whole: code %d", name, r.code)
		}
		if _, ok := d.flow(t, f, p.protocol); !ok {
			t.Errorf("%s, whole: no flow", name)
		}
		d.forget(t, f, p.protocol)
	}
}

// shortestTestRun: newer kernels refuse to test-run a frame without a whole IP header; those go over a veth.
func shortestTestRun(p packet) int {
	if p.dst.Addr().Is6() {
		return 14 + 40
	}
	return 14 + 20
}

// TestParseTruncatedIPHeader sends frames that end inside the IP header over a real interface.
func TestParseTruncatedIPHeader(t *testing.T) {
	d := opened(t)
	lan := veth(t, "lan0")
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}, Interfaces: []Interface{lan}})
	send := rawSender(t, "lan0")
	sent := uint64(0)
	for _, p := range shapes() {
		for length := 15; length < shortestTestRun(p); length++ {
			send(p.bytes()[:length])
			sent++
		}
	}
	d.awaitDrops(t, gatewayReasonREASON_TRUNCATED, sent)
	if flows, err := d.Flows(); err != nil || len(flows) > 0 {
		t.Errorf("some became flows: %v (%v)", flows, err)
	}
}

// awaitDrops waits until frames that were sent have been counted.
func (d *Datapath) awaitDrops(t *testing.T, reason gatewayReason, want uint64) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); d.drops(t, reason) < want; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d frames were dropped as %s", d.drops(t, reason), want, reasonText(uint32(reason)))
		}
	}
}

// TestParseTwoTags: behind a tag that is only a priority the kernel takes off a second one, and would forward what
// the program did not see.
func TestParseTwoTags(t *testing.T) {
	d := opened(t)
	lan := veth(t, "lan0")
	apply(t, d, Desired{Policy: &policy.Policy{Default: "block"}, Interfaces: []Interface{lan}})
	send := rawSender(t, "lan0")
	p := udpPacket("192.168.0.3:5000", "203.0.113.10:443")
	p.vlan = []byte{0x81, 0, 0, 0}
	send(p.bytes())
	d.awaitDrops(t, gatewayReasonREASON_RULE_BLOCK, 1)
	for _, tags := range [][]byte{{0x81, 0, 0, 0, 0x81, 0, 0, 0}, {0x88, 0xa8, 0, 0, 0x81, 0, 0, 0}} {
		p.vlan = tags
		send(p.bytes())
	}
	d.awaitDrops(t, gatewayReasonREASON_MALFORMED, 2)
}

// TestParseContradictions: headers that disagree with each other never become a flow of other ports.
func TestParseContradictions(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	udp4 := packet{src: client4, dst: server4, protocol: unix.IPPROTO_UDP, payload: make([]byte, 40)}.bytes()
	tcp4 := packet{src: client4, dst: server4, protocol: unix.IPPROTO_TCP, tcpFlags: flagSYN}.bytes()
	udp6 := packet{src: client6, dst: server6, protocol: unix.IPPROTO_UDP, payload: make([]byte, 40)}.bytes()
	nine := packet{src: client6, dst: server6, protocol: unix.IPPROTO_UDP}
	for range 9 {
		nine.extensions = append(nine.extensions, ext{unix.IPPROTO_DSTOPTS, make([]byte, 6)})
	}
	set := func(b []byte, at int, v byte) []byte {
		b = append([]byte(nil), b...)
		b[at] = v
		return b
	}
	for _, c := range []struct {
		name   string
		frame  []byte
		reason gatewayReason
	}{
		{"IPv4 header shorter than 20", set(udp4, 14, 4<<4|4), gatewayReasonREASON_MALFORMED},
		{"IP version 5", set(udp4, 14, 5<<4|5), gatewayReasonREASON_MALFORMED},
		{"total length within the header", set(set(udp4, 16, 0), 17, 19), gatewayReasonREASON_MALFORMED},
		{"total length beyond the frame", set(udp4, 16, 9), gatewayReasonREASON_TRUNCATED},
		{"total length hides the ports in the padding", set(set(udp4, 16, 0), 17, 22), gatewayReasonREASON_TRUNCATED},
		{"TCP header shorter than 20", set(tcp4, 14+20+12, 4<<4), gatewayReasonREASON_MALFORMED},
		{"TCP options beyond the packet", set(tcp4, 14+20+12, 15<<4), gatewayReasonREASON_TRUNCATED},
		{"IPv6 payload beyond the frame", set(udp6, 18, 9), gatewayReasonREASON_TRUNCATED},
		{"IPv6 says version 4", set(udp6, 14, 4<<4), gatewayReasonREASON_MALFORMED},
		{"IPv6 from a mapped address", packet{src: addrPort("[::ffff:192.168.0.3]:1"), dst: server6, protocol: unix.IPPROTO_UDP}.bytes(), gatewayReasonREASON_MALFORMED},
		{"nine extension headers", nine.bytes(), gatewayReasonREASON_EXTENSION_HEADERS},
	} {
		before := d.drops(t, c.reason)
		r := d.run(t, c.frame)
		if r.code != tcxDrop || d.drops(t, c.reason) != before+1 {
			t.Errorf("%s: code %d, %s counted %d times", c.name, r.code, reasonText(uint32(c.reason)), d.drops(t, c.reason)-before)
		}
	}
	if flows, err := d.Flows(); err != nil || len(flows) > 0 {
		t.Errorf("some became flows: %v (%v)", flows, err)
	}
}

// TestParseLeavesAlone: what is not the gateway's to decide passes, unmarked and unrecorded, even where the
// policy blocks everything.
func TestParseLeavesAlone(t *testing.T) {
	d := opened(t)
	own := addrPort("192.168.0.2:22")
	apply(t, d, Desired{
		Policy:       &policy.Policy{Default: "block"},
		OwnAddresses: []netip.Addr{own.Addr(), addrPort("[fd00::2]:22").Addr()},
		Published:    []Service{{addrPort("192.168.0.3:51820").Addr(), 51820, policy.UDP}},
	})
	syn := func(src, dst string) packet {
		return packet{src: addrPort(src), dst: addrPort(dst), protocol: unix.IPPROTO_TCP, tcpFlags: flagSYN}
	}
	udp := func(src, dst string) packet {
		return packet{src: addrPort(src), dst: addrPort(dst), protocol: unix.IPPROTO_UDP}
	}
	other := udp("192.168.0.3:5000", "203.0.113.10:443").bytes()
	other[0] = 2 // another host's MAC
	tagged := syn("192.168.0.3:5000", "203.0.113.10:443")
	tagged.vlan = []byte{0x81, 0, 0, 5}
	middle := syn("192.168.0.3:5000", "203.0.113.10:443")
	middle.tcpFlags = flagACK
	answer := syn("192.168.0.3:443", "203.0.113.10:6000")
	answer.tcpFlags = flagSYN | flagACK
	for name, frame := range map[string][]byte{
		"to the gateway itself":                   syn("192.168.0.3:5000", "192.168.0.2:22").bytes(),
		"to the gateway itself, IPv6":             syn("[fd00::3]:5000", "[fd00::2]:22").bytes(),
		"multicast":                               udp("192.168.0.3:5353", "224.0.0.251:5353").bytes(),
		"multicast, IPv6":                         udp("[fe80::3]:5353", "[ff02::fb]:5353").bytes(),
		"broadcast":                               udp("0.0.0.0:68", "255.255.255.255:67").bytes(),
		"link-local, IPv6":                        udp("[fe80::3]:1", "[fe80::2]:2").bytes(),
		"a frame for another host":                other,
		"a VLAN's frame":                          tagged.bytes(),
		"ARP":                                     packet{src: client4, dst: server4, protocol: unix.IPPROTO_UDP, etherType: unix.ETH_P_ARP}.bytes(),
		"TCP whose beginning was not seen":        middle.bytes(),
		"TCP answer to a connection from outside": answer.bytes(),
		"UDP of a published service, answering outside":   udp("192.168.0.3:51820", "198.51.100.9:40000").bytes(),
		"UDP of a published service, another peer's port": udp("192.168.0.3:51820", "198.51.100.9:53").bytes(),
	} {
		if r := d.run(t, frame); r.code != tcxNext || r.mark != 0 {
			t.Errorf("%s: code %d, mark %#x", name, r.code, r.mark)
		}
	}
	if flows, err := d.Flows(); err != nil || len(flows) > 0 {
		t.Errorf("some were recorded: %v (%v)", flows, err)
	}
	if r := d.run(t, udp("192.168.0.3:51821", "198.51.100.9:40000").bytes()); r.code != tcxDrop {
		t.Errorf("UDP that is not published: code %d, want a drop", r.code)
	}
}

func TestParseDSCP(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct", Rules: []policy.Rule{rule(t, "ef", "block", "dscp", "46")}}})
	for dscp := range uint8(64) {
		for _, p := range []packet{
			{src: client4, dst: server4, protocol: unix.IPPROTO_UDP, dscp: dscp},
			{src: client6, dst: server6, protocol: unix.IPPROTO_UDP, dscp: dscp},
		} {
			want := int32(tcxNext)
			if dscp == 46 {
				want = tcxDrop
			}
			if r := d.run(t, p.bytes()); r.code != want {
				t.Errorf("dscp %d to %s: code %d, want %d", dscp, p.dst, r.code, want)
			}
			d.forget(t, policy.Flow{Source: p.src, Destination: p.dst}, p.protocol)
		}
	}
}
