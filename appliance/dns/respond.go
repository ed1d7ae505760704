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

// queryTime bounds everything about one query.
const queryTime = 2 * time.Second

// outcome is how far quick came with a query.
type outcome uint8

const (
	answered outcome = iota // also with silence
	strange                 // not enough is known of the client
	admitted                // the cache lacks it, or the client has to be taught
)

// quick appends the answer to a query that needs nothing to be waited for. It runs on a listener's thread:
// it never waits, and calls nobody.
func (s *Server) quick(b []byte, q *query, rcode int, client *[16]byte, key *[]byte, limit int, now int64) ([]byte, outcome, admission) {
	none := admission{}
	r := s.resolver.Load()
	if r == nil {
		return b, strange, none
	}
	v, reason := s.clients.known(client, r, now)
	if reason != 0 {
		s.counters.drop(reason, 1)
		return b, answered, none
	}
	if v == nil {
		return b, strange, none
	}
	if rcode == dns.RcodeSuccess {
		rcode = q.refusal()
	}
	if rcode != dns.RcodeSuccess {
		return q.appendBare(b, rcode, 0), answered, none
	}
	*key = appendKey((*key)[:0], q.name(), q.qtype, q.do, q.unchecked(), v)
	e, renew := r.cache.ready(*key, client, now)
	if e == nil {
		a, reason := s.clients.enter(client, r, v)
		if reason != 0 {
			s.counters.drop(reason, 1)
			return b, answered, none
		}
		return b, admitted, a
	}
	if renew {
		if a, err := newAsk(q.name(), q.qtype, q.do, q.unchecked(), v); err == nil {
			s.work.Go(func() { r.renew(s.ctx, a) })
		}
	}
	s.counters.cached.Add(1)
	if e.failed {
		s.counters.failed.Add(1)
	}
	return s.appendEntry(b, q, e, e.left(now), limit), answered, none
}

// refusal is the rcode for what is not resolved, whatever the name.
func (q *query) refusal() int {
	switch {
	case q.edns && q.version != 0:
		return dns.RcodeBadVers
	case q.class != dns.ClassINET:
		return dns.RcodeRefused
	case q.qtype == dns.TypeOPT || q.qtype >= 128 && q.qtype < 255 || q.qtype == 0:
		return dns.RcodeRefused // meta types (RFC 6895 section 3.1): transfers and what is no question
	}
	return dns.RcodeSuccess
}

// arrival is a query that has to wait for something.
type arrival struct {
	packet    []byte
	client    [16]byte
	limit     func(*query) int // how long the answer may be
	admission admission        // zero: the client has to be identified
	known     func()           // nil, or called when it has been; any number of times
}

// respond answers a query, and waits for what it needs. An answer of no bytes is silence.
func (s *Server) respond(ctx context.Context, in arrival) []byte {
	var q query
	rcode, ok := q.parse(in.packet)
	if !ok {
		s.counters.drop(Malformed, 1)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, queryTime)
	defer cancel()
	seat := in.admission
	for {
		if seat.client == nil {
			r := s.resolver.Load()
			if r == nil {
				return s.servfail(&q)
			}
			var reason Reason
			seat, reason = s.clients.admit(in.client, r, monotonic())
			if in.known != nil {
				in.known()
			}
			if reason != 0 {
				s.counters.drop(reason, 1)
				return nil
			}
		}
		answer, failed, reason := s.attempt(ctx, seat, in, &q, rcode)
		s.clients.leave(seat)
		switch {
		case reason != 0:
			s.counters.drop(reason, 1)
			return nil
		case s.ctx.Err() != nil:
			return nil // the client will ask again, and the next daemon answer
		case failed && s.resolver.Load() != seat.resolver:
			seat = admission{} // a reload closed the resolver: the next one may do better
			continue
		case failed:
			s.counters.failed.Add(1)
		}
		return answer
	}
}

// attempt answers a query by one resolver. If failed is true the answer is SERVFAIL; with a reason there is
// none.
func (s *Server) attempt(ctx context.Context, seat admission, in arrival, q *query, rcode int) (answer []byte, failed bool, dropped Reason) {
	r := seat.resolver
	if rcode == dns.RcodeSuccess {
		rcode = q.refusal()
	}
	if rcode != dns.RcodeSuccess {
		return q.appendBare(nil, rcode, 0), false, 0
	}
	a, err := newAsk(q.name(), q.qtype, q.do, q.unchecked(), seat.view)
	if err != nil {
		return q.appendBare(nil, dns.RcodeFormatError, 0), false, 0
	}
	a.from = seat.device
	if s.circular(r, a, in.client) {
		return q.appendBare(nil, dns.RcodeServerFailure, 0), true, 0
	}
	waiting, cancel := context.WithDeadline(ctx, a.due) // there must be time to teach a stale answer
	e, err := r.resolve(waiting, a)
	cancel()
	if errors.Is(err, errBusy) {
		return nil, false, ClientLimit
	}
	if err != nil {
		return q.appendBare(nil, dns.RcodeServerFailure, 0), true, 0
	}
	if e.renew {
		s.work.Go(func() { r.renew(s.ctx, a) })
	}
	left := e.left(monotonic())
	if e.late {
		left = staleTTL
		s.counters.stale.Add(1)
	}
	if e.cached {
		s.counters.cached.Add(1)
	}
	if err := s.teach(ctx, r, &e, in.client, left); err != nil {
		s.log.Debug("answer withheld", "name", a.host, "client", netip.AddrFrom16(in.client).Unmap(), "error", err)
		return q.appendBare(nil, dns.RcodeServerFailure, 0), true, 0
	}
	return s.appendEntry(nil, q, e.entry, left, in.limit(q)), e.failed, 0
}

// circular reports that an upstream asks us what we are asking it: it is behind us, and its own questions
// come here.
func (s *Server) circular(r *Resolver, a *ask, client [16]byte) bool {
	if !r.inFlight(a.key) {
		return false
	}
	addr := netip.AddrFrom16(client).Unmap()
	if !slices.ContainsFunc(r.located, func(l located) bool { return slices.Contains(l.Addresses(), addr) }) {
		return false
	}
	if r.circles.given() {
		s.log.Warn("dns upstream asks us in a circle: exempt it from the gateway", "upstream", addr, "name", a.host)
	}
	return true
}

// teach returns when the client may have the answer.
func (s *Server) teach(ctx context.Context, r *Resolver, e *resolved, client [16]byte, left uint32) error {
	if len(e.lessons) == 0 || !e.late && r.cache.isTaught(e.entry, &client, monotonic()) {
		return nil
	}
	addr, ttl := netip.AddrFrom16(client).Unmap(), time.Duration(max(left, 1))*time.Second
	for _, l := range e.lessons {
		s.counters.taught.Add(1)
		if err := s.options.Learner.Learn(ctx, addr, l.names, l.addrs, ttl); err != nil {
			return fmt.Errorf("learning %s: %w", l.names[0], err)
		}
	}
	r.cache.learned(e.entry, client, monotonic())
	return nil
}

func (s *Server) servfail(q *query) []byte {
	s.counters.failed.Add(1)
	return q.appendBare(nil, dns.RcodeServerFailure, 0)
}

// appendEntry appends the answer that an entry is, for this query.
func (s *Server) appendEntry(b []byte, q *query, e *entry, left uint32, limit int) []byte {
	if e.wire == nil {
		s.counters.drop(Rejected, 1)
		return b
	}
	reply, whole := q.appendWire(b, e, left, limit)
	if !whole {
		s.counters.truncated.Add(1)
	}
	return reply
}
