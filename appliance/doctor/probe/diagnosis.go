package probe

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"sidegate/appliance/doctor"
	"sidegate/appliance/firewall"
	"sidegate/appliance/policy"
)

const symmetric = "return_path: symmetric in the configuration"

// forwarding connects with the gateway bypassed, and concludes.
func (r *run) forwarding(ctx context.Context) error {
	c, err := r.try(ctx, r.by(r.Bypass))
	if err != nil {
		return err
	}
	r.step(c.left.IsValid(), "it did not", "past the gateway's programs, the client's first packet leaves the box by %s", r.uplink.Name)
	if !c.left.IsValid() {
		return r.lostInBox(ctx, c)
	}
	r.step(c.answered, "none came"+c.said(), "the answer of %s comes to the client", r.target)
	if !c.answered {
		return r.lostBeyond(ctx, c)
	}
	r.step(c.followed || c.arrived, "they did not"+c.said(), "the packets that follow leave the box")
	if !c.followed && !c.arrived {
		return r.lostByState(ctx)
	}
	r.step(c.arrived, "it repeats its answer"+c.said(), "%s receives them", r.target)
	if !c.arrived {
		r.conclude(Path, symmetric+"; or let the firewall between this box and the internet pass connections that it sees half of",
			"a stateful firewall between this box and the internet drops what follows the first packet of a half-seen connection")
		return nil
	}
	switch {
	case c.left.Addr() != r.is():
		r.Conclusion = fmt.Sprintf("plain forwarding works; the box translates it to %s, so replies come back through the box", c.left.Addr())
	case c.byBox:
		r.Conclusion = "plain forwarding works, and replies come back through the box"
	default:
		r.Conclusion = "plain forwarding works, and replies go past the box"
	}
	return nil
}

// said is how somebody refused.
func (c course) said() string {
	switch {
	case c.refuser.IsValid():
		return fmt.Sprintf("; %s says by ICMP that it is unreachable", c.refuser)
	case c.reset:
		return "; it was reset"
	}
	return ""
}

// lostInBox names what keeps the box from forwarding at all.
func (r *run) lostInBox(ctx context.Context, c course) error {
	fix := "sidegate doctor names what is wrong with the box"
	parameter := "net.ipv4.ip_forward"
	if r.IPv6 {
		parameter = "net.ipv6.conf.all.forwarding"
	}
	if value, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(parameter, ".", "/")); err == nil && strings.TrimSpace(string(value)) == "0" {
		r.conclude(Box, "sysctl -w "+parameter+"=1", "this box does not forward %s: %s is 0", r.Family, parameter)
		return nil
	}
	place, err := r.firewall(ctx, firewall.New)
	switch {
	case err != nil:
		return err
	case place != "":
		r.conclude(Box, "let it accept what comes in by "+r.LAN.Name+" and leaves by "+r.uplink.Name, "this box's firewall drops forwarded packets: %s", place)
	case r.uplink.Index == r.LAN.Index || r.IPv6:
		r.conclude(Box, fix, "this box drops the client's packet: by its firewall, a route, or a program on %s", r.LAN.Name)
	default:
		r.conclude(Box, fix, "this box drops the client's packet: by its firewall, rp_filter, a route, or a program on %s", r.LAN.Name)
	}
	if c.refuser.IsValid() {
		r.Conclusion += c.said()
	}
	return nil
}

// lostByState: what comes after the SYN does not leave.
func (r *run) lostByState(ctx context.Context) error {
	place, err := r.firewall(ctx, firewall.Invalid)
	if err != nil {
		return err
	}
	if place != "" {
		place = ": " + place
	}
	r.conclude(BoxState, "remove the rule, or accept before it what comes in by "+r.LAN.Name+" and leaves by "+r.uplink.Name,
		"this box's own firewall drops what follows the first packet of a half-seen connection%s", place)
	return nil
}

// firewall asks the box's firewall who drops the client's packets; nobody: it is empty.
func (r *run) firewall(ctx context.Context, state firewall.State) (string, error) {
	rules, err := firewall.Read(ctx)
	if err != nil {
		return "", err
	}
	j := rules.Forwarded(firewall.Packet{
		Source: netip.AddrPortFrom(r.is(), 40000), Destination: r.target, Protocol: unix.IPPROTO_TCP, Mark: r.Mark, State: state,
		In: firewall.Interface{Name: r.LAN.Name, Index: r.LAN.Index}, Out: firewall.Interface{Name: r.uplink.Name, Index: r.uplink.Index},
	})
	if j.Verdict != firewall.Dropped {
		return "", nil
	}
	return j.Place.String(), nil
}

// lostBeyond tells whom the router does not like: the client, or the client behind the box.
func (r *run) lostBeyond(ctx context.Context, first course) error {
	if r.routerMAC == [6]byte{} {
		r.conclude(Path, "look at what is beyond "+r.uplink.Name+": a firewall, or a missing route back to the LAN",
			"the client's packet leaves by %s as %s, and no answer comes%s", r.uplink.Name, first.left.Addr(), first.said())
		return nil
	}
	c, err := r.try(ctx, r.direct)
	if err != nil {
		return err
	}
	r.step(c.answered, "none came either"+c.said(), "it does if the client asks the router itself")
	if c.answered {
		r.conclude(Router, symmetric, "the router %s answers the client itself, and not through this box: it ties addresses to MAC addresses, "+
			"or something there sees replies only", r.router)
		return nil
	}
	r.conclude(Stranger, "--as an address that the router knows and nobody uses now; if that fails too, "+symmetric,
		"the router %s, or what is behind it, answers the box and no client of the address %s%s", r.router, r.is(), first.said())
	return nil
}

// throughGateway sends the same as clients do, and compares with the policy.
func (r *run) throughGateway(ctx context.Context) error {
	if r.Through == nil {
		return nil
	}
	c, err := r.try(ctx, r.by(r.Through))
	if err != nil {
		return err
	}
	want, err := r.Expect(ctx, r.mac, netip.AddrPortFrom(r.is(), 0), r.target)
	if err != nil {
		return err
	}
	got := c.verdict()
	agrees := got == want.Verdict || want.Sniffed && got == policy.Proxy
	r.step(agrees, fmt.Sprintf("they make %s of it%s", got, c.said()), "the gateway's programs do as the policy says: %s", want.Verdict)
	r.Carried = c.arrived && got == policy.Direct
	r.Translated = r.Carried && c.left.Addr() != r.is()
	if !agrees && r.Lost == Nowhere {
		r.conclude(Gateway, "sidegate status; and sidegate explain tells the rule", "the gateway's programs make %s of it, where the policy says %s", got, want.Verdict)
	}
	return nil
}

// verdict is what was made of a connection, as it looks from outside.
func (c course) verdict() policy.Verdict {
	switch {
	case c.left.IsValid():
		return policy.Direct
	case c.answered:
		return policy.Proxy
	}
	return policy.Block
}

// Finding is what the result is to the doctor; nil if all is well. Symmetric tells that the configuration wants direct flows
// translated, or finds out by itself.
func (r Result) Finding(symmetric bool) *doctor.Finding {
	if r.Lost == Nowhere {
		return nil
	}
	f := &doctor.Finding{
		Check: "probe", Severity: doctor.Failure, Object: r.Interface + " " + r.Family, Seen: r.Conclusion,
		Why: "direct connections of clients fail", Fix: r.Fix,
	}
	network := r.Lost == Router || r.Lost == Path || r.Lost == Stranger
	switch {
	case r.Lost == Unknown || r.Lost == Target:
		f.Severity, f.Why = doctor.Warning, "the probe could not look"
	case r.Lost == Gateway:
		f.Why = "clients do not get what the policy says"
	case r.Translated, network && symmetric:
		f.Severity, f.Why = doctor.Note, "the gateway translates direct connections, as it must here; without it they fail"
		f.Fix = "nothing, as long as the gateway runs"
	case r.Carried:
		f.Severity, f.Why = doctor.Warning, "the running gateway's direct connections are carried all the same; without it they fail"
	case r.Lost == Stranger:
		f.Severity, f.Why = doctor.Warning, "direct connections fail if the router treats known clients alike"
	}
	return f
}
