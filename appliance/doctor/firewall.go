package doctor

import (
	"context"
	"fmt"
	"iter"
	"slices"

	"sidegate/appliance/firewall"
	"sidegate/appliance/netstate"
)

// crossing is a client's way through the box, from one LAN interface and in one family.
type crossing struct {
	box    *Box
	rules  *firewall.Ruleset
	lan    netstate.Link
	direct firewall.Packet // the first of a connection that the gateway leaves to the kernel
}

func (c crossing) oneArmed() bool { return c.direct.In == c.direct.Out }

// steered is a packet that the gateway gives to its proxy.
func (c crossing) steered() firewall.Packet {
	p := c.direct
	p.Mark, p.Steered, p.Out = c.box.Marks.Proxy, true, firewall.Interface{}
	return p
}

// answer is what the proxy sends to the client, in the server's name.
func (c crossing) answer() firewall.Packet {
	p := c.direct
	p.Source, p.Destination = p.Destination, p.Source
	p.In, p.Out, p.Mark, p.State = firewall.Interface{}, p.In, 0, firewall.Established
	return p
}

// crossings makes a check of the box's own firewall out of one that looks at one crossing.
func crossings(look func(crossing) *Finding) func(context.Context, *Box) ([]Finding, error) {
	return func(_ context.Context, b *Box) ([]Finding, error) {
		rules, err := b.firewall()
		if err != nil {
			return nil, err
		}
		var found []Finding
		told := map[string]bool{}
		for c := range b.crossings(rules) {
			if f := look(c); f != nil && !told[f.Seen] { // of both families, as a rule
				told[f.Seen] = true
				found = append(found, *f)
			}
		}
		return found, nil
	}
}

// crossings are those of all LAN interfaces that are there, in both families.
func (b *Box) crossings(rules *firewall.Ruleset) iter.Seq[crossing] {
	return func(yield func(crossing) bool) {
		for _, l := range b.LAN {
			link, ok := b.link(l)
			if !ok {
				continue
			}
			for _, ipv6 := range []bool{false, true} {
				if c, ok := b.crossing(rules, link, ipv6); ok && !yield(c) {
					return
				}
			}
		}
	}
}

func (b *Box) crossing(rules *firewall.Ruleset, link netstate.Link, ipv6 bool) (crossing, bool) {
	route, _ := b.Network.Default(ipv6)
	uplink, ok := b.Network.Link(route.LinkIndex)
	own := slices.IndexFunc(b.Network.AddressesOf(link.Index), func(a netstate.Address) bool {
		return a.Prefix.Addr().Is6() == ipv6 && !a.Prefix.Addr().IsLinkLocalUnicast()
	})
	if !ok || own < 0 {
		return crossing{}, false
	}
	in, out := firewall.Interface{Name: link.Name, Index: link.Index}, firewall.Interface{Name: uplink.Name, Index: uplink.Index}
	beside := b.Network.AddressesOf(link.Index)[own].Prefix.Addr()
	return crossing{b, rules, link, firewall.FromClient(beside, in, out, b.Marks.Direct)}, true
}

// dropped is the finding that a rule drops packets of a mark.
func (c crossing) dropped(j firewall.Judgement, what, why string, mark uint32) *Finding {
	if j.Verdict != firewall.Dropped || !j.Certain {
		return nil
	}
	return refused(c.lan.Name, "this box's firewall drops "+what, why, j.Place, firewall.Marked{Mark: mark, Mask: c.box.Marks.Mask})
}

// refused is the finding that a place refuses packets, of a kind that it can be told to accept.
func refused(object, seen, why string, at firewall.Place, k firewall.Kind) *Finding {
	command := firewall.Command(at, k)
	return &Finding{
		Severity: Failure, Object: object, Seen: fmt.Sprintf("%s: %s", seen, at), Why: why,
		Fix:    command + "; for good, " + firewall.Lasting(at, k),
		Repair: &Repair{Does: command, Apply: func(ctx context.Context) error { return firewall.Permit(ctx, at, k) }},
	}
}

func firewallForward(c crossing) *Finding {
	const why = "direct flows do not leave the box"
	if f := c.dropped(c.rules.Forwarded(c.direct), "direct packets", why, c.box.Marks.Direct); f != nil {
		return f
	}
	if !c.box.Asymmetric || !c.oneArmed() {
		return nil
	}
	j, spared := c.rules.HalfSeen(c.direct)
	if spared { // the gateway exempts them from the tracking of connections
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
	j := c.rules.Without(c.box.Marks.OwnTable).Forwarded(c.direct)
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
func legacyFirewall(_ context.Context, b *Box) ([]Finding, error) {
	rules, err := b.firewall()
	if err != nil || rules.Unread == "" {
		return nil, err
	}
	return []Finding{{
		Severity: Warning, Object: rules.Unread, Seen: "there are tables of the old iptables, which doctor cannot read",
		Why: "their rules may drop what the gateway forwards or takes",
		Fix: "look through iptables-legacy-save and ip6tables-legacy-save, or load them by iptables-nft-restore and remove them here",
	}}, nil
}
