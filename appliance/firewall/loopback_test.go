package firewall

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// TestLooped: what the box sends to itself by lo meets four hooks as one packet: on its way out it has no interface that it came by
// and its sender's mark, on its way in the mark that it was given on lo, and in both the state that it had when it left. A place that
// stops it accepts it after Permit. That the kernel does the same is shown by TestDoctor of package endtoend, which sends such packets.
func TestLooped(t *testing.T) {
	w := newWorld(t)
	const steered, daemon = 0x01000000, 0x02000000
	first, answer := FromBox(netip.MustParseAddr("127.83.0.1"), unix.IPPROTO_UDP)
	first6, answer6 := FromBox(netip.IPv6Loopback(), unix.IPPROTO_TCP)
	answer.Mark, answer6.Mark = daemon, daemon
	all := []struct {
		name   string
		packet Packet
		mark   uint32
	}{{"first", first, steered}, {"answer", answer, daemon}, {"first6", first6, steered}, {"answer6", answer6, daemon}}
	const everything = "first answer first6 answer6"
	chain := func(name, hook, rules string) string {
		return "table inet mine { chain " + name + " { type filter hook " + hook + "; " + rules + "; }; }"
	}
	for _, c := range []struct {
		load      string
		old       bool   // as a kernel judges whose reverse path filters do not ask for sockets
		stopped   string // names
		uncertain string
	}{
		{load: chain("out", "output priority 0", "oifname lo drop"), stopped: everything},
		{load: chain("out", "output priority 0", "iifname lo drop")},
		{load: chain("out", "postrouting priority 0", "oif lo drop"), stopped: everything},
		{load: chain("in", "prerouting priority 0", "oifname lo drop"), uncertain: everything}, // nobody knows yet
		{load: chain("in", "prerouting priority 0", "iif lo drop"), stopped: everything},
		{load: chain("in", "input priority 0", "iifname lo drop"), stopped: everything},
		{load: chain("in", "forward priority 0", "drop")},
		{load: chain("out", "output priority 0", "meta mark 0x01000000 drop")},
		{load: chain("in", "prerouting priority 0", "meta mark 0x01000000 drop"), stopped: "first first6"},
		{load: chain("in", "input priority 0", "meta mark 0x02000000 drop"), stopped: "answer answer6"},
		{load: chain("in", "input priority 0", "ct state new drop"), stopped: "first first6"},
		{load: chain("in", "prerouting priority raw", "ct state new drop"), stopped: "first first6"}, // it has its connection since it left
		{load: chain("in", "prerouting priority -100", "ct state established drop"), stopped: "answer answer6"},
		{load: chain("out", "output priority 0", "ip saddr 127.0.0.0/8 drop"), stopped: "first"},
		{load: chain("out", "output priority 0", "fib daddr type local drop"), stopped: "answer answer6"},
		{load: chain("in", "input priority 0", "fib daddr type != local drop"), stopped: "first first6"},
		{load: chain("in", "prerouting priority mangle + 10", "fib saddr . mark . iif oif missing drop"), stopped: "first first6"},
		{load: chain("in", "prerouting priority mangle + 10", "fib saddr . iif oif missing drop"), stopped: "first first6"},
		{load: chain("in", "prerouting priority mangle + 10", "fib saddr . mark . iif oif missing drop"), old: true, uncertain: "first first6"},
		{load: chain("in", "input priority 0", "fib saddr . mark . iif oif missing drop"), old: true, uncertain: everything},
		{load: "table inet mine { chain out { type nat hook postrouting priority srcnat; masquerade; }; }", stopped: "first first6"},
		{load: "table inet mine { chain out { type nat hook postrouting priority srcnat; oif != lo masquerade; }; }"},
	} {
		judge := func(p Packet, mark uint32) Judgement {
			r := w.read(t)
			r.fibAsksSockets = !c.old
			return r.Looped(p, mark)
		}
		w.load(t, "nft:"+c.load)
		var stopped, uncertain []string
		var places []Place
		for _, p := range all {
			switch j := judge(p.packet, p.mark); {
			case !j.Certain:
				uncertain = append(uncertain, p.name)
			case j.Verdict != Accepted:
				stopped, places = append(stopped, p.name), append(places, j.Place)
			}
		}
		if got, want := fmt.Sprint(stopped, uncertain), fmt.Sprint(strings.Fields(c.stopped), strings.Fields(c.uncertain)); got != want {
			t.Errorf("%s: %s are stopped and uncertain, want %s", c.load, got, want)
		}
		for _, at := range places {
			if err := w.Host(lab.Sidegate).Do(func() error { return Permit(t.Context(), at, By(Loopback)) }); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range all {
			if j := judge(p.packet, p.mark); len(places) > 0 && (j.Verdict != Accepted || !j.Certain) {
				t.Errorf("%s: %s after it was permitted: %+v", c.load, p.name, j)
			}
		}
		w.sh(t, "nft delete table inet mine")
	}
}
