package lab

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

const (
	ethernet = "0200c0a80002 0200c0a80003 "
	ip4      = "45b8 0030 0001 4000 3f11 0000 c0a80003 cb00710a "
	ip6      = "6b800000 0010 %s 3f fd00c0a8000000000000000000000003 20010db8011300000000000000000010 "
	ports    = "1389 0035 "
)

func frame(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sixth(next string) string { return strings.Replace(ip6, "%s", next, 1) }

func TestParse(t *testing.T) {
	four := Packet{
		SrcMAC: MAC{2, 0, 0xc0, 0xa8, 0, 3}, DstMAC: MAC{2, 0, 0xc0, 0xa8, 0, 2}, EtherType: EtherIPv4,
		Src: netip.MustParseAddrPort("192.168.0.3:5001"), Dst: netip.MustParseAddrPort("203.0.113.10:53"),
		Protocol: UDP, TTL: 63, TOS: 0xb8, DontFragment: true,
	}
	six := four
	six.EtherType, six.DontFragment = EtherIPv6, false
	six.Src, six.Dst = netip.MustParseAddrPort("[fd00:c0a8::3]:5001"), netip.MustParseAddrPort("[2001:db8:113::10]:53")
	with := func(p Packet, change func(*Packet)) Packet { change(&p); return p }
	noPorts := func(p *Packet) {
		p.Src, p.Dst = netip.AddrPortFrom(p.Src.Addr(), 0), netip.AddrPortFrom(p.Dst.Addr(), 0)
	}
	for name, test := range map[string]struct {
		frame string
		want  Packet
	}{
		"IPv4":         {ethernet + "0800" + ip4 + ports, four},
		"IPv4 options": {ethernet + "0800" + "46" + ip4[2:] + "01010101" + ports, four},
		"VLAN":         {ethernet + "8100 e064 0800" + ip4 + ports, with(four, func(p *Packet) { p.VLAN = 100 })},
		"QinQ":         {ethernet + "88a8 0007 8100 0064 0800" + ip4 + ports, with(four, func(p *Packet) { p.VLAN = 7 })},
		"TCP": {
			ethernet + "0800" + strings.Replace(ip4, "3f11", "3f06", 1) + ports + "00000001 00000002 5012 ffff",
			with(four, func(p *Packet) { p.Protocol, p.TCPFlags = TCP, 0x12 }),
		},
		"ICMP": {
			ethernet + "0800" + strings.Replace(ip4, "3f11", "3f01", 1) + "0304",
			with(four, func(p *Packet) { noPorts(p); p.Protocol, p.ICMPType, p.ICMPCode = ICMP, 3, 4 }),
		},
		"first fragment": {
			ethernet + "0800" + strings.Replace(ip4, "4000", "2000", 1) + ports,
			with(four, func(p *Packet) { p.Fragment, p.DontFragment = First, false }),
		},
		"later fragment": {
			ethernet + "0800" + strings.Replace(ip4, "4000", "00b9", 1) + ports,
			with(four, func(p *Packet) { noPorts(p); p.Fragment, p.DontFragment = Later, false }),
		},
		"IPv6":       {ethernet + "86dd" + sixth("11") + ports, six},
		"extensions": {ethernet + "86dd" + sixth("00") + "2b00000000000000" + "3c01" + strings.Repeat("00", 14) + "1100000000000000" + ports, six},
		"IPv6 first fragment": {
			ethernet + "86dd" + sixth("2c") + "1100 0001 00000001" + ports,
			with(six, func(p *Packet) { p.Fragment = First }),
		},
		"IPv6 later fragment": {
			ethernet + "86dd" + sixth("2c") + "1100 05a8 00000001" + ports,
			with(six, func(p *Packet) { noPorts(p); p.Fragment = Later }),
		},
		"ICMPv6": {
			ethernet + "86dd" + sixth("3a") + "0200",
			with(six, func(p *Packet) { noPorts(p); p.Protocol, p.ICMPType = ICMPv6, 2 }),
		},
		"ARP": {ethernet + "0806 0001", Packet{SrcMAC: four.SrcMAC, DstMAC: four.DstMAC, EtherType: EtherARP}},
	} {
		t.Run(name, func(t *testing.T) {
			b := frame(t, test.frame)
			var h header
			parse(b, &h)
			if got := h.packet(); got != test.want {
				t.Errorf("got  %s %+v\nwant %s %+v", got, got, test.want, test.want)
			}
			for n := range b { // cut off anywhere, it must not panic
				parse(b[:n], new(header))
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var h header
		parse(b, &h)
		_ = h.packet().String()
	})
}
