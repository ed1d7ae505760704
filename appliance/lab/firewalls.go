package lab

import (
	"context"
	"fmt"
	"strings"
)

// Networks that mind connections of which they see one half, as a side router makes them. Each hindrance lasts as long as
// the lab.

// Firewall is the host that AddFirewall adds.
const Firewall = "firewall"

// DropHalfSeen makes the host drop what its connection tracking calls invalid among the packets that it forwards, as
// stateful firewalls do. Of a TCP connection whose replies go another way it lets the SYN through, and nothing after it.
func (h *Host) DropHalfSeen(ctx context.Context) error {
	if err := h.nft(ctx, "table inet half-seen { chain forward { type filter hook forward priority 0; ct state invalid drop; }; }"); err != nil {
		return fmt.Errorf("making %s drop half-seen connections: %w", h.name, err)
	}
	// Else connections that begin in the middle, as after a restart of the firewall, are taken as seen.
	return h.SetSysctl("net.netfilter.nf_conntrack_tcp_loose", "0")
}

// TieAddresses makes the router drop packets from a LAN host's address that do not come from its MAC address, as source
// guards of routers and switches do. It holds for the hosts that the LAN has now.
func (l *Lab) TieAddresses(ctx context.Context) error {
	var rules strings.Builder
	for _, h := range l.Hosts() {
		if i := h.Interface(); i.segment == &lan && h.name != Router {
			fmt.Fprintf(&rules, "ip saddr %s ether saddr != %s drop; ip6 saddr %s ether saddr != %[2]s drop; ", h.Addr4(), i.MAC, h.Addr6())
		}
	}
	err := l.Host(Router).nft(ctx, "table inet ties { chain from-lan { type filter hook prerouting priority -300; iifname lan jump tied; }; chain tied { "+rules.String()+"}; }")
	if err != nil {
		return fmt.Errorf("tying addresses to MAC addresses on the router: %w", err)
	}
	return nil
}

// AddFirewall puts a stateful firewall between the side router and the router, 192.168.0.4. All that these two send to each
// other or through each other passes it, in both directions; a machine in the side router's place has its default route to be set by
// the caller. Replies of a client's direct flows go from the router to
// the client, so of those it sees one half.
func (l *Lab) AddFirewall(ctx context.Context) (*Host, error) {
	h, err := l.build(site{name: Firewall, interfaces: []attachment{{"eth0", &lan, 4}}, forwards: true, gateway: 1})
	if err == nil {
		err = h.DropHalfSeen(ctx)
	}
	sidegate, router := l.Host(Sidegate), l.Host(Router)
	for _, way := range []struct {
		of              *Host
		to, family, via string
	}{
		{sidegate, "default", "-4", "192.168.0.4"},
		{sidegate, "default", "-6", "fd00:c0a8::4"},
		{router, sidegate.Addr4().String(), "-4", "192.168.0.4"},
		{router, sidegate.Addr6().String(), "-6", "fd00:c0a8::4"},
	} {
		if err == nil && !way.of.replaced {
			_, err = way.of.Exec(ctx, "ip", way.family, "route", "replace", way.to, "via", way.via)
		}
	}
	if err == nil && !sidegate.replaced {
		err = l.verify(ctx, sidegate, l.Host(Server))
	}
	if err != nil {
		return nil, fmt.Errorf("putting a firewall between the side router and the router: %w", err)
	}
	return h, nil
}

// nft runs one nftables command.
func (h *Host) nft(ctx context.Context, command string) error {
	binary, err := find("nft", "nftables")
	if err != nil {
		return err
	}
	_, err = h.Exec(ctx, binary, command)
	return err
}
