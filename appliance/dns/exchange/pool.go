package exchange

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// session is a connection that many questions share.
type session interface {
	// ask sends a question and waits for its answer. An error that is neither a *badAnswer nor the
	// context's means that the session is of no more use.
	ask(ctx context.Context, q *question) (reply, error)
	// dead is closed when the session has ended, by whichever side.
	dead() <-chan struct{}
	// close ends it and returns when nothing of it is left.
	close()
}

// idle is how long a session without questions is kept. Servers close earlier or later (RFC 7766
// section 6.2.3); a question that meets a closed one is asked again on a new one.
const idle = 30 * time.Second

// backoff is how long to wait before connecting after that many failures in a row: not at all after
// the first, then longer each time. Questions wait meanwhile, so that none fails that need not.
var backoff = []time.Duration{0, 0, 50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond}

// limits of a pool.
type limits struct {
	width int // links at most
	depth int // questions on each link before there is another one
}

var errSilent = errors.New("the connection went silent")

// pool keeps a few links to an upstream. It connects when a question wants to be asked, once for all
// that wait, and replaces links that died, went silent or were idle too long.
type pool struct {
	open           func(context.Context) (session, error)
	timeout        time.Duration // of a question; half of it is how long a proven link may be silent
	connectTimeout time.Duration
	life           *life
	limits

	mu         sync.Mutex
	links      []*link // that take questions
	connecting *attempt
	failures   int // links in a row that never answered
}

// link is a session in a pool. The pool's mutex guards it.
type link struct {
	session
	load    int       // questions on it
	proven  bool      // it has answered
	heard   time.Time // when it answered last
	unused  time.Time // since when the load is 0
	retired bool      // it takes no more questions
	drained chan struct{}
}

// attempt is a connecting that questions wait for.
type attempt struct {
	done chan struct{}
	link *link
	err  error
}

// ask asks on some link; once more, on another one, where a link that used to work turned out dead.
func (p *pool) ask(ctx context.Context, q *question) (reply, error) {
	for again := false; ; again = true {
		l, err := p.acquire(ctx)
		if err != nil {
			return reply{}, err
		}
		r, worked, err := p.askOn(ctx, l, q)
		if err == nil || again || !worked || ctx.Err() != nil || isBadAnswer(err) {
			return r, err
		}
	}
}

// askOn asks on a link that was acquired, and releases it; worked says whether the link ever answered.
// One that did, and now says nothing at all for half of the timeout, is given up while there is time
// for another one: its peer may be gone without a word. One that never did has as long as connecting may
// take; then other questions are asked elsewhere, and this one may wait on.
func (p *pool) askOn(ctx context.Context, l *link, q *question) (r reply, worked bool, err error) {
	begun := time.Now()
	asking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer time.AfterFunc(p.timeout/2, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.proven && l.heard.Before(begun) {
			cancel(errSilent)
		}
	}).Stop()
	defer time.AfterFunc(p.connectTimeout, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.load > 0 && l.heard.Before(begun) {
			p.retire(l)
		}
	}).Stop()
	r, err = l.ask(asking, q)
	if err != nil && context.Cause(asking) == errSilent {
		err = errSilent
	}
	return r, p.release(ctx, l, begun, err), err
}

// acquire finds the link with the least load and counts a question on it, or waits until there is one.
func (p *pool) acquire(ctx context.Context) (*link, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		var l *link
		for _, other := range p.links {
			if !other.ended() && (l == nil || other.load < l.load) {
				l = other
			}
		}
		a := p.connecting
		if a == nil && (l == nil || l.load >= p.depth && len(p.links) < p.width) {
			a = p.connect()
		}
		if l != nil {
			l.load++
			return l, nil
		}
		p.mu.Unlock()
		select {
		case <-a.done:
		case <-ctx.Done():
		}
		p.mu.Lock()
		switch {
		case ctx.Err() != nil:
			return nil, &connectError{ctx.Err()}
		case a.err != nil:
			return nil, a.err
		case !a.link.retired:
			a.link.load++
			return a.link, nil
		case !a.link.proven:
			return nil, errors.New("the connection ended before it answered")
		}
		// Others were answered before it ended: this one is asked on the next.
	}
}

type connectError struct{ cause error }

func (e *connectError) Error() string { return "connecting: " + e.cause.Error() }
func (e *connectError) Unwrap() error { return e.cause }

// release ends a question on a link and judges the link by how it went. It says whether it ever worked.
func (p *pool) release(ctx context.Context, l *link, begun time.Time, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	l.load--
	switch {
	case err == nil || isBadAnswer(err):
		l.proven, l.heard = true, time.Now()
		p.failures = 0
	case errors.Is(ctx.Err(), context.Canceled): // who asked went away
	case errors.Is(ctx.Err(), context.DeadlineExceeded) && l.heard.After(begun): // slow with this one only
	default:
		p.retire(l)
	}
	if l.load == 0 {
		l.unused = time.Now()
		if l.retired {
			close(l.drained)
		}
	}
	return l.proven
}

// retire takes a link out of use. It is closed when the questions on it have ended.
func (p *pool) retire(l *link) {
	if l.retired {
		return
	}
	l.retired = true
	p.links = slices.DeleteFunc(p.links, func(other *link) bool { return other == l })
	if !l.proven {
		p.failures++
	}
}

// connect opens a link for all that wait, and keeps it then. It is not bound to the question that
// needs it first.
func (p *pool) connect() *attempt {
	a := &attempt{done: make(chan struct{})}
	pause := backoff[min(p.failures, len(backoff)-1)]
	started := p.life.start(func() {
		if l := p.attempt(a, pause); l != nil {
			p.keep(l)
		}
	})
	if started {
		p.connecting = a
	} else {
		a.err = net.ErrClosed
		close(a.done)
	}
	return a
}

func (p *pool) attempt(a *attempt, pause time.Duration) *link {
	var made session
	err := p.pause(pause)
	if err == nil {
		ctx, cancel := context.WithTimeout(p.life.ctx, p.connectTimeout)
		made, err = p.open(ctx)
		cancel()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.connecting = nil
	defer close(a.done)
	if err != nil {
		a.err = &connectError{err}
		p.failures++
		return nil
	}
	a.link = &link{session: made, unused: time.Now(), drained: make(chan struct{})}
	p.links = append(p.links, a.link)
	return a.link
}

func (p *pool) pause(d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-p.life.ctx.Done():
		return net.ErrClosed
	}
}

// keep waits for the end of a link, and is it when nobody uses it any more.
func (p *pool) keep(l *link) {
	defer l.close()
	timer := time.NewTimer(idle)
	defer timer.Stop()
	for {
		select {
		case <-l.drained:
			return
		case <-l.dead():
		case <-p.life.ctx.Done():
		case <-timer.C:
		}
		p.mu.Lock()
		left := idle
		if l.load == 0 {
			left -= time.Since(l.unused)
		}
		if over := l.ended() || p.life.ctx.Err() != nil; over || left <= 0 {
			if !over {
				l.proven = true // it did no wrong
			}
			p.retire(l)
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		timer.Reset(left)
	}
}

func (l *link) ended() bool {
	select {
	case <-l.dead():
		return true
	default:
		return false
	}
}

// pooled is a transport that asks on a pool.
type pooled struct {
	pool  *pool
	shape shape
}

func (p *pooled) exchange(ctx context.Context, asked *dns.Msg) (*dns.Msg, error) {
	q, err := newQuestion(asked, p.shape)
	if err != nil {
		return nil, err
	}
	r, err := p.pool.ask(ctx, q)
	if err == nil && r.knowsNoEDNS() {
		if q, err = newQuestion(asked, shape{bare: true}); err == nil {
			r, err = p.pool.ask(ctx, q)
		}
	}
	return r.Msg, err
}
