package probe

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
)

// segment is a TCP segment (RFC 9293) in a packet of IPv4 or IPv6.
type segment struct {
	source, destination netip.AddrPort
	seq, ack            uint32
	flags               byte
	data                []byte
}

const (
	flagSYN = 1 << 1
	flagRST = 1 << 2
	flagPSH = 1 << 3
	flagACK = 1 << 4
)

// packet writes the segment with its IP header. A SYN has the one option that every stack sends.
func (s segment) packet() []byte {
	tcp := binary.BigEndian.AppendUint16(nil, s.source.Port())
	tcp = binary.BigEndian.AppendUint16(tcp, s.destination.Port())
	tcp = binary.BigEndian.AppendUint32(tcp, s.seq)
	tcp = binary.BigEndian.AppendUint32(tcp, s.ack)
	const window, largest = 65535, 1220 // what IPv6 carries everywhere
	var options []byte
	if s.flags&flagSYN != 0 {
		options = binary.BigEndian.AppendUint16([]byte{2, 4}, largest)
	}
	tcp = append(tcp, byte((20+len(options))/4)<<4, s.flags)
	tcp = binary.BigEndian.AppendUint16(tcp, window)
	tcp = append(tcp, 0, 0, 0, 0) // checksum, urgent pointer
	tcp = append(append(tcp, options...), s.data...)
	source, destination := s.source.Addr().AsSlice(), s.destination.Addr().AsSlice()
	pseudo := binary.BigEndian.AppendUint32(append(append([]byte{}, source...), destination...), uint32(len(tcp)))
	pseudo = binary.BigEndian.AppendUint32(pseudo, unix.IPPROTO_TCP)
	binary.BigEndian.PutUint16(tcp[16:], checksum(pseudo, tcp))
	if s.source.Addr().Is6() {
		ip := binary.BigEndian.AppendUint16([]byte{0x60, 0, 0, 0}, uint16(len(tcp)))
		ip = append(ip, unix.IPPROTO_TCP, 64)
		return append(append(append(ip, source...), destination...), tcp...)
	}
	const dontFragment = 0x4000
	ip := binary.BigEndian.AppendUint16([]byte{0x45, 0}, uint16(20+len(tcp)))
	ip = append(ip, 0, 0)
	ip = binary.BigEndian.AppendUint16(ip, dontFragment)
	ip = append(ip, 64, unix.IPPROTO_TCP, 0, 0)
	ip = append(append(ip, source...), destination...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, tcp...)
}

// checksum is that of the internet (RFC 1071), over parts of which all but the last have an even length.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		for i, b := range p {
			sum += uint32(b) << (8 * (1 - i%2))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// header is what an IP header says.
type header struct {
	source, destination netip.Addr
	protocol            byte
	payload             []byte // as much as there is
	length              int    // of the whole
}

// parseIP reads an IP header. Packets with IPv6 extension headers are none of ours.
func parseIP(b []byte) (h header, ok bool) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		size := int(b[0]&15) * 4
		total := int(binary.BigEndian.Uint16(b[2:]))
		if size < 20 || len(b) < size || total < size {
			return h, false
		}
		h = header{netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9], b[size:], total - size}
	case len(b) >= 40 && b[0]>>4 == 6:
		h = header{netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[6], b[40:], int(binary.BigEndian.Uint16(b[4:]))}
	default:
		return h, false
	}
	h.payload = h.payload[:min(len(h.payload), h.length)] // behind it is the padding of small frames
	return h, true
}

// segment reads a TCP header.
func (h header) segment() (s segment, ok bool) {
	b := h.payload
	if h.protocol != unix.IPPROTO_TCP || len(b) < 20 {
		return s, false
	}
	size := int(b[12]>>4) * 4
	if size < 20 || size > len(b) {
		return s, false
	}
	return segment{
		source:      netip.AddrPortFrom(h.source, binary.BigEndian.Uint16(b)),
		destination: netip.AddrPortFrom(h.destination, binary.BigEndian.Uint16(b[2:])),
		seq:         binary.BigEndian.Uint32(b[4:]), ack: binary.BigEndian.Uint32(b[8:]),
		flags: b[13], data: b[size:],
	}, true
}

// refuses reports whether the packet is an ICMP error about one from that address and port: "unreachable", which firewalls send too.
func (h header) refuses(client netip.AddrPort) bool {
	unreachable := map[byte]byte{unix.IPPROTO_ICMP: 3, unix.IPPROTO_ICMPV6: 1} // RFC 792, RFC 4443
	if want, ok := unreachable[h.protocol]; !ok || len(h.payload) < 8 || h.payload[0] != want {
		return false
	}
	quoted, ok := parseIP(h.payload[8:])
	return ok && quoted.protocol == unix.IPPROTO_TCP && quoted.source == client.Addr() &&
		len(quoted.payload) >= 2 && binary.BigEndian.Uint16(quoted.payload) == client.Port()
}

const ethernetHeader = 14

func ethernet(to, from netstate.MAC, protocol uint16, payload []byte) []byte {
	frame := append(append([]byte{}, to[:]...), from[:]...)
	return append(binary.BigEndian.AppendUint16(frame, protocol), payload...)
}

func protocolOf(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.ETH_P_IP
	}
	return unix.ETH_P_IPV6
}

// The operations of ARP (RFC 826).
const (
	arpRequest = 1
	arpReply   = 2
)

type arp struct {
	operation            uint16
	senderMAC, targetMAC netstate.MAC
	sender, target       netip.Addr
}

func (a arp) bytes() []byte {
	b := binary.BigEndian.AppendUint16(nil, unix.ARPHRD_ETHER)
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)
	b = binary.BigEndian.AppendUint16(append(b, 6, 4), a.operation)
	b = append(append(b, a.senderMAC[:]...), a.sender.AsSlice()...)
	return append(append(b, a.targetMAC[:]...), a.target.AsSlice()...)
}

func parseARP(b []byte) (a arp, ok bool) {
	if len(b) < 28 || binary.BigEndian.Uint16(b[2:]) != unix.ETH_P_IP || b[4] != 6 || b[5] != 4 {
		return a, false
	}
	return arp{
		operation: binary.BigEndian.Uint16(b[6:]),
		senderMAC: netstate.MAC(b[8:14]), sender: netip.AddrFrom4([4]byte(b[14:18])),
		targetMAC: netstate.MAC(b[18:24]), target: netip.AddrFrom4([4]byte(b[24:28])),
	}, true
}

// The largest part of a packet that is read: headers, and what ICMP errors quote.
const snapshot = 2048

// forClient lets frames to a MAC address pass, and who asks or says who has an address: ARP, and IPv6's neighbour discovery.
func forClient(mac netstate.MAC) ([]bpf.RawInstruction, error) {
	return bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 4},
		bpf.JumpIf{Val: binary.BigEndian.Uint32(mac[:]), SkipFalse: 2},
		bpf.LoadAbsolute{Off: 4, Size: 2},
		bpf.JumpIf{Val: uint32(binary.BigEndian.Uint16(mac[4:])), SkipTrue: 8},
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Val: unix.ETH_P_ARP, SkipTrue: 6},
		bpf.JumpIf{Val: unix.ETH_P_IPV6, SkipFalse: 6},
		bpf.LoadAbsolute{Off: ethernetHeader + 6, Size: 1},
		bpf.JumpIf{Val: unix.IPPROTO_ICMPV6, SkipFalse: 4},
		bpf.LoadAbsolute{Off: ethernetHeader + 40, Size: 1},
		bpf.JumpIf{Val: solicitation, SkipTrue: 1},
		bpf.JumpIf{Val: advertisement, SkipFalse: 1},
		bpf.RetConstant{Val: snapshot},
		bpf.RetConstant{Val: 0},
	})
}

// ICMPv6's types of neighbour discovery (RFC 4861).
const (
	solicitation  = 135
	advertisement = 136
)

// towards lets packets to an address pass, which begin with their IP header.
func towards(to netip.Addr) ([]bpf.RawInstruction, error) {
	version, offset := uint32(4), uint32(16)
	if to.Is6() {
		version, offset = 6, 24
	}
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: 0, Size: 1}, bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4}}
	words := to.AsSlice()
	last := uint8(len(words) / 2) // instructions from the first comparison to the refusal
	program = append(program, bpf.JumpIf{Val: version, SkipFalse: last + 1})
	for i := 0; i < len(words); i += 4 {
		program = append(program,
			bpf.LoadAbsolute{Off: offset + uint32(i), Size: 4},
			bpf.JumpIf{Val: binary.BigEndian.Uint32(words[i:]), SkipFalse: last - uint8(i/2) - 1})
	}
	return bpf.Assemble(append(program, bpf.RetConstant{Val: snapshot}, bpf.RetConstant{Val: 0}))
}
