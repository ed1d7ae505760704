package datapath

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// packet builds a frame: `packet{…}.bytes()`. Its destination MAC is zero, as loopback's is, so that the
// test run takes it as sent to this host.
type packet struct {
	src, dst netip.AddrPort
	protocol uint8
	dscp     uint8
	mac      policy.MAC
	tcpFlags uint8
	seq, ack uint32
	payload  []byte

	options    int        // bytes of IPv4 options, in fours
	extensions []ext      // IPv6 extension headers
	fragment   *fragmentV // makes it a fragment
	etherType  uint16     // instead of the right one
	vlan       []byte     // inserted before the EtherType
}

type ext struct {
	kind uint8
	body []byte // from the third byte on; padded to a multiple of eight with the header
}

type fragmentV struct {
	id     uint32
	offset int // in bytes
	more   bool
}

const (
	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagACK = 0x10
)

func packetOf(f policy.Flow) packet {
	p := packet{src: f.Source, dst: f.Destination, dscp: f.DSCP, mac: f.SourceMAC, protocol: uint8(f.Network)}
	switch f.Network {
	case policy.TCP:
		p.tcpFlags = flagSYN
	case policy.UDP:
	default:
		p.protocol = unix.IPPROTO_GRE
	}
	return p
}

func (p packet) bytes() []byte {
	frame := make([]byte, 12, 128)
	copy(frame[6:], p.mac[:])
	frame = append(frame, p.vlan...)
	v6 := p.dst.Addr().Is6()
	etherType := p.etherType
	if etherType == 0 {
		etherType = unix.ETH_P_IP
		if v6 {
			etherType = unix.ETH_P_IPV6
		}
	}
	frame = binary.BigEndian.AppendUint16(frame, etherType)
	transport := p.transport()
	if p.fragment != nil && p.fragment.offset > 0 {
		transport = p.payload
	}
	if v6 {
		return p.appendIPv6(frame, transport)
	}
	return p.appendIPv4(frame, transport)
}

func (p packet) appendIPv4(frame, transport []byte) []byte {
	length := 20 + p.options
	ip := make([]byte, length)
	ip[0] = 4<<4 | byte(length/4)
	ip[1] = p.dscp << 2
	binary.BigEndian.PutUint16(ip[2:], uint16(length+len(transport)))
	if f := p.fragment; f != nil {
		binary.BigEndian.PutUint16(ip[4:], uint16(f.id))
		offset := uint16(f.offset / 8)
		if f.more {
			offset |= 1 << 13
		}
		binary.BigEndian.PutUint16(ip[6:], offset)
	}
	ip[8], ip[9] = 64, p.protocol
	for i := 20; i < length; i++ {
		ip[i] = 1 // no operation
	}
	src, dst := p.src.Addr().As4(), p.dst.Addr().As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(0, ip))
	return append(append(frame, ip...), transport...)
}

func (p packet) appendIPv6(frame, transport []byte) []byte {
	extensions := p.extensions
	if f := p.fragment; f != nil {
		body := make([]byte, 6)
		offset := uint16(f.offset)
		if f.more {
			offset |= 1
		}
		binary.BigEndian.PutUint16(body, offset)
		binary.BigEndian.PutUint32(body[2:], f.id)
		extensions = append(extensions[:len(extensions):len(extensions)], ext{unix.IPPROTO_FRAGMENT, body})
	}
	var chain []byte
	for i, e := range extensions {
		next := p.protocol
		if i+1 < len(extensions) {
			next = extensions[i+1].kind
		}
		header := append([]byte{next, 0}, e.body...)
		for len(header)%8 != 0 || len(header) == 0 {
			header = append(header, 0)
		}
		switch e.kind {
		case unix.IPPROTO_FRAGMENT:
		case unix.IPPROTO_AH:
			header[1] = byte(len(header)/4 - 2)
		default:
			header[1] = byte(len(header)/8 - 1)
		}
		chain = append(chain, header...)
	}
	ip := make([]byte, 40)
	ip[0] = 6<<4 | p.dscp>>2
	ip[1] = p.dscp << 6
	binary.BigEndian.PutUint16(ip[4:], uint16(len(chain)+len(transport)))
	ip[6], ip[7] = p.protocol, 64
	if len(extensions) > 0 {
		ip[6] = extensions[0].kind
	}
	src, dst := p.src.Addr().As16(), p.dst.Addr().As16()
	copy(ip[8:], src[:])
	copy(ip[24:], dst[:])
	return append(append(append(frame, ip...), chain...), transport...)
}

func (p packet) transport() []byte {
	switch p.protocol {
	case unix.IPPROTO_TCP:
		h := make([]byte, 20)
		binary.BigEndian.PutUint16(h, p.src.Port())
		binary.BigEndian.PutUint16(h[2:], p.dst.Port())
		binary.BigEndian.PutUint32(h[4:], p.seq)
		binary.BigEndian.PutUint32(h[8:], p.ack)
		h[12], h[13] = 5<<4, p.tcpFlags
		return append(h, p.payload...)
	case unix.IPPROTO_UDP:
		h := make([]byte, 8)
		binary.BigEndian.PutUint16(h, p.src.Port())
		binary.BigEndian.PutUint16(h[2:], p.dst.Port())
		binary.BigEndian.PutUint16(h[4:], uint16(8+len(p.payload)))
		return append(h, p.payload...)
	}
	return append([]byte{8, 0, 0, 0, 0, 1, 0, 1}, p.payload...)
}

// onesSum is the ones' complement sum of RFC 1071.
func onesSum(sum uint32, b []byte) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
