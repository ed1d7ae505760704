package dns

import (
	"context"
	"log/slog"
	"sync"
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

	mu       sync.Mutex
	underWay int
	devices  map[device]int // questions under way; no zeros
}

const (
	// maxAsking is how many questions of all devices together are under way at an upstream. It takes more,
	// but lets them wait.
	maxAsking = 1000
	// maxAskingEach is how many of one device are. Names whose servers are black holes keep an upstream busy
	// for as long as it is waited for.
	maxAskingEach = 128
)

// enter counts a question as under way, if the device may have one more. When much is, those who have
// little still may.
func (u *upstream) enter(d device) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := u.devices[d]
	if n >= maxAskingEach || u.underWay >= maxAsking*3/4 && n >= reserved || u.underWay >= maxAsking {
		return false
	}
	u.devices[d]++
	u.underWay++
	return true
}

func (u *upstream) leave(d device) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.underWay--
	if u.devices[d]--; u.devices[d] == 0 {
		delete(u.devices, d)
	}
}

// ask asks the upstream and returns what of its answer is believed; errBusy without asking if there are too
// many questions.
func (u *upstream) ask(ctx context.Context, a *ask) (*answer, error) {
	if !u.enter(a.from) {
		return nil, errBusy
	}
	defer u.leave(a.from)
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
