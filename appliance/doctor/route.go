package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
)

// defaultRoute wants one of IPv4, unless the interface that it would be on is what is missing.
func defaultRoute(_ context.Context, b *Box) ([]Finding, error) {
	usable := func(l LAN) bool {
		link, ok := b.link(l)
		return ok && link.Up
	}
	if _, ok := b.Network.Default(false); ok || !slices.ContainsFunc(b.LAN, usable) {
		return nil, nil
	}
	return []Finding{{
		Severity: Failure, Object: "IPv4", Seen: "the box has no default route",
		Why: "nothing direct leaves the LAN, and no upstream is reached",
		Fix: "make the main router the default route: ip route add default via ADDRESS-OF-THE-ROUTER",
	}}, nil
}

// reversePath looks for strict reverse path filtering where the kernel would send answers another way (RFC 3704 section 2.2).
// The greater of the two values counts (ip-sysctl.rst).
func reversePath(_ context.Context, b *Box, link netstate.Link) ([]Finding, error) {
	highest := 0
	for _, name := range []string{"all", link.Name} {
		text, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + name + "/rp_filter")
		if err != nil {
			return nil, err
		}
		var value int
		if _, err := fmt.Sscan(string(text), &value); err != nil {
			return nil, fmt.Errorf("reading rp_filter of %s: %w", name, err)
		}
		highest = max(highest, value)
	}
	if highest != 1 {
		return nil, nil
	}
	for _, a := range b.Network.AddressesOf(link.Index) {
		if !a.Prefix.Addr().Is4() || a.Prefix.Bits() >= 31 {
			continue
		}
		routes, err := netlink.RouteGet(someoneElse(a.Prefix).AsSlice())
		if err != nil || len(routes) == 0 || routes[0].LinkIndex == link.Index {
			continue // it has no route: others say so
		}
		other, _ := b.Network.Link(routes[0].LinkIndex)
		name := "net.ipv4.conf." + strings.ReplaceAll(link.Name, ".", "/") + ".rp_filter"
		return []Finding{{
			Severity: Failure, Object: link.Name,
			Seen:   fmt.Sprintf("rp_filter is strict, and the route to %s is through %s", a.Prefix.Masked(), other.Name),
			Why:    "every packet that comes from clients on " + link.Name + " is dropped",
			Fix:    "sysctl -w " + name + "=2",
			Repair: setting(name, "2"),
		}}, nil
	}
	return nil, nil
}

// someoneElse is an address of a subnet that is not the box's own.
func someoneElse(p netip.Prefix) netip.Addr {
	first := p.Masked().Addr().Next()
	if first == p.Addr() {
		return first.Next()
	}
	return first
}

// leased tells of an address that may become another.
func leased(_ context.Context, b *Box, link netstate.Link) ([]Finding, error) {
	var found []Finding
	for _, a := range b.Network.AddressesOf(link.Index) {
		if a.Leased && a.Prefix.Addr().Is4() {
			found = append(found, Finding{
				Severity: Note, Object: link.Name, Seen: "its address " + a.Prefix.Addr().String() + " is leased, as by DHCP",
				Why: "clients have this address as their gateway: with another one, or none, they are cut off",
				Fix: fmt.Sprintf("ip address change %s dev %s valid_lft forever preferred_lft forever", a.Prefix, link.Name),
			})
		}
	}
	return found, nil
}

// ethernetMTU is what every Ethernet carries (IEEE 802.3).
const ethernetMTU = 1500

// packetSize looks whether the interface takes and sends packets as large as the LAN has.
func packetSize(ctx context.Context, b *Box, link netstate.Link) ([]Finding, error) {
	if !link.Ethernet {
		return nil, nil
	}
	fix := fmt.Sprintf("ip link set %s mtu %d", link.Name, ethernetMTU)
	if link.MTU < ethernetMTU {
		return []Finding{{
			Severity: Warning, Object: link.Name, Seen: fmt.Sprintf("its MTU is %d, and Ethernet carries %d", link.MTU, ethernetMTU),
			Why: "full-size packets of clients are dropped before the box sees them", Fix: fix,
		}}, nil
	}
	route, ok := b.Network.Default(false)
	if !ok || route.LinkIndex != link.Index || !route.Gateway.Is4() || link.MTU > 65535 {
		return nil, nil
	}
	small, err := echoes(ctx, route.Gateway, 100)
	if err != nil || !small {
		return nil, err // it answers no pings at all, which is its right
	}
	if full, err := echoes(ctx, route.Gateway, link.MTU); err != nil || full {
		return nil, err
	}
	return []Finding{{
		Severity: Warning, Object: link.Name, Seen: fmt.Sprintf("its MTU is %d, and packets of that size do not reach the router", link.MTU),
		Why: "large packets that the box sends are lost without a word", Fix: fix,
	}}, nil
}

// echoes reports whether a host answers an unfragmented ping of so many bytes, with its IP header.
func echoes(ctx context.Context, to netip.Addr, size int) (bool, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		})
		if controlErr != nil {
			return controlErr
		}
		return err
	}}
	conn, err := config.ListenPacket(ctx, "ip4:icmp", "0.0.0.0")
	if err != nil {
		return false, fmt.Errorf("opening a socket for pings: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, listenFor/2)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()
	echo := &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: size, Data: make([]byte, size-20-8)}
	request, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: echo}).Marshal(nil)
	if err != nil {
		return false, err
	}
	end := repeat(ctx, func() error {
		_, err := conn.WriteTo(request, &net.IPAddr{IP: to.AsSlice()})
		return err
	})
	answer := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFrom(answer)
		if err != nil {
			return false, errors.Join(unlessTimeout(err), end())
		}
		message, err := icmp.ParseMessage(1, answer[:n])
		if err != nil || !from.(*net.IPAddr).IP.Equal(to.AsSlice()) {
			continue
		}
		if e, ok := message.Body.(*icmp.Echo); ok && message.Type == ipv4.ICMPTypeEchoReply && e.ID == echo.ID && e.Seq == echo.Seq {
			return true, end()
		}
	}
}
