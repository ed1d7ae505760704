package dns

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// age makes everything in the cache older.
func (d *desk) age(by time.Duration) {
	c := d.server.resolver.Load().cache
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		for _, e := range s.entries {
			if e.stored < -1<<60 {
				continue // fuzzing ages some without end
			}
			e.stored -= int64(by)
			e.retry -= int64(by)
			for i := range e.taught {
				e.taught[i].at -= int64(by)
			}
		}
		s.mu.Unlock()
	}
}

// forgetTaught makes every client one that has to be taught.
func (d *desk) forgetTaught() {
	c := d.server.resolver.Load().cache
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		for _, e := range s.entries {
			e.taught = e.taught[:0] // its memory is counted
		}
		s.mu.Unlock()
	}
}

var errDown = errors.New("down")

func TestTTLs(t *testing.T) {
	z := newZone(t,
		"www.example. 300 CNAME b.example.", "b.example. 100 A 192.0.2.1",
		"short.example. 1 A 192.0.2.2", "never.example. 0 A 192.0.2.3", "long.example. 1000000 A 192.0.2.4",
		"example. 900 SOA ns.example. x.example. 1 2 3 4 50", "nosoa.test. 60 TXT x")
	d := over(t, z, func(s *Settings) { s.Cache = Cache{MaxTTL: time.Hour} })
	d.server.resolver.Load().cache.prefetch = false
	ttl := func(name string, qtype uint16) uint32 {
		t.Helper()
		m := d.ask(name, qtype)
		all := append(m.Answer, m.Ns...)
		for _, record := range all {
			if record.Header().Ttl != all[0].Header().Ttl {
				t.Errorf("%s: the TTLs differ:\n%v", name, m)
			}
		}
		if len(all) == 0 {
			return 0
		}
		return all[0].Header().Ttl
	}
	steps := []struct {
		name   string
		qtype  uint16
		age    time.Duration
		want   uint32
		cached bool
	}{
		{"www.example", dns.TypeA, 0, 100, false},
		{"www.example", dns.TypeA, 30 * time.Second, 70, true},
		{"www.example", dns.TypeA, 69 * time.Second, 1, true},
		{"www.example", dns.TypeA, 2 * time.Second, 100, false},
		{"never.example", dns.TypeA, 0, 0, false},
		{"never.example", dns.TypeA, 0, 0, false},
		{"long.example", dns.TypeA, 0, 3600, false},
		{"gone.example", dns.TypeA, 0, 50, false},
		{"gone.example", dns.TypeA, 20 * time.Second, 30, true},
		{"gone.example", dns.TypeA, 31 * time.Second, 50, false},
		{"b.example", dns.TypeAAAA, 0, 50, false},
		{"b.example", dns.TypeAAAA, time.Second, 49, true},
		{"nosoa.test", dns.TypeA, 0, 0, false},
		{"nosoa.test", dns.TypeA, unknownNegative - time.Second, 0, true},
		{"nosoa.test", dns.TypeA, 2 * time.Second, 0, false},
	}
	for i, step := range steps {
		d.age(step.age)
		asked := len(z.questions())
		if got := ttl(step.name, step.qtype); got != step.want {
			t.Errorf("step %d, %s: TTL %d, want %d", i, step.name, got, step.want)
		}
		if cached := len(z.questions()) == asked; cached != step.cached {
			t.Errorf("step %d, %s: cached %v, want %v", i, step.name, cached, step.cached)
		}
	}
	d = over(t, z, func(s *Settings) { s.Cache = Cache{MinTTL: time.Minute} })
	if got := ttl("short.example", dns.TypeA); got != 60 {
		t.Errorf("a short TTL was raised to %d, want 60", got)
	}
}

// While its upstream fails an answer is used beyond its life, within bounds, and the upstream is spared.
func TestStale(t *testing.T) {
	z := newZone(t, "www.example. 100 A 192.0.2.1")
	d := over(t, z, func(s *Settings) { s.Cache = Cache{Stale: time.Hour, FailureTTL: 5 * time.Second} })
	d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
	z.set(func(z *zone) { z.err = errDown })
	for i, step := range []struct {
		age   time.Duration
		want  string
		asked int // in all
	}{
		{99 * time.Second, "NOERROR 192.0.2.1", 1},
		{2 * time.Second, "NOERROR 192.0.2.1", 2}, // asked, failed
		{time.Second, "NOERROR 192.0.2.1", 2},     // spared
		{5 * time.Second, "NOERROR 192.0.2.1", 3},
		{time.Hour - 20*time.Second, "NOERROR 192.0.2.1", 4},
		{20 * time.Second, "SERVFAIL", 5},
		{time.Second, "SERVFAIL", 5}, // the failure is kept
		{5 * time.Second, "SERVFAIL", 6},
	} {
		d.age(step.age)
		d.pupil.forget()
		m := d.ask("www.example", dns.TypeA)
		if got := brief(m); got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
		if n := len(z.questions()); n != step.asked {
			t.Errorf("step %d: %d questions, want %d", i, n, step.asked)
		}
		if step.want != "SERVFAIL" && i > 0 {
			if m.Answer[0].Header().Ttl != staleTTL {
				t.Errorf("step %d: TTL %d", i, m.Answer[0].Header().Ttl)
			}
			if all := d.pupil.all(); len(all) != 1 || all[0].ttl != staleTTL*time.Second {
				t.Errorf("step %d: taught %v", i, all)
			}
		}
	}
	z.set(func(z *zone) { z.err = nil })
	d.age(6 * time.Second)
	d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
	if s := d.server.Stats(); s.Stale != 4 || s.Failed != 3 {
		t.Errorf("%+v", s)
	}
}

// An upstream that says nothing costs a client no more than 2 s, and less than that while there is a stale
// answer: the first who asks waits for the upstream, and nobody else.
func TestSilentUpstream(t *testing.T) {
	real := processStart
	defer func() { processStart = real }()
	synctest.Test(t, func(t *testing.T) {
		processStart = time.Now()
		z := newZone(t, "www.example. 100 A 192.0.2.1")
		d := over(t, z, func(s *Settings) { s.Cache = Cache{Stale: time.Hour, FailureTTL: 2 * Overtime} })
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.age(200 * time.Second)
		z.set(func(z *zone) { z.hold = make(chan struct{}) })
		for _, c := range []struct {
			after      time.Duration
			name, want string
			takes      time.Duration
		}{
			{0, "www.example", "NOERROR 192.0.2.1", patience},
			{0, "www.example", "NOERROR 192.0.2.1", 0},
			{0, "other.example", "SERVFAIL", exchangeTime},
			{0, "other.example", "SERVFAIL", exchangeTime},        // an answer may come yet
			{Overtime, "other.example", "SERVFAIL", 0},            // the failure is kept
			{Overtime, "other.example", "SERVFAIL", exchangeTime}, // for no longer than if there were no overtime
		} {
			time.Sleep(c.after)
			start := time.Now()
			d.expect(c.name, dns.TypeA, c.want)
			if took := time.Since(start); took != c.takes || took > 2*time.Second {
				t.Errorf("%s took %v, want %v", c.name, took, c.takes)
			}
		}
	})
}

// One question is asked once, however many ask it at once.
func TestCoalescing(t *testing.T) {
	hold := make(chan struct{})
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	z.hold = hold
	d := over(t, z, nil)
	var asking sync.WaitGroup
	const clients = 100
	next := client4
	for range clients {
		next = next.Next()
		client := next
		asking.Go(func() {
			if got := brief(d.send(client, question("WWW.example", dns.TypeA))); got != "NOERROR 192.0.2.1" {
				t.Error(got)
			}
			if !d.pupil.knows(client, "www.example", addrs("192.0.2.1")[0]) {
				t.Errorf("%s was not taught before it got the answer", client)
			}
		})
	}
	eventually(t, "all are waiting", func() bool {
		c := d.server.clients
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.outstanding == clients
	})
	close(hold)
	asking.Wait()
	if q := z.questions(); len(q) != 1 {
		t.Errorf("asked %q", q)
	}
}

// An answer that is asked for near its end is renewed, once, without anybody waiting.
func TestPrefetch(t *testing.T) {
	for _, quick := range []bool{true, false} {
		z := newZone(t, "www.example. 100 A 192.0.2.1", "short.example. 5 A 192.0.2.1")
		d := over(t, z, func(s *Settings) { s.Cache = Cache{Prefetch: true} })
		d.expect("short.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.age(4900 * time.Millisecond)
		d.expect("short.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.age(89 * time.Second)
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.server.work.Wait()
		if n := len(z.questions()); n != 2 {
			t.Fatalf("%d questions before it is time, want 2", n)
		}
		hold := make(chan struct{})
		z.set(func(z *zone) {
			z.records, z.hold = nil, hold
			z.err = nil
		})
		z.add(t, "www.example. 100 A 192.0.2.2")
		if !quick {
			d.forgetTaught() // so that the answers have to wait for Learn
		}
		d.age(2 * time.Second)
		for range 3 {
			d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		}
		close(hold)
		d.server.work.Wait()
		d.pupil.forget()
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.2")
		if n := len(z.questions()); n != 3 {
			t.Errorf("%d questions, want 3", n)
		}
		if !d.pupil.knows(client4, "www.example", addrs("192.0.2.2")[0]) {
			t.Error("the new address was not taught")
		}
	}
}

// The cache is bounded, and what is in use stays.
func TestCacheIsBounded(t *testing.T) {
	c := newCache(Cache{Entries: 1600}, nil)
	entry := func(name string, size int) *entry {
		return &entry{key: name, wire: make([]byte, size), stored: monotonic(), life: int64(time.Hour)}
	}
	c.put(entry("used", 100), 0)
	for i := range 20000 {
		if i%50 == 0 {
			if e, how, _ := c.get([]byte("used"), monotonic()); e == nil || how != fresh {
				t.Fatalf("after %d entries the one in use is gone", i)
			}
		}
		once := entry(fmt.Sprint("once ", i), 100)
		c.put(once, 0)
		for client := range byte(i % (2 * maxTaught)) {
			c.learned(once, [16]byte{client}, int64(i))
		}
	}
	if n := c.length(); n > 1600 || n < 1300 {
		t.Errorf("%d entries, want about 1600", n)
	}
	for i := range 20000 {
		c.put(entry(fmt.Sprint("large ", i), 10000), 0)
	}
	for i := range c.shards {
		s := &c.shards[i]
		for _, e := range slices.Collect(maps.Values(s.entries)) { // clients learn, and nothing is put any more
			for client := range byte(maxTaught) {
				c.learned(e, [16]byte{client}, 0)
			}
		}
		sum, n := 0, 0
		for e := s.newest; e != nil; e = e.next {
			sum += e.size()
			n++
		}
		if s.bytes != sum || s.bytes > s.maxBytes || n != len(s.entries) {
			t.Errorf("shard %d: %d bytes counted, %d there, at most %d; %d entries in the list, %d in the map", i, s.bytes, sum, s.maxBytes, n, len(s.entries))
		}
	}
	c.put(entry("enormous", 60000), 0)
	if e, _, _ := c.get([]byte("enormous"), monotonic()); e != nil {
		t.Error("an entry that would fill a shard was kept")
	}
}
