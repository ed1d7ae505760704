package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"

	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/dns"
	"sidegate/appliance/dns/exchange"
	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

// resolution is how a plan answers the LAN's DNS.
type resolution struct {
	resolver  *dns.Resolver
	upstreams []*exchange.Upstream
	allow     []netip.Prefix // who may ask, beside the LAN
	closed    atomic.Bool
}

// close gives up what is under way.
func (r *resolution) close() {
	if r == nil {
		return
	}
	r.closed.Store(true)
	r.resolver.Close()
	for _, u := range r.upstreams {
		u.Close()
	}
}

// addresses are those of the DNS servers that are asked: they may themselves be behind this gateway.
func (r *resolution) addresses() (all []netip.Addr) {
	if r == nil {
		return nil
	}
	for _, u := range r.upstreams {
		all = append(all, u.Addresses()...)
	}
	return all
}

// lookup finds a host for the gateway itself.
func (r *resolution) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if r == nil {
		return systemLookup(ctx, host)
	}
	return r.resolver.Lookup(ctx, host)
}

// allows reports whether the configuration lets a client ask.
func (r *resolution) allows(a netip.Addr) bool {
	return r != nil && slices.ContainsFunc(r.allow, func(p netip.Prefix) bool { return p.Contains(a) })
}

// makeResolution makes the DNS side of the plan, after its outbounds. Nothing is asked yet.
func (p *Plan) makeResolution(s surroundings) error {
	c := p.Config.DNS
	if c == nil {
		return nil
	}
	made := &resolution{allow: c.Allow}
	settings := dns.Settings{
		Upstreams:   map[string]dns.Exchanger{},
		Default:     c.Default,
		Hosts:       c.Hosts,
		Geo:         p.Config.Policy.Geo,
		IPVersion:   preferences[c.IPVersion],
		StripECH:    c.StripECH,
		RebindAllow: c.RebindAllow,
		Own:         s.own,
		Cache: dns.Cache{
			Entries: int(c.Cache.Entries), MinTTL: c.Cache.MinTTL, MaxTTL: c.Cache.MaxTTL,
			Stale: c.Cache.Stale, FailureTTL: c.Cache.FailureTTL, Prefetch: c.Cache.Prefetch,
		},
		Log: s.log,
	}
	var errs []error
	for _, name := range sortedKeys(c.Upstreams) {
		u, err := p.makeUpstream(name, c.Upstreams[name], s)
		if err != nil {
			errs = append(errs, c.Upstreams[name].Position.Errorf("%w", err))
			continue
		}
		made.upstreams = append(made.upstreams, u)
		settings.Upstreams[name] = u
	}
	for _, r := range c.Rules {
		settings.Rules = append(settings.Rules, questionRule(r))
	}
	for _, r := range c.Responses {
		settings.Responses = append(settings.Responses, dns.Response{
			Match: r.Match, From: r.From, Upstream: r.Upstream, Reject: rejections[r.Reject], Accept: r.Accept,
		})
	}
	err := errors.Join(errs...)
	if err == nil {
		if made.resolver, err = dns.NewResolver(settings); err != nil {
			err = c.Position.Errorf("dns: %w", err)
		}
	}
	if err != nil {
		for _, u := range made.upstreams {
			u.Close()
		}
		return err
	}
	p.resolution = made
	return nil
}

func questionRule(r config.DNSRule) dns.Rule {
	out := dns.Rule{
		Match: r.Match, QueryTypes: r.QueryTypes, Upstream: r.Upstream, Answer: r.Answer, Reject: rejections[r.Reject],
		StripECH: r.StripECH,
	}
	if r.IPVersion != nil {
		out.IPVersion = new(preferences[*r.IPVersion])
	}
	return out
}

var preferences = map[config.Preference]dns.Preference{
	config.AnyVersion: dns.AnyVersion, config.Prefer4: dns.Prefer4, config.Prefer6: dns.Prefer6,
	config.Only4: dns.Only4, config.Only6: dns.Only6,
}

var rejections = map[config.Rejection]dns.Reject{
	config.RejectRefused: dns.Refused, config.RejectNXDomain: dns.NXDomain, config.RejectEmpty: dns.Empty, config.RejectDrop: dns.Drop,
}

func (p *Plan) makeUpstream(name string, c config.DNSUpstream, s surroundings) (*exchange.Upstream, error) {
	own := exchange.Direct(markOwn)
	o := exchange.Options{
		Dialer: own, BootstrapDialer: own, Addresses: c.Addresses, Bootstrap: c.Bootstrap,
		CAFile: c.CAFile, ServerName: c.ServerName, Overtime: dns.Overtime, Log: s.log,
	}
	if c.Detour != "" && c.Detour != policy.OutboundDirect {
		through, ok := p.outbounds.Outbound(c.Detour)
		if !ok {
			return nil, fmt.Errorf("dns upstream %q: detour: there is no outbound %q", name, c.Detour)
		}
		o.Dialer = detour{through}
	}
	return exchange.New(name, c.URL, o)
}

// detour dials through an outbound.
type detour struct{ outbound.Outbound }

func (d detour) Stream(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return d.DialTCP(ctx, outbound.Destination{Addr: to})
}

func (d detour) Packets(ctx context.Context, _ netip.AddrPort) (net.PacketConn, error) {
	a, err := d.AssociateUDP(ctx)
	if err != nil {
		return nil, err
	}
	return outbound.PacketConn(a)
}

func (g *gateway) surroundings() surroundings {
	return surroundings{own: g.neighbours.isOwn, lookup: g.lookup, log: g.log}
}

// listenDNS opens the DNS server's sockets. A gateway that has no DNS section can do without, until one appears.
func (g *gateway) listenDNS(plan *Plan, p *pupils) error {
	g.dns, g.noDNS = dns.Listen(dns.Options{
		Learner: p, ClientFacts: p.facts, Allow: g.mayAsk, Mark: uint32(datapath.MarkOwn), Log: g.log,
		Limits: dns.Limits{Queries: int(plan.Config.PerClient.DNSQueries)}, // of what the kernel lets through, and of TCP
	})
	if g.noDNS != nil && plan.resolution != nil {
		return plan.Config.DNS.Position.Errorf("dns: %w", g.noDNS)
	}
	return nil
}

// resolution is what answers the LAN's questions, and finds what the gateway itself looks up; nil: the system does.
func (g *gateway) resolution() *resolution {
	if plan := g.current().plan; plan != nil {
		return plan.resolution
	}
	return nil
}

func (g *gateway) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	return g.resolution().lookup(ctx, host)
}

func (g *gateway) mayAsk(a netip.Addr) bool {
	return g.neighbours.mayAsk(a) || g.resolution().allows(a)
}
