package dns

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// family is what differs between IPv4 and IPv6 in opening our sockets. See ip(7), ipv6(7).
type family struct {
	suffix      string // of net's networks: "tcp4"
	domain      int
	optional    bool       // the box may lack it
	address     netip.Addr // of the UDP listener
	loopback    netip.Addr // of the TCP listener
	level       int
	transparent int // option: bind to, and answer from, addresses that are not ours
	receiveInfo int // option: have each datagram's destination told in a control message
	info        int // that message, which also sets a reply's source
	infoSize    int
}

// dnsPort is where clients send to, so that it must be where answers come from.
const dnsPort = 53

// families are IPv4 and IPv6, in this order. Other resolvers on the box may be bound to the usual loopback
// addresses, so ours are unusual: 83 and 71 are "SG". IPv6 has only one loopback address; ours is of the
// prefix that is routed nowhere (100::/64, RFC 6666), which a transparent socket may be bound to.
var families = [...]family{
	{
		suffix: "4", domain: unix.AF_INET,
		address:  netip.AddrFrom4([4]byte{127, 83, 71, 53}),
		loopback: netip.AddrFrom4([4]byte{127, 0, 0, 1}),
		level:    unix.SOL_IP, transparent: unix.IP_TRANSPARENT,
		receiveInfo: unix.IP_PKTINFO, info: unix.IP_PKTINFO, infoSize: unix.SizeofInet4Pktinfo,
	}, {
		suffix: "6", domain: unix.AF_INET6, optional: true,
		address:  netip.MustParseAddr("100::5347:35"),
		loopback: netip.IPv6Loopback(),
		level:    unix.SOL_IPV6, transparent: unix.IPV6_TRANSPARENT,
		receiveInfo: unix.IPV6_RECVPKTINFO, info: unix.IPV6_PKTINFO, infoSize: unix.SizeofInet6Pktinfo,
	},
}

// missing reports that an error means that the box lacks the family.
func (f *family) missing(err error) bool {
	return f.optional && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL))
}

// setTransparent prepares a socket that stands for other people's addresses.
func (f *family) setTransparent(fd int, mark uint32) error {
	if err := unix.SetsockoptInt(fd, f.level, f.transparent, 1); err != nil {
		return fmt.Errorf("making a socket transparent (needs CAP_NET_ADMIN): %w", err)
	}
	if mark == 0 {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		return fmt.Errorf("marking a socket (needs CAP_NET_ADMIN): %w", err)
	}
	return nil
}

// udpBuffer is the size of the listener's buffers, in bytes. The kernel reserves nothing.
const udpBuffer = 8 << 20

// openUDP opens the listener.
func (f *family) openUDP(mark uint32) (fd int, err error) {
	fd, err = unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("creating a udp socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := f.setTransparent(fd, mark); err != nil {
		return -1, err
	}
	if err := unix.SetsockoptInt(fd, f.level, f.receiveInfo, 1); err != nil {
		return -1, fmt.Errorf("asking for destinations: %w", err)
	}
	// Resolvers that are bound to every address of the box are no conflict if they do the same.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return -1, fmt.Errorf("sharing a udp port: %w", err)
	}
	for _, option := range [][2]int{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, option[0], udpBuffer) != nil {
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, option[1], udpBuffer)
		}
	}
	var address unix.Sockaddr = &unix.SockaddrInet6{Port: dnsPort, Addr: f.address.As16()}
	if f.domain == unix.AF_INET {
		address = &unix.SockaddrInet4{Port: dnsPort, Addr: f.address.As4()}
	} else if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
		return -1, fmt.Errorf("keeping a udp socket to ipv6: %w", err)
	}
	if err := unix.Bind(fd, address); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			err = errors.New("a dns server of this box holds port 53 on every address: bind it to its own (dnsmasq: bind-interfaces)")
		}
		return -1, fmt.Errorf("binding a udp socket to %s: %w", netip.AddrPortFrom(f.address, dnsPort), err)
	}
	return fd, nil
}

// rawSocket shows a descriptor, which the runtime's poller does not know, as a syscall.Conn. It can
// only be controlled.
type rawSocket int

func (s rawSocket) SyscallConn() (syscall.RawConn, error) { return s, nil }

func (s rawSocket) Control(f func(fd uintptr)) error {
	f(uintptr(s))
	return nil
}

func (rawSocket) Read(func(fd uintptr) bool) error  { return errors.ErrUnsupported }
func (rawSocket) Write(func(fd uintptr) bool) error { return errors.ErrUnsupported }
