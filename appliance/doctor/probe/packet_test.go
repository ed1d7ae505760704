package probe

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/mdlayher/ndp"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
)

func between(from, to string) segment {
	return segment{
		source: netip.MustParseAddrPort(from), destination: netip.MustParseAddrPort(to),
		seq: 0xfffffff0, ack: 7, flags: flagACK | flagPSH, data: []byte("odd"),
	}
}

var segments = []segment{
	between("192.168.0.9:40000", "203.0.113.10:443"), between("[fd00::9]:40000", "[2001:db8::10]:443"),
}

// TestSegments: what is written is read again; its checksums are those that a receiver computes; and no shorter packet is read as
// something else, or beyond its end.
func TestSegments(t *testing.T) {
	for _, want := range segments {
		b := want.packet()
		h, ok := parseIP(append(slices.Clone(b), 0, 0, 0)) // as the padding of a small frame
		s, is := h.segment()
		if !ok || !is || s.source != want.source || s.destination != want.destination || s.seq != want.seq || s.ack != want.ack ||
			s.flags != want.flags || string(s.data) != string(want.data) {
			t.Errorf("%+v is read as %+v", want, s)
		}
		pseudo := append(append(slices.Clone(h.source.AsSlice()), h.destination.AsSlice()...), 0, 0, 0, byte(len(h.payload)), 0, 0, 0, unix.IPPROTO_TCP)
		if sum := checksum(pseudo, h.payload); sum != 0 {
			t.Errorf("%+v: the sum over the segment with its checksum is %#x", want, sum)
		}
		if sum := checksum(b[:20]); h.source.Is4() && sum != 0 {
			t.Errorf("%+v: the sum over the IP header with its checksum is %#x", want, sum)
		}
		for n := range b {
			h, ok := parseIP(b[:n])
			if s, is := h.segment(); ok && is && (s.source != want.source || s.seq != want.seq) {
				t.Errorf("%d bytes of %+v are read as %+v", n, want, s)
			}
		}
	}
}

// TestRefusals: an ICMP error counts if it quotes a packet of this client, however little of it.
func TestRefusals(t *testing.T) {
	for _, quoted := range segments {
		kind, protocol, size := byte(3), byte(unix.IPPROTO_ICMP), 20
		if quoted.source.Addr().Is6() {
			kind, protocol, size = 1, unix.IPPROTO_ICMPV6, 40
		}
		packet := quoted.packet()
		for n := range packet {
			h := icmpError(protocol, append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, packet[:n]...))
			if got, want := h.refuses(quoted.source), n >= size+2; got != want {
				t.Errorf("%s: with %d bytes quoted: %t, want %t", quoted.source, n, got, want)
			}
		}
		h := icmpError(protocol, append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, packet...))
		if other := netip.AddrPortFrom(quoted.source.Addr(), 1); h.refuses(other) {
			t.Errorf("what quotes %s counts for %s", quoted.source, other)
		}
		h.payload[0] = 11 // time exceeded
		if h.refuses(quoted.source) {
			t.Error("any ICMP error is a refusal")
		}
	}
}

func icmpError(protocol byte, payload []byte) header {
	return header{protocol: protocol, payload: payload}
}

// TestFilters: the sockets see what they are for, and not the traffic of a LAN.
func TestFilters(t *testing.T) {
	mac, other := netstate.MAC{2, 0xd1, 3, 4, 5, 6}, netstate.MAC{2, 0xd1, 3, 4, 5, 7}
	wire := machine(t, func() ([]bpf.RawInstruction, error) { return forClient(mac) })
	c, everybody := &client{mac: mac}, netip.MustParseAddr("ff02::1")
	for name, f := range map[string]struct {
		frame []byte
		want  bool
	}{
		"to the client":               {ethernet(mac, other, unix.ETH_P_IP, segments[0].packet()), true},
		"to another":                  {ethernet(other, mac, unix.ETH_P_IP, segments[0].packet()), false},
		"IPv6 to another":             {ethernet(other, mac, unix.ETH_P_IPV6, segments[1].packet()), false},
		"to another, nearly the same": {ethernet(netstate.MAC{2, 0xd1, 3, 4, 9, 9}, other, unix.ETH_P_IP, segments[0].packet()), false},
		"ARP":                         {ethernet(other, other, unix.ETH_P_ARP, arp{arpRequest, other, other, segments[0].source.Addr(), segments[0].source.Addr()}.bytes()), true},
		"a solicitation":              {ethernet(other, other, unix.ETH_P_IPV6, c.icmp(&ndp.NeighborSolicitation{TargetAddress: segments[1].source.Addr()}, everybody)), true},
		"an advertisement":            {ethernet(other, other, unix.ETH_P_IPV6, c.icmp(&ndp.NeighborAdvertisement{TargetAddress: segments[1].source.Addr()}, everybody)), true},
		"a router's advertisement":    {ethernet(other, other, unix.ETH_P_IPV6, c.icmp(&ndp.RouterAdvertisement{}, everybody)), false},
	} {
		if got := wire(f.frame); got != f.want {
			t.Errorf("%s: seen: %t", name, got)
		}
	}
	for i, s := range segments {
		leaving := machine(t, func() ([]bpf.RawInstruction, error) { return towards(s.destination.Addr()) })
		for j, other := range segments {
			if got := leaving(other.packet()); got != (i == j) {
				t.Errorf("towards %s: a packet to %s is seen: %t", s.destination, other.destination, got)
			}
		}
		back := s
		back.source, back.destination = s.destination, s.source
		if leaving(back.packet()) {
			t.Errorf("towards %s: a packet from there is seen", s.destination)
		}
	}
}

// machine runs a filter as the kernel does.
func machine(t *testing.T, make func() ([]bpf.RawInstruction, error)) func([]byte) bool {
	t.Helper()
	raw, err := make()
	if err != nil {
		t.Fatal(err)
	}
	program, _ := bpf.Disassemble(raw)
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	return func(packet []byte) bool {
		n, err := vm.Run(packet)
		if err != nil {
			t.Fatal(err)
		}
		return n > 0
	}
}
