package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"sidegate/appliance/admin"
)

type statusCmd struct {
	JSON bool `help:"Print JSON."`
	socketFlag
}

func (c *statusCmd) Run(ctx context.Context, e *env) error {
	s, err := c.client(e).Status(ctx)
	if err != nil {
		return err
	}
	if c.JSON {
		return e.json(s)
	}
	file := s.Config.File
	if file == "" {
		file = "the built-in default"
	}
	t := e.table("")
	t.row("sidegate", fmt.Sprintf("%s, running for %s (process %d)", s.Version, duration(time.Since(s.Started)), s.PID))
	t.row("configuration", fmt.Sprintf("%s: %s, default %s, on failure %s, return path %s",
		file, plural(s.Config.Rules, "rule"), s.Config.Default, s.Config.OnFailure, s.Config.ReturnPath))
	t.row("policy", fmt.Sprintf("generation %d, %s", s.Generation, reloadText(s.LastReload)))
	t.row("LAN", interfacesText(s.Interfaces))
	t.row("IPv6", ipv6Text(s))
	t.row("relaying", fmt.Sprintf("%s, %s", plural(s.Proxy.Connections, "TCP connection"), plural(s.Proxy.Sessions, "UDP session")))
	if n := s.Sniff; n != (admin.Sniff{}) {
		t.row("sniffed", fmt.Sprintf("%d TLS, %d HTTP, %d QUIC; %d without a name, %d not in time", n.TLS, n.HTTP, n.QUIC, n.Nothing, n.Timeout))
	}
	if n := s.DNS; n != nil {
		t.row("DNS", fmt.Sprintf("%d questions: %d from the cache, %d failed; %s kept", n.Queries, n.Cached, n.Failed, plural(n.Entries, "answer")))
	}
	t.print()

	tables := e.table("TABLE", "ENTRIES", "CAPACITY", "FULL")
	for _, name := range slices.Sorted(maps.Keys(s.Tables)) {
		n := s.Tables[name]
		tables.row(name, n.Entries, n.Max, percent(n.Entries, n.Max))
	}
	tables.section()
	traffic := e.table("OUTBOUND", "TCP", "UDP", "FAILED", "UP", "DOWN")
	for _, name := range slices.Sorted(maps.Keys(s.Proxy.Outbounds)) {
		n := s.Proxy.Outbounds[name]
		traffic.row(name, n.Connections, n.Sessions, n.Failures, size(n.BytesUp), size(n.BytesDown))
	}
	traffic.section()
	if s.DNS != nil {
		upstreams := e.table("DNS UPSTREAM", "QUESTIONS", "FAILED")
		for _, name := range slices.Sorted(maps.Keys(s.DNS.Upstreams)) {
			n := s.DNS.Upstreams[name]
			upstreams.row(name, n.Queries, n.Failures)
		}
		upstreams.section()
	}
	nonZero(e, "DROPPED OR REFUSED", "PACKETS", s.Drops)
	nonZero(e, "REFUSED BY THE PROXY", "COUNT", s.Proxy.Refused)
	if s.DNS != nil {
		nonZero(e, "QUESTIONS DROPPED", "COUNT", s.DNS.Dropped)
	}
	if len(s.Problems) > 0 {
		fmt.Fprintln(e.stdout, "\nProblems:")
		for _, p := range s.Problems {
			fmt.Fprintln(e.stdout, "  "+p)
		}
	}
	return nil
}

func reloadText(r admin.Reload) string {
	if r.OK {
		return "read " + duration(time.Since(r.Time)) + " ago"
	}
	return "not the file as it is: it was refused " + duration(time.Since(r.Time)) + " ago: " + strings.ReplaceAll(r.Error, "\n", "; ")
}

func interfacesText(all []admin.Interface) string {
	var texts []string
	for _, i := range all {
		state := ""
		switch {
		case i.Index == 0:
			state = " (absent)"
		case !i.Attached:
			state = " (not attached)"
		}
		if i.Port != "" {
			state = " (" + i.Port + " is its port)" + state
		}
		texts = append(texts, i.Name+state)
	}
	return strings.Join(texts, ", ")
}

// ipv6Text says who makes clients use the box for IPv6, and where it does so itself.
func ipv6Text(s admin.Status) string {
	var on []string
	for _, i := range s.Interfaces {
		if i.Advertised {
			on = append(on, i.Name)
		}
	}
	switch {
	case s.Config.IPv6 != "advertise":
		return s.Config.IPv6
	case len(on) == 0:
		return "advertise (nowhere at present)"
	}
	return "advertise, on " + strings.Join(on, ", ")
}

func nonZero(e *env, what, unit string, counts map[string]uint64) {
	t := e.table(what, unit)
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		if counts[name] > 0 {
			t.row(name, counts[name])
		}
	}
	t.section()
}

type rulesCmd struct {
	JSON bool `help:"Print JSON."`
	socketFlag
}

// Help says how rules are counted.
func (rulesCmd) Help() string {
	return `Rules count from 1 in the order of the file, and the first that matches decides. Implicit rules stand before
them: they leave the traffic of upstream proxies direct. FLOWS counts since the policy came into force.`
}

func (c *rulesCmd) Run(ctx context.Context, e *env) error {
	rules, err := c.client(e).Rules(ctx)
	if err != nil {
		return err
	}
	if c.JSON {
		return e.json(rules)
	}
	t := e.table("#", "RULE", "OUTCOME", "FLOWS", "MATCHES")
	for _, r := range rules {
		number := fmt.Sprint(r.Index + 1)
		switch {
		case r.Implicit:
			number = "implicit"
		case r.Index < 0:
			number = "default"
		}
		name := r.Name
		if name == "default" || strings.HasPrefix(name, "#") {
			name = "-"
		}
		t.row(number, name, decided(r.Verdict, r.Outbound, r.Translated), r.Flows, r.Matches)
	}
	t.print()
	return nil
}

type reloadCmd struct {
	JSON bool `help:"Print JSON."`
	socketFlag
}

// Help says what happens on a failure.
func (reloadCmd) Help() string {
	return `Live flows keep the verdict that they began with. A configuration that is refused changes nothing.
Exit status: 0 if it was taken, 1 if not.`
}

func (c *reloadCmd) Run(ctx context.Context, e *env) error {
	r, err := c.client(e).Reload(ctx)
	if err != nil {
		return err
	}
	if c.JSON {
		if err := e.json(r); err != nil {
			return err
		}
	}
	if !r.OK {
		if !c.JSON {
			fmt.Fprintln(e.stderr, r.Error)
			fmt.Fprintln(e.stderr, "sidegate: the configuration was not taken; the one before stays in force")
		}
		return exit(1)
	}
	if c.JSON {
		return nil
	}
	for _, w := range r.Warnings {
		fmt.Fprintln(e.stderr, w)
	}
	fmt.Fprintf(e.stdout, "generation %d is in force\n", r.Generation)
	return nil
}
