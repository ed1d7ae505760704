package outbound

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// The header of a SOCKS5 UDP datagram (RFC 1928 section 7): two reserved bytes, the fragment number,
// the address type, the address, the port.
const (
	udpHeaderFixed = 4
	udpHeaderRoom  = udpHeaderFixed + 16 + 2
)

// Why a datagram from a relay is dropped. They are values, not formatted, since a hostile relay can
// cause one per packet.
var (
	errUDPTruncated = errors.New("the socks5 udp header is cut short")
	errUDPFragment  = errors.New("the datagram is a socks5 fragment, which is not supported")
	errUDPName      = errors.New("the sender is given as a domain instead of an address")
	errUDPAddress   = errors.New("the address type is unknown")
)

func appendUDPHeader(b []byte, to netip.AddrPort) []byte {
	return appendAddress(append(b, 0, 0, 0), to)
}

// parseUDPHeader returns the sender and where the payload starts. The reserved bytes are not looked
// at. It does not support fragments, which the RFC leaves optional and has dropped then.
func parseUDPHeader(packet []byte) (netip.AddrPort, int, error) {
	var none netip.AddrPort
	if len(packet) < udpHeaderFixed {
		return none, 0, errUDPTruncated
	}
	if packet[2] != 0 {
		return none, 0, errUDPFragment
	}
	length := 0
	switch packet[3] {
	case addressIPv4:
		length = 4
	case addressIPv6:
		length = 16
	case addressName:
		return none, 0, errUDPName
	default:
		return none, 0, errUDPAddress
	}
	offset := udpHeaderFixed + length + 2
	if len(packet) < offset {
		return none, 0, errUDPTruncated
	}
	address, _ := netip.AddrFromSlice(packet[udpHeaderFixed : udpHeaderFixed+length])
	return netip.AddrPortFrom(address.Unmap(), binary.BigEndian.Uint16(packet[offset-2:])), offset, nil
}
