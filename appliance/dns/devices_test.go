package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"sidegate/appliance/policy"
)

// One device is one, however many addresses it asks from.
func TestManyAddressesAreOneDevice(t *testing.T) {
	mac := policy.MAC{2, 0, 0, 0, 0, 9}
	for _, c := range []struct {
		what  string
		from  []string
		facts func(netip.Addr) (policy.MAC, string)
		one   bool
	}{
		{"of a MAC address", []string{"192.168.7.9", "fd07::9", "fd08::9"}, func(netip.Addr) (policy.MAC, string) { return mac, "" }, true},
		{"of a subnet", []string{"fd07::1:1", "fd07::1:2", "fd07::ffff:ffff:ffff:ffff"}, nil, true},
		{"of several subnets", []string{"fd07:0:0:1::1", "fd07:0:0:2::1", "fd07:0:0:3::1"}, nil, false},
		{"of IPv4", []string{"192.168.7.9", "192.168.7.10", "192.168.7.11"}, nil, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			z := newZone(t)
			hold := make(chan struct{})
			z.hold = hold
			d := newDesk(t, Options{Limits: Limits{Outstanding: 1}, ClientFacts: c.facts}, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"})
			var asking sync.WaitGroup
			for i, from := range c.from {
				asking.Go(func() { d.send(netip.MustParseAddr(from), question(fmt.Sprintf("n%d.example", i), dns.TypeA)) })
			}
			dropped, asked := 0, len(c.from)
			if c.one {
				dropped, asked = len(c.from)-1, 1
			}
			eventually(t, "all have been asked or dropped", func() bool {
				return d.server.Stats().Dropped[ClientLimit] == uint64(dropped) && len(z.questions()) == asked
			})
			close(hold)
			asking.Wait()
			d.server.clients.mu.Lock()
			defer d.server.clients.mu.Unlock()
			if n := len(d.server.clients.devices); n != 0 {
				t.Errorf("%d devices have something under way", n)
			}
		})
	}
}

// A device that asks for names whose servers are black holes leaves the upstream to others.
func TestOneDeviceDoesNotFillAnUpstream(t *testing.T) {
	hole := make(chan struct{})
	black := newZone(t)
	black.hold = hole
	white := newZone(t, "www.example. 60 A 192.0.2.1")
	d := over(t, exchangeFunc(func(q *dns.Msg) *dns.Msg {
		z := white
		if strings.HasSuffix(q.Question[0].Name, "evil.test.") {
			z = black
		}
		m, _ := z.Exchange(t.Context(), q)
		return m
	}), nil)
	const more = 50
	var asking sync.WaitGroup
	for i := range maxAskingEach + more {
		asking.Go(func() { d.send(other4, question(fmt.Sprintf("n%d.evil.test", i), dns.TypeA)) })
	}
	eventually(t, "the limit is reached", func() bool { return d.server.Stats().Dropped[ClientLimit] == more })
	if n := len(black.questions()); n != maxAskingEach {
		t.Errorf("%d questions of one device are under way, want %d", n, maxAskingEach)
	}
	d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
	if n := d.server.Stats().Entries; n != 1 {
		t.Errorf("%d entries: what was dropped is remembered as a failure", n)
	}
	close(hole)
	asking.Wait()
	if got := brief(d.send(other4, question("www.evil.test", dns.TypeA))); got != "NXDOMAIN" {
		t.Errorf("afterwards: %s", got)
	}
}

// When an upstream has much under way, who has little there still gets something.
func TestReservedShareOfAnUpstream(t *testing.T) {
	u := newSeats(maxAsking, maxAskingEach)
	all := func(d device) (n int) {
		for u.enter(d) {
			n++
		}
		return n
	}
	number := func(i int) device { return device{mac: policy.MAC{2, 0, 0, 0, 0, byte(i)}} }
	greedy := 0
	for i := range 5 {
		greedy += all(number(i))
	}
	if greedy != 5*maxAskingEach {
		t.Fatalf("5 devices have %d under way, want %d each", greedy, maxAskingEach)
	}
	if n := all(number(5)); n != maxAsking*3/4-greedy {
		t.Errorf("the sixth has %d", n)
	}
	for i := 6; i < 20; i++ {
		if n := all(number(i)); n != reserved {
			t.Errorf("device %d has %d, want %d", i, n, reserved)
		}
	}
}
