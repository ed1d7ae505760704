package advertise

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// wire is how ICMPv6 messages leave and reach an interface.
type wire interface {
	send(message []byte, to netip.Addr) error
	// receive is net.ErrClosed after Close.
	receive(buffer []byte) (n int, from netip.Addr, hopLimit int, err error)
	Close() error
}

var (
	allNodes   = netip.MustParseAddr("ff02::1")
	allRouters = netip.MustParseAddr("ff02::2")
)

// hopLimit of every message of neighbour discovery: no router has forwarded it (RFC 4861 section 3.1).
const hopLimit = 255

// rawSocket is a raw ICMPv6 socket of one interface, for router solicitations and advertisements. It is not ndp.Conn,
// because that neither keeps its own messages from the box's kernel nor lets what it was made of be reached.
type rawSocket struct {
	*ipv6.PacketConn
	control ipv6.ControlMessage
}

func listen(i Interface, mark uint32) (_ wire, err error) {
	defer func() {
		switch {
		case errors.Is(err, unix.EPERM):
			err = fmt.Errorf("opening a raw ICMPv6 socket: %w; start sidegate as root, or with CAP_NET_RAW too", err)
		case err != nil:
			err = fmt.Errorf("opening a raw ICMPv6 socket: %w", err)
		}
	}()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) {
			set = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, i.Index),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)),
				// An address that the interface has lost is withdrawn in its own name (RFC 4861 section 6.2.8).
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1),
			)
		})
		return errors.Join(err, set)
	}}
	conn, err := config.ListenPacket(context.Background(), "ip6:ipv6-icmp", "::")
	if err != nil {
		return nil, err
	}
	s := &rawSocket{ipv6.NewPacketConn(conn), ipv6.ControlMessage{HopLimit: hopLimit, Src: i.Address.AsSlice(), IfIndex: i.Index}}
	var filter ipv6.ICMPFilter
	filter.SetAll(true)
	filter.Accept(ipv6.ICMPTypeRouterSolicitation)
	filter.Accept(ipv6.ICMPTypeRouterAdvertisement)
	link := &net.Interface{Index: i.Index}
	err = errors.Join(
		s.SetICMPFilter(&filter),
		s.SetHopLimit(hopLimit),
		s.SetMulticastHopLimit(hopLimit),
		s.SetMulticastInterface(link),
		// All nodes are the box, too: its kernel and its network manager must not take their route from it.
		s.SetMulticastLoopback(false),
		s.SetControlMessage(ipv6.FlagHopLimit, true),
		s.JoinGroup(link, &net.IPAddr{IP: allRouters.AsSlice()}),
	)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return s, nil
}

func (s *rawSocket) send(message []byte, to netip.Addr) error {
	s.SetWriteDeadline(time.Now().Add(time.Second))
	_, err := s.WriteTo(message, &s.control, &net.IPAddr{IP: to.AsSlice()})
	return err
}

func (s *rawSocket) receive(buffer []byte) (n int, from netip.Addr, limit int, err error) {
	n, control, source, err := s.ReadFrom(buffer)
	if err != nil {
		return 0, netip.Addr{}, 0, err
	}
	if a, ok := source.(*net.IPAddr); ok {
		from, _ = netip.AddrFromSlice(a.IP)
	}
	if control != nil {
		limit = control.HopLimit
	}
	return n, from, limit, nil
}
