package dns

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// zone is an upstream whose records a test gives, in the form of zone files. It follows aliases as
// resolvers do.
type zone struct {
	mu      sync.Mutex
	records []dns.RR
	asked   []string // "name TYPE", in order
	seen    []*dns.Msg
	err     error
	hold    chan struct{} // if not nil, answers wait until it is closed
	rewrite func(*dns.Msg)
}

func newZone(t testing.TB, records ...string) *zone {
	t.Helper()
	z := new(zone)
	z.add(t, records...)
	return z
}

func (z *zone) add(t testing.TB, records ...string) {
	t.Helper()
	z.mu.Lock()
	defer z.mu.Unlock()
	for _, text := range records {
		record, err := dns.NewRR(text)
		if err != nil || record == nil {
			t.Fatalf("record %q: %v", text, err)
		}
		z.records = append(z.records, record)
	}
}

func (z *zone) set(change func(z *zone)) {
	z.mu.Lock()
	defer z.mu.Unlock()
	change(z)
}

func (z *zone) questions() []string {
	z.mu.Lock()
	defer z.mu.Unlock()
	return slices.Clone(z.asked)
}

// Exchange answers.
func (z *zone) Exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	z.mu.Lock()
	question := q.Question[0]
	z.asked = append(z.asked, strings.TrimSuffix(question.Name, ".")+" "+dns.TypeToString[question.Qtype])
	z.seen = append(z.seen, q.Copy())
	hold, err, rewrite := z.hold, z.err, z.rewrite
	m := z.answer(q)
	z.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err != nil {
		return nil, err
	}
	if rewrite != nil {
		rewrite(m)
	}
	return m, nil
}

func (z *zone) answer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	owner, known := q.Question[0].Name, false
	for range maxChain + 1 {
		next := ""
		for _, record := range z.records {
			if !strings.EqualFold(record.Header().Name, owner) {
				continue
			}
			known = true
			if record.Header().Rrtype == q.Question[0].Qtype {
				m.Answer = append(m.Answer, dns.Copy(record))
			} else if alias, ok := record.(*dns.CNAME); ok {
				m.Answer = append(m.Answer, dns.Copy(record))
				next = alias.Target
			}
		}
		if next == "" {
			break
		}
		owner = next
	}
	if !known {
		m.Rcode = dns.RcodeNameError
	}
	if len(m.Answer) == 0 {
		for _, record := range z.records {
			if soa, ok := record.(*dns.SOA); ok && dns.IsSubDomain(soa.Hdr.Name, owner) {
				m.Ns = []dns.RR{dns.Copy(record)}
			}
		}
	}
	return m
}

// pupil is a Learner that remembers.
type pupil struct {
	mu      sync.Mutex
	lessons []taughtLesson
	err     error
	hold    chan struct{} // if not nil, Learn waits until it is closed
	holding int           // calls that waited
}

type taughtLesson struct {
	client netip.Addr
	names  []string
	addrs  []netip.Addr
	ttl    time.Duration
}

var errForgetful = errors.New("the pupil does not learn")

func (p *pupil) Learn(ctx context.Context, client netip.Addr, names []string, addrs []netip.Addr, ttl time.Duration) error {
	p.mu.Lock()
	hold, err := p.hold, p.err
	if hold != nil {
		p.holding++
	}
	p.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lessons = append(p.lessons, taughtLesson{client, names, addrs, ttl})
	return nil
}

// knows reports whether a client was taught that a name leads to an address.
func (p *pupil) knows(client netip.Addr, name string, addr netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.lessons, func(l taughtLesson) bool {
		return l.client == client && slices.Contains(l.names, name) && slices.Contains(l.addrs, addr)
	})
}

func (p *pupil) all() []taughtLesson {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.lessons)
}

// newResolver makes one that is closed when the test ends.
func newResolver(t testing.TB, s Settings) *Resolver {
	t.Helper()
	r, err := NewResolver(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func addrs(texts ...string) []netip.Addr {
	var all []netip.Addr
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

// exchangeFunc is an upstream that is a function.
type exchangeFunc func(*dns.Msg) *dns.Msg

func (f exchangeFunc) Exchange(_ context.Context, q *dns.Msg) (*dns.Msg, error) { return f(q), nil }
