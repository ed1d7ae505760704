package doctor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
)

// listenFor is how long answers of the LAN are waited for.
const listenFor = time.Second

// duplicates asks, as who is new on the LAN does, whether anybody else has the box's addresses (RFC 5227, RFC 4861).
func duplicates(ctx context.Context, b *Box, link netstate.Link) ([]Finding, error) {
	if !link.Ethernet {
		return nil, nil
	}
	own := b.Network.AddressesOf(link.Index)
	others, errs := make([][]netstate.MAC, len(own)), make([]error, len(own))
	var asking sync.WaitGroup
	for i, a := range own {
		asking.Go(func() { others[i], errs[i] = b.whoHas(ctx, link, netip.Addr{}, a.Prefix.Addr()) })
	}
	asking.Wait()
	var found []Finding
	for i, a := range own {
		if len(others[i]) == 0 && !a.DADFailed {
			continue
		}
		seen := "another host has it too"
		if len(others[i]) > 0 {
			seen += ": " + others[i][0].String()
		}
		found = append(found, Finding{
			Severity: Failure, Object: a.Prefix.Addr().String(), Seen: seen,
			Why: "clients reach one or the other, by chance", Fix: "give one of the two another address",
		})
	}
	return found, errors.Join(errs...)
}

// router asks whether the one answers that the box sends everything of a family to.
func router(ipv6 bool) func(context.Context, *Box) ([]Finding, error) {
	return func(ctx context.Context, b *Box) ([]Finding, error) {
		route, ok := b.Network.Default(ipv6)
		link, up := b.Network.Link(route.LinkIndex)
		if !ok || !up || !link.Up || !link.Ethernet || !route.Gateway.IsValid() {
			return nil, nil
		}
		var own netip.Addr
		for _, a := range b.Network.AddressesOf(link.Index) {
			if a.Prefix.Addr().Is4() == route.Gateway.Is4() && !own.IsValid() {
				own = a.Prefix.Addr()
			}
		}
		answers, err := b.whoHas(ctx, link, own, route.Gateway)
		if err != nil || len(answers) > 0 {
			return nil, err
		}
		return []Finding{{
			Severity: Failure, Object: route.Gateway.String(), Seen: "the box's default router does not answer on " + link.Name,
			Why: "nothing direct leaves the LAN, and no upstream is reached", Fix: "switch it on, or correct the default route: ip route",
		}}, nil
	}
}

// whoHas returns the MAC addresses that answer for an address, without the box's own. With a sender, one is enough; without, everybody
// is waited for.
func (b *Box) whoHas(ctx context.Context, link netstate.Link, sender, target netip.Addr) ([]netstate.MAC, error) {
	ctx, cancel := context.WithTimeout(ctx, listenFor)
	defer cancel()
	ask := askARP
	if target.Is6() {
		ask = askNDP
	}
	var others []netstate.MAC
	err := ask(ctx, link, sender, target, func(mac netstate.MAC) (more bool) {
		own := slices.ContainsFunc(b.Network.Links, func(l netstate.Link) bool { return l.MAC == mac })
		if !own && !slices.Contains(others, mac) {
			others = append(others, mac)
		}
		return own || !sender.IsValid()
	})
	return others, err
}

// again is after what time an unanswered question is repeated: one packet may be lost.
const again = 300 * time.Millisecond

// repeat sends a question until ctx ends. The caller waits for the end with the function that it returns.
func repeat(ctx context.Context, send func() error) (end func() error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		for {
			if err := send(); err != nil {
				done <- err
				return
			}
			select {
			case <-time.After(again):
			case <-ctx.Done():
				done <- nil
				return
			}
		}
	}()
	return func() error {
		cancel()
		return <-done
	}
}

// askARP sends ARP requests (RFC 826), which are probes without a sender (RFC 5227), and gives each answer's MAC to answer.
func askARP(ctx context.Context, link netstate.Link, sender, target netip.Addr, answer func(netstate.MAC) (more bool)) error {
	device := &net.Interface{Index: link.Index, Name: link.Name, MTU: link.MTU, HardwareAddr: link.MAC[:]}
	conn, err := packet.Listen(device, packet.Datagram, unix.ETH_P_ARP, nil)
	if err != nil {
		return fmt.Errorf("listening for ARP: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()
	request := binary.BigEndian.AppendUint16(nil, unix.ARPHRD_ETHER)
	request = binary.BigEndian.AppendUint16(request, unix.ETH_P_IP)
	request = append(request, 6, 4, 0, 1) // lengths of addresses; a request
	request = append(request, link.MAC[:]...)
	source := [4]byte{}
	if sender.IsValid() {
		source = sender.As4()
	}
	request = append(request, source[:]...)
	request = append(request, make([]byte, 6)...)
	wanted := target.As4()
	request = append(request, wanted[:]...)
	broadcast := &packet.Addr{HardwareAddr: net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	end := repeat(ctx, func() error {
		_, err := conn.WriteTo(request, broadcast)
		return err
	})
	frame := make([]byte, 128)
	for {
		n, _, err := conn.ReadFrom(frame)
		if err != nil {
			return errors.Join(unlessTimeout(err), end())
		}
		// An answer, or what its owner says without being asked: the sender has the address.
		if n >= 28 && binary.BigEndian.Uint16(frame[2:]) == unix.ETH_P_IP && [4]byte(frame[14:18]) == wanted && !answer(netstate.MAC(frame[8:14])) {
			return end()
		}
	}
}

// askNDP sends neighbour solicitations (RFC 4861 section 7.2) from the link-local address, and gives each answer's MAC to answer.
func askNDP(ctx context.Context, link netstate.Link, _, target netip.Addr, answer func(netstate.MAC) (more bool)) error {
	conn, err := listenNDP(link)
	if err != nil {
		return err
	}
	if conn == nil {
		return nil
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()
	group, err := ndp.SolicitedNodeMulticast(target)
	if err != nil {
		return err
	}
	question := &ndp.NeighborSolicitation{
		TargetAddress: target,
		Options:       []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: link.MAC[:]}},
	}
	end := repeat(ctx, func() error { return conn.WriteTo(question, nil, group) })
	for {
		message, _, _, err := conn.ReadFrom()
		if fatal := net.Error(nil); errors.As(err, &fatal) {
			return errors.Join(unlessTimeout(err), end())
		}
		if err != nil {
			continue // somebody's malformed message
		}
		advertisement, ok := message.(*ndp.NeighborAdvertisement)
		if !ok || advertisement.TargetAddress != target {
			continue
		}
		for _, o := range advertisement.Options {
			if l, ok := o.(*ndp.LinkLayerAddress); ok && len(l.Addr) == 6 && !answer(netstate.MAC(l.Addr)) {
				return end()
			}
		}
	}
}

// listenNDP opens a socket for neighbour discovery; nil where the link has no IPv6.
func listenNDP(link netstate.Link) (*ndp.Conn, error) {
	device, err := net.InterfaceByIndex(link.Index)
	if err != nil {
		return nil, err
	}
	conn, _, err := ndp.Listen(device, ndp.LinkLocal)
	if err != nil {
		addresses, listErr := device.Addrs()
		has6 := slices.ContainsFunc(addresses, func(a net.Addr) bool {
			p, err := netip.ParsePrefix(a.String())
			return err == nil && p.Addr().Is6() && p.Addr().IsLinkLocalUnicast()
		})
		if listErr == nil && !has6 {
			return nil, nil
		}
		return nil, fmt.Errorf("listening for neighbour discovery: %w", err)
	}
	return conn, nil
}

func unlessTimeout(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}
