package exchange

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// How long the addresses of an upstream's host are used before they are looked up again. The lower
// bound keeps a TTL of 0 from costing a look-up for each question.
const (
	minKnown  = time.Minute
	maxKnown  = time.Hour
	hostKnown = 5 * time.Minute // where the TTL is not known
	// retryAfter keeps failing look-ups apart.
	retryAfter = time.Second
	// maxAddresses are kept of a host.
	maxAddresses = 8
)

// locator knows the addresses of an upstream's host. Look-ups that coincide are one. Known addresses
// are used on while a look-up renews them, and when it fails.
type locator struct {
	host    string
	look    func(ctx context.Context, host string) ([]netip.Addr, time.Duration, error)
	timeout time.Duration // of a look-up
	life    *life

	mu      sync.Mutex
	list    []netip.Addr
	renew   time.Time // when to look up again
	failure error     // of the last look-up
	running chan struct{}
}

// addresses returns what is known, or waits for a look-up.
func (l *locator) addresses(ctx context.Context) ([]netip.Addr, error) {
	l.mu.Lock()
	if l.running == nil && !time.Now().Before(l.renew) {
		l.begin()
	}
	list, failure, running := l.list, l.failure, l.running
	l.mu.Unlock()
	switch {
	case len(list) > 0:
		return list, nil
	case running == nil:
		return nil, failure
	}
	select {
	case <-running:
	case <-ctx.Done():
		return nil, fmt.Errorf("looking up %s: %w", l.host, ctx.Err())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) > 0 {
		return l.list, nil
	}
	return nil, l.failure
}

// begin starts a look-up, which is not bound to the question that needs it: others wait for it too.
func (l *locator) begin() {
	done := make(chan struct{})
	started := l.life.start(func() {
		ctx, cancel := context.WithTimeout(l.life.ctx, l.timeout)
		defer cancel()
		list, known, err := l.look(ctx, l.host)
		l.mu.Lock()
		defer l.mu.Unlock()
		if err == nil {
			list = usable(list)
			if len(list) == 0 {
				err = errors.New("it has no usable address")
			}
		}
		if err != nil {
			l.failure = fmt.Errorf("looking up %s: %w", l.host, err)
			l.renew = time.Now().Add(retryAfter)
		} else {
			l.list, l.failure = list, nil
			l.renew = time.Now().Add(min(max(known, minKnown), maxKnown))
		}
		l.running = nil
		close(done)
	})
	if started {
		l.running = done
	} else {
		l.failure = net.ErrClosed
	}
}

// doubt has the addresses looked up anew with the next question, though not at once again and again.
func (l *locator) doubt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if soon := time.Now().Add(retryAfter); l.renew.After(soon) {
		l.renew = soon
	}
}

func (l *locator) known() []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.list)
}

// usable is the addresses that can be a server's, IPv4 first: where IPv6 is broken it usually is
// silent, and costs time.
func usable(list []netip.Addr) []netip.Addr {
	var kept []netip.Addr
	for _, a := range list {
		if a = a.Unmap(); a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !lacksZone(a) && !slices.Contains(kept, a) {
			kept = append(kept, a)
		}
	}
	slices.SortStableFunc(kept, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return kept[:min(len(kept), maxAddresses)]
}

// system looks hosts up as /etc/hosts and /etc/resolv.conf say, by Go's own resolver, because only
// there can the sockets be the dialer's.
func system(d Dialer) func(context.Context, string) ([]netip.Addr, time.Duration, error) {
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return nil, err
		}
		var c net.Conn
		if strings.HasPrefix(network, "tcp") {
			c, err = d.Stream(ctx, to)
		} else {
			var packets net.PacketConn
			if packets, err = d.Packets(ctx, to); err == nil {
				c = aimed{packets, net.UDPAddrFromAddrPort(to)}
			}
		}
		if err == nil {
			// The resolver heeds its context only between queries.
			context.AfterFunc(ctx, func() { c.Close() })
		}
		return c, err
	}}
	return func(ctx context.Context, host string) ([]netip.Addr, time.Duration, error) {
		list, err := r.LookupNetIP(ctx, "ip", host)
		var reason *net.DNSError
		if errors.As(err, &reason) { // the rest of it repeats the name
			err = errors.New(reason.Err)
		}
		return list, hostKnown, err
	}
}

// bootstrap looks hosts up at given servers.
func bootstrap(server transport) func(context.Context, string) ([]netip.Addr, time.Duration, error) {
	return func(ctx context.Context, host string) ([]netip.Addr, time.Duration, error) {
		type result struct {
			list []netip.Addr
			ttl  uint32
			err  error
		}
		results := make(chan result)
		types := []uint16{dns.TypeA, dns.TypeAAAA}
		for _, t := range types {
			go func() {
				q := &dns.Msg{MsgHdr: dns.MsgHdr{RecursionDesired: true}}
				q.Question = []dns.Question{{Name: dns.Fqdn(host), Qtype: t, Qclass: dns.ClassINET}}
				m, err := server.exchange(ctx, q)
				if err == nil && m.Rcode != dns.RcodeSuccess {
					err = fmt.Errorf("the bootstrap server answered %s", dns.RcodeToString[m.Rcode])
				}
				r := result{err: err}
				if err == nil {
					r.list, r.ttl = chain(m, t)
				}
				results <- r
			}()
		}
		var all result
		for range types {
			r := <-results
			if len(r.list) > 0 {
				if len(all.list) == 0 || r.ttl < all.ttl {
					all.ttl = r.ttl
				}
				all.list = append(all.list, r.list...)
			}
			if r.err != nil {
				all.err = r.err
			}
		}
		if len(all.list) > 0 {
			all.err = nil
		}
		return all.list, time.Duration(all.ttl) * time.Second, all.err
	}
}

// chain follows the aliases of an answer from the question to the addresses at their end, and nothing
// else that the answer may contain. The TTL is the least on the way, in seconds.
func chain(m *dns.Msg, qtype uint16) (list []netip.Addr, ttl uint32) {
	name, ttl := m.Question[0].Name, uint32(1<<31-1)
	for range len(m.Answer) + 1 {
		alias := ""
		for _, rr := range m.Answer {
			h := rr.Header()
			if !strings.EqualFold(h.Name, name) || h.Class != dns.ClassINET {
				continue
			}
			var address netip.Addr
			switch rr := rr.(type) {
			case *dns.CNAME:
				alias = rr.Target
			case *dns.A:
				address, _ = netip.AddrFromSlice(rr.A.To4())
			case *dns.AAAA:
				address, _ = netip.AddrFromSlice(rr.AAAA)
			default:
				continue
			}
			if alias == "" && h.Rrtype != qtype {
				continue
			}
			ttl = min(ttl, h.Ttl)
			if address.IsValid() {
				list = append(list, address)
			}
		}
		if len(list) > 0 || alias == "" {
			return list, ttl
		}
		name = alias
	}
	return nil, 0
}
