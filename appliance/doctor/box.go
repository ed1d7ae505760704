package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
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
	return append(found, overlooked(b)...), nil
}

// overlooked are networks that auto leaves out: it takes the side of the default route only.
func overlooked(b *Box) (found []Finding) {
	if len(b.LAN) != 1 || b.LAN[0].Name != "auto" || b.LAN[0].Index == 0 {
		return nil
	}
	for _, link := range b.Network.Links {
		addresses := b.Network.AddressesOf(link.Index)
		at := slices.IndexFunc(addresses, func(a netstate.Address) bool { return a.Prefix.Addr().IsPrivate() && !a.Prefix.IsSingleIP() })
		if at < 0 || !link.Up || link.Index == b.LAN[0].Index {
			continue
		}
		lan, _ := b.link(b.LAN[0])
		found = append(found, Finding{
			Severity: Note, Object: link.Name, Seen: fmt.Sprintf("it is up and has %s, and auto takes only %s, where the default route is", addresses[at].Prefix, lan.Name),
			Why: "what comes by it is not decided: it goes as the kernel routes it, past every rule",
			Fix: fmt.Sprintf("if clients are there, name it in the configuration: interfaces: {lan: [%s]}", link.Name),
		})
	}
	return found
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

// kernelFloor is the oldest kernel that has tcx links.
var kernelFloor = [2]int{6, 6}

func kernel(context.Context, *Box) ([]Finding, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, fmt.Errorf("asking for the kernel's version: %w", err)
	}
	release := unix.ByteSliceToString(name.Release[:])
	var version [2]int
	if _, err := fmt.Sscanf(release, "%d.%d", &version[0], &version[1]); err != nil {
		return nil, fmt.Errorf("reading the kernel's version %q: %w", release, err)
	}
	var found []Finding
	if slices.Compare(version[:], kernelFloor[:]) < 0 {
		found = append(found, Finding{
			Severity: Failure, Object: "Linux " + release, Seen: fmt.Sprintf("it is older than %d.%d", kernelFloor[0], kernelFloor[1]),
			Why: "sidegate does not start: it attaches its programs by tcx", Fix: "boot a newer kernel",
		})
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); errors.Is(err, fs.ErrNotExist) {
		found = append(found, Finding{
			Severity: Failure, Object: "BTF", Seen: "the kernel does not describe its types: there is no /sys/kernel/btf/vmlinux",
			Why: "sidegate does not start: its programs cannot be fitted to the kernel",
			Fix: "boot a kernel with CONFIG_DEBUG_INFO_BTF, as those of distributions are, and mount /sys",
		})
	}
	return found, nil
}

func programs(_ context.Context, b *Box, link netstate.Link) ([]Finding, error) {
	others, err := b.Before(link.Index)
	var found []Finding
	for _, p := range others {
		found = append(found, Finding{
			Severity: Warning, Object: link.Name, Seen: fmt.Sprintf("packets meet the BPF program %q (id %d) before the gateway's", p.Name, p.ID),
			Why: "what it passes (TCX_PASS) never meets the policy: flows that are to be proxied or blocked go direct",
			Fix: "stop the program's owner, or attach it behind the gateway's; `bpftool link` tells who holds it",
		})
	}
	return found, err
}
