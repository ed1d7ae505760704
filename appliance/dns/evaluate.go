package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/miekg/dns"
)

// plan is what the question's rule says.
type plan struct {
	upstream string
	reject   Reject
	answer   []netip.Addr // fixed
	version  Preference
	stripECH bool
}

func (r *Resolver) plan(a *ask) plan {
	p := plan{upstream: r.settings.Default, version: r.settings.IPVersion, stripECH: r.settings.StripECH}
	i := r.questionRule(a)
	if i < 0 {
		return p
	}
	rule := &r.settings.Rules[i]
	if rule.Upstream != "" {
		p.upstream = rule.Upstream
	}
	if rule.IPVersion != nil {
		p.version = *rule.IPVersion
	}
	if rule.StripECH != nil {
		p.stripECH = *rule.StripECH
	}
	p.reject, p.answer = rule.Reject, rule.Answer
	return p
}

// evaluate answers a question that the cache does not. It never returns nil.
func (r *Resolver) evaluate(ctx context.Context, a *ask) *entry {
	if e := r.local(a); e != nil {
		return e
	}
	p := r.plan(a)
	switch {
	case p.reject != RejectNone:
		return r.rejected(a, p.reject, localTTL)
	case len(p.answer) > 0:
		return r.fixed(a, p.answer)
	}
	if life, excluded := r.excluded(ctx, a, &p); excluded {
		return r.rejected(a, Empty, life)
	}
	return r.exchange(ctx, a, &p)
}

// excluded reports whether clients are not to be told of this family, and for how long that holds.
func (r *Resolver) excluded(ctx context.Context, a *ask, p *plan) (time.Duration, bool) {
	switch {
	case a.qtype == dns.TypeAAAA && p.version == Only4, a.qtype == dns.TypeA && p.version == Only6:
		return localTTL, true
	case a.qtype == dns.TypeAAAA && p.version == Prefer4:
		return r.preferred(ctx, a.other(dns.TypeA), Prefer4)
	case a.qtype == dns.TypeA && p.version == Prefer6:
		return r.preferred(ctx, a.other(dns.TypeAAAA), Prefer6)
	}
	return 0, false
}

// preferred reports whether a name has addresses of the preferred family.
func (r *Resolver) preferred(ctx context.Context, b *ask, v Preference) (time.Duration, bool) {
	// Rules may differ by type. Two families that each wait for the other would wait in vain.
	if p := r.plan(b); p.version != v && p.version != AnyVersion {
		return 0, false
	}
	e, err := r.resolve(ctx, b)
	if err != nil || len(e.addrs) == 0 {
		return 0, false
	}
	if e.late {
		return staleTTL * time.Second, true
	}
	return time.Duration(e.left(monotonic())) * time.Second, true
}

// exchange asks upstreams until a response rule accepts, or there is none.
func (r *Resolver) exchange(ctx context.Context, a *ask, p *plan) *entry {
	name := p.upstream
	var asked []string
	for {
		asked = append(asked, name)
		got, err := r.upstreams[name].ask(ctx, a)
		if err != nil {
			e := r.failure(a)
			e.refused = errors.Is(err, errBusy)
			return e
		}
		rule := r.responseRule(a.view, got.names, got.addresses(), name, asked)
		if rule >= 0 {
			switch response := &r.settings.Responses[rule]; {
			case response.Upstream != "":
				name = response.Upstream
				continue
			case response.Reject != RejectNone:
				return r.rejected(a, response.Reject, r.clamp(got.ttl))
			}
		}
		guarded := !r.rebinding.exempt(a.host)
		if guarded && got.filter(r.rebinding.forbidden) {
			r.counters.filtered.Add(1)
			got.excuse()
			if r.rebound.given() {
				r.log.Info("kept addresses of this network from who asked for a public name: if they are right, name it under rebind_allow", "name", a.host, "upstream", name)
			}
		}
		got.trim(p.version, p.stripECH)
		e := r.entry(a, got)
		e.guarded = guarded
		return e
	}
}

// failure is the entry of a question that no upstream answered.
func (r *Resolver) failure(a *ask) *entry {
	e := r.entry(a, &answer{rcode: dns.RcodeServerFailure})
	e.failed, e.life = true, int64(r.settings.Cache.FailureTTL)
	return e
}

// clamp bounds the life of an answer.
func (r *Resolver) clamp(ttl time.Duration) time.Duration {
	c := &r.settings.Cache
	return min(max(ttl, c.MinTTL), c.MaxTTL)
}

// entry makes the form that the cache keeps and clients get.
func (r *Resolver) entry(a *ask, got *answer) *entry {
	life := r.clamp(got.ttl)
	e := &entry{
		key: string(a.key), rcode: got.rcode, authentic: got.authentic,
		stored: monotonic(), life: int64(life), addrs: got.hostAddresses(), lessons: got.lessons(),
	}
	m := dns.Msg{Compress: true, Answer: got.records, Ns: got.authority}
	m.Response, m.Rcode = true, got.rcode
	m.Question = []dns.Question{{Name: a.name, Qtype: a.qtype, Qclass: dns.ClassINET}}
	for _, records := range [][]dns.RR{m.Answer, m.Ns} {
		for _, record := range records {
			record.Header().Ttl = uint32(life / time.Second)
		}
	}
	wire, err := m.Pack()
	if err == nil {
		var ok bool
		if e.ttls, ok = findTTLs(wire); !ok {
			err = fmt.Errorf("it does not parse")
		}
	}
	if err != nil {
		// What an upstream sent cannot be sent on: an oversized record, for example.
		r.log.Debug("answer not repeatable", "name", a.host, "error", err)
		if got.rcode == dns.RcodeServerFailure {
			panic("an answer without records does not pack: " + err.Error())
		}
		return r.failure(a)
	}
	e.wire = slices.Clone(wire) // Pack's slice is longer than it needs to be
	return e
}
