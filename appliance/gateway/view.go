package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"sidegate/appliance/admin"
	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/policy"
)

// The gateway as package admin shows it.
var _ admin.Gateway = (*gateway)(nil)

func (g *gateway) Status(context.Context) (admin.Status, error) {
	force := g.current()
	d, err := g.datapath.Status()
	if err != nil {
		return admin.Status{}, err
	}
	s := admin.Status{
		Version:      g.options.Version,
		PID:          os.Getpid(),
		Started:      g.started,
		Config:       force.describe(g.path.describe(force)),
		Generation:   d.Generation,
		OwnAddresses: force.desired.OwnAddresses,
		LastReload:   force.lastReload,
		Problems:     g.problems(),
		Drops:        d.Drops,
		Tables: map[string]admin.Table{
			"flows":   admin.Table(d.Flows),
			"crowd":   admin.Table(d.Crowd),
			"clients": admin.Table(d.Clients),
		},
		Proxy: g.proxyStatus(),
		Sniff: g.sniffStatus(),
		DNS:   g.dnsStatus(),
	}
	for _, l := range force.lan {
		name := l.device
		if name == "" {
			name = l.name
		}
		s.Interfaces = append(s.Interfaces, admin.Interface{
			Name: name, Port: l.port, Index: l.index, Attached: slices.Contains(d.Links, datapath.LANLink(l.device)),
			Advertised: l.index != 0 && g.advertiser.Advertised(l.index),
		})
	}
	return s, nil
}

func (f inForce) describe(way string) admin.Config {
	return admin.Config{
		File:          f.plan.Path,
		Digest:        f.plan.Digest,
		Rules:         len(f.policy.file.Rules),
		ImplicitRules: f.policy.implicit,
		Default:       f.policy.file.Default,
		OnFailure:     f.plan.Config.OnFailure.String(),
		ReturnPath:    way,
		IPv6:          string(f.plan.Config.IPv6),
	}
}

func (g *gateway) proxyStatus() admin.Proxy {
	stats := g.proxy.Stats()
	p := admin.Proxy{
		Connections: stats.Connections,
		Sessions:    stats.Sessions,
		Flows:       stats.Flows,
		Outbounds:   map[string]admin.Traffic{},
		Refused:     map[string]uint64{},
	}
	for name, t := range stats.Outbounds {
		p.Outbounds[name] = admin.Traffic(t)
	}
	for reason, n := range stats.Refused {
		p.Refused[reason.String()] = n
	}
	return p
}

func (g *gateway) Flows(context.Context) ([]admin.Flow, error) {
	flows, err := g.datapath.Flows()
	if err != nil {
		return nil, err
	}
	out := make([]admin.Flow, len(flows))
	for i, f := range flows {
		out[i] = admin.Flow{
			Network: f.Protocol, Source: f.Source, Destination: f.Destination,
			Verdict: f.Verdict, Translated: f.Translated, Outbound: f.Outbound, Rule: f.Rule, Generation: f.Generation, State: f.State,
			Packets: f.Packets, Bytes: f.Bytes, Age: f.Age.Seconds(), Idle: f.Idle.Seconds(),
			ClientMAC: f.ClientMAC, Interface: f.Interface, Process: (*admin.Process)(f.Process),
		}
	}
	return out, nil
}

// Names lists what clients have learned.
func (g *gateway) Names(context.Context) ([]admin.Name, error) {
	return namesOf(g.datapath.Names()), nil
}

func namesOf(known []datapath.KnownName) []admin.Name {
	out := make([]admin.Name, len(known))
	for i, n := range known {
		out[i] = admin.Name{
			Client: n.Client, Address: n.Address, Names: n.Names, Source: n.Source.String(),
			Age: n.Age.Seconds(), Expires: n.Expires.Seconds(),
		}
	}
	return out
}

func (g *gateway) sniffStatus() admin.Sniff {
	s := g.proxy.Stats().Sniffed
	return admin.Sniff{TLS: s.TLS, HTTP: s.HTTP1 + s.HTTP2, QUIC: s.QUIC, Nothing: s.Nothing, Timeout: s.TimedOut}
}

func (g *gateway) dnsStatus() *admin.DNS {
	if g.dns == nil || g.resolution() == nil {
		return nil
	}
	s := g.dns.Stats()
	d := &admin.DNS{
		Queries: s.Queries, Cached: s.Cached, Stale: s.Stale, Failed: s.Failed, Truncated: s.Truncated,
		Taught: s.Taught, Filtered: s.Filtered, Connections: s.Connections, Entries: s.Entries,
		Upstreams: map[string]admin.DNSUpstream{},
		Dropped:   map[string]uint64{},
	}
	for name, u := range s.Upstreams {
		d.Upstreams[name] = admin.DNSUpstream(u)
	}
	for reason, n := range s.Dropped {
		d.Dropped[reason.String()] = n
	}
	return d
}

func (g *gateway) Rules(context.Context) ([]admin.Rule, error) {
	counts, err := g.datapath.Rules()
	if err != nil {
		return nil, err
	}
	force := g.current()
	if len(counts) != len(force.policy.policy.Rules)+1 {
		return nil, errors.New("reading the rules: the policy is just being replaced; ask again")
	}
	rules := make([]admin.Rule, len(counts))
	for i, n := range counts {
		rules[i] = admin.Rule{Name: n.Name, Matches: "everything else", Verdict: n.Verdict, Outbound: n.Outbound, Flows: n.Flows}
		rules[i].Translated = force.policy.translated(n.Index, force.desired.ReturnPath)
		rules[i].Index, rules[i].Implicit = force.policy.index(n.Index)
		if n.Index >= 0 {
			rules[i].Matches = matches(force.policy.policy.Rules[n.Index])
		}
	}
	return rules, nil
}

func (g *gateway) FlowCounts(context.Context) ([]admin.FlowCount, error) {
	counts, err := g.datapath.FlowCounts()
	if err != nil {
		return nil, err
	}
	out := make([]admin.FlowCount, len(counts))
	for i, n := range counts {
		out[i] = admin.FlowCount(n)
	}
	return out, nil
}

// Explain asks the policy in force, and the kernel.
func (g *gateway) Explain(_ context.Context, facts map[string][]string) (admin.LiveExplanation, error) {
	flow, err := ParseFlow(facts)
	if err != nil {
		return admin.LiveExplanation{}, admin.BadRequest{Err: err}
	}
	force := g.current()
	flow = sentByTheBox(flow, force.desired.Own)
	var sources admin.Sources
	if len(flow.Names) == 0 && flow.Destination.Addr().IsValid() {
		sources.Names = namesOf(g.datapath.NamesOf(flow.Source.Addr(), flow.SourceMAC, flow.Destination.Addr()))
		flow.Names = sources.Known()
	}
	e := admin.LiveExplanation{
		Config:     force.describe(g.path.describe(force)),
		Generation: g.datapath.Generation(),
		Policy:     force.policy.explain(flow, force.desired.ReturnPath),
	}
	e.Policy.Sources.Names = sources.Names
	if flow.Destination.Addr().IsValid() {
		ask := g.datapath.Query
		if len(facts["domain"]) == 0 {
			ask = g.datapath.QueryFrom
		}
		kernel, err := ask(flow)
		if err != nil {
			return admin.LiveExplanation{}, err
		}
		if len(facts["domain"]) == 0 { // a name and its aliases are one, which the policy cannot know
			e.Policy.Ambiguous = kernel.Doubtful && len(flow.Names) > 0
			e.Policy.Sniff = kernel.Doubtful && flow.Network != 0
		}
		answer := force.policy.answer(kernel.Decision, kernel.Translated)
		e.Kernel = &answer
	}
	return e, nil
}

// ParseFlow makes a flow of facts as people write them: keys and values of config.SetFlow. Errors are one line,
// with the fix.
func ParseFlow(facts map[string][]string) (policy.Flow, error) {
	var f policy.Flow
	for _, key := range slices.Sorted(maps.Keys(facts)) {
		values := facts[key]
		if len(values) > 1 && key != "domain" {
			return f, fmt.Errorf("%s is given %d times: a flow has one", key, len(values))
		}
		for _, value := range values {
			if err := config.SetFlow(&f, key, value); err != nil {
				return f, err
			}
		}
	}
	source, destination := f.Source.Addr(), f.Destination.Addr()
	switch {
	case !destination.IsValid() && len(f.Names) == 0:
		return f, errors.New("ip is missing: give the address of the destination, such as ip=203.0.113.10, or its name, domain=example.com")
	case source.IsValid() && destination.IsValid() && source.Is4() != destination.Is4():
		return f, errors.New("source_ip and ip are of different IP versions")
	case f.Network == 0 && (f.Source.Port() != 0 || f.Destination.Port() != 0):
		return f, errors.New("network is missing: a port is one of network=tcp or network=udp")
	}
	return f, nil
}
