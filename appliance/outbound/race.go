package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

// headStart is how long an address is tried alone before the next one is tried too (RFC 8305 section 5).
const headStart = 250 * time.Millisecond

// connect makes the TCP connection to the upstream. The net package looks names up and tries the addresses, unless
// the options have their own look-up.
func (u *upstream) connect(ctx context.Context) (net.Conn, error) {
	if _, err := netip.ParseAddr(u.host); err == nil || u.options.Lookup == nil {
		return u.dialer.DialContext(ctx, "tcp", u.address())
	}
	ctx, cancel := context.WithTimeout(ctx, u.options.dialTimeout())
	defer cancel()
	addrs, err := u.options.Lookup(ctx, u.host)
	if err != nil {
		return nil, fmt.Errorf("looking up %s: %w", u.host, err)
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("looking up %s: it has no address", u.host)
	}
	return u.race(ctx, addrs)
}

// race dials one address after the other, each when the one before has failed or has had its head start. The first
// connection wins; the other dials are given up, and have ended when race returns.
func (u *upstream) race(ctx context.Context, addrs []netip.Addr) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	var dials sync.WaitGroup
	defer dials.Wait()
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	next := time.NewTimer(0)
	defer next.Stop()
	var errs error
	for started, running := 0, 0; ; {
		if started == len(addrs) && running == 0 {
			return nil, errs
		}
		select {
		case <-next.C:
			if started == len(addrs) {
				continue
			}
			to := netip.AddrPortFrom(addrs[started], u.port).String()
			started++
			running++
			next.Reset(headStart)
			dials.Go(func() {
				conn, err := u.dialer.DialContext(ctx, "tcp", to)
				select {
				case results <- result{conn, err}:
				case <-ctx.Done():
					if err == nil {
						conn.Close()
					}
				}
			})
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			running--
			errs = errors.Join(errs, r.err)
			next.Reset(0)
		case <-ctx.Done():
			return nil, errors.Join(errs, ctx.Err())
		}
	}
}
