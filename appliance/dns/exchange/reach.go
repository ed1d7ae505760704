package exchange

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// stagger is how long an address may be silent before the next one is tried beside it (RFC 8305).
const stagger = 250 * time.Millisecond

// endpoint is where an upstream is.
type endpoint struct {
	host   string
	port   uint16
	dialer Dialer
	fixed  []netip.AddrPort // or
	locate *locator
	best   atomic.Pointer[netip.AddrPort] // the address that worked last
}

// addresses are those to try, in this order.
func (e *endpoint) addresses(ctx context.Context) ([]netip.AddrPort, error) {
	list := slices.Clone(e.fixed)
	if e.locate != nil {
		found, err := e.locate.addresses(ctx)
		if err != nil {
			return nil, err
		}
		for _, a := range found {
			list = append(list, netip.AddrPortFrom(a, e.port))
		}
	}
	if best := e.best.Load(); best != nil {
		if i := slices.Index(list, *best); i > 0 {
			list[0], list[i] = list[i], list[0]
		}
	}
	return list, nil
}

// reach tries the endpoint's addresses until one works, the next one whenever one fails or has been
// silent for a while. Those that work too late are discarded. All tries have ended when it returns.
func reach[T any](ctx context.Context, e *endpoint, try func(context.Context, netip.AddrPort) (T, error), discard func(T)) (T, error) {
	var none T
	list, err := e.addresses(ctx)
	if err != nil {
		return none, err
	}
	if len(list) == 1 {
		made, err := try(ctx, list[0])
		if err != nil {
			e.unreachable(err)
			return none, fmt.Errorf("%s: %w", list[0], bare(err))
		}
		return made, nil
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		from netip.AddrPort
		made T
		err  error
	}
	results := make(chan result)
	running, next, won := 0, 0, false
	winner := none
	begin := func() {
		to := list[next]
		next++
		running++
		go func() {
			made, err := try(ctx, to)
			results <- result{to, made, err}
		}()
	}
	begin()
	timer := time.NewTimer(stagger)
	defer timer.Stop()
	var failure error
	for running > 0 {
		select {
		case r := <-results:
			running--
			switch {
			case r.err == nil && won:
				discard(r.made)
			case r.err == nil:
				winner, won = r.made, true
				e.best.Store(&r.from)
				cancel()
			case won || ctx.Err() != nil && failure != nil:
			case failure == nil:
				failure = fmt.Errorf("%s: %w", r.from, bare(r.err))
			default:
				failure = fmt.Errorf("%w; %s: %w", failure, r.from, bare(r.err))
			}
		case <-timer.C:
		}
		if !won && next < len(list) && ctx.Err() == nil {
			begin()
			timer.Reset(stagger)
		}
	}
	if won {
		return winner, nil
	}
	e.unreachable(failure)
	return none, failure
}

// unreachable says that no address worked: the host may have moved, unless nobody wanted to know.
func (e *endpoint) unreachable(err error) {
	if e.locate != nil && !errors.Is(err, context.Canceled) {
		e.locate.doubt()
	}
}
