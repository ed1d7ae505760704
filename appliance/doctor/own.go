package doctor

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"sidegate/appliance/firewall"
)

// firewallOwn follows the box's own proxied connections by lo. What firewall-input has a fix for is left to it: the same mark is on both.
func firewallOwn(_ context.Context, b *Box) ([]Finding, error) {
	if b.Own == nil || b.Own.Problem != nil || !b.Proxies {
		return nil, nil
	}
	rules, err := b.firewall()
	if err != nil {
		return nil, err
	}
	told := map[firewall.Place]bool{}
	for c := range b.crossings(rules) {
		if j := rules.Delivered(c.steered()); j.Verdict == firewall.Dropped && j.Certain {
			told[j.Place] = true
		}
	}
	var found []Finding
	tell := func(j firewall.Judgement, what string) {
		does := map[firewall.Verdict]string{firewall.Dropped: "drops ", firewall.Translated: "translates the source of "}[j.Verdict]
		if does == "" || !j.Certain || told[j.Place] {
			return
		}
		told[j.Place] = true
		found = append(found, *refused(firewall.Loopback.Name, "this box's firewall "+does+what, "proxied connections of the box itself time out, or are refused",
			j.Place, firewall.By(firewall.Loopback)))
	}
	var answers []firewall.Packet
	for _, source := range b.Own.Sources {
		tcp, answer := firewall.FromBox(source, unix.IPPROTO_TCP)
		datagram, answered := firewall.FromBox(source, unix.IPPROTO_UDP)
		tcp.Mark = b.Marks.Proxy // the socket's; a datagram has none before it is on lo
		for _, first := range []firewall.Packet{tcp, datagram} {
			tell(rules.Looped(first, b.Marks.Proxy), "what its own programs send to the proxy, by lo")
		}
		answers = append(answers, answer, answered)
	}
	clear(told) // another mark is on these
	for _, f := range answers {
		f.Mark = b.Marks.Daemon
		tell(rules.Looped(f, f.Mark), "the proxy's answers to its own programs, which come by lo and have the server's address")
	}
	return found, nil
}

func ownConnections(_ context.Context, b *Box) ([]Finding, error) {
	if b.Own == nil || b.Own.Problem == nil {
		return nil, nil
	}
	f := Finding{
		Severity: Warning, Object: "the box", Seen: b.Own.Problem.Error(),
		Why: "connections of the box itself follow no rule, though the configuration says local: true; clients are served as ever",
		Fix: "mount -t cgroup2 none /sys/fs/cgroup, or name a directory of cgroup v2 in the configuration (gateway: {cgroup: DIRECTORY})",
	}
	if errors.Is(b.Own.Problem, unix.EPERM) || errors.Is(b.Own.Problem, unix.EACCES) {
		f.Fix = "in a container, let it attach BPF programs to the host's cgroups, or run sidegate on the host; " +
			"or a program is there that admits no other: bpftool cgroup show DIRECTORY effective"
	}
	return []Finding{f}, nil
}
