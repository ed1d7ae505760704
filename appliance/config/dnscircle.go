package config

import (
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"sidegate/appliance/policy"
)

// An upstream that is reached through an outbound needs that outbound's address. Where the outbound is
// given by name, the gateway looks it up as it would for a client; if that leads back to the same upstream,
// neither can ever be reached.

// circles finds upstreams that need themselves.
type circles struct {
	c    *draft
	hops []hop           // from the upstream that is looked at
	seen map[string]bool // upstreams that were gone through from there
}

// hop is one step: the upstream, its detour and the host of that.
type hop struct{ upstream, detour, host string }

// dnsCircles reports each circle once, at the detour of one of its upstreams.
func (d *decoder) dnsCircles(c *draft) {
	told := map[string]bool{}
	for _, detour := range c.dns.detours {
		find := circles{c: c, seen: map[string]bool{}}
		if told[detour.upstream] || !find.from(detour.upstream, detour.upstream) {
			continue
		}
		var way []string
		for i, h := range find.hops {
			told[h.upstream] = true
			next := find.hops[(i+1)%len(find.hops)].upstream
			way = append(way, fmt.Sprintf("needs %s, whose host %s is looked up through upstream %s", h.detour, h.host, quote(next)))
		}
		first := find.hops[0]
		d.errorf(detour.to.line, "%s: detour: it %s; give %s an address in its url, list %s under hosts of dns, or send it to another upstream by a rule",
			detour.at, strings.Join(way, ", which "), first.detour, first.host)
	}
}

// from reports whether goal is reached from an upstream; then hops is the way.
func (f *circles) from(upstream, goal string) bool {
	f.seen[upstream] = true
	detour := f.c.DNS.Upstreams[upstream].Detour
	host := f.c.Outbounds[detour].host()
	if host == "" {
		return false
	}
	f.hops = append(f.hops, hop{upstream, detour, host})
	for _, next := range slices.Sorted(maps.Keys(f.asked(host))) {
		if next == goal || !f.seen[next] && f.from(next, goal) {
			return true
		}
	}
	f.hops = f.hops[:len(f.hops)-1]
	return false
}

// host is the name that an outbound has to look up; empty: none.
func (o Outbound) host() string {
	u, err := url.Parse(o.URL)
	if err != nil {
		return ""
	}
	if _, err := netip.ParseAddr(u.Hostname()); err == nil {
		return ""
	}
	return strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
}

// asked are the upstreams that a look-up of the gateway's own may go through. It has no client.
func (f *circles) asked(host string) map[string]bool {
	all := map[string]bool{}
	if _, listed := f.c.DNS.Hosts[host]; listed {
		return all
	}
	for _, wanted := range []string{"A", "AAAA"} {
		if first := f.rule(host, queryTypes[wanted]); first != "" {
			all[first] = true
			f.judged(host, first, all)
		}
	}
	return all
}

// rule is the upstream that a question is sent to; empty: it is answered without.
func (f *circles) rule(host string, queryType uint16) string {
	for _, r := range f.c.DNS.Rules {
		if len(r.QueryTypes) == 0 || slices.Contains(r.QueryTypes, queryType) {
			if f.matches(r.Match, host) {
				return r.Upstream
			}
		}
	}
	return f.c.DNS.Default
}

// judged adds the upstreams that are asked instead, whatever addresses the answer has.
func (f *circles) judged(host, upstream string, all map[string]bool) {
	for _, r := range f.c.DNS.Responses {
		if len(r.From) > 0 && !slices.Contains(r.From, upstream) {
			continue
		}
		named, sure := r.Match, true
		named.Is, named.Not = withoutAddresses(r.Match.Is, &sure), withoutAddresses(r.Match.Not, &sure)
		if !f.matches(named, host) {
			continue
		}
		if r.Upstream != "" && !all[r.Upstream] {
			all[r.Upstream] = true
			f.judged(host, r.Upstream, all)
		}
		if sure {
			return
		}
	}
}

func withoutAddresses(conditions []policy.Condition, all *bool) []policy.Condition {
	return slices.DeleteFunc(slices.Clone(conditions), func(c policy.Condition) bool {
		address := c.Field.Dimension == policy.DestinationAddress
		*all = *all && !address
		return address
	})
}

func (f *circles) matches(r policy.Rule, host string) bool {
	alone := policy.Policy{Rules: []policy.Rule{r}, Geo: f.c.Policy.Geo}
	return alone.Match(policy.Flow{Names: []string{host}}).Rule == 0
}
