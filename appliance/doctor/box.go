package doctor

import (
	"context"
	"fmt"

	"sidegate/appliance/sysctl"
)

func interfaces(_ context.Context, b *Box) ([]Finding, error) {
	var found []Finding
	for _, l := range b.LAN {
		link, ok := b.link(l)
		f := Finding{Severity: Failure, Object: l.Name}
		switch {
		case !ok && l.Name == "auto":
			f.Seen = "there is no default route to tell the LAN interface by"
			f.Why = "nothing is decided for any client"
			f.Fix = "add a default route, or name the interface in the configuration (interfaces: {lan: [eth0]})"
		case !ok:
			f.Seen = "there is no such interface"
			f.Why = "nothing is decided for its clients until it appears"
			f.Fix = "correct interfaces.lan in the configuration; the box has " + names(b)
		case !link.Up:
			f.Object = link.Name
			f.Seen = "it is down, or not connected"
			f.Why = "clients do not reach the box"
			f.Fix = fmt.Sprintf("ip link set %s up, or connect it", link.Name)
		default:
			continue
		}
		found = append(found, f)
	}
	return found, nil
}

func names(b *Box) (list string) {
	for _, l := range b.Network.Links {
		if list != "" {
			list += ", "
		}
		list += l.Name
	}
	return list
}

func parameters(_ context.Context, b *Box) ([]Finding, error) {
	wrong, err := sysctl.Check(b.Parameters)
	var found []Finding
	for _, s := range wrong {
		severity := Warning
		if s.Breaks {
			severity = Failure
		}
		found = append(found, Finding{
			Severity: severity, Object: s.Name, Seen: "it is " + s.Seen, Why: s.Why, Fix: s.Fix(),
			Repair: setting(s.Name, s.Value),
		})
	}
	return found, err
}

// setting is the repair of a kernel parameter. It lasts until the next boot, as sysctl -w does.
func setting(name, value string) *Repair {
	return &Repair{Does: "sysctl -w " + name + "=" + value, Apply: func(context.Context) error {
		_, err := sysctl.Set(name, value)
		return err
	}}
}

func gatewayProblems(_ context.Context, b *Box) ([]Finding, error) {
	var found []Finding
	for _, line := range b.Problems {
		found = append(found, Finding{
			Severity: Failure, Object: "sidegate", Seen: line,
			Why: "the running gateway cannot do all of its work", Fix: "what it says; `sidegate status` tells when it is solved",
		})
	}
	return found, nil
}
