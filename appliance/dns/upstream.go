package dns

import (
	"context"
	"errors"
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
	asking            seats // of questions under way
	late              seats // of those among them that no client waits for any more
}

const (
	// maxAsking is how many questions of all devices together are under way at an upstream. It takes more,
	// but lets them wait.
	maxAsking = 1000
	// maxAskingEach is how many of one device are. Names whose servers are black holes keep an upstream busy
	// for as long as it is waited for.
	maxAskingEach = 128
	// maxLate and maxLateEach are how many of them may go on when no client waits any more.
	maxLate     = 64
	maxLateEach = 32
)

func newUpstream(name string, e Exchanger, log *slog.Logger) *upstream {
	return &upstream{name: name, exchanger: e, log: log, asking: newSeats(maxAsking, maxAskingEach), late: newSeats(maxLate, maxLateEach)}
}

// seats bounds what is under way, in all and for each device.
type seats struct {
	all, each int

	mu      sync.Mutex
	taken   int
	devices map[device]int // no zeros
}

func newSeats(all, each int) seats { return seats{all: all, each: each, devices: make(map[device]int)} }

// enter takes a seat, if the device may have one more. When few are left, those who have little still may.
func (s *seats) enter(d device) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.devices[d]
	if n >= s.each || s.taken >= s.all*3/4 && n >= reserved || s.taken >= s.all {
		return false
	}
	s.devices[d]++
	s.taken++
	return true
}

func (s *seats) leave(d device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken--
	if s.devices[d]--; s.devices[d] == 0 {
		delete(s.devices, d)
	}
}

// ask asks the upstream and returns what of its answer is believed; errBusy without asking if there are too
// many questions.
func (u *upstream) ask(ctx context.Context, a *ask) (*answer, error) {
	if !u.asking.enter(a.from) {
		return nil, errBusy
	}
	defer u.asking.leave(a.from)
	u.queries.Add(1)
	q := new(dns.Msg)
	q.SetQuestion(a.name, a.qtype)
	q.SetEdns0(maxReply, a.do)
	q.CheckingDisabled = a.cd
	q.AuthenticatedData = true // tell us whether it is authentic; who did not ask is not told (RFC 6840 section 5.7)
	asking, end := u.limit(ctx, a)
	defer end()
	m, err := u.exchanger.Exchange(asking, q)
	switch {
	case context.Cause(asking) == errLate:
		err = errLate
	case err == nil:
		err = asking.Err() // nobody waits for what reading it would tell
	}
	var got *answer
	if err == nil {
		got, err = accept(a, m)
	}
	if err != nil {
		u.failed(ctx, a, err)
		return nil, err
	}
	return got, nil
}

var errLate = errors.New("no answer in time, and too many are waited for beyond it")

// limit ends the asking when nobody waits for the answer any more, unless there is a seat for it then: who
// asked will ask again. The caller calls end.
func (u *upstream) limit(ctx context.Context, a *ask) (asking context.Context, end func()) {
	asking, cancel := context.WithCancelCause(ctx)
	seated := make(chan bool, 1)
	timer := time.AfterFunc(time.Until(a.due), func() {
		ok := u.late.enter(a.from)
		if !ok {
			cancel(errLate)
		}
		seated <- ok
	})
	return asking, func() {
		cancel(nil)
		if !timer.Stop() && <-seated {
			u.late.leave(a.from)
		}
	}
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
