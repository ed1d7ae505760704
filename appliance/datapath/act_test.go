package datapath

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

func udpPacket(src, dst string) packet {
	return packet{src: addrPort(src), dst: addrPort(dst), protocol: unix.IPPROTO_UDP}
}

func synPacket(src, dst string) packet {
	return packet{src: addrPort(src), dst: addrPort(dst), protocol: unix.IPPROTO_TCP, tcpFlags: flagSYN, seq: 1000}
}

// TestActVerdicts: what each verdict does to a flow's first packet and to its next, without a listener.
func TestActVerdicts(t *testing.T) {
	d := opened(t)
	marked := rule(t, "marked", "direct", "port", "81")
	marked.Mark = 0x42
	p := &policy.Policy{Default: "direct", Rules: []policy.Rule{
		marked,
		rule(t, "proxied", "hk", "port", "82"),
		rule(t, "blocked", "block", "port", "83"),
		rule(t, "translated", "direct", "port", "84"),
		rule(t, "untranslated", "direct", "port", "85"),
	}}
	p.Rules[3].SNAT, p.Rules[4].SNAT = new(true), new(false)
	direct, translated := uint32(gatewayMarkMARK_DIRECT), uint32(gatewayMarkMARK_TRANSLATED)
	for _, c := range []struct {
		port      string
		onFailure policy.Verdict
		path      ReturnPath
		code      int32
		mark      uint32
		reason    gatewayReason
	}{
		{"80", policy.Block, Asymmetric, tcxNext, direct, 0},
		{"80", policy.Block, Symmetric, tcxNext, translated, 0},
		{"81", policy.Block, Asymmetric, tcxNext, direct | 0x42, 0},
		{"81", policy.Block, Symmetric, tcxNext, translated | 0x42, 0},
		{"82", policy.Block, Asymmetric, tcxDrop, 0, gatewayReasonREASON_NO_LISTENER},
		{"82", policy.Direct, Asymmetric, tcxNext, direct, 0},
		{"82", policy.Direct, Symmetric, tcxNext, translated, 0},
		{"83", policy.Direct, Symmetric, tcxDrop, 0, gatewayReasonREASON_RULE_BLOCK},
		{"84", policy.Block, Asymmetric, tcxNext, translated, 0},
		{"85", policy.Block, Symmetric, tcxNext, direct, 0},
	} {
		apply(t, d, Desired{Policy: p, OnFailure: c.onFailure, ReturnPath: c.path})
		for _, flow := range []packet{
			udpPacket("192.168.0.3:5000", "203.0.113.10:"+c.port),
			udpPacket("[fd00::3]:5000", "[2001:db8::10]:"+c.port),
			synPacket("192.168.0.3:5000", "203.0.113.10:"+c.port),
		} {
			d.forget(t, policy.Flow{Source: flow.src, Destination: flow.dst}, flow.protocol)
			for range 2 {
				before := d.drops(t, c.reason)
				r := d.run(t, flow.bytes())
				if r.code != c.code || r.mark != c.mark && r.code == tcxNext {
					t.Errorf("port %s, on failure %s, return path %d: code %d, mark %#x; want %d, %#x", c.port, c.onFailure, c.path, r.code, r.mark, c.code, c.mark)
				}
				if c.reason != 0 && d.drops(t, c.reason) != before+1 {
					t.Errorf("port %s: not counted as %s", c.port, reasonText(uint32(c.reason)))
				}
			}
		}
	}
}

// TestActLiveFlowsKeepTheirReturnPath: what switches the return path changes new flows only, and fragments and ICMP errors
// go as their flow does.
func TestActLiveFlowsKeepTheirReturnPath(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "direct"}
	marks := []uint32{Asymmetric: uint32(gatewayMarkMARK_DIRECT), Symmetric: uint32(gatewayMarkMARK_TRANSLATED)}
	for _, began := range []ReturnPath{Asymmetric, Symmetric} {
		for _, hosts := range [][2]string{{"192.168.0.3", "203.0.113.10"}, {"[fd00::3]", "[2001:db8::10]"}} {
			port := ":" + strconv.Itoa(6000+int(began))
			udp, tcp := udpPacket(hosts[0]+port, hosts[1]+":9"), synPacket(hosts[0]+port, hosts[1]+":80")
			apply(t, d, Desired{Policy: p, ReturnPath: began})
			d.run(t, udp.bytes())
			d.run(t, tcp.bytes())
			apply(t, d, Desired{Policy: p, ReturnPath: Symmetric - began})
			tcp.tcpFlags, tcp.seq = flagACK, 1001
			first, later := udp, udp
			first.payload, later.payload = make([]byte, 64), make([]byte, 64)
			first.fragment = &fragmentV{id: 7 + uint32(began), more: true}
			later.fragment = &fragmentV{id: 7 + uint32(began), offset: 1480}
			reply := packet{src: udp.dst, dst: udp.src, protocol: unix.IPPROTO_UDP, payload: make([]byte, 8)}
			for what, frame := range map[string][]byte{"UDP": udp.bytes(), "TCP": tcp.bytes(), "an ICMP error": icmpErrorAbout(udp, reply)} {
				if r := d.run(t, frame); r.code != tcxNext || r.mark != marks[began] {
					t.Errorf("%s of %s that began as %d: code %d, mark %#x", what, hosts[0], began, r.code, r.mark)
				}
			}
			for i, part := range []packet{first, later} {
				if r := d.run(t, part.bytes()); r.code != tcxNext || r.mark != marks[began] {
					t.Errorf("fragment %d of %s that began as %d: code %d, mark %#x", i, hosts[0], began, r.code, r.mark)
				}
			}
			udp.dst = addrPort(hosts[1] + ":" + strconv.Itoa(10+int(began)))
			if r := d.run(t, udp.bytes()); r.mark != marks[Symmetric-began] {
				t.Errorf("a new flow of %s: mark %#x", hosts[0], r.mark)
			}
		}
	}
}

// TestActProxiedMidConnection: a proxied connection whose daemon is gone is reset, and never sent direct.
func TestActProxiedMidConnection(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}, OnFailure: policy.Block})
	for _, syn := range []packet{
		synPacket("192.168.0.3:5000", "203.0.113.10:443"),
		synPacket("[fd00::3]:5000", "[2001:db8::10]:443"),
	} {
		d.run(t, syn.bytes())
		data := syn
		data.tcpFlags, data.ack = flagACK, 77
		r := d.run(t, data.bytes())
		if r.code != tcxRedirect {
			t.Fatalf("code %d, want a reset", r.code)
		}
		tcp := r.data[len(r.data)-20:]
		if tcp[13] != flagRST || binary.BigEndian.Uint32(tcp[4:]) != 77 {
			t.Errorf("flags %#x, sequence %d; want RST at 77", tcp[13], binary.BigEndian.Uint32(tcp[4:]))
		}
		data.tcpFlags = flagRST
		if r := d.run(t, data.bytes()); r.code != tcxDrop {
			t.Errorf("a reset: code %d, want a drop", r.code)
		}
	}
}

// TestActOnFailureDirect: what begins without a daemon goes direct to its end, and UDP that was proxied
// goes on direct.
func TestActOnFailureDirect(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "hk"}
	apply(t, d, Desired{Policy: p, OnFailure: policy.Block})
	udp := udpPacket("192.168.0.3:6000", "203.0.113.10:443")
	d.run(t, udp.bytes()) // recorded as proxied
	apply(t, d, Desired{Policy: p, OnFailure: policy.Direct})
	syn := synPacket("192.168.0.3:5000", "203.0.113.10:443")
	data := syn
	data.tcpFlags = flagACK
	fresh := udpPacket("192.168.0.3:6001", "203.0.113.10:443")
	for name, frame := range map[string][]byte{
		"SYN": syn.bytes(), "live UDP": udp.bytes(), "new UDP": fresh.bytes(),
	} {
		if r := d.run(t, frame); r.code != tcxNext || r.mark != uint32(gatewayMarkMARK_DIRECT) {
			t.Errorf("%s: code %d, mark %#x", name, r.code, r.mark)
		}
	}
	apply(t, d, Desired{Policy: p, OnFailure: policy.Direct, Sockets: udpListener(t)}) // the daemon is back
	for name, frame := range map[string][]byte{"TCP": data.bytes(), "UDP": fresh.bytes()} {
		if r := d.run(t, frame); r.code != tcxNext || r.mark != uint32(gatewayMarkMARK_DIRECT) {
			t.Errorf("%s in mid-flow: code %d, mark %#x", name, r.code, r.mark)
		}
	}
}

// udpListener is a listener of each family, for flows to be given to.
func udpListener(t *testing.T) Sockets {
	t.Helper()
	var s Sockets
	for network, conn := range map[string]*syscall.Conn{"127.0.0.1:0": &s.UDP4, "[::1]:0": &s.UDP6} {
		c, err := net.ListenPacket("udp", network)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		*conn = c.(*net.UDPConn)
	}
	return s
}

// TestActClientRate: what one client gives to the listeners is limited, whole or in fragments.
func TestActClientRate(t *testing.T) {
	d := opened(t)
	const limit = 10
	apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}, Sockets: udpListener(t), ClientFresh: limit})
	for i := range 100 {
		p := udpPacket("192.168.0.3:6000", "203.0.113.10:443")
		p.payload = make([]byte, 64)
		p.fragment = &fragmentV{id: uint32(i), more: true}
		d.run(t, p.bytes())
	}
	// the clock's second may have turned once or twice on a slow machine
	if n := d.drops(t, gatewayReasonREASON_CLIENT_RATE); n < 100-3*limit {
		t.Errorf("%d of 100 first fragments were over the rate of %d a second", n, limit)
	}
}

// TestActMarkOfOthers: bits of the mark that are not ours stay, those that are do not.
func TestActMarkOfOthers(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	r := runMarked(t, d.generation.objects.LanEthernet, udpPacket("192.168.0.3:1", "203.0.113.10:2").bytes(), 0xff0000ff)
	if want := uint32(0xf00000ff) | uint32(gatewayMarkMARK_DIRECT); r.mark != want {
		t.Errorf("mark %#x, want %#x", r.mark, want)
	}
}

// TestActNewOwnAddress: flows towards an address that becomes the gateway's own are forgotten.
func TestActNewOwnAddress(t *testing.T) {
	d := opened(t)
	want := Desired{Policy: &policy.Policy{Default: "block"}}
	apply(t, d, want)
	p := udpPacket("192.168.0.3:5000", "192.168.0.9:53")
	if r := d.run(t, p.bytes()); r.code != tcxDrop {
		t.Fatalf("code %d", r.code)
	}
	want.OwnAddresses = []netip.Addr{addrPort("192.168.0.9:0").Addr()}
	apply(t, d, want)
	if r := d.run(t, p.bytes()); r.code != tcxNext {
		t.Errorf("to the gateway's new address: code %d", r.code)
	}
}

func TestActNotProxyable(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}})
	ping := packet{src: addrPort("192.168.0.3:0"), dst: addrPort("203.0.113.10:0"), protocol: unix.IPPROTO_ICMP}
	if r := d.run(t, ping.bytes()); r.code != tcxDrop || d.drops(t, gatewayReasonREASON_NOT_PROXYABLE) != 1 {
		t.Errorf("code %d: a ping that cannot be proxied must not go direct", r.code)
	}
}

// TestActReject checks the reset byte by byte, and that UDP is left to the kernel's ICMP error.
func TestActReject(t *testing.T) {
	d := opened(t)
	reject := rule(t, "refused", "block", "port", "443")
	reject.Reject = true
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct", Rules: []policy.Rule{reject}}})
	for _, p := range []packet{
		synPacket("192.168.0.3:5000", "203.0.113.10:443"),
		synPacket("[fd00::3]:5000", "[2001:db8::10]:443"),
	} {
		p.mac = policy.MAC{2, 0, 0, 0, 0, 9}
		p.payload = make([]byte, 100) // as a SYN of Fast Open has
		r := d.run(t, p.bytes())
		if r.code != tcxRedirect {
			t.Fatalf("code %d, want a redirect", r.code)
		}
		checkReset(t, p, r.data)
	}
	if r := d.run(t, udpPacket("192.168.0.3:5000", "203.0.113.10:443").bytes()); r.code != tcxNext || r.mark != uint32(gatewayMarkMARK_REJECT) {
		t.Errorf("UDP: code %d, mark %#x", r.code, r.mark)
	}
	if n := d.drops(t, gatewayReasonREASON_RULE_REJECT); n != 3 {
		t.Errorf("%d refusals counted, want 3", n)
	}
}

func checkReset(t *testing.T, p packet, frame []byte) {
	t.Helper()
	header, protocolAt, src, dst := 20, 9, 12, 16
	if p.dst.Addr().Is6() {
		header, protocolAt, src, dst = 40, 6, 8, 24
	}
	if len(frame) != 14+header+20 {
		t.Fatalf("the reset is %d bytes long, want %d", len(frame), 14+header+20)
	}
	if string(frame[:6]) != string(p.mac[:]) {
		t.Errorf("sent to %x, want the client's %x", frame[:6], p.mac)
	}
	ip, tcp := frame[14:14+header], frame[14+header:]
	size := dst - src
	from, _ := netip.AddrFromSlice(ip[src : src+size])
	to, _ := netip.AddrFromSlice(ip[dst : dst+size])
	if from != p.dst.Addr() || to != p.src.Addr() || ip[protocolAt] != unix.IPPROTO_TCP {
		t.Errorf("from %s to %s, protocol %d", from, to, ip[protocolAt])
	}
	if header == 20 && onesSum(0, ip) != 0xffff {
		t.Errorf("the IPv4 checksum is wrong")
	}
	pseudo := append(append([]byte(nil), ip[src:src+2*size]...), 0, unix.IPPROTO_TCP, 0, 20)
	if onesSum(uint32(onesSum(0, pseudo)), tcp) != 0xffff {
		t.Errorf("the TCP checksum is wrong")
	}
	if sport, dport := binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:]); sport != p.dst.Port() || dport != p.src.Port() {
		t.Errorf("ports %d → %d", sport, dport)
	}
	if tcp[13] != flagRST|flagACK || binary.BigEndian.Uint32(tcp[8:]) != p.seq+1 {
		t.Errorf("flags %#x, acknowledges %d; want RST+ACK of %d", tcp[13], binary.BigEndian.Uint32(tcp[8:]), p.seq+1)
	}
}

// TestActLiveFlowsKeepTheirVerdict: a new generation decides new flows only; a new connection of the same
// ports is a new flow.
func TestActLiveFlowsKeepTheirVerdict(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	syn := synPacket("192.168.0.3:5000", "203.0.113.10:443")
	udp := udpPacket("192.168.0.3:5000", "203.0.113.10:443")
	data := syn
	data.tcpFlags = flagACK
	d.run(t, syn.bytes())
	d.run(t, udp.bytes())
	apply(t, d, Desired{Policy: &policy.Policy{Default: "block"}})
	for name, c := range map[string]struct {
		frame []byte
		code  int32
	}{
		"live TCP":     {data.bytes(), tcxNext},
		"live UDP":     {udp.bytes(), tcxNext},
		"new UDP flow": {udpPacket("192.168.0.3:5001", "203.0.113.10:443").bytes(), tcxDrop},
	} {
		if r := d.run(t, c.frame); r.code != c.code {
			t.Errorf("%s: code %d, want %d", name, r.code, c.code)
		}
	}
	if r := d.run(t, syn.bytes()); r.code != tcxDrop {
		t.Errorf("a new connection of the same ports: code %d, want a drop", r.code)
	}
	flows, err := d.Flows()
	if err != nil || len(flows) != 3 {
		t.Fatalf("%d flows, %v", len(flows), err)
	}
}

// TestActFragments: later fragments do what their first one did, or are dropped where it was not seen.
func TestActFragments(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Sockets: udpListener(t), Policy: &policy.Policy{Default: "direct", Rules: []policy.Rule{
		rule(t, "proxied", "hk", "port", "82"), rule(t, "blocked", "block", "port", "83"),
	}}})
	part := func(dst string, id uint32, offset int) []byte {
		p := udpPacket("192.168.0.3:5000", dst)
		if p.dst.Addr().Is6() {
			p.src = addrPort("[fd00::3]:5000")
		}
		p.payload = make([]byte, 64)
		p.fragment = &fragmentV{id: id, offset: offset, more: true}
		return p.bytes()
	}
	for i, c := range []struct {
		dst  string
		code int32
		mark uint32
	}{
		{"203.0.113.10:80", tcxNext, uint32(gatewayMarkMARK_DIRECT)},
		{"203.0.113.10:82", tcxNext, uint32(gatewayMarkMARK_PROXY)},
		{"203.0.113.10:83", tcxDrop, 0},
		{"[2001:db8::10]:80", tcxNext, uint32(gatewayMarkMARK_DIRECT)},
		{"[2001:db8::10]:82", tcxNext, uint32(gatewayMarkMARK_PROXY)},
		{"[2001:db8::10]:83", tcxDrop, 0},
	} {
		id := uint32(100 + i)
		if r := d.run(t, part(c.dst, id, 1480)); r.code != tcxDrop {
			t.Errorf("%s: a later fragment before its first: code %d", c.dst, r.code)
		}
		for _, offset := range []int{0, 1480, 2960} {
			if r := d.run(t, part(c.dst, id, offset)); r.code != c.code || r.code == tcxNext && r.mark != c.mark {
				t.Errorf("%s at %d: code %d, mark %#x", c.dst, offset, r.code, r.mark)
			}
		}
	}
	if n := d.drops(t, gatewayReasonREASON_FRAGMENT_UNKNOWN); n != 6 {
		t.Errorf("%d unknown fragments counted, want 6", n)
	}
}

// TestActICMPErrors: an error about a proxied flow goes to the proxy's socket, about a blocked one nowhere,
// and all others pass: path MTU discovery depends on them.
func TestActICMPErrors(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "block", Rules: []policy.Rule{
		rule(t, "direct", "direct", "port", "80"), rule(t, "proxied", "hk", "port", "82"),
	}}})
	for _, c := range []struct {
		port string
		seen bool
		code int32
		mark uint32
	}{
		{"80", true, tcxNext, uint32(gatewayMarkMARK_DIRECT)},
		{"82", true, tcxNext, uint32(gatewayMarkMARK_PROXY)},
		{"83", true, tcxDrop, 0},
		{"84", false, tcxNext, 0},
	} {
		for _, hosts := range [][2]string{{"192.168.0.3", "203.0.113.10"}, {"[fd00::3]", "[2001:db8::10]"}} {
			flow := udpPacket(hosts[0]+":5000", hosts[1]+":"+c.port)
			if c.seen {
				d.run(t, flow.bytes())
			}
			reply := packet{src: flow.dst, dst: flow.src, protocol: unix.IPPROTO_UDP, payload: make([]byte, 8)}
			frame := icmpErrorAbout(flow, reply)
			if r := d.run(t, frame); r.code != c.code || r.mark != c.mark {
				t.Errorf("port %s of %s: code %d, mark %#x; want %d, %#x", c.port, hosts[1], r.code, r.mark, c.code, c.mark)
			}
		}
	}
}

// icmpErrorAbout is the client's "port unreachable" about a reply that it got.
func icmpErrorAbout(flow, reply packet) []byte {
	quoted := reply.bytes()[14:]
	p := packet{src: flow.src, dst: flow.dst, protocol: unix.IPPROTO_ICMP, payload: quoted}
	kind, header := byte(3), 20
	if flow.dst.Addr().Is6() {
		p.protocol, kind, header = unix.IPPROTO_ICMPV6, 1, 40
	}
	frame := p.bytes()
	frame[14+header] = kind
	return frame
}

// TestActClientShare: a client over its share of the table goes on in the crowd's table, and nobody else.
func TestActClientShare(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "direct"}
	const share = 100
	apply(t, d, Desired{Policy: p, ClientFlows: share})
	flood := udpPacket("192.168.0.66:1", "203.0.113.10:443")
	flood.mac = policy.MAC{2, 0, 0, 0, 0, 66}
	for i := range 3 * share {
		// inventing addresses does not help: the MAC is the client
		flood.src = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, byte(i), 66}), uint16(i+1))
		if r := d.run(t, flood.bytes()); r.code != tcxNext {
			t.Fatalf("flow %d: code %d", i, r.code)
		}
	}
	other := udpPacket("192.168.0.3:5000", "203.0.113.10:443")
	other.mac = policy.MAC{2, 0, 0, 0, 0, 3}
	d.run(t, other.bytes())
	s, err := d.Status()
	if err != nil {
		t.Fatal(err)
	}
	if s.Flows.Entries != share+1 || s.Crowd.Entries != 2*share || s.Clients.Entries != 2 {
		t.Errorf("%d flows in the table, %d in the crowd's, %d clients", s.Flows.Entries, s.Crowd.Entries, s.Clients.Entries)
	}
}

// TestActSweep: idle flows leave by their kind's limit, and the client's share is free again.
func TestActSweep(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}, ClientFlows: 4})
	syn := synPacket("192.168.0.3:5000", "203.0.113.10:443")
	data := syn
	data.tcpFlags = flagACK
	half, closing := synPacket("192.168.0.3:5001", "203.0.113.10:443"), synPacket("192.168.0.3:5002", "203.0.113.10:443")
	fin := closing
	fin.tcpFlags = flagACK | flagFIN
	udp := udpPacket("192.168.0.3:5003", "203.0.113.10:443")
	mac := policy.MAC{2, 0, 0, 0, 0, 3}
	for _, p := range []*packet{&syn, &data, &half, &closing, &fin, &udp} {
		p.mac = mac
	}
	for _, p := range []packet{syn, data, half, closing, fin, udp, udp} {
		d.run(t, p.bytes())
	}
	left := func() int {
		flows, err := d.Flows()
		if err != nil {
			t.Fatal(err)
		}
		return len(flows)
	}
	for _, c := range []struct {
		after int64 // seconds
		left  int
	}{{50, 4}, {70, 3}, {250, 2}, {9 * 60, 2}, {11 * 60, 1}, {23 * 3600, 1}, {25 * 3600, 0}} {
		d.sweepAfter(t, time.Duration(c.after)*time.Second)
		if left() != c.left {
			t.Errorf("after %d s idle %d flows are left, want %d", c.after, left(), c.left)
		}
	}
	for _, p := range []packet{syn, half, closing, udp} {
		d.run(t, p.bytes())
	}
	if s, err := d.Status(); err != nil || s.Flows.Entries != 4 || s.Crowd.Entries != 0 {
		t.Errorf("the share is not free again: %+v, %v", s, err)
	}
}

// sweepAfter sweeps as if a time had passed.
func (d *Datapath) sweepAfter(t *testing.T, passed time.Duration) {
	t.Helper()
	now, err := d.generation.now()
	if err == nil {
		_, _, err = d.state.sweep(now+uint64(passed.Seconds())*d.generation.clock.hertz, d.generation)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestActSweepForgetsGenerations: the rules' names of old generations go with their last flow.
func TestActSweepForgetsGenerations(t *testing.T) {
	d := opened(t)
	for range 5 {
		apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	}
	d.run(t, udpPacket("192.168.0.3:5000", "203.0.113.10:443").bytes())
	for range 5 {
		apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	}
	if err := d.sweep(); err != nil {
		t.Fatal(err)
	}
	if len(d.rules) != 2 {
		t.Errorf("the names of %d generations are kept, want that of the live flow and that in force", len(d.rules))
	}
}

// TestActSweepProxiedConnections: one that is open and silent stays, though the program may not have called it established. One that the
// proxy reset, or the kernel for it, leaves as one does that its client closed: it is the socket that tells.
func TestActSweepProxiedConnections(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}})
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for _, state := range []gatewayFlowState{gatewayFlowStateFLOW_OPENING, gatewayFlowStateFLOW_ESTABLISHED} {
			client, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			carried, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			from, to := addrPort(carried.RemoteAddr().String()), addrPort(carried.LocalAddr().String())
			now, err := d.generation.now()
			if err != nil {
				t.Fatal(err)
			}
			key := gatewayFlowKey{
				Source: addressOf(from.Addr()), Destination: addressOf(to.Addr()), Protocol: unix.IPPROTO_TCP,
				SourcePort: bigEndian(from.Port()), DestinationPort: bigEndian(to.Port()),
			}
			err = d.state.maps.Flows.Put(key, gatewayFlow{
				FirstSeen: now, LastSeen: now, Packets: 3, Interface: 1, Verdict: uint8(gatewayVerdictVERDICT_PROXY), State: uint8(state),
			})
			if err != nil {
				t.Fatal(err)
			}
			there := func(after time.Duration, want bool, how string) {
				t.Helper()
				d.sweepAfter(t, after)
				if _, is := d.state.flow(key); is != want {
					t.Errorf("%s to %s, state %d, after %v: listed %t, want %t", how, to, state, after, is, want)
				}
			}
			there(time.Hour, true, "open")
			carried.(*net.TCPConn).SetLinger(0)
			carried.Close()
			there(3*time.Minute, true, "reset")
			there(5*time.Minute, false, "reset")
			client.Close()
		}
	}
}

// TestActOverfull: a full table makes room whoever filled it, many clients with one flow each too.
func TestActOverfull(t *testing.T) {
	s := &state{}
	var err error
	s.maps.Flows, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 80})
	if err != nil {
		t.Skipf("needs root: %v", err)
	}
	defer s.maps.Flows.Close()
	held := map[gatewayClientKey][]agedFlow{}
	for i := range uint32(80) {
		held[gatewayClientKey{W: [4]uint32{i + 1}}] = []agedFlow{{seen: uint64(i)}}
	}
	if over := s.overfull(held); len(over) != 10 {
		t.Errorf("%d flows given up, want 10: the table holds 80 and an eighth is kept free", len(over))
	}
}

// TestActLostEntry: a packet in mid-connection without an entry is the proxy's if a socket of the proxy has its
// addresses, and left alone otherwise.
func TestActLostEntry(t *testing.T) {
	d := opened(t)
	veth(t, "lan0")
	rawSender(t, "lan0") // brings it up
	apply(t, d, Desired{Policy: &policy.Policy{Default: "hk"}})
	data := synPacket("192.168.0.3:40000", "203.0.113.10:443")
	data.tcpFlags = flagACK
	if r := d.run(t, data.bytes()); r.code != tcxNext || r.mark != 0 {
		t.Errorf("without a socket: code %d, mark %#x", r.code, r.mark)
	}
	transparentSocket(t, "lan0", data.dst, data.src)
	if r := d.run(t, data.bytes()); r.code != tcxNext || r.mark != uint32(gatewayMarkMARK_PROXY) {
		t.Errorf("with the proxy's socket: code %d, mark %#x, want local delivery", r.code, r.mark)
	}
}

// transparentSocket is a TCP socket that has a foreign address as its own, as the proxy's have. It waits for the
// other side's answer, so it is no listener.
func transparentSocket(t *testing.T, device string, local, remote netip.AddrPort) {
	t.Helper()
	l, err := netlink.LinkByName(device)
	if err != nil {
		t.Fatal(err)
	}
	route := netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: remote.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}}
	if err := netlink.RouteAdd(&route); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: local.Addr().As4(), Port: int(local.Port())}),
	)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: remote.Addr().As4(), Port: int(remote.Port())}); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatalf("connecting: %v", err)
	}
}
