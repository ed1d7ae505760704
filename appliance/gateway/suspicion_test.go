package gateway

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"sidegate/appliance/datapath"
)

const (
	roundTrip = 700 * time.Millisecond
	forever   = time.Hour
	watched   = 2 * time.Minute // how long a suspicion has to be proved
)

// beyond is a network and the servers behind it, which are all there from back until gone, but for the dead one. Times are
// since a test began.
type beyond struct {
	back, gone time.Duration
	drops      bool // what it sees one half of
}

func testServer(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(n)}), 443)
}

var deadServer = testServer(99)

func (n beyond) answers(to netip.AddrPort, at time.Duration) bool {
	return to != deadServer && n.back <= at && at < n.gone
}

// connecting is one client's attempt to connect.
type connecting struct {
	to       netip.AddrPort
	begun    time.Duration
	patience time.Duration
}

// synAfter says when Linux sends SYNs, the first one included (tcp_syn_linear_timeouts, then RFC 6298 §5.5).
var synAfter = []time.Duration{0, 1, 2, 3, 4, 5, 7, 11, 19, 35, 67}

// half is what the gateway has seen of it by now; false: nothing that the watch would tell of.
func (c connecting) half(n beyond, now time.Duration) (h datapath.Half, ok bool) {
	h = datapath.Half{Client: netip.MustParseAddrPort("192.168.0.3:40000"), Destination: c.to, Age: now - c.begun}
	for _, after := range synAfter {
		sent := c.begun + after*time.Second
		if sent > now || after*time.Second > c.patience {
			break
		}
		h.Attempts++
		h.Idle = now - sent
		if h.Attempts >= 3 {
			h.Outcome = datapath.Unanswered
		}
		if !n.drops && n.answers(c.to, sent) && h.Idle >= roundTrip {
			h.Outcome = datapath.Carried
			break
		}
	}
	return h, h.Outcome != datapath.Undecided
}

// proved is when the gateway, which looks for the first time phase later than it might, takes it for proved that the network drops
// what these clients send; false: never.
func (n beyond) proved(t *testing.T, clients []connecting, phase time.Duration) (after time.Duration, ok bool) {
	synctest.Test(t, func(*testing.T) { // no time passes
		begun := time.Now()
		reach := func(e datapath.Evidence) (netip.AddrPort, bool) {
			asked := time.Since(begun)
			time.Sleep(roundTrip)
			for _, to := range e.Failing[:min(proofServers, len(e.Failing))] {
				if n.answers(to, asked) {
					return to, true
				}
			}
			time.Sleep(proofTimeout - roundTrip)
			return netip.AddrPort{}, false
		}
		var s suspicion
		for time.Sleep(phase); !ok && time.Since(begun) < watched; time.Sleep(watchEvery) {
			var halves datapath.Halves
			for _, c := range clients {
				if h, ok := c.half(n, time.Since(begun)); ok {
					halves = append(halves, h)
				}
			}
			_, ok = s.look(halves, reach)
			after = time.Since(begun)
		}
	})
	return after, ok
}

// again is clients that go to servers every so often.
func again(every, patience time.Duration, to ...netip.AddrPort) (all []connecting) {
	for begun := time.Duration(0); begun < watched; begun += every {
		for _, s := range to {
			all = append(all, connecting{s, begun, patience})
		}
	}
	return all
}

// TestSuspicion: servers that come back prove nothing, at whatever moment and for however long they do, alone or all of them as behind
// an uplink, and whether their clients wait, try again or have given up. A network that drops is found out within 30 s all the same,
// by one client of one server.
func TestSuspicion(t *testing.T) {
	one, five := testServer(1), []netip.AddrPort{testServer(1), testServer(2), testServer(3), testServer(4), testServer(5)}
	given := connecting{to: one, patience: 5 * time.Second}
	for name, clients := range map[string][]connecting{
		"a connection that waits":                      {{to: one, patience: watched}},
		"one that is given up":                         {given},
		"one that is given up, beside a dead server's": append(again(10*time.Second, 10*time.Second, deadServer), given),
		"one server, again and again":                  again(5*time.Second, 4*time.Second, one),
		"one server, rarely, and with patience":        again(20*time.Second, 20*time.Second, one),
		"five servers, again and again":                again(10*time.Second, 10*time.Second, five...),
		"five servers, once":                           again(watched, time.Minute, five...),
	} {
		t.Run(name, func(t *testing.T) {
			var longest time.Duration
			for phase := time.Duration(0); phase < watchEvery; phase += 200 * time.Millisecond {
				for back := time.Duration(0); back < 40*time.Second; back += 300 * time.Millisecond {
					for _, n := range []beyond{{back: back, gone: forever}, {back: back, gone: back + time.Second}} {
						if after, ok := n.proved(t, clients, phase); ok {
							t.Fatalf("servers that are there from %v until %v prove something after %v", n.back, n.gone, after)
						}
					}
				}
				after, ok := beyond{gone: forever, drops: true}.proved(t, clients, phase)
				if !ok || after > 30*time.Second {
					t.Fatalf("a network that drops is found out after %v: %t", after, ok)
				}
				longest = max(longest, after)
			}
			t.Logf("a network that drops is found out within %v", longest)
		})
	}
}

// TestSuspicionBeginsAnew: that a server was reached once counts no longer when it is not the next time, or when clients reach it.
func TestSuspicionBeginsAnew(t *testing.T) {
	fails := connecting{to: testServer(1), patience: watched}
	for name, between := range map[string]struct {
		network beyond
		reached bool
	}{
		"it proves the network":            {beyond{drops: true, gone: forever}, true},
		"the server is away the next time": {beyond{drops: true}, false},
		"a client reaches it":              {beyond{gone: forever}, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var s suspicion
				looks := func(n beyond, reached bool) bool {
					var halves datapath.Halves
					if h, ok := fails.half(n, 30*time.Second); ok {
						halves = datapath.Halves{h}
					}
					_, proved := s.look(halves, func(datapath.Evidence) (netip.AddrPort, bool) { return fails.to, reached })
					time.Sleep(proofPause + proofTimeout)
					return proved
				}
				dropping := beyond{drops: true}
				if looks(dropping, true) {
					t.Error("it is proved at once")
				}
				proved := looks(between.network, between.reached)
				if want := between.network.drops && between.reached; proved != want {
					t.Errorf("it is proved: %t, want %t", proved, want)
				}
				if looks(dropping, true) {
					t.Error("the third look is not a first one")
				}
			})
		})
	}
}
