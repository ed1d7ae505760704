package dns

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/policy"
)

// onItsClock runs a test on a clock of its own, from which our time counts too.
func onItsClock(t *testing.T, test func(t *testing.T)) {
	real := processStart
	defer func() { processStart = real }()
	synctest.Test(t, func(t *testing.T) {
		processStart = time.Now()
		test(t)
	})
}

// slowly is an upstream that takes its time.
type slowly struct {
	Exchanger
	takes time.Duration
	asked atomic.Int32
	now   atomic.Int32 // under way
}

func (s *slowly) Exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	s.asked.Add(1)
	s.now.Add(1)
	defer s.now.Add(-1)
	select {
	case <-time.After(s.takes):
		return s.Exchanger.Exchange(ctx, q)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// An answer that comes when its client has given up is for the client's next try, and everybody's: who asks before it is
// there gets it when it comes, who asks then has it at once, taught like any other, and the upstream was asked once. What
// breaks it is to stop waiting when the client does.
func TestLateAnswer(t *testing.T) {
	onItsClock(t, func(t *testing.T) {
		up := &slowly{Exchanger: newZone(t, "www.example. 60 A 192.0.2.1"), takes: 3 * time.Second}
		d := over(t, up, nil)
		for _, c := range []struct {
			client netip.Addr
			want   string
			takes  time.Duration
		}{
			{client4, "SERVFAIL", exchangeTime},
			{client4, "NOERROR 192.0.2.1", up.takes - exchangeTime},
			{client4, "NOERROR 192.0.2.1", 0},
			{other4, "NOERROR 192.0.2.1", 0},
		} {
			start := time.Now()
			got := brief(d.send(c.client, question("www.example", dns.TypeA)))
			if took := time.Since(start); got != c.want || took != c.takes {
				t.Errorf("%s after %v, want %s after %v", got, took, c.want, c.takes)
			}
			if taught := d.pupil.knows(c.client, "www.example", addrs("192.0.2.1")[0]); taught != (c.want != "SERVFAIL") {
				t.Errorf("%s was told %s; taught: %v", c.client, got, taught)
			}
		}
		if n := up.asked.Load(); n != 1 {
			t.Errorf("the upstream was asked %d times", n)
		}
	})
}

// A late answer takes the place of a stale one, for which nobody waits meanwhile but the first who asks.
func TestLateAnswerReplacesAStaleOne(t *testing.T) {
	onItsClock(t, func(t *testing.T) {
		z := newZone(t, "www.example. 60 A 192.0.2.1")
		up := &slowly{Exchanger: z}
		d := over(t, up, func(s *Settings) { s.Cache.Stale = time.Hour })
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.age(2 * time.Minute)
		z.set(func(z *zone) { z.records = nil })
		z.add(t, "www.example. 60 A 192.0.2.2")
		up.takes = 3 * time.Second
		for _, c := range []struct {
			after time.Duration
			want  string
			takes time.Duration
		}{{0, "192.0.2.1", patience}, {0, "192.0.2.1", 0}, {up.takes - patience, "192.0.2.2", 0}} {
			time.Sleep(c.after)
			synctest.Wait()
			start := time.Now()
			d.expect("www.example", dns.TypeA, "NOERROR "+c.want)
			if took := time.Since(start); took != c.takes {
				t.Errorf("%s after %v, want %v", c.want, took, c.takes)
			}
		}
	})
}

// A late answer is judged as one in time is: its chain, and where it leads.
func TestLateAnswerIsJudged(t *testing.T) {
	for want, answer := range map[string]func(m *dns.Msg){
		"SERVFAIL": func(m *dns.Msg) { m.Question[0].Name = "bank.example." },
		"NOERROR":  func(m *dns.Msg) { m.Answer[0].(*dns.A).A = []byte{192, 168, 0, 1} },
	} {
		onItsClock(t, func(t *testing.T) {
			z := newZone(t, "www.example. 60 A 192.0.2.1")
			z.rewrite = answer
			up := &slowly{Exchanger: z, takes: 3 * time.Second}
			d := over(t, up, nil)
			d.expect("www.example", dns.TypeA, "SERVFAIL")
			time.Sleep(up.takes - exchangeTime)
			synctest.Wait()
			d.expect("www.example", dns.TypeA, want)
			if taught := d.pupil.all(); len(taught) > 0 || up.asked.Load() != 1 {
				t.Errorf("%s: taught %v, asked %d times", want, taught, up.asked.Load())
			}
		})
	}
}

// What goes on when nobody waits any more is bounded, for each device and in all, in time, and by Close, which leaves
// nothing of it behind.
func TestLateAnswersAreBounded(t *testing.T) {
	onItsClock(t, func(t *testing.T) {
		up := &slowly{Exchanger: newZone(t), takes: time.Hour}
		d := newDesk(t, Options{ClientFacts: func(a netip.Addr) (policy.MAC, string) {
			return policy.MAC{2, 0, 0, 0, 0, a.As4()[3]}, ""
		}}, Settings{Upstreams: map[string]Exchanger{"up": up}, Default: "up"})
		var asking sync.WaitGroup
		// Devices ask one after the other, and so they give up.
		devices := []struct{ asks, goOn int }{{100, maxLateEach}, {100, maxLate*3/4 - maxLateEach}, {2, 2}, {100, maxLate/4 - 2}}
		const between = 10 * time.Millisecond
		under := 0
		for i, c := range devices {
			for j := range c.asks {
				asking.Go(func() {
					d.send(netip.AddrFrom4([4]byte{192, 168, 7, byte(10 + i)}), question(fmt.Sprintf("n%d.d%d.example", j, i), dns.TypeA))
				})
			}
			under += c.asks
			time.Sleep(between)
		}
		time.Sleep(exchangeTime - time.Duration(len(devices))*between)
		for i, c := range devices {
			synctest.Wait()
			if under += c.goOn - c.asks; int(up.now.Load()) != under {
				t.Errorf("when device %d gave up %d questions were under way, want %d", i, up.now.Load(), under)
			}
			time.Sleep(between)
		}
		asking.Wait()
		time.Sleep(Overtime)
		synctest.Wait()
		if n := up.now.Load(); n != 0 {
			t.Errorf("%d questions are under way in the end", n)
		}
		d.ask("www.example", dns.TypeA)
		if n := up.now.Load(); n != 1 {
			t.Fatalf("%d questions are under way, want 1", n)
		}
		start := time.Now()
		d.server.resolver.Load().Close()
		if n := up.now.Load(); n != 0 || time.Since(start) != 0 {
			t.Errorf("Close took %v and left %d questions under way", time.Since(start), n)
		}
	})
}

// The server ends at once, however long a renewal would take.
func TestRenewalHoldsUpNoEnd(t *testing.T) {
	onItsClock(t, func(t *testing.T) {
		up := &slowly{Exchanger: newZone(t, "www.example. 100 A 192.0.2.1")}
		d := over(t, up, func(s *Settings) { s.Cache.Prefetch = true })
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		ctx, stop := context.WithCancel(t.Context())
		d.server.ctx = ctx
		d.age(95 * time.Second)
		up.takes = time.Hour
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		synctest.Wait()
		if n := up.now.Load(); n != 1 {
			t.Fatalf("%d renewals are under way, want 1", n)
		}
		start := time.Now()
		stop()
		d.server.work.Wait()
		if took := time.Since(start); took != 0 {
			t.Errorf("it took %v", took)
		}
	})
}
