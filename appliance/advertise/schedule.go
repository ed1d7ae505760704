package advertise

import (
	"math/rand/v2"
	"time"
)

// Times between advertisements. The first follow each other quickly, for some are lost on Wi-Fi; after that a client that
// has lost its route has it again within longest.
const (
	shortest, longest = 30 * time.Second, 60 * time.Second
	initial           = 3               // that follow quickly (RFC 4861 section 10: MAX_INITIAL_RTR_ADVERTISEMENTS)
	least             = 3 * time.Second // between two (MIN_DELAY_BETWEEN_RAS), however many ask
	mostDelay         = 500 * time.Millisecond
	begin             = time.Second // for the main router to answer first, so that we can say as it does
)

// schedule is when the next advertisement is due.
type schedule struct {
	next, last time.Time
	sent       int // since something changed
}

// renew makes what has changed known quickly.
func (s *schedule) renew(now time.Time) {
	s.sent = 0
	s.next = later(now, s.last.Add(least))
}

// solicited brings the next one forward, by a random delay so that routers do not answer all at once. Those who ask
// are all answered by the same one.
func (s *schedule) solicited(now time.Time) {
	if at := later(now.Add(rand.N(mostDelay)), s.last.Add(least)); at.Before(s.next) {
		s.next = at
	}
}

func (s *schedule) done(now time.Time) {
	s.sent++
	s.last, s.next = now, now.Add(least)
	if s.sent >= initial {
		s.next = now.Add(shortest + rand.N(longest-shortest))
	}
}

func (s *schedule) failed(now time.Time) { s.next = now.Add(least) }

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
