package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
)

// client is a host of the LAN that does not exist. What others send to it is seen on the wire, by its MAC address, and does not
// enter the box. What it sends comes in by the LAN interface.
type client struct {
	lan    netstate.Link
	uplink netstate.Link // by which the box's packets for the target leave
	mac    netstate.MAC
	target netip.AddrPort
	inject func(frame []byte) error // as if it came in by the LAN interface, past the gateway

	wire    *packet.Conn // the LAN interface
	leaving *packet.Conn // the uplink: packets to the target
	seen    chan sighting
	ends    context.CancelFunc
	reader  sync.WaitGroup

	mu      sync.Mutex
	address netip.Addr // none at first: then it answers nobody
	err     error      // why a reader ended
}

// sighting is something that concerns the client.
type sighting struct {
	kind
	header
	segment
	byBox bool         // of what came to the client: the box sent it
	owner netstate.MAC // of a claim: who has the address header.source
}

type kind int

const (
	left    kind = iota + 1 // a segment to the target left the box
	arrived                 // a packet came to the client
	claim                   // somebody says who has an address
)

// newClient opens the client's eyes. It has no address yet.
func newClient(lan, uplink netstate.Link, target netip.AddrPort, inject func([]byte) error) (_ *client, err error) {
	c := &client{lan: lan, uplink: uplink, target: target, inject: inject, mac: lan.MAC, seen: make(chan sighting, 64)}
	c.mac[0] = c.mac[0]&^1 | 2 // locally administered
	c.mac[1] ^= 0xd1
	ctx, end := context.WithCancel(context.Background())
	c.ends = end
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("listening on %s: %w", lan.Name, err), c.Close())
		}
	}()
	filter, err := forClient(c.mac)
	if err != nil {
		return nil, err
	}
	if c.wire, err = listen(lan, packet.Raw, filter); err != nil {
		return nil, err
	}
	if err := c.wire.SetPromiscuous(true); err != nil { // until it is closed
		return nil, err
	}
	if filter, err = towards(target.Addr()); err != nil {
		return nil, err
	}
	if c.leaving, err = listen(uplink, packet.Datagram, filter); err != nil {
		return nil, err
	}
	c.reader.Go(func() { c.read(ctx) })
	return c, nil
}

func listen(link netstate.Link, kind packet.Type, filter []bpf.RawInstruction) (*packet.Conn, error) {
	device := &net.Interface{Index: link.Index, Name: link.Name, MTU: link.MTU, HardwareAddr: link.MAC[:]}
	return packet.Listen(device, kind, unix.ETH_P_ALL, &packet.Config{Filter: filter})
}

// Close ends it. Whoever knows the client's address knows it for some more minutes.
func (c *client) Close() error {
	c.ends()
	var errs []error
	for _, conn := range []*packet.Conn{c.wire, c.leaving} {
		if conn != nil {
			errs = append(errs, conn.Close())
		}
	}
	c.reader.Wait()
	return errors.Join(errs...)
}

// read looks at what comes on the wire, and tells whoever waits.
func (c *client) read(ctx context.Context) {
	b := make([]byte, snapshot)
	for {
		n, address, err := c.wire.ReadFrom(b)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			c.fail(err)
			return
		}
		var from netstate.MAC
		if a, ok := address.(*packet.Addr); ok && len(a.HardwareAddr) == len(from) {
			from = netstate.MAC(a.HardwareAddr)
		}
		s, ok := c.onWire(slices.Clone(b[:n]), from)
		if !ok {
			continue
		}
		select {
		case c.seen <- s:
		case <-ctx.Done():
			return
		}
	}
}

// departures are the segments to the target that left the box and were not asked for yet. Whoever asks when an answer has come
// knows all that went before it.
func (c *client) departures() (all []sighting, err error) {
	raw, err := c.leaving.SyscallConn()
	if err != nil {
		return nil, err
	}
	b := make([]byte, snapshot)
	controlErr := raw.Control(func(fd uintptr) {
		for {
			var from unix.Sockaddr
			var n int
			n, from, err = unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			link, ok := from.(*unix.SockaddrLinklayer)
			if !ok || link.Pkttype != unix.PACKET_OUTGOING || link.Halen == 6 && netstate.MAC(link.Addr[:6]) == c.mac {
				continue
			}
			if h, ok := parseIP(slices.Clone(b[:n])); ok {
				if s, ok := h.segment(); ok {
					all = append(all, sighting{kind: left, header: h, segment: s})
				}
			}
		}
	})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		err = nil
	}
	return all, errors.Join(controlErr, err)
}

func (c *client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = errors.Join(c.err, err)
}

func (c *client) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *client) is() netip.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.address
}

// become gives it an address. From now on it answers who asks for it.
func (c *client) become(a netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.address = a
}

func (c *client) onWire(b []byte, from netstate.MAC) (sighting, bool) {
	if len(b) < ethernetHeader || from == c.mac {
		return sighting{}, false
	}
	protocol, payload := binary.BigEndian.Uint16(b[12:]), b[ethernetHeader:]
	if protocol == unix.ETH_P_ARP {
		a, ok := parseARP(payload)
		if !ok {
			return sighting{}, false
		}
		if a.operation == arpRequest && a.target == c.is() {
			c.answer(from, unix.ETH_P_ARP, arp{arpReply, c.mac, a.senderMAC, c.is(), a.sender}.bytes())
		}
		return sighting{kind: claim, header: header{source: a.sender}, owner: a.senderMAC}, a.sender.IsValid() && !a.sender.IsUnspecified()
	}
	h, ok := parseIP(payload)
	if !ok {
		return sighting{}, false
	}
	if s, ok := c.neighbour(h, from); ok {
		return s, true
	}
	s := sighting{kind: arrived, header: h, byBox: from == c.lan.MAC}
	s.segment, _ = h.segment()
	return s, h.destination == c.is()
}

// neighbour answers solicitations for the client, and reads advertisements (RFC 4861).
func (c *client) neighbour(h header, from netstate.MAC) (s sighting, ok bool) {
	if h.protocol != unix.IPPROTO_ICMPV6 {
		return s, false
	}
	message, err := ndp.ParseMessage(h.payload)
	if err != nil {
		return s, false
	}
	switch m := message.(type) {
	case *ndp.NeighborSolicitation:
		if m.TargetAddress == c.is() && !h.source.IsUnspecified() {
			c.answer(from, unix.ETH_P_IPV6, c.icmp(&ndp.NeighborAdvertisement{
				Solicited: true, Override: true, TargetAddress: c.is(),
				Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: c.mac[:]}},
			}, h.source))
		}
	case *ndp.NeighborAdvertisement:
		for _, o := range m.Options {
			if l, is := o.(*ndp.LinkLayerAddress); is && l.Direction == ndp.Target && len(l.Addr) == len(s.owner) {
				return sighting{kind: claim, header: header{source: m.TargetAddress}, owner: netstate.MAC(l.Addr)}, true
			}
		}
	}
	return s, false
}

// answer sends to a neighbour; to the box itself, by the way on which the box listens.
func (c *client) answer(to netstate.MAC, protocol uint16, payload []byte) {
	frame := ethernet(to, c.mac, protocol, payload)
	send := c.send
	if to == c.lan.MAC {
		send = c.inject
	}
	if err := send(frame); err != nil {
		c.fail(err)
	}
}

// icmp is a packet of neighbour discovery, with the hop limit that shows that no router forwarded it.
func (c *client) icmp(m ndp.Message, to netip.Addr) []byte {
	from := c.is()
	if !from.IsValid() {
		from = netip.IPv6Unspecified()
	}
	body, err := ndp.MarshalMessageChecksum(m, from, to)
	if err != nil {
		c.fail(err)
	}
	ip := binary.BigEndian.AppendUint16([]byte{0x60, 0, 0, 0}, uint16(len(body)))
	ip = append(append(ip, unix.IPPROTO_ICMPV6, 255), from.AsSlice()...)
	return append(append(ip, to.AsSlice()...), body...)
}

// send puts a frame on the wire.
func (c *client) send(frame []byte) error {
	_, err := c.wire.WriteTo(frame, &packet.Addr{HardwareAddr: net.HardwareAddr(frame[:6])})
	if err != nil {
		return fmt.Errorf("sending on %s: %w", c.lan.Name, err)
	}
	return nil
}

// ask asks the LAN who has an address; in the client's name if it has one.
func (c *client) ask(wanted netip.Addr) error {
	if wanted.Is4() {
		sender := c.is()
		if !sender.IsValid() {
			sender = netip.IPv4Unspecified() // a probe, of RFC 5227
		}
		everybody := netstate.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		return c.send(ethernet(everybody, c.mac, unix.ETH_P_ARP, arp{arpRequest, c.mac, netstate.MAC{}, sender, wanted}.bytes()))
	}
	group, err := ndp.SolicitedNodeMulticast(wanted)
	if err != nil {
		return err
	}
	question := &ndp.NeighborSolicitation{TargetAddress: wanted}
	if c.is().IsValid() { // who asks whether an address is free does not say who asks (RFC 4862)
		question.Options = []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: c.mac[:]}}
	}
	low := group.As16()
	to := netstate.MAC{0x33, 0x33, low[12], low[13], low[14], low[15]}
	return c.send(ethernet(to, c.mac, unix.ETH_P_IPV6, c.icmp(question, group)))
}

// owners asks for addresses again and again for a while, and returns who answered. It ends when enough are known.
func (c *client) owners(ctx context.Context, wanted []netip.Addr, enough int) (map[netip.Addr]netstate.MAC, error) {
	found := map[netip.Addr]netstate.MAC{}
	_, err := c.until(ctx, asking, func() error {
		for _, a := range wanted {
			if _, known := found[a]; !known {
				if err := c.ask(a); err != nil {
					return err
				}
			}
		}
		return nil
	}, func(s sighting) bool {
		if s.kind == claim && s.owner != c.mac {
			found[s.header.source] = s.owner
		}
		known := 0
		for _, a := range wanted {
			if _, ok := found[a]; ok {
				known++
			}
		}
		return known >= enough
	})
	return found, err
}

// patience is how long something is waited for, and after what time it is sent again.
type patience struct{ each, total time.Duration }

var (
	asking  = patience{250 * time.Millisecond, 800 * time.Millisecond} // of a LAN
	patient = patience{500 * time.Millisecond, 2 * time.Second}        // of the internet
)

// until sends again and again, and looks at what is seen, until look is content or patience ends.
func (c *client) until(ctx context.Context, p patience, send func() error, look func(sighting) (content bool)) (bool, error) {
	deadline := time.NewTimer(p.total)
	defer deadline.Stop()
	again := time.NewTicker(p.each)
	defer again.Stop()
	for {
		if err := errors.Join(send(), c.failed()); err != nil {
			return false, err
		}
		for waiting := true; waiting; {
			var now []sighting
			ended := false
			select {
			case s := <-c.seen:
				now = append(now, s)
			case <-again.C:
				waiting = false
			case <-deadline.C:
				ended = true
			case <-ctx.Done():
				return false, context.Cause(ctx)
			}
			before, err := c.departures()
			if err != nil {
				return false, fmt.Errorf("listening on %s: %w", c.uplink.Name, err)
			}
			content := false
			for _, s := range append(before, now...) {
				content = look(s) || content
			}
			if content || ended {
				return content, nil
			}
		}
	}
}
