package exchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	// foldingKnown is how long a server that does not keep the case of names is believed to go on so.
	foldingKnown = time.Hour
	// agreeing answers show that it is the server's habit, where that has no TCP to ask: unbound wants as many.
	agreeing = 3
)

// folding is whether a server keeps the case of names. One that does not gets them as they are: with random case
// every answer of its would have to be confirmed. What protects from forgeries then is the id and the port.
type folding struct {
	host  string // for the log
	log   *slog.Logger
	until atomic.Pointer[time.Time] // when it has to be shown again; nil: it has not been
}

// folds reports whether the server is known not to keep the case.
func (f *folding) folds() bool {
	until := f.until.Load()
	return until != nil && time.Now().Before(*until)
}

// shown says that the server does not keep the case.
func (f *folding) shown() {
	until := time.Now().Add(foldingKnown)
	if f.until.Swap(&until) == nil {
		f.log.Warn("dns upstream does not repeat names as they were asked: forged answers are easier to make", "upstream", f.host)
	}
}

// confirm finds out whether an answer with the name in another case is the server's or forged. The server itself
// says so by TCP, where nobody off the path answers: if the case is kept there the datagram was forged, and nothing
// is learned from it.
func (u *udp) confirm(ctx context.Context, q *question, first reply) (reply, error) {
	byTCP, cancel := context.WithTimeout(ctx, u.timeout/2)
	defer cancel()
	r, err := u.tcp.ask(byTCP, q)
	switch {
	case err == nil:
		if !r.keepsCase {
			u.shown()
		}
		return r, nil
	case !isBadAnswer(err) && ctx.Err() == nil:
		var differ error
		if r, differ = u.agree(ctx, q, first); differ == nil {
			return r, nil
		}
		err = fmt.Errorf("%w; %w", err, differ)
	}
	return r, fmt.Errorf("the answer does not repeat the name; asking again by tcp: %w", err)
}

// agree asks until so many answers agree, in content and in not keeping the case, that they cannot be forged: each
// would have to hit an id and a port of its own. One that keeps the case is the server's, for nobody else knows it.
func (u *udp) agree(ctx context.Context, q *question, first reply) (reply, error) {
	for range agreeing - 1 {
		again, err := newQuestion(q.asked, q.shape)
		if err != nil {
			return reply{}, err
		}
		h, err := u.reach(ctx, again)
		switch {
		case err != nil:
			return reply{}, fmt.Errorf("asking again by udp: %w", err)
		case !h.byTCP:
			return h.reply, nil
		case h.Msg == nil || !sameAnswer(first.Msg, h.Msg):
			return reply{}, errDiffer
		}
	}
	u.shown()
	return first, nil
}

var errDiffer = errors.New("asked again by udp the answer is another one")

// sameAnswer reports whether two messages say the same of their question, in whatever order and for whatever time.
func sameAnswer(a, b *dns.Msg) bool {
	return a.Rcode == b.Rcode && len(a.Answer) == len(b.Answer) && !slices.ContainsFunc(a.Answer, func(r dns.RR) bool {
		return !slices.ContainsFunc(b.Answer, func(s dns.RR) bool { return dns.IsDuplicate(r, s) })
	})
}
