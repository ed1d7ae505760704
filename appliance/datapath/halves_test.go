package datapath

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// TestWatchCountsWhatIsSentAgain: what a client sends, packet by packet, and what the entry counts after each.
func TestWatchCountsWhatIsSentAgain(t *testing.T) {
	d := opened(t)
	proxied := rule(t, "proxied", "hk", "port", "82")
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct", Rules: []policy.Rule{proxied}}})
	type step struct {
		flags    uint8
		seq      uint32
		payload  int
		attempts uint8
	}
	const syn = 0x7001_ffff // its low half overflows
	for name, steps := range map[string][]step{
		"the SYN, four times": {
			{flagSYN, syn, 0, 1}, {flagSYN, syn, 0, 2}, {flagSYN, syn, 0, 3}, {flagSYN, syn, 0, 4},
		},
		"another connection of the same ports": {
			{flagSYN, syn, 0, 1}, {flagSYN, syn, 0, 2}, {flagSYN, syn + 9, 0, 1},
		},
		"a new connection after an old one, by chance with the same number": {
			{flagSYN, syn, 0, 1}, {flagACK, syn + 1, 0, 0}, {flagACK, syn + 1, 100, 1}, {flagSYN, syn, 0, 1},
		},
		"the first data, three times": {
			{flagSYN, syn, 0, 1},
			{flagSYN, syn, 0, 2},
			{flagACK, syn + 1, 0, 0},
			{flagACK, syn + 1, 100, 1},
			{flagACK, syn + 1, 100, 2},
			{flagACK, syn + 1, 100, 3},
		},
		"data on and on": {
			{flagSYN, syn, 0, 1},
			{flagACK, syn + 1, 0, 0},
			{flagACK, syn + 1, 100, 1},
			{flagACK, syn + 101, 100, 1},
			{flagACK, syn + 201, 100, 1},
			{flagACK, syn + 201, 100, 1},
		},
		"acknowledgements of a server that speaks first": {
			{flagSYN, syn, 0, 1}, {flagACK, syn + 1, 0, 0}, {flagACK, syn + 1, 0, 0}, {flagACK, syn + 1, 0, 0},
		},
		"the FIN of who says nothing, three times": {
			{flagSYN, syn, 0, 1},
			{flagACK, syn + 1, 0, 0},
			{flagACK | flagFIN, syn + 1, 0, 1},
			{flagACK | flagFIN, syn + 1, 0, 2},
			{flagACK | flagFIN, syn + 1, 0, 3},
		},
		"a reset": {{flagSYN, syn, 0, 1}, {flagRST, syn + 1, 0, 0}, {flagRST, syn + 1, 0, 0}},
	} {
		for family, ends := range map[string][2]string{
			"v4": {"192.168.0.3:5000", "203.0.113.10:80"}, "v6": {"[fd00::3]:5000", "[2001:db8::10]:80"},
		} {
			for i, s := range steps {
				p := synPacket(ends[0], ends[1])
				p.tcpFlags, p.seq, p.payload = s.flags, s.seq, make([]byte, s.payload)
				d.run(t, p.bytes())
				entry, ok := d.flow(t, policy.Flow{Source: p.src, Destination: p.dst}, unix.IPPROTO_TCP)
				if !ok || entry.Attempts != s.attempts {
					t.Fatalf("%s, %s: %d attempts after packet %d, want %d", family, name, entry.Attempts, i+1, s.attempts)
				}
			}
			if err := d.state.maps.Flows.Delete(keyOf(t, ends[0], ends[1])); err != nil {
				t.Fatal(err)
			}
		}
	}
	// What is not forwarded direct is not counted, nor is a packet that comes late in a connection's life.
	p := synPacket("192.168.0.3:5001", "203.0.113.10:82")
	d.run(t, p.bytes())
	if entry, ok := d.flow(t, policy.Flow{Source: p.src, Destination: p.dst}, unix.IPPROTO_TCP); !ok || entry.Attempts != 0 {
		t.Errorf("a proxied connection: %d attempts", entry.Attempts)
	}
	p = synPacket("192.168.0.3:5002", "203.0.113.10:80")
	d.run(t, p.bytes())
	p.tcpFlags, p.seq = flagACK, p.seq+1
	for range 40 {
		d.run(t, p.bytes())
	}
	p.payload = make([]byte, 100)
	d.run(t, p.bytes())
	if entry, _ := d.flow(t, policy.Flow{Source: p.src, Destination: p.dst}, unix.IPPROTO_TCP); entry.Attempts != 0 {
		t.Errorf("data after 40 packets: %d attempts", entry.Attempts)
	}
}

func keyOf(t *testing.T, src, dst string) gatewayFlowKey {
	t.Helper()
	s, d := addrPort(src), addrPort(dst)
	return gatewayFlowKey{
		Source: addressOf(s.Addr()), Destination: addressOf(d.Addr()),
		SourcePort: bigEndian(s.Port()), DestinationPort: bigEndian(d.Port()), Protocol: unix.IPPROTO_TCP,
	}
}

// TestHalfOpeningKeepsItsAge: a SYN that comes again does not make its connection young.
func TestHalfOpeningKeepsItsAge(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	p := synPacket("192.168.0.3:5000", "203.0.113.10:80")
	f := policy.Flow{Source: p.src, Destination: p.dst}
	d.run(t, p.bytes())
	first, _ := d.flow(t, f, unix.IPPROTO_TCP)
	old := first
	old.FirstSeen -= 1000
	if err := d.state.maps.Flows.Put(keyOf(t, p.src.String(), p.dst.String()), old); err != nil {
		t.Fatal(err)
	}
	d.run(t, p.bytes())
	if again, _ := d.flow(t, f, unix.IPPROTO_TCP); again.FirstSeen != old.FirstSeen || again.Packets != 2 || again.Bytes != 2*first.Bytes {
		t.Errorf("first seen %d, %d packets, %d bytes; want %d, 2, %d", again.FirstSeen, again.Packets, again.Bytes, old.FirstSeen, 2*first.Bytes)
	}
	for range 2 {
		d.run(t, p.bytes())
	}
	halves, err := d.Halves()
	if err != nil || len(halves) != 1 || halves[0].Outcome != Unanswered || halves[0].Attempts != 4 || halves[0].Destination != p.dst {
		t.Errorf("%+v, %v", halves, err)
	}
}

func TestHalfOutcome(t *testing.T) {
	const (
		opening     = uint8(gatewayFlowStateFLOW_OPENING)
		established = uint8(gatewayFlowStateFLOW_ESTABLISHED)
		closing     = uint8(gatewayFlowStateFLOW_CLOSING)
		direct      = uint8(gatewayVerdictVERDICT_DIRECT)
		mark        = uint32(gatewayMarkMARK_DIRECT)
	)
	c := clock{100}
	for _, test := range []struct {
		name string
		flow gatewayFlow
		idle uint64 // ticks
		age  uint64
		want Outcome
	}{
		{"one SYN", gatewayFlow{State: opening, Attempts: 1, Packets: 1}, 500, 500, Undecided},
		{"a lost SYN", gatewayFlow{State: opening, Attempts: 2, Packets: 2}, 1, 100, Undecided},
		{"three SYNs", gatewayFlow{State: opening, Attempts: 3, Packets: 3}, 1, 300, Unanswered},
		{"three SYNs of old", gatewayFlow{State: opening, Attempts: 3, Packets: 3}, 1, 13000, Undecided},
		{"answered", gatewayFlow{State: established, Packets: 2}, 1, 100, Answered},
		{"scanned", gatewayFlow{State: closing, Packets: 2}, 1, 100, Undecided},
		{"data underway", gatewayFlow{State: established, Attempts: 1, Packets: 3}, 10, 100, Undecided},
		{"data arrived", gatewayFlow{State: established, Attempts: 1, Packets: 3}, 300, 400, Carried},
		{"data arrived at the second attempt", gatewayFlow{State: established, Attempts: 2, Packets: 9}, 1, 100, Carried},
		{"data at the third attempt", gatewayFlow{State: established, Attempts: 3, Packets: 5}, 1, 100, Stalled},
		{"which got through, and it went on", gatewayFlow{State: established, Attempts: 3, Packets: 200}, 1, 500, Carried},
		{"and the client gave up", gatewayFlow{State: closing, Attempts: 5, Packets: 9}, 1000, 2000, Stalled},
		{"a page", gatewayFlow{State: closing, Attempts: 1, Packets: 6}, 1, 100, Carried},
		{"reset before it could be acknowledged", gatewayFlow{State: closing, Attempts: 1, Packets: 4}, 1000, 1000, Undecided},
	} {
		test.flow.Verdict, test.flow.Mark = direct, mark
		test.flow.FirstSeen, test.flow.LastSeen = 100_000-test.age, 100_000-test.idle
		key := gatewayFlowKey{Protocol: unix.IPPROTO_TCP}
		got := c.half(100_000, key, test.flow)
		if got.Outcome != test.want || got.Idle != time.Duration(test.idle)*time.Second/100 {
			t.Errorf("%s: %s, idle for %v; want %s", test.name, got.Outcome, got.Idle, test.want)
		}
		for what, spoil := range map[string]func(*gatewayFlowKey, *gatewayFlow){
			"udp":        func(k *gatewayFlowKey, _ *gatewayFlow) { k.Protocol = unix.IPPROTO_UDP },
			"proxied":    func(_ *gatewayFlowKey, v *gatewayFlow) { v.Verdict = uint8(gatewayVerdictVERDICT_PROXY) },
			"translated": func(_ *gatewayFlowKey, v *gatewayFlow) { v.Mark |= uint32(gatewayMarkMARK_TRANSLATED) },
		} {
			k, v := key, test.flow
			if spoil(&k, &v); c.half(100_000, k, v).Outcome != Undecided {
				t.Errorf("%s, %s: not left alone", test.name, what)
			}
		}
	}
}

// TestSince: of what fails, only that counts of which a packet was sent since, long enough ago to have been answered.
func TestSince(t *testing.T) {
	for _, test := range []struct {
		outcome Outcome
		idle    time.Duration
		stays   bool
	}{
		{Unanswered, 20 * time.Second, false},
		{Unanswered, 5 * time.Second, true},
		{Unanswered, answerTime / 2, false},
		{Stalled, 20 * time.Second, false},
		{Stalled, 5 * time.Second, true},
		{Stalled, answerTime / 2, false},
		{Carried, time.Minute, true},
		{Answered, time.Millisecond, true},
	} {
		h := Halves{{Outcome: test.outcome, Idle: test.idle, Age: 2 * time.Minute}}
		if stays := len(h.Since(10*time.Second)) == 1; stays != test.stays || len(h) != 1 {
			t.Errorf("%s, the last packet %v ago: stays: %t", test.outcome, test.idle, stays)
		}
	}
}

func TestEvidence(t *testing.T) {
	type many struct {
		outcome Outcome
		network byte // the third byte of the addresses
		number  int  // of destinations, each with two ports
		seconds int  // since the youngest began
	}
	for _, test := range []struct {
		name       string
		seen       []many
		pattern    Outcome
		failing    int
		against    int
		convincing bool
	}{
		{"nothing", nil, Undecided, 0, 0, false},
		{"a healthy network", []many{{Carried, 1, 20, 0}, {Answered, 2, 3, 0}}, Undecided, 0, 0, false},
		{"and a dead server", []many{{Unanswered, 2, 1, 0}, {Carried, 1, 2, 0}}, Undecided, 0, 0, false},
		{"a dead server and nothing else", []many{{Unanswered, 2, 1, 0}}, Unanswered, 1, 0, false},
		{"a server that drops one port", []many{{Carried, 1, 1, 0}, {Unanswered, 1, 1, 0}}, Undecided, 0, 0, false},
		{"a router that ties addresses to devices", []many{{Unanswered, 1, 5, 0}}, Unanswered, 5, 0, true},
		{"and one network that it does not lead to", []many{{Unanswered, 1, 5, 0}, {Carried, 2, 1, 0}}, Unanswered, 5, 1, false},
		{"since a minute ago", []many{{Unanswered, 1, 5, 0}, {Carried, 1, 9, 60}}, Unanswered, 5, 0, true},
		{"until a minute ago", []many{{Unanswered, 1, 5, 60}, {Carried, 1, 9, 0}}, Undecided, 0, 0, false},
		{"a firewall that sees one half", []many{{Stalled, 1, 5, 0}, {Answered, 2, 2, 0}}, Stalled, 5, 0, true},
		{"and dead servers", []many{{Stalled, 1, 3, 0}, {Unanswered, 2, 4, 0}}, Stalled, 3, 0, true},
		{"a server that hangs, among others", []many{{Stalled, 1, 1, 0}, {Carried, 2, 4, 0}}, Undecided, 0, 0, false},
		{"dead servers where others are only answered", []many{{Unanswered, 1, 2, 0}, {Answered, 2, 3, 0}}, Undecided, 0, 0, false},
	} {
		var halves Halves
		for _, m := range test.seen {
			for i := range 2 * m.number {
				halves = append(halves, Half{
					Client:      netip.AddrPortFrom(netip.MustParseAddr("192.168.0.3"), uint16(40_000+len(halves))),
					ClientMAC:   [6]byte{2, 0, 0, 0, 0, byte(i % 2)},
					Destination: addrPort(fmt.Sprintf("203.0.%d.%d:%d", m.network, 1+i/2, 80+i%2)),
					Outcome:     m.outcome,
					Age:         time.Duration(m.seconds+i) * time.Second,
				})
			}
		}
		e := halves.Evidence()
		if e.Pattern != test.pattern || len(e.Failing) != test.failing || e.Against != test.against || e.Convincing() != test.convincing {
			t.Errorf("%s: %+v, convincing: %t", test.name, e, e.Convincing())
		}
		if test.failing > 0 && (e.Clients != 2 || e.Failing[0] != addrPort(fmt.Sprintf("203.0.%d.1:80", test.seen[0].network))) {
			t.Errorf("%s: %+v: not two clients, and the youngest first", test.name, e)
		}
	}
}
