package lab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
)

// Packet is what a Capture keeps of a packet: everything but length and payload. Packets that agree in all of it are
// counted together. Numbers are zero where the packet has no such field.
type Packet struct {
	Out            bool // sent by the host on whose interface it was captured, not received
	SrcMAC, DstMAC MAC
	VLAN           uint16 // identifier of the outer tag
	EtherType      uint16 // of what the tags enclose: 0x0800 IPv4, 0x86dd IPv6, 0x0806 ARP
	Src, Dst       netip.AddrPort
	Protocol       uint8 // IANA number behind the IPv6 extension headers: 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6
	TTL            uint8 // or hop limit
	TOS            uint8 // or traffic class: DSCP<<2 | ECN
	DontFragment   bool  // IPv4 only: IPv6 never fragments on the way
	Fragment       Fragment
	ICMPType       uint8
	ICMPCode       uint8
	TCPFlags       uint8 // FIN 1, SYN 2, RST 4, PSH 8, ACK 16
}

// Fragment tells which part of a datagram a packet is.
type Fragment uint8

// Only a Whole or First packet has ports.
const (
	Whole Fragment = iota
	First
	Later
)

// MAC is a hardware address as a map key.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Numbers of Packet.Protocol and Packet.EtherType that people compare with.
const (
	ICMP   = 1
	TCP    = 6
	UDP    = 17
	ICMPv6 = 58

	EtherIPv4 = 0x0800
	EtherIPv6 = 0x86dd
	EtherARP  = 0x0806
	etherVLAN = 0x8100
	etherQinQ = 0x88a8
)

func (p Packet) String() string {
	direction := "in "
	if p.Out {
		direction = "out"
	}
	what := fmt.Sprintf("ethertype %#04x", p.EtherType)
	if p.Src.Addr().IsValid() {
		name, ok := map[uint8]string{ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPv6: "icmp6"}[p.Protocol]
		if !ok {
			name = fmt.Sprintf("protocol %d", p.Protocol)
		}
		what = fmt.Sprintf("%s %s → %s ttl %d", name, endpoint(p.Src), endpoint(p.Dst), p.TTL)
		switch p.Protocol {
		case ICMP, ICMPv6:
			what += fmt.Sprintf(" type %d code %d", p.ICMPType, p.ICMPCode)
		case TCP:
			what += fmt.Sprintf(" flags %#02x", p.TCPFlags)
		}
		what += [...]string{"", " first fragment", " later fragment"}[p.Fragment]
	}
	if p.VLAN != 0 {
		what += fmt.Sprintf(" vlan %d", p.VLAN)
	}
	return fmt.Sprintf("%s %s → %s %s", direction, p.SrcMAC, p.DstMAC, what)
}

func endpoint(a netip.AddrPort) string {
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}

// header is Packet without pointers: as a map key it is hashed at once and never scanned by the garbage collector.
type header struct {
	srcMAC, dstMAC    MAC
	src, dst          [16]byte
	srcPort, dstPort  uint16
	vlan, etherType   uint16
	family            uint8 // 4, 6, or 0 for what is not IP
	out, dontFragment bool
	protocol, ttl     uint8
	tos               uint8
	fragment          Fragment
	icmpType          uint8
	icmpCode          uint8
	tcpFlags          uint8
}

func (h *header) packet() Packet {
	p := Packet{
		Out: h.out, SrcMAC: h.srcMAC, DstMAC: h.dstMAC, VLAN: h.vlan, EtherType: h.etherType,
		Protocol: h.protocol, TTL: h.ttl, TOS: h.tos, DontFragment: h.dontFragment, Fragment: h.fragment,
		ICMPType: h.icmpType, ICMPCode: h.icmpCode, TCPFlags: h.tcpFlags,
	}
	switch h.family {
	case 4:
		p.Src = netip.AddrPortFrom(netip.AddrFrom4([4]byte(h.src[:4])), h.srcPort)
		p.Dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(h.dst[:4])), h.dstPort)
	case 6:
		p.Src = netip.AddrPortFrom(netip.AddrFrom16(h.src), h.srcPort)
		p.Dst = netip.AddrPortFrom(netip.AddrFrom16(h.dst), h.dstPort)
	}
	return p
}

// parse reads an Ethernet frame, of which b may be only the beginning. What is cut off stays zero.
func parse(b []byte, h *header) {
	if len(b) < 14 {
		return
	}
	copy(h.dstMAC[:], b)
	copy(h.srcMAC[:], b[6:])
	h.etherType = binary.BigEndian.Uint16(b[12:])
	b = b[14:]
	for (h.etherType == etherVLAN || h.etherType == etherQinQ) && len(b) >= 4 {
		if h.vlan == 0 {
			h.vlan = binary.BigEndian.Uint16(b) & 0xfff
		}
		h.etherType = binary.BigEndian.Uint16(b[2:])
		b = b[4:]
	}
	switch h.etherType {
	case EtherIPv4:
		parse4(b, h)
	case EtherIPv6:
		parse6(b, h)
	}
}

// parse4 follows RFC 791.
func parse4(b []byte, h *header) {
	if len(b) < 20 {
		return
	}
	h.family = 4
	h.tos, h.ttl, h.protocol = b[1], b[8], b[9]
	copy(h.src[:], b[12:16])
	copy(h.dst[:], b[16:20])
	fragment := binary.BigEndian.Uint16(b[6:])
	h.dontFragment = fragment&0x4000 != 0
	h.fragment = fragmentOf(fragment&0x1fff, fragment&0x2000 != 0)
	if length := int(b[0]&0xf) * 4; length >= 20 && length <= len(b) {
		parseTransport(b[length:], h)
	}
}

// parse6 follows RFC 8200, over the extension headers that may precede a transport header.
func parse6(b []byte, h *header) {
	if len(b) < 40 {
		return
	}
	h.family = 6
	h.tos = b[0]<<4 | b[1]>>4
	h.protocol, h.ttl = b[6], b[7]
	copy(h.src[:], b[8:24])
	copy(h.dst[:], b[24:40])
	b = b[40:]
	for {
		length := 8
		switch h.protocol {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if len(b) >= 2 {
				length = 8 * (int(b[1]) + 1)
			}
		case 51: // authentication header counts in 4 bytes (RFC 4302)
			if len(b) >= 2 {
				length = 4 * (int(b[1]) + 2)
			}
		case 44: // fragment
			if len(b) >= 8 {
				f := binary.BigEndian.Uint16(b[2:])
				h.fragment = fragmentOf(f>>3, f&1 != 0)
			}
		default:
			parseTransport(b, h)
			return
		}
		if len(b) < length {
			return
		}
		h.protocol = b[0]
		if b = b[length:]; h.fragment == Later {
			return
		}
	}
}

func fragmentOf(offset uint16, more bool) Fragment {
	switch {
	case offset != 0:
		return Later
	case more:
		return First
	}
	return Whole
}

func parseTransport(b []byte, h *header) {
	if h.fragment == Later {
		return
	}
	switch h.protocol {
	case TCP, UDP:
		if len(b) < 4 {
			return
		}
		h.srcPort = binary.BigEndian.Uint16(b)
		h.dstPort = binary.BigEndian.Uint16(b[2:])
		if h.protocol == TCP && len(b) >= 14 {
			h.tcpFlags = b[13]
		}
	case ICMP, ICMPv6:
		if len(b) >= 2 {
			h.icmpType, h.icmpCode = b[0], b[1]
		}
	}
}
