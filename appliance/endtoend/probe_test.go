package endtoend

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// probed is what doctor --probe says of one family.
type probed struct {
	Family, Interface, Client, MAC, Lost, Conclusion, Fix string
	Carried, Translated                                   bool
	Steps                                                 []struct {
		Step, Seen string
		OK         bool
	}
}

func (p probed) String() string {
	text := fmt.Sprintf("%s as %s (%s): lost %q: %s; fix: %s\n", p.Family, p.Client, p.MAC, p.Lost, p.Conclusion, p.Fix)
	for _, s := range p.Steps {
		text += fmt.Sprintf("\t%t %s: %s\n", s.OK, s.Step, s.Seen)
	}
	return text
}

// probeCommand prepares doctor --probe on the box.
func (w world) probeCommand(t *testing.T, args ...string) (*lab.Command, *bytes.Buffer) {
	t.Helper()
	socket := filepath.Join(w.Dir(), "none.sock")
	if w.gateway != nil {
		socket = w.gateway.Socket
	}
	out := &bytes.Buffer{}
	command := w.sidegate().Command(t.Context(), binary, append([]string{"doctor", "--probe", "--socket", socket}, args...)...)
	command.Stdout = out
	return command, out
}

// probe runs doctor --probe on the box, which must leave nothing behind, and returns the one result and the severity of its finding.
func (w world) probe(t *testing.T, target netip.AddrPort, args ...string) (probed, string) {
	t.Helper()
	all, severity := w.probeAll(t, target, args...)
	if len(all) != 1 {
		t.Fatalf("%d results: %v", len(all), all)
	}
	return all[0], severity
}

// probeAll has one result for each LAN interface, and the severity of the last finding.
func (w world) probeAll(t *testing.T, target netip.AddrPort, args ...string) ([]probed, string) {
	t.Helper()
	w.settles(t)
	before := w.traces(t, "")
	command, out := w.probeCommand(t, append([]string{"--json", "--target", target.String()}, args...)...)
	err := command.Run()
	if exited := (*exec.ExitError)(nil); err != nil && (!errors.As(err, &exited) || exited.ExitCode() == 1) {
		t.Fatal(err)
	}
	var result struct {
		Probe    []probed
		Findings []finding
	}
	if err := json.Unmarshal(out.Bytes(), &result); err != nil || len(result.Probe) == 0 {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, p := range result.Probe {
		w.untouched(t, before, p.MAC)
	}
	severity := ""
	for _, f := range result.Findings {
		if f.Check == "probe" {
			severity = f.Severity
		}
	}
	return result.Probe, severity
}

// counters and ages are not what a trace is.
var changing = regexp.MustCompile(`expires \w+|valid_lft \w+|preferred_lft \w+|_timer +[\d.]+`)

// traces are what a probe could leave on the box: links with their promiscuity, addresses, routes, rules. (Its program is attached to
// a link of its own, and nothing else holds it.) What was forwarded to is a neighbour for good; only one of the MAC address must not be.
func (w world) traces(t *testing.T, mac string) string {
	t.Helper()
	var all strings.Builder
	for _, arg := range []string{"-d -o link", "-o address", "route show table all", "-6 route show table all", "rule", "-6 rule"} {
		out, err := w.sidegate().Exec(t.Context(), "ip", strings.Fields(arg)...)
		need(t, err)
		all.WriteString(changing.ReplaceAllString(out, ""))
	}
	neighbours, err := w.sidegate().Exec(t.Context(), "ip", "neigh")
	need(t, err)
	for line := range strings.Lines(neighbours) {
		if mac != "" && strings.Contains(line, mac) {
			all.WriteString(line)
		}
	}
	return all.String()
}

// settles waits until the kernel has taken the box's addresses: those of an interface that was just made become usable a little later, and
// so would look like traces.
func (w world) settles(t *testing.T) {
	t.Helper()
	need(t, lab.Wait(within(t, 10*time.Second), "the kernel to take the box's addresses", func() error {
		_, err := w.sidegate().Exec(t.Context(), "sh", "-c", `ip -6 -o address | while read -r _ _ _ a _; do
			ip -6 route show table local | grep -q "^local ${a%/*} " || { echo "$a has no route yet"; exit 1; }
		done`)
		return err
	}))
}

// untouched compares: a probe has left the box as it was.
func (w world) untouched(t *testing.T, before, mac string) {
	t.Helper()
	if after := w.traces(t, mac); after != before {
		t.Errorf("the probe leaves something behind: before\n%s\nafter\n%s", before, after)
	}
}

// TestProbe: each network that loses a client's connections, and where the probe says that they are lost.
func TestProbe(t *testing.T) {
	const blocked, direct = "interfaces: { lan: auto }\ndefault: block\n", "interfaces: { lan: auto }\ndefault: direct\n"
	forwarding := map[bool]string{false: "net.ipv4.ip_forward", true: "net.ipv6.conf.all.forwarding"}
	free := map[bool]string{false: "192.168.0.77", true: "fd00:c0a8::77"}
	halfSeen := func(t *testing.T, w world, _ bool) { need(t, w.sidegate().DropHalfSeen(t.Context())) }
	tied := func(t *testing.T, w world, ipv6 bool) {
		// The probe's MAC address is made of the interface's.
		mac := slices.Clone(w.sidegate().MAC())
		mac[0], mac[1] = mac[0]&^1|2, mac[1]^0xd1
		family := map[bool]string{false: "ip", true: "ip6"}[ipv6]
		nft(t, w.router(), fmt.Sprintf("table inet ties {\n\tchain c {\n\t\ttype filter hook prerouting priority raw;\n\t\t%s saddr %s ether saddr != %s drop\n\t}\n}\n", family, free[ipv6], mac))
	}
	firewalled := func(t *testing.T, w world, _ bool) {
		_, err := w.AddFirewall(t.Context())
		need(t, err)
	}
	for _, c := range []struct {
		name     string
		gateway  string // its configuration; empty: none runs
		breaks   func(t *testing.T, w world, ipv6 bool)
		as       bool // the client has the address that the network has rules about
		dead     bool // nothing answers at the target
		lost     string
		severity string
		says     string
	}{
		{name: "healthy", says: "replies go past the box"},
		{name: "healthy, with everything blocked", gateway: blocked, says: "replies go past the box"},
		{name: "healthy, with everything direct", gateway: direct, says: "replies go past the box"},
		{
			name: "healthy, with everything proxied", gateway: "interfaces: { lan: auto }\noutbounds: { hk: { url: \"socks5://203.0.113.20:1080\" } }\ndefault: hk\n",
			says: "replies go past the box",
		},
		{name: "the LAN carries no second MAC address", breaks: func(t *testing.T, w world, _ bool) {
			nft(t, w.Host("switch"), fmt.Sprintf("table netdev guard {\n\tchain c {\n\t\ttype filter hook ingress device sidegate priority 0;\n\t\tether saddr != %s drop\n\t}\n}\n", w.sidegate().MAC()))
		}, lost: "unknown", severity: "warning", says: "does not carry a client of another MAC address"},
		{name: "the box does not forward", breaks: func(t *testing.T, w world, ipv6 bool) {
			need(t, w.sidegate().SetSysctl(forwarding[ipv6], "0"))
		}, lost: "box", severity: "failure", says: "is 0"},
		{name: "the box's firewall drops", breaks: func(t *testing.T, w world, _ bool) {
			nft(t, w.sidegate(), "table inet strict {\n\tchain forward {\n\t\ttype filter hook forward priority 0;\n\t\ttcp dport 7 drop\n\t}\n}\n")
		}, lost: "box", severity: "failure", says: "inet strict forward: "},
		{name: "the box drops half-seen connections", breaks: halfSeen, lost: "box-state", severity: "failure", says: "ct state invalid"},
		{
			name: "the box drops half-seen connections, and the gateway exempts its own", gateway: direct, breaks: halfSeen,
			lost: "box-state", severity: "warning", says: "ct state invalid",
		},
		{name: "the router ties addresses to MAC addresses", breaks: tied, as: true, lost: "router", severity: "failure", says: "ties addresses"},
		{
			name: "the router ties addresses, and the gateway translates", gateway: direct + "return_path: symmetric\n", breaks: tied, as: true,
			lost: "router", severity: "note", says: "ties addresses",
		},
		{name: "the router knows its hosts", breaks: func(t *testing.T, w world, _ bool) {
			nft(t, w.router(), fmt.Sprintf("table netdev known {\n\tchain c {\n\t\ttype filter hook ingress device lan priority 0;\n\t\tip saddr 192.168.0.0/24 ip saddr != %s drop\n\t\tip6 saddr fd00:c0a8::/64 ip6 saddr != { %s, %s } meta l4proto tcp drop\n\t}\n}\n",
				w.sidegate().Addr4(), w.sidegate().Addr6(), "fd00:c0a8::1"))
		}, lost: "stranger", severity: "warning", says: "no client of the address"},
		{name: "a firewall before the router sees one half", breaks: firewalled, lost: "path", severity: "failure", says: "stateful firewall between"},
		{
			name: "a firewall before the router sees one half, and the gateway blocks", gateway: blocked, breaks: firewalled,
			lost: "path", severity: "failure", says: "stateful firewall between",
		},
		{name: "the box translates", breaks: func(t *testing.T, w world, _ bool) {
			nft(t, w.sidegate(), "table inet masq {\n\tchain post {\n\t\ttype nat hook postrouting priority srcnat;\n\t\tmasquerade\n\t}\n}\n")
		}, says: "the box translates it to"},
		{name: "the target is dead", dead: true, lost: "target", severity: "warning", says: "does not answer the box itself either"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // it waits more than it works
			w := newWorld(t, lab.Options{})
			_, err := w.server().StartEcho(t.Context(), 7)
			need(t, err)
			if c.gateway != "" {
				w.start(t, c.gateway)
			}
			for _, target := range []netip.Addr{w.server().Addr4(), w.server().Addr6()} {
				ipv6 := target.Is6()
				if c.breaks != nil && (!ipv6 || strings.Contains(c.name, "tie") || strings.Contains(c.name, "does not forward")) {
					c.breaks(t, w, ipv6)
				}
				var args []string
				if c.as {
					args = append(args, "--as", free[ipv6])
				}
				to := netip.AddrPortFrom(target, 7)
				if c.dead {
					to = netip.AddrPortFrom(target, 9)
				}
				start := time.Now()
				p, severity := w.probe(t, to, args...)
				t.Logf("%v: %s %s", time.Since(start).Round(time.Millisecond), severity, p)
				if p.Lost != c.lost || severity != c.severity || !strings.Contains(p.Conclusion, c.says) {
					t.Errorf("lost %q (%s): %q; want %q (%s): %q", p.Lost, severity, p.Conclusion, c.lost, c.severity, c.says)
				}
			}
		})
	}
}

// TestProbeWhereverItStands: every place of a box has its own way of carrying connections, and each is found to work.
func TestProbeWhereverItStands(t *testing.T) {
	for _, where := range places {
		t.Run(where.name, func(t *testing.T) {
			t.Parallel() // it waits more than it works
			w := newWorld(t, lab.Options{})
			_, err := w.server().StartEcho(t.Context(), 7)
			need(t, err)
			if where.build != nil {
				where.build(t, w)
			}
			config := filepath.Join(t.TempDir(), "sidegate.yaml")
			need(t, os.WriteFile(config, []byte("interfaces: { lan: "+where.lan+" }\ndefault: direct\n"), 0o644))
			for _, target := range []netip.Addr{w.server().Addr4(), w.server().Addr6()} {
				to := netip.AddrPortFrom(target, 7)
				if strings.Contains(where.lan, "tun") {
					command, out := w.probeCommand(t, "--target", to.String(), "-c", config)
					if err := command.Run(); err == nil || !strings.Contains(err.Error(), "no LAN interface with Ethernet") {
						t.Errorf("%v\n%s", err, out)
					}
					continue
				}
				results, severity := w.probeAll(t, to, "-c", config)
				if severity != "" {
					t.Errorf("there is a finding: %s", severity)
				}
				for _, p := range results {
					want := map[bool]string{true: "replies go past the box", false: "come back through the box"}[p.Interface == "eth0" || p.Interface == "br0"]
					if where.nat {
						want = "the box translates it to " + map[bool]string{false: w.sidegate().Addr4().String(), true: w.sidegate().Addr6().String()}[target.Is6()]
					}
					if p.Lost != "" || !strings.Contains(p.Conclusion, want) {
						t.Errorf("want %q: %s", want, p)
					}
				}
				if n := 1 + strings.Count(where.lan, ","); len(results) != n {
					t.Errorf("%d results for %d interfaces: %v", len(results), n, results)
				}
			}
		})
	}
}

// TestProbeThatIsInterrupted leaves nothing, whether it is asked to end or killed, and the next one works.
func TestProbeThatIsInterrupted(t *testing.T) {
	w := newWorld(t, lab.Options{})
	_, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	// So that it waits, with all that it has open.
	nft(t, w.router(), "table inet mute {\n\tchain c {\n\t\ttype filter hook forward priority 0;\n\t\tip saddr != 192.168.0.2 ip daddr 203.0.113.10 drop\n\t}\n}\n")
	before := w.traces(t, "")
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		command, _ := w.probeCommand(t, "--target", "203.0.113.10:7")
		p, err := command.Start()
		need(t, err)
		need(t, lab.Wait(within(t, 10*time.Second), "the probe to inject", func() error {
			out, err := w.sidegate().Exec(t.Context(), "ip", "-o", "link")
			if err == nil && !strings.Contains(out, "sgprobe") {
				err = errors.New("there is no interface of its own")
			}
			return err
		}))
		need(t, p.Signal(signal))
		if err := p.Wait(); err == nil {
			t.Errorf("%v: the probe says that all is well", signal)
		}
		w.untouched(t, before, "d1:")
	}
	_, err = w.router().Exec(t.Context(), "nft", "delete table inet mute")
	need(t, err)
	if p, _ := w.probe(t, netip.MustParseAddrPort("203.0.113.10:7")); p.Lost != "" {
		t.Errorf("afterwards: %s", p)
	}
}

// TestProbeFindsATarget: where no well-known server answers, one line asks for another; where one does, it is taken.
func TestProbeFindsATarget(t *testing.T) {
	w := newWorld(t, lab.Options{})
	command, out := w.probeCommand(t)
	if err := command.Run(); err == nil {
		t.Error("there is no internet, and all is well")
	}
	if n := strings.Count(out.String(), "--target ADDRESS:PORT of a server that can be reached from here"); n != 2 {
		t.Errorf("of two families, %d ask for a target:\n%s", n, out)
	}
	run(t, w.router(), "ip route add 9.9.9.9 via "+w.server().Addr4().String())
	run(t, w.server(), "ip address add 9.9.9.9 dev lo")
	_, err := w.server().StartEcho(t.Context(), 443)
	need(t, err)
	command, out = w.probeCommand(t)
	command.Run() // IPv6 has no target still
	if !strings.Contains(out.String(), "ok    9.9.9.9:443 receives them\nplain forwarding works") {
		t.Error(out)
	}
}

// TestProbeAsSomebody: a client must not take an address that a host has.
func TestProbeAsSomebody(t *testing.T) {
	w := newWorld(t, lab.Options{})
	_, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	for as, want := range map[netip.Addr]string{
		w.laptop().Addr4():                 w.laptop().MAC().String() + " has this address",
		w.laptop().Addr6():                 w.laptop().MAC().String() + " has this address",
		w.sidegate().Addr4():               "the box's own address",
		netip.MustParseAddr("203.0.113.9"): "no LAN interface",
	} {
		command, out := w.probeCommand(t, "--as", as.String(), "--target", netip.AddrPortFrom(map[bool]netip.Addr{false: w.server().Addr4(), true: w.server().Addr6()}[as.Is6()], 7).String())
		if err := command.Run(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("as %s: %v\n%s", as, err, out)
		}
	}
}
