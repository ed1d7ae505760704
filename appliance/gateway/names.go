package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Upstream proxies that are given by name are looked up for the implicit rules: by the DNS of the configuration, or
// with the system's resolver where it has none.
const (
	lookupTimeout = 3 * time.Second
	lookupAgain   = time.Minute
	lookupFailed  = 10 * time.Second // after a failure: at boot the network may come up behind us
	// An address keeps its rule for this long after it was last seen, so that a name whose answers rotate
	// does not make a new policy each time.
	addressLife = time.Hour
	maxPerHost  = 64
)

// lookup finds the addresses of a host.
type lookup func(ctx context.Context, host string) ([]netip.Addr, error)

// systemLookup does as /etc/resolv.conf says.
func systemLookup(ctx context.Context, host string) ([]netip.Addr, error) {
	resolver := &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return ownDialer().DialContext(ctx, network, address)
		},
	}
	return resolver.LookupNetIP(ctx, "ip", host)
}

// names are the addresses of upstream hosts.
type names struct {
	mu   sync.Mutex
	seen map[string]map[netip.Addr]time.Time
}

func newNames() *names { return &names{seen: map[string]map[netip.Addr]time.Time{}} }

// clone is for a configuration that may not be taken.
func (n *names) clone() *names {
	n.mu.Lock()
	defer n.mu.Unlock()
	next := newNames()
	for host, addrs := range n.seen {
		next.seen[host] = maps.Clone(addrs)
	}
	return next
}

// addresses of a host, sorted. It does not look anything up.
func (n *names) addresses(host string) []netip.Addr {
	if found := literal(host); found != nil {
		return found
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.SortedFunc(maps.Keys(n.seen[host]), netip.Addr.Compare)
}

// refresh looks all names among the hosts up, at once and in bounded time. What was known of a name that
// fails stays.
func (n *names) refresh(ctx context.Context, find lookup, upstreams []upstream) error {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	hosts := map[string]bool{}
	for _, u := range upstreams {
		if literal(u.host) == nil {
			hosts[u.host] = true
		}
	}
	var g errgroup.Group
	g.SetLimit(16)
	var mu sync.Mutex
	var errs []error
	for host := range hosts {
		g.Go(func() error {
			found, err := find(ctx, host)
			if err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("looking up the upstream %s: %w", host, plainDNS(err)))
				mu.Unlock()
				return nil
			}
			n.learn(host, found, time.Now())
			return nil
		})
	}
	g.Wait()
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

func (n *names) learn(host string, found []netip.Addr, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	addrs := n.seen[host]
	if addrs == nil {
		addrs = map[netip.Addr]time.Time{}
		n.seen[host] = addrs
	}
	maps.DeleteFunc(addrs, func(_ netip.Addr, at time.Time) bool { return now.Sub(at) > addressLife })
	for _, a := range found {
		a = a.Unmap().WithZone("")
		if _, known := addrs[a]; known || len(addrs) < maxPerHost {
			addrs[a] = now
		}
	}
}

// plainDNS takes out of a resolver's error the host, which the message names already, and ports, which would
// make each repetition a new message.
func plainDNS(err error) error {
	dns := (*net.DNSError)(nil)
	switch {
	case errors.Is(err, context.DeadlineExceeded): // of our DNS
		return errors.New("no answer in time")
	case !errors.As(err, &dns):
		return err
	case dns.IsTimeout:
		return errors.New("no answer in time")
	case dns.IsNotFound:
		return errors.New("there is no such name")
	}
	return errors.New(dns.Err)
}

// lookups refreshes the names of the plan in force. Changed gets a token after each round.
type lookups struct {
	refresh func(context.Context) error
	failed  func(error) // nil error: all is well
	changed chan struct{}
	ready   chan struct{}
}

func (l *lookups) String() string         { return "upstream names" }
func (l *lookups) Ready() <-chan struct{} { return l.ready }

func (l *lookups) Run(ctx context.Context) error {
	close(l.ready)
	pause := lookupFailed // soon after the start: the first round may have failed
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		err := l.refresh(ctx)
		if ctx.Err() != nil {
			return nil
		}
		l.failed(err)
		pause = lookupAgain
		if err != nil {
			pause = lookupFailed
		}
		select {
		case l.changed <- struct{}{}:
		default:
		}
	}
}
