package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/policy"
)

const (
	// exchangeTime is how long a client waits for what upstreams are asked for it, so that it hears something
	// within 2 s.
	exchangeTime = 1900 * time.Millisecond
	// Overtime is how long upstreams are waited for beyond that: clients ask again, and so do the servers that
	// upstreams ask.
	Overtime = 5 * time.Second
	// patience is how long an upstream is waited for while there is a stale answer (RFC 8767 section 5).
	patience = 1800 * time.Millisecond
	// staleTTL is the TTL of a stale answer (RFC 8767 section 5).
	staleTTL = 30
	// maxRenewals bounds how many answers are being renewed at once.
	maxRenewals = 64
)

// generation tells one resolver from another. Whoever remembers it keeps no cache alive.
type generation struct{ _ byte }

// Resolver answers questions as Settings say.
type Resolver struct {
	generation *generation
	settings   Settings
	log        *slog.Logger
	questions  rules
	answers    rules
	views      views
	gateway    *view // of the gateway itself: nothing is known of it
	hosts      map[string][]netip.Addr
	rebinding  rebinding
	cache      *cache
	upstreams  map[string]*upstream
	located    []located
	counters   resolverCounters
	circles    occasion
	rebound    occasion

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu       sync.Mutex
	flights  map[string]*flight
	renewals int
	closed   bool
	flying   sync.WaitGroup
}

// located are the upstreams that know their addresses, which may change.
type located interface{ Addresses() []netip.Addr }

// ask is one question in one view: all that an answer depends on.
type ask struct {
	key    []byte // of the cache
	name   string // as miekg's package has it: lower case, with the last dot
	host   string // as rules have it: without
	qtype  uint16
	do, cd bool
	view   *view
	// What the answer does not depend on:
	from device    // who is held to account
	due  time.Time // when who asks stops waiting
}

// appendKey appends the key of a question. Its name is in wire form, of any case.
func appendKey(b, name []byte, qtype uint16, do, cd bool, v *view) []byte {
	b = appendLower(b, name)
	var flags byte
	if do {
		flags |= 1
	}
	if cd {
		flags |= 2
	}
	return append(b, byte(qtype>>8), byte(qtype), flags, byte(v.id>>8), byte(v.id))
}

// newAsk makes the question of a query. The name is valid, or else the query was refused.
func newAsk(name []byte, qtype uint16, do, cd bool, v *view) (*ask, error) {
	a := &ask{qtype: qtype, do: do, cd: cd, view: v, due: time.Now().Add(exchangeTime)}
	a.key = appendKey(nil, name, qtype, do, cd, v)
	text, _, err := dns.UnpackDomainName(a.key[:len(name)], 0)
	if err != nil {
		return nil, fmt.Errorf("reading a name: %w", err)
	}
	a.name, a.host = text, strings.TrimSuffix(text, ".")
	return a, nil
}

// other is the same question about another type.
func (a *ask) other(qtype uint16) *ask {
	b := *a
	b.qtype = qtype
	b.key = slices.Clone(a.key)
	at := len(b.key) - 5
	b.key[at], b.key[at+1] = byte(qtype>>8), byte(qtype)
	return &b
}

// NewResolver checks and compiles the settings. Its error has a line for each defect.
func NewResolver(s Settings) (*Resolver, error) {
	s.Cache.setDefaults()
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	r := &Resolver{
		generation: new(generation),
		settings:   s,
		log:        s.Log,
		hosts:      make(map[string][]netip.Addr),
		rebinding:  newRebinding(s.RebindAllow, s.Own),
		cache:      newCache(s.Cache, s.Own),
		upstreams:  make(map[string]*upstream),
		flights:    make(map[string]*flight),
	}
	var questions, answers []policy.Rule
	for _, rule := range s.Rules {
		questions = append(questions, rule.Match)
	}
	for _, rule := range s.Responses {
		answers = append(answers, rule.Match)
	}
	var err error
	if r.questions, err = compileRules("rule", questions, s.Geo, false); err != nil {
		return nil, err
	}
	if r.answers, err = compileRules("response", answers, s.Geo, true); err != nil {
		return nil, err
	}
	r.views = views{
		questions: &r.questions, answers: &r.answers,
		asks: asksFacts(questions) || asksFacts(answers),
		all:  make(map[[2]policy.Bits]*view),
	}
	if r.gateway, err = r.views.of(policy.Flow{}); err != nil {
		return nil, err
	}
	for name, addrs := range s.Hosts {
		r.hosts[lowerName(name)] = addrs
	}
	for name, exchanger := range s.Upstreams {
		r.upstreams[name] = newUpstream(name, exchanger, s.Log)
		if l, ok := exchanger.(located); ok {
			r.located = append(r.located, l)
		}
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

func (c *Cache) setDefaults() {
	setDefault(&c.Entries, 65536)
	setDefault(&c.MaxTTL, 24*time.Hour)
	setDefault(&c.FailureTTL, 5*time.Second)
}

func setDefault[T ~int | ~int64](value *T, usual T) {
	if *value <= 0 {
		*value = usual
	}
}

// check finds what leads nowhere. What the rules match is checked where they are compiled.
func (s *Settings) check() error {
	var errs []error
	known := func(where, name string) {
		if _, ok := s.Upstreams[name]; !ok {
			errs = append(errs, fmt.Errorf("%s: unknown dns upstream %q (have: %s)", where, name,
				strings.Join(slices.Sorted(maps.Keys(s.Upstreams)), ", ")))
		}
	}
	known("dns default", s.Default)
	for i := range s.Rules {
		r, where := &s.Rules[i], label("rule", i, s.Rules[i].Match.Name)
		if r.Upstream != "" {
			known(where, r.Upstream)
		}
		if count(r.Upstream != "", len(r.Answer) > 0, r.Reject != RejectNone) > 1 {
			errs = append(errs, fmt.Errorf("%s: upstream, answer and reject exclude each other: keep one", where))
		}
	}
	for i := range s.Responses {
		r, where := &s.Responses[i], label("response", i, s.Responses[i].Match.Name)
		for _, from := range r.From {
			known(where, from)
		}
		if r.Upstream != "" {
			known(where, r.Upstream)
		}
		if count(r.Upstream != "", r.Accept, r.Reject != RejectNone) != 1 {
			errs = append(errs, fmt.Errorf("%s: it needs one of upstream, reject and accept", where))
		}
	}
	return errors.Join(errs...)
}

func count(conditions ...bool) int {
	n := 0
	for _, c := range conditions {
		if c {
			n++
		}
	}
	return n
}

// Close ends the exchanges under way and waits for them. Questions that come later fail.
func (r *Resolver) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.flying.Wait()
}

// flight is the work on one question. Whoever asks the same meanwhile waits for it, as long as clients do. It may take
// longer.
type flight struct {
	from  device
	begun int64 // monotonic
	done  chan struct{}
	entry *entry // set when done
}

var (
	errClosed = errors.New("the resolver has been closed")
	errBusy   = errors.New("who asks has too many questions under way")
)

// join starts work on a question, or finds who does it.
func (r *Resolver) join(a *ask) (*flight, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.flights[string(a.key)]; f != nil {
		return f, nil
	}
	if r.closed {
		return nil, errClosed
	}
	f := &flight{from: a.from, begun: monotonic(), done: make(chan struct{})}
	r.flights[string(a.key)] = f
	r.flying.Go(func() {
		defer close(f.done)
		ctx, cancel := context.WithTimeout(r.ctx, exchangeTime+Overtime)
		defer cancel()
		f.entry = r.evaluate(ctx, a)
		if f.entry.failed { // overtime is no reason to remember it longer
			f.entry.stored = min(f.entry.stored, f.begun+int64(exchangeTime))
		}
		if r.ctx.Err() == nil && !f.entry.refused {
			r.cache.put(f.entry, monotonic())
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.flights, string(a.key))
	})
	return f, nil
}

// inFlight reports whether a question is being worked on.
func (r *Resolver) inFlight(key []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.flights[string(key)] != nil
}

// resolved is how a question was answered.
type resolved struct {
	*entry
	cached bool
	late   bool // past its life, because the upstream does not answer
	renew  bool // the caller has to have it renewed
}

// resolve finds the answer to a question, in the cache or by asking.
func (r *Resolver) resolve(ctx context.Context, a *ask) (resolved, error) {
	old, how, renew := r.cache.get(a.key, monotonic())
	switch how {
	case fresh:
		return resolved{entry: old, cached: true, renew: renew}, nil
	case waiting:
		return resolved{entry: old, cached: true, late: true}, nil
	}
	for {
		f, err := r.join(a)
		if err != nil {
			return resolved{}, err
		}
		var impatient <-chan time.Time
		if old != nil {
			timer := time.NewTimer(time.Duration(f.begun-monotonic()) + patience)
			defer timer.Stop()
			impatient = timer.C
		}
		select {
		case <-f.done:
		case <-impatient:
			return resolved{entry: old, cached: true, late: true}, nil
		case <-ctx.Done():
			return resolved{}, ctx.Err()
		}
		switch {
		case f.entry.failed && old != nil:
			return resolved{entry: old, cached: true, late: true}, nil
		case f.entry.refused && f.from == a.from:
			return resolved{}, errBusy
		case !f.entry.refused:
			return resolved{entry: f.entry}, nil
		}
		// Somebody else's excess is none of ours.
	}
}

// renew has an answer renewed before its life ends, unless much else is being renewed. It returns when that is done, or
// ctx has ended.
func (r *Resolver) renew(ctx context.Context, a *ask) {
	r.mu.Lock()
	if r.renewals >= maxRenewals {
		r.mu.Unlock()
		return
	}
	r.renewals++
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.renewals--
	}()
	if f, err := r.join(a); err == nil {
		select {
		case <-f.done:
		case <-ctx.Done():
		}
	}
}

// Lookup returns the addresses of a name, IPv4 first, for the gateway's own use: by the rules for a client
// of which nothing is known, through the cache, and taught to nobody. A name without addresses is an error.
func (r *Resolver) Lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{a}, nil
	}
	wire := make([]byte, maxName)
	n, err := dns.PackDomainName(dns.Fqdn(name), wire, 0, nil, false)
	if err != nil {
		return nil, fmt.Errorf("looking up %q: %w", name, err)
	}
	types := [...]uint16{dns.TypeA, dns.TypeAAAA}
	var results [len(types)]struct {
		resolved
		err error
	}
	var asking sync.WaitGroup
	for i, qtype := range types {
		asking.Go(func() {
			a, err := newAsk(wire[:n], qtype, false, false, r.gateway)
			if err == nil {
				results[i].resolved, err = r.resolve(ctx, a)
			}
			results[i].err = err
		})
	}
	asking.Wait()
	var addrs []netip.Addr
	var failure error
	for _, result := range results {
		switch {
		case result.err != nil:
			failure = result.err
		case result.failed:
			failure = errors.New("no upstream answered")
		default:
			addrs = append(addrs, result.addrs...)
		}
	}
	switch {
	case len(addrs) > 0:
		return addrs, nil
	case failure != nil:
		return nil, fmt.Errorf("looking up %q: %w", name, failure)
	}
	return nil, fmt.Errorf("looking up %q: it has no addresses", name)
}

var processStart = time.Now()

// monotonic is the time since the process started, in nanoseconds.
func monotonic() int64 { return int64(time.Since(processStart)) }
