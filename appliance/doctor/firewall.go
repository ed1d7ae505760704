package doctor

import (
	"context"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"sidegate/appliance/firewall"
	"sidegate/appliance/netstate"
)

// outside are addresses of documentation (RFC 5737, RFC 3849): no firewall has rules about them.
var outside = map[bool]netip.Addr{false: netip.MustParseAddr("198.51.100.1"), true: netip.MustParseAddr("2001:db8::1")}

// crossing is a client's packet at one LAN interface, in one family, and the ways it may take.
type crossing struct {
	box    *Box
	rules  *firewall.Ruleset
	lan    netstate.Link
	uplink netstate.Link
	client netip.AddrPort
	server netip.AddrPort
}

func (c crossing) oneArmed() bool { return c.lan.Index == c.uplink.Index }

// direct is a packet that the gateway leaves to the kernel.
func (c crossing) direct(state firewall.State) firewall.Packet {
	return firewall.Packet{
		Source: c.client, Destination: c.server, Protocol: unix.IPPROTO_TCP, Mark: c.box.Marks.Direct, State: state,
		In: firewall.Interface{Name: c.lan.Name, Index: c.lan.Index}, Out: firewall.Interface{Name: c.uplink.Name, Index: c.uplink.Index},
	}
}

// steered is a packet that the gateway gives to its proxy.
func (c crossing) steered() firewall.Packet {
	p := c.direct(firewall.New)
	p.Mark, p.Steered, p.Out = c.box.Marks.Proxy, true, firewall.Interface{}
	return p
}

// answer is what the proxy sends to the client, in the server's name.
func (c crossing) answer() firewall.Packet {
	return firewall.Packet{
		Source: c.server, Destination: c.client, Protocol: unix.IPPROTO_TCP, State: firewall.Established,
		Out: firewall.Interface{Name: c.lan.Name, Index: c.lan.Index},
	}
}

// crossings makes a check of the box's own firewall out of one that looks at one crossing.
func crossings(look func(crossing) *Finding) func(context.Context, *Box) ([]Finding, error) {
	return func(ctx context.Context, b *Box) ([]Finding, error) {
		rules, err := firewall.Read(ctx)
		if err != nil {
			return nil, err
		}
		var found []Finding
		told := map[string]bool{}
		for _, l := range b.LAN {
			link, ok := b.link(l)
			if !ok {
				continue
			}
			for _, ipv6 := range []bool{false, true} {
				c, ok := b.crossing(rules, link, ipv6)
				if !ok {
					continue
				}
				if f := look(c); f != nil && !told[f.Seen] { // of both families, as a rule
					told[f.Seen] = true
					found = append(found, *f)
				}
			}
		}
		return found, nil
	}
}

func (b *Box) crossing(rules *firewall.Ruleset, link netstate.Link, ipv6 bool) (crossing, bool) {
	route, ok := b.Network.Default(ipv6)
	if !ok {
		return crossing{}, false
	}
	c := crossing{box: b, rules: rules, lan: link, server: netip.AddrPortFrom(outside[ipv6], 443)}
	c.uplink, ok = b.Network.Link(route.LinkIndex)
	for _, a := range b.Network.AddressesOf(link.Index) {
		if a.Prefix.Addr().Is6() == ipv6 && !a.Prefix.Addr().IsLinkLocalUnicast() {
			c.client = netip.AddrPortFrom(a.Prefix.Addr().Next(), 40000)
		}
	}
	return c, ok && c.client.IsValid()
}

// dropped is the finding that a rule drops packets of a mark.
func (c crossing) dropped(j firewall.Judgement, what, why string, mark uint32) *Finding {
	if j.Verdict != firewall.Dropped || !j.Certain {
		return nil
	}
	mask := c.box.Marks.Mask
	return &Finding{
		Severity: Failure, Object: c.lan.Name, Seen: fmt.Sprintf("this box's firewall drops %s: %s", what, j.Place), Why: why,
		Fix: firewall.Command(j.Place, mark, mask) + "; for good, " + firewall.Lasting(j.Place, mark, mask),
		Repair: &Repair{Does: firewall.Command(j.Place, mark, mask), Apply: func(ctx context.Context) error {
			return firewall.Permit(ctx, j.Place, mark, mask)
		}},
	}
}

func firewallForward(c crossing) *Finding {
	const why = "direct flows do not leave the box"
	if f := c.dropped(c.rules.Forwarded(c.direct(firewall.New)), "direct packets", why, c.box.Marks.Direct); f != nil {
		return f
	}
	if !c.box.Asymmetric || !c.oneArmed() {
		return nil
	}
	// What is dropped for its state alone the gateway exempts from the tracking of connections.
	j := c.rules.Forwarded(c.direct(firewall.Invalid))
	if c.rules.Forwarded(c.direct(firewall.Untracked)).Verdict != firewall.Dropped {
		return nil
	}
	return c.dropped(j, "what follows the first packet of a direct connection, whose other half does not pass here",
		"direct connections do not come about", c.box.Marks.Direct)
}

func firewallInput(c crossing) *Finding {
	if !c.box.Proxies {
		return nil
	}
	return c.dropped(c.rules.Delivered(c.steered()), "packets that are for the proxy", "proxied flows, and DNS if it is answered here, time out", c.box.Marks.Proxy)
}

// firewallOutput has no repair: the proxy's answers have no mark.
func firewallOutput(c crossing) *Finding {
	if !c.box.Proxies {
		return nil
	}
	f := c.dropped(c.rules.Sent(c.answer()), "the proxy's answers, which have the server's address", "proxied flows time out", 0)
	if f != nil {
		f.Fix, f.Repair = "remove the rule, or accept before it what leaves by "+c.lan.Name+" and belongs to an established connection", nil
	}
	return f
}

func masquerade(c crossing) *Finding {
	if !c.box.Asymmetric || !c.oneArmed() {
		return nil
	}
	j := c.rules.Without(c.box.Marks.OwnTable).Forwarded(c.direct(firewall.New))
	if j.Verdict != firewall.Translated || !j.Certain {
		return nil
	}
	return &Finding{
		Severity: Warning, Object: c.lan.Name, Seen: "direct flows are translated to the box's address: " + j.Place.String(),
		Why: "servers do not see the client, and replies come back through the box, though return_path is asymmetric",
		Fix: "remove the rule (nft -a list ruleset shows its handle), or say return_path: symmetric",
	}
}

// legacyFirewall: what iptables-nft cannot translate cannot be judged.
func legacyFirewall(ctx context.Context, _ *Box) ([]Finding, error) {
	rules, err := firewall.Read(ctx)
	if err != nil || rules.Unread == "" {
		return nil, err
	}
	return []Finding{{
		Severity: Warning, Object: rules.Unread, Seen: "there are tables of the old iptables, which doctor cannot read",
		Why: "their rules may drop what the gateway forwards or takes",
		Fix: "look through iptables-legacy-save and ip6tables-legacy-save, or load them by iptables-nft-restore and remove them here",
	}}, nil
}
