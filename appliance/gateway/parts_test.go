package gateway

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"sidegate/appliance/netstate"
)

func TestLANInterfaces(t *testing.T) {
	s := &netstate.Snapshot{
		Links: []netstate.Link{
			{Index: 2, Name: "eth0", Up: true, Ethernet: true},
			{Index: 3, Name: "eth1", Ethernet: true},
			{Index: 4, Name: "br0", Up: true, Ethernet: true, Kind: "bridge"},
			{Index: 5, Name: "port", Up: true, Ethernet: true, MasterIndex: 4},
			{Index: 6, Name: "wg0", Up: true},
			{Index: 7, Name: "bond0", Up: true, Ethernet: true, Kind: "bond", MasterIndex: 4},
			{Index: 8, Name: "nic", Up: true, Ethernet: true, MasterIndex: 7},
			{Index: 9, Name: "blue", Up: true, Kind: "vrf"},
			{Index: 10, Name: "member", Up: true, Ethernet: true, MasterIndex: 9},
		},
		Defaults: []netstate.Route{{LinkIndex: 4}},
	}
	for _, c := range []struct {
		name, device string
		index        int
		ethernet     bool
		problem      string
	}{
		{"eth0", "eth0", 2, true, ""},
		{"nic", "br0", 4, true, ""}, // through the bond
		{"member", "member", 10, true, ""},
		{"auto", "br0", 4, true, ""},
		{"wg0", "wg0", 6, false, ""},
		{"eth1", "eth1", 3, true, "eth1 is down: ip link set eth1 up"},
		{"port", "br0", 4, true, ""},
		{"eth7", "", 0, false, "there is no interface eth7"},
	} {
		got := lanInterfaces([]string{c.name}, s, nil)[0]
		problem := ""
		if got.problem != nil {
			problem = got.problem.Error()
		}
		if got.device != c.device || got.index != c.index || got.ethernet != c.ethernet || !strings.Contains(problem, c.problem) || (c.problem == "") != (problem == "") {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
	if got := lanInterfaces([]string{"port", "nic", "eth0"}, s, nil); len(got) != 2 || got[0].port != "port" || got[1].device != "eth0" {
		t.Errorf("two ports of one bridge: %+v", got)
	}
	if got := lanInterfaces([]string{"auto"}, &netstate.Snapshot{}, nil)[0]; got.index != 0 || got.problem == nil {
		t.Errorf("auto without a default route: %+v", got)
	}
	auto := lanInterfaces([]string{"auto"}, s, nil)
	away := *s
	away.Defaults = nil
	if got := lanInterfaces([]string{"auto"}, &away, auto)[0]; got.index != auto[0].index || got.index == 0 {
		t.Errorf("auto while the default route is away: %+v, before %+v", got, auto[0])
	}
	away.Links = nil
	if got := lanInterfaces([]string{"auto"}, &away, auto)[0]; got.index != 0 {
		t.Errorf("auto without the interface that it was: %+v", got)
	}
}

func TestParseFlow(t *testing.T) {
	facts := func(pairs ...string) map[string][]string {
		m := map[string][]string{}
		for _, p := range pairs {
			key, value, _ := strings.Cut(p, "=")
			m[key] = append(m[key], value)
		}
		return m
	}
	f, err := ParseFlow(facts("ip=::ffff:203.0.113.10", "source_ip=192.168.0.3", "port=443", "network=udp", "source_mac=02:00:00:00:00:10",
		"domain=b.example", "domain=a.example", "dscp=46", "interface=eth0", "process=curl", "source_port=5000"))
	if err != nil || f.Destination.String() != "203.0.113.10:443" || f.Source.String() != "192.168.0.3:5000" || len(f.Names) != 2 || f.DSCP != 46 || f.Process.Name != "curl" {
		t.Errorf("%+v, %v", f, err)
	}
	for name, want := range map[string]string{
		"":                                "ip is missing",
		"ip=x":                            "not an address",
		"ip=192.0.2.1 port=443":           "network is missing",
		"ip=192.0.2.1 source_port=443":    "network is missing",
		"ip=192.0.2.1 ip=192.0.2.2":       "2 times",
		"ip=192.0.2.1 source_ip=fd00::1":  "different IP versions",
		"ip=192.0.2.1 port=0 network=tcp": "port",
		"ip=192.0.2.1 Port=1":             `did you mean "port"`,
		"ip=192.0.2.1 domain=":            "no value",
	} {
		if _, err := ParseFlow(facts(strings.Fields(name)...)); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
}

// TestTasks: one that ends ends the others, its name is in the error, and ready waits for all.
func TestTasks(t *testing.T) {
	wait := func(ctx context.Context) error { <-ctx.Done(); return nil }
	boom := errors.New("boom")
	for _, c := range []struct {
		name string
		run  func(context.Context) error
		want string
	}{
		{"fails", func(context.Context) error { return boom }, "odd: boom"},
		{"ends", func(context.Context) error { return nil }, "odd: it ended by itself"},
	} {
		err := runTasks(t.Context(), []task{newTask("even", wait), newTask("odd", c.run)}, func() {})
		if err == nil || err.Error() != c.want {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	late := newTask("late", wait)
	lateToo := &slow{plain: late, begin: make(chan struct{})}
	ready := make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- runTasks(ctx, []task{newTask("early", wait), lateToo}, func() { close(ready) }) }()
	select {
	case <-ready:
		t.Error("ready before the last task was")
	case lateToo.begin <- struct{}{}:
	}
	<-ready
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// slow is a task that is ready only when it is told.
type slow struct {
	*plain
	begin chan struct{}
}

func (s *slow) Run(ctx context.Context) error {
	<-s.begin
	return s.plain.Run(ctx)
}

// TestNotify: what systemd is told, in its words.
func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "30000000")
	t.Setenv("WATCHDOG_PID", "")
	n := notifier{slog.New(slog.DiscardHandler)}
	heard := func() string {
		b := make([]byte, 1024)
		k, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:k])
	}
	n.ready("LAN eth0")
	if got := heard(); got != "READY=1\nSTATUS=LAN eth0" {
		t.Errorf("ready: %q", got)
	}
	n.reloading()
	if got := heard(); !strings.HasPrefix(got, "RELOADING=1\nMONOTONIC_USEC=") || strings.HasSuffix(got, "=0") {
		t.Errorf("reloading: %q", got)
	}
	n.stopping()
	n.alive()
	if got := heard() + " " + heard(); got != "STOPPING=1 WATCHDOG=1" {
		t.Errorf("stopping, alive: %q", got)
	}
	if got := n.watchdog().Seconds(); got != 10 {
		t.Errorf("the watchdog is fed every %v seconds, want 10", got)
	}
}

// TestReport: a problem is told once, when it comes, and again when it is over.
func TestReport(t *testing.T) {
	var log bytes.Buffer
	g := &gateway{log: slog.New(slog.NewTextHandler(&log, nil)), trouble: map[string]string{}}
	lines := func() int { return strings.Count(log.String(), "\n") }
	two := errors.New("a is wrong\nb is wrong")
	for i, c := range []struct {
		err   error
		lines int
	}{
		{two, 2}, {two, 2}, {errors.New("a is wrong\nb is wrong\nc is wrong"), 3}, {nil, 4}, {nil, 4}, {two, 6},
	} {
		g.report("things", c.err)
		if lines() != c.lines {
			t.Fatalf("after report %d the log has %d lines, want %d:\n%s", i, lines(), c.lines, &log)
		}
	}
	g.report("others", errors.New("z"))
	if got := strings.Join(g.problems(), ","); got != "z,a is wrong,b is wrong" {
		t.Errorf("problems: %s", got)
	}
}
