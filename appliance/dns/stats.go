package dns

import "sync/atomic"

// Stats is a snapshot. Its parts are read one after the other, not at one instant.
type Stats struct {
	Queries   uint64 // that came
	Cached    uint64 // answered from the cache
	Stale     uint64 // of those: past their end, because the upstream did not answer
	Failed    uint64 // answered SERVFAIL
	Truncated uint64 // too long for UDP: the client asks again by TCP
	Taught    uint64 // calls of Learn
	Filtered  uint64 // answers of which the rebinding filter took something

	Connections int                 // TCP
	Entries     int                 // in the cache
	Upstreams   map[string]Upstream // by name
	Dropped     map[Reason]uint64   // queries without an answer; has every reason
}

// Upstream is what became of the questions to one upstream since the start.
type Upstream struct {
	Queries, Failures uint64
}

// Reason is why a query got no answer, or a connection was reset. The zero value is invalid.
type Reason uint8

// The reasons. All count queries but ClientLimit, which counts connections too.
const (
	Malformed   Reason = iota + 1 // no query at all: too short, or itself an answer
	NotAllowed                    // the client may not ask, or asked our own listener
	ClientRate                    // the client asks faster than it may
	ClientLimit                   // the client has as much under way as it may have
	Overloaded                    // all clients together have
	Rejected                      // a rule says so
	SendFailed                    // the kernel did not take the answer
	numReasons
)

var reasonNames = [numReasons]string{
	Malformed:   "malformed",
	NotAllowed:  "not_allowed",
	ClientRate:  "client_rate",
	ClientLimit: "client_limit",
	Overloaded:  "overloaded",
	Rejected:    "rejected",
	SendFailed:  "send_failed",
}

// String is the name as metrics show it.
func (r Reason) String() string {
	if r == 0 || r >= numReasons {
		return "invalid"
	}
	return reasonNames[r]
}

// serverCounters are what the Server's threads write.
type serverCounters struct {
	queries, cached, stale, failed, truncated, taught atomic.Uint64
	dropped                                           [numReasons]atomic.Uint64
	connections                                       atomic.Int64
}

func (c *serverCounters) drop(r Reason, n int) { c.dropped[r].Add(uint64(n)) }

type resolverCounters struct {
	filtered atomic.Uint64
}

// Stats returns the counters. Those of upstreams go on counting over reloads.
func (s *Server) Stats() Stats {
	c := &s.counters
	stats := Stats{
		Queries:     c.queries.Load(),
		Cached:      c.cached.Load(),
		Stale:       c.stale.Load(),
		Failed:      c.failed.Load(),
		Truncated:   c.truncated.Load(),
		Taught:      c.taught.Load(),
		Connections: int(c.connections.Load()),
		Upstreams:   make(map[string]Upstream),
		Dropped:     make(map[Reason]uint64),
	}
	for r := Reason(1); r < numReasons; r++ {
		stats.Dropped[r] = c.dropped[r].Load()
	}
	s.retired.mu.Lock()
	defer s.retired.mu.Unlock()
	stats.Filtered = s.retired.filtered
	for name, u := range s.retired.upstreams {
		stats.Upstreams[name] = u
	}
	if r := s.resolver.Load(); r != nil {
		stats.Entries = r.cache.length()
		r.addTo(&stats.Filtered, stats.Upstreams)
	}
	return stats
}

// addTo adds a resolver's figures.
func (r *Resolver) addTo(filtered *uint64, upstreams map[string]Upstream) {
	*filtered += r.counters.filtered.Load()
	for name, u := range r.upstreams {
		sum := upstreams[name]
		sum.Queries += u.queries.Load()
		sum.Failures += u.failures.Load()
		upstreams[name] = sum
	}
}
