package dns

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// upstream is one upstream with its figures.
type upstream struct {
	name              string
	exchanger         Exchanger
	log               *slog.Logger
	queries, failures atomic.Uint64
	warning           occasion
}

// ask asks the upstream and returns what of its answer is believed.
func (u *upstream) ask(ctx context.Context, a *ask) (*answer, error) {
	u.queries.Add(1)
	q := new(dns.Msg)
	q.SetQuestion(a.name, a.qtype)
	q.SetEdns0(maxReply, a.do)
	q.CheckingDisabled = a.cd
	q.AuthenticatedData = true // tell us whether it is authentic; who did not ask is not told (RFC 6840 section 5.7)
	m, err := u.exchanger.Exchange(ctx, q)
	var got *answer
	if err == nil {
		err = ctx.Err() // nobody waits for what reading it would tell
	}
	if err == nil {
		got, err = accept(a, m)
	}
	if err != nil {
		u.failed(ctx, a, err)
		return nil, err
	}
	return got, nil
}

// occasion keeps what happens all the time from filling the log.
type occasion struct{ last atomic.Int64 } // monotonic; 0: never

const warningInterval = 10 * time.Second

// given reports whether something may be written now: at most once per interval.
func (o *occasion) given() bool {
	now, last := monotonic(), o.last.Load()
	return (last == 0 || now-last > int64(warningInterval)) && o.last.CompareAndSwap(last, now)
}

// failed counts a failure and warns of it, but not for each question: an upstream that is down fails all.
func (u *upstream) failed(ctx context.Context, a *ask, err error) {
	failures := u.failures.Add(1)
	u.log.Debug("question failed", "upstream", u.name, "name", a.host, "type", dns.TypeToString[a.qtype], "error", err)
	if ctx.Err() == context.Canceled {
		return // we are being closed
	}
	if u.warning.given() {
		u.log.Warn("dns upstream failed", "upstream", u.name, "name", a.host, "error", err, "failures", failures)
	}
}
