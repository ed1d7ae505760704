package firewall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// mark is what the test gives to the packets of port 8, which an ip rule then delivers to the box itself, as a proxy would have it.
const mark = 0x01000000

// ruleset is one that people have, and what it does to a side router's traffic.
type ruleset struct {
	name, load string
	forward    map[State]string // by the state that the packet has: the place that drops it; none: it passes
	deliver    string           // the same of a packet that is steered to the box, new
	send       string           // and of its answers
	translates string
}

const nixosFilter = `
chain rpfilter { type filter hook prerouting priority mangle + 10; policy drop
 meta nfproto ipv4 udp sport . udp dport { 67 . 68, 68 . 67 } accept
 fib saddr . mark . iif oif exists accept
 jump rpfilter-allow
}
chain rpfilter-allow { }
chain input { type filter hook input priority filter; policy drop
 iifname "lo" accept
 ct state vmap { invalid : drop, established : accept, related : accept, new : jump input-allow, untracked : jump input-allow }
 tcp flags syn / fin,syn,rst,ack log prefix "refused connection: " level info
}
chain input-allow { tcp dport 22 accept
 icmp type echo-request accept
}
chain forward { type filter hook forward priority filter; policy drop
 ct state vmap { invalid : drop, established : accept, related : accept, new : jump forward-allow, untracked : jump forward-allow }
}
chain forward-allow { ct status dnat accept
}`

var rulesets = []ruleset{
	{name: "none"},
	{
		name: "invalid dropped", load: "nft:table inet mine {\nchain forward { type filter hook forward priority filter; ct state invalid counter drop\n}\n}",
		forward: map[State]string{Invalid: "inet mine forward: ct state invalid drop"},
	},
	{
		name:    "invalid dropped, but not of the mark",
		load:    "nft:table inet mine {\nchain forward { type filter hook forward priority filter; meta mark & 0x0f000000 == 0x04000000 accept\nct state invalid drop\n}\n}",
		forward: map[State]string{Invalid: "inet mine forward: ct state invalid drop"},
	},
	{
		name: "invalid dropped, tracking exempted",
		load: "nft:table inet mine {\nchain raw { type filter hook prerouting priority raw; notrack\n}\nchain forward { type filter hook forward priority filter; ct state invalid drop\n}\n}",
	},
	{
		name: "a forward policy with a map and an interface",
		load: "nft:table inet mine {\nchain forward { type filter hook forward priority filter; policy drop; ct state vmap { established : accept, related : accept, invalid : drop }\niifname \"eth0\" oifname \"eth0\" accept\n}\n}",
		forward: map[State]string{
			Invalid: "inet mine forward: ct state vmap { … }",
		},
	},
	{
		name:    "a forward policy that accepts another interface",
		load:    "nft:table ip mine {\nchain forward { type filter hook forward priority filter; policy drop; iifname \"eth1\" accept\n}\n}",
		forward: map[State]string{New: "ip mine forward: policy drop", Invalid: "ip mine forward: policy drop"},
	},
	{
		name:    "sets, ranges and prefixes",
		load:    "nft:table inet mine {\nset lan { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.168.0.0/24 }\n}\nchain forward { type filter hook forward priority filter; policy drop; ip saddr @lan tcp dport 1-20 jump more\nip daddr 203.0.113.0/24 udp dport { 5, 7 } accept\n}\nchain more { tcp dport != 7 return\nct state { new, established } accept\n}\n}",
		forward: map[State]string{Invalid: "inet mine forward: policy drop"},
	},
	{
		name: "Docker",
		load: `sh:iptables -P FORWARD DROP; iptables -N DOCKER; iptables -N DOCKER-USER; iptables -N DOCKER-ISOLATION-STAGE-1; iptables -N DOCKER-ISOLATION-STAGE-2
iptables -A FORWARD -j DOCKER-USER; iptables -A FORWARD -j DOCKER-ISOLATION-STAGE-1; iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A FORWARD -o docker0 -j DOCKER; iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT; iptables -A FORWARD -i docker0 -o docker0 -j ACCEPT
iptables -A DOCKER-USER -j RETURN; iptables -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2; iptables -A DOCKER-ISOLATION-STAGE-1 -j RETURN
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE`,
		forward: map[State]string{New: "ip filter FORWARD: policy drop", Invalid: "ip filter FORWARD: policy drop"},
	},
	{
		name: "ufw, which denies what is routed",
		load: `sh:iptables -P INPUT DROP; iptables -P FORWARD DROP
for c in ufw-before-forward ufw-user-forward ufw-reject-forward ufw-before-input ufw-user-input ufw-not-local ufw-skip-to-policy-input ufw-logging-deny; do iptables -N $c; done
iptables -A FORWARD -j ufw-before-forward; iptables -A FORWARD -j ufw-reject-forward
iptables -A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT; iptables -A ufw-before-forward -j ufw-user-forward
iptables -A INPUT -j ufw-before-input
iptables -A ufw-before-input -i lo -j ACCEPT; iptables -A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny; iptables -A ufw-before-input -m conntrack --ctstate INVALID -j DROP
iptables -A ufw-before-input -j ufw-not-local; iptables -A ufw-before-input -j ufw-user-input
iptables -A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN; iptables -A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN; iptables -A ufw-not-local -m addrtype --dst-type BROADCAST -j RETURN
iptables -A ufw-not-local -j DROP
iptables -A ufw-user-input -p tcp --dport 22 -j ACCEPT`,
		forward: map[State]string{New: "ip filter FORWARD: policy drop", Invalid: "ip filter FORWARD: policy drop"},
		deliver: "ip filter ufw-not-local: drop",
	},
	{
		name: "firewalld",
		load: `nft:table inet firewalld {
chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept
 meta nfproto ipv4 fib saddr . mark . iif oif missing drop
}
chain filter_INPUT { type filter hook input priority filter + 10; policy accept
 ct state { established, related } accept
 ct status dnat accept
 iifname "lo" accept
 ct state invalid drop
 jump filter_INPUT_ZONES
 reject with icmpx admin-prohibited
}
chain filter_INPUT_ZONES { goto filter_IN_public
}
chain filter_IN_public { tcp dport 22 ct state { new, untracked } accept
}
chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept
 ct state { established, related } accept
 ct status dnat accept
 iifname "lo" accept
 ct state invalid drop
 jump filter_FORWARD_ZONES
 reject with icmpx admin-prohibited
}
chain filter_FORWARD_ZONES { goto filter_FWD_public
}
chain filter_FWD_public { oifname "eth9" accept
}
}`,
		forward: map[State]string{New: "inet firewalld filter_FORWARD: reject", Invalid: "inet firewalld filter_FORWARD: ct state invalid drop"},
		deliver: "inet firewalld mangle_PREROUTING: meta nfproto ipv4 fib missing drop",
	},
	{
		name: "NixOS", load: "nft:table inet nixos-fw {" + nixosFilter + "\n}",
		forward: map[State]string{New: "inet nixos-fw forward: policy drop", Invalid: "inet nixos-fw forward: ct state vmap { … }"},
		deliver: "inet nixos-fw rpfilter: policy drop",
	},
	{
		name:    "an input that accepts ssh",
		load:    "nft:table inet mine {\nchain input { type filter hook input priority filter; policy drop; tcp dport 22 accept\nct state established accept\nmeta l4proto { icmp, ipv6-icmp } accept\n}\n}",
		deliver: "inet mine input: policy drop",
	},
	{
		name: "an output that sends from own addresses only",
		load: "nft:table ip mine {\nchain output { type filter hook output priority filter; ip saddr != 192.168.0.2 drop\n}\n}",
		send: "ip mine output: saddr != 192.168.0.2 drop",
	},
	{
		name:       "masquerade",
		load:       "nft:table ip nat {\nchain postrouting { type nat hook postrouting priority srcnat; oifname \"eth0\" masquerade\n}\n}",
		translates: "ip nat postrouting: oifname \"eth0\" masquerade",
	},
	{
		name:       "masquerade of iptables",
		load:       "sh:iptables -t nat -A POSTROUTING -s 192.168.0.0/16 -o eth0 -j MASQUERADE",
		translates: "ip nat POSTROUTING: oifname \"eth0\" saddr 192.168.0.0/16 MASQUERADE",
	},
	{
		name: "masquerade of others",
		load: "nft:table ip nat {\nchain postrouting { type nat hook postrouting priority srcnat; ip saddr 172.17.0.0/16 masquerade\n}\n}",
	},
}

// world is a network without a gateway, whose box forwards plainly, and delivers port 8 to itself.
type world struct {
	*lab.Lab
	direct, steered netip.AddrPort
	heard           func() []netip.AddrPort // who the service beyond the box saw
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: builds network namespaces and loads firewalls")
	}
	l, err := lab.New(t.Context(), lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
	})
	w := &world{Lab: l}
	echo, err := l.Host(lab.Server).StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.direct, w.steered, w.heard = echo.Addr4(), netip.AddrPortFrom(echo.Addr4().Addr(), 8), echo.Senders
	w.answer(t)
	w.sh(t, fmt.Sprintf(`ip rule add fwmark %#x/0x0f000000 lookup 77; ip route add local default dev lo table 77
nft 'add table ip steer; add chain ip steer in { type filter hook prerouting priority -350; }; add rule ip steer in meta l4proto { tcp, udp } th dport 8 meta mark set %#x'`, mark, mark))
	return w
}

// answer accepts what is steered to the box, under the address that was meant, and sends back what comes.
func (w *world) answer(t *testing.T) {
	t.Helper()
	transparent := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		failed := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) })
		return errors.Join(failed, err)
	}}
	transparent.SetMultipathTCP(false)
	l, err := w.Host(lab.Sidegate).ListenWith(t.Context(), transparent, "tcp4", "0.0.0.0:8")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
}

func (w *world) sh(t *testing.T, script string) {
	t.Helper()
	if _, err := w.Host(lab.Sidegate).Exec(t.Context(), "sh", "-ec", script); err != nil {
		t.Fatal(err)
	}
}

func (w *world) load(t *testing.T, text string) {
	t.Helper()
	switch how, text, _ := strings.Cut(text, ":"); how {
	case "nft":
		w.sh(t, "nft -f - <<'END'\n"+text+"\nEND")
	case "sh":
		w.sh(t, text)
	}
}

func (w *world) read(t *testing.T) *Ruleset {
	t.Helper()
	var r *Ruleset
	err := w.Host(lab.Sidegate).Do(func() (err error) {
		r, err = Read(t.Context())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// reaches tries the echo service over TCP or UDP.
func (w *world) reaches(t *testing.T, network string, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	c, err := w.Host(lab.Laptop).Dial(ctx, network, to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = lab.PingPong(ctx, c, 10, 1)
	return err
}

// TestJudgementsAreTheKernels loads rulesets that people have, asks what they do, and then sends packets through them.
func TestJudgementsAreTheKernels(t *testing.T) {
	for _, rs := range rulesets {
		t.Run(rs.name, func(t *testing.T) {
			w := newWorld(t)
			w.load(t, rs.load)
			r := w.read(t)
			eth0 := Interface{"eth0", w.Host(lab.Sidegate).Interface().Index}
			laptop := w.Host(lab.Laptop).Addr4()
			packet := func(protocol uint8, to netip.AddrPort, state State) Packet {
				return Packet{Source: netip.AddrPortFrom(laptop, 40000), Destination: to, Protocol: protocol, In: eth0, Out: eth0, State: state}
			}
			expect := func(what string, j Judgement, where string) {
				t.Helper()
				switch {
				case where == "" && (j.Verdict == Dropped || !j.Certain):
					t.Errorf("%s: %+v, want it accepted", what, j)
				case where != "" && (j.Verdict != Dropped || !j.Certain || j.Place.String() != where):
					t.Errorf("%s: %+v (%s), want it dropped by %s", what, j, j.Place, where)
				}
			}
			for _, state := range []State{New, Invalid} {
				expect(fmt.Sprint("forwarded in state ", state), r.Forwarded(packet(unix.IPPROTO_TCP, w.direct, state)), rs.forward[state])
			}
			expect("forwarded by UDP", r.Forwarded(packet(unix.IPPROTO_UDP, w.direct, New)), rs.forward[New])
			steered := packet(unix.IPPROTO_TCP, w.steered, New)
			steered.Mark, steered.Steered, steered.Out = mark, true, Interface{}
			expect("delivered", r.Delivered(steered), rs.deliver)
			answer := Packet{Source: w.steered, Destination: steered.Source, Protocol: unix.IPPROTO_TCP, Out: eth0, State: Established}
			expect("sent", r.Sent(answer), rs.send)
			if j := r.Forwarded(packet(unix.IPPROTO_TCP, w.direct, New)); (j.Verdict == Translated) != (rs.translates != "") ||
				j.Verdict == Translated && (j.Place.String() != rs.translates || !j.Certain) {
				t.Errorf("translated: %+v (%s), want %q", j, j.Place, rs.translates)
			}

			drops := func(network string, to netip.AddrPort, where ...string) {
				t.Helper()
				err := w.reaches(t, network, to)
				if dropped := strings.Join(where, "") != ""; dropped != (err != nil) {
					t.Errorf("the kernel on %s to %s: %v; the package says that it is dropped by %q", network, to, err, where)
				}
			}
			drops("udp", w.direct, rs.forward[New])
			drops("tcp", w.direct, rs.forward[New], rs.forward[Invalid])
			drops("tcp", w.steered, rs.deliver, rs.send)
			if seen := w.heard(); len(seen) > 0 && (seen[0].Addr() != laptop) != (rs.translates != "") {
				t.Errorf("the server saw %s; the package says that it is translated by %q", seen[0], rs.translates)
			}
		})
	}
}

// TestUncertain: what depends on facts that were not described is not said to be certain, and later rules count.
func TestUncertain(t *testing.T) {
	w := newWorld(t)
	eth0 := Interface{"eth0", w.Host(lab.Sidegate).Interface().Index}
	p := Packet{
		Source: netip.MustParseAddrPort("192.168.0.3:40000"), Destination: w.direct, Protocol: unix.IPPROTO_TCP, In: eth0, Out: eth0, State: New,
	}
	for _, c := range []struct {
		rules string
		want  Verdict
		sure  bool
	}{
		{"limit rate 5/second accept\ndrop", Dropped, false},
		{"limit rate 5/second drop\naccept", Accepted, false},
		{"meta skuid 0 drop\ntcp dport 7 drop", Dropped, true},
		{"limit rate 5/second jump other\ndrop", Dropped, false},
		{"limit rate 5/second log", Accepted, true},
		{"tcp dport 8 drop", Accepted, true},
		{"meta mark set 5\nmeta mark 5 drop", Dropped, true},
		{"limit rate 5/second meta mark set 5\nmeta mark 5 drop", Accepted, false},
		{"goto other\ndrop", Accepted, true},
		{"jump other\ndrop", Accepted, true},
		{"jump empty\ndrop", Dropped, true},
		{"goto empty\ndrop", Accepted, true},
		{"limit rate 5/second return\naccept", Accepted, false},
		{"meta l4proto tcp rt ip nexthop 192.168.0.1 accept\ndrop", Dropped, false}, // the library leaves out what loads the next hop
		{"meta l4proto tcp rt ip nexthop 192.168.0.1 drop", Accepted, false},
		{"iifname \"eth5\" rt ip nexthop 192.168.0.1 drop", Accepted, true},
		{"meta mark set 3\nmeta mark { 1-5, 10 } drop", Accepted, false},
		{"meta l4proto tcp tcp option maxseg size 1400 drop", Accepted, false},
		{"tcp dport vmap { 8 : accept, * : drop }", Accepted, false},
		{"ct mark vmap { 1 : accept, 2 : jump empty }\ndrop", Dropped, false},
		{"ct mark vmap { 1 : drop, 2 : jump other }", Accepted, false},
	} {
		w.load(t, "nft:table inet mine {\nchain other { accept\n}\nchain empty { tcp dport 99 accept\n}\nchain forward { type filter hook forward priority filter; "+c.rules+"\n}\n}")
		if j := w.read(t).Forwarded(p); j.Verdict != c.want || j.Certain != c.sure {
			t.Errorf("%q: %+v, want %v, certain %v", c.rules, j, c.want, c.sure)
		}
		w.sh(t, "nft delete table inet mine")
	}
}

// TestLegacy: the rules of the old iptables are judged as the kernel does, beside tables of nftables with the same names, and permitted.
func TestLegacy(t *testing.T) {
	w := newWorld(t)
	if _, err := w.Host(lab.Sidegate).Exec(t.Context(), "iptables-legacy", "-N", "user"); err != nil {
		t.Skipf("the kernel has no legacy iptables: %v", err)
	}
	w.sh(t, "iptables-nft -N user; iptables-nft -A FORWARD -j ACCEPT; iptables-legacy -A FORWARD -j user; iptables-legacy -A user -p tcp -j DROP")
	w.load(t, "nft:table inet marks {\nchain in { type filter hook prerouting priority -350; meta mark set 4\n}\n}")
	eth0 := Interface{"eth0", w.Host(lab.Sidegate).Interface().Index}
	forwarded := func(protocol uint8) Judgement {
		t.Helper()
		r := w.read(t)
		if r.Unread != "" {
			t.Errorf("unread: %q", r.Unread)
		}
		return r.Forwarded(Packet{
			Source: netip.MustParseAddrPort("192.168.0.3:40000"), Destination: w.direct, Protocol: protocol, In: eth0, Out: eth0, State: New,
		})
	}
	if j := forwarded(unix.IPPROTO_UDP); j.Verdict != Accepted || w.reaches(t, "udp", w.direct) != nil {
		t.Errorf("UDP: %+v", j)
	}
	j := forwarded(unix.IPPROTO_TCP)
	if j.Verdict != Dropped || !j.Certain || j.Place.String() != "iptables-legacy filter user: meta l4proto tcp drop" {
		t.Errorf("TCP: %+v (%s)", j, j.Place)
	}
	if w.reaches(t, "tcp", w.direct) == nil {
		t.Error("the kernel forwards TCP")
	}
	for range 2 {
		if err := w.Host(lab.Sidegate).Do(func() error { return Permit(t.Context(), j.Place, Marked{4, 0xf}) }); err != nil {
			t.Fatal(err)
		}
	}
	if j := forwarded(unix.IPPROTO_TCP); j.Verdict != Accepted {
		t.Errorf("%+v after it was permitted", j)
	}
	if err := w.reaches(t, "tcp", w.direct); err != nil {
		t.Error(err)
	}
	if rules, err := w.Host(lab.Sidegate).Exec(t.Context(), "iptables-legacy-save"); err != nil || strings.Count(string(rules), permitted) != 1 {
		t.Errorf("permitted twice: %v\n%s", err, rules)
	}
}

// TestLegacyIsNotOverlooked: what cannot be translated is said to be unread, and empty tables are not.
func TestLegacyIsNotOverlooked(t *testing.T) {
	w := newWorld(t)
	if _, err := w.Host(lab.Sidegate).Exec(t.Context(), "iptables-legacy", "-A", "FORWARD", "-j", "DROP"); err != nil {
		t.Skipf("the kernel has no legacy iptables: %v", err)
	}
	saves, err := exec.LookPath("iptables-legacy-save")
	if err != nil {
		t.Fatal(err)
	}
	only := t.TempDir() // a box without the newer iptables
	if err := os.Symlink(saves, filepath.Join(only, "iptables-legacy-save")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", only+string(os.PathListSeparator)+"/nonexistent")
	r := w.read(t)
	if r.Unread != "iptables-legacy (1 rules and policies)" {
		t.Errorf("unread: %q", r.Unread)
	}
	t.Setenv("PATH", "/nonexistent")
	if r := w.read(t); !strings.Contains(r.Unread, "cannot be asked") {
		t.Errorf("unread: %q", r.Unread)
	}
}

// TestPermit: what is dropped passes after it, and doing it again adds nothing.
func TestPermit(t *testing.T) {
	w := newWorld(t)
	w.load(t, "nft:table inet mine {\nchain forward { type filter hook forward priority filter; policy drop; jump sub\n}\nchain sub { tcp dport 7 drop\n}\n}")
	eth0 := Interface{"eth0", w.Host(lab.Sidegate).Interface().Index}
	p := Packet{
		Source: netip.MustParseAddrPort("192.168.0.3:40000"), Destination: w.direct, Protocol: unix.IPPROTO_TCP, In: eth0, Out: eth0, State: New, Mark: 4,
	}
	w.load(t, "nft:table inet marks {\nchain in { type filter hook prerouting priority -350; meta mark set 4\n}\n}")
	if err := w.reaches(t, "tcp", w.direct); err == nil {
		t.Fatal("nothing is dropped")
	}
	for range 5 {
		j := w.read(t).Forwarded(p)
		if j.Verdict != Dropped {
			break
		}
		if err := w.Host(lab.Sidegate).Do(func() error { return Permit(t.Context(), j.Place, Marked{4, 0xf}) }); err != nil {
			t.Fatal(err)
		}
	}
	if j := w.read(t).Forwarded(p); j.Verdict == Dropped {
		t.Errorf("%+v after it was permitted", j)
	}
	if err := w.reaches(t, "tcp", w.direct); err != nil {
		t.Error(err)
	}
	before, _ := w.Host(lab.Sidegate).Exec(t.Context(), "nft", "list", "ruleset")
	for _, c := range []string{"forward", "sub"} {
		place := Place{Family: familyOf("inet"), Table: "mine", Chain: c}
		if err := w.Host(lab.Sidegate).Do(func() error { return Permit(t.Context(), place, Marked{4, 0xf}) }); err != nil {
			t.Fatal(err)
		}
	}
	after, _ := w.Host(lab.Sidegate).Exec(t.Context(), "nft", "list", "ruleset")
	if strings.Count(string(after), "sidegate") != 2 || errors.Is(t.Context().Err(), context.Canceled) {
		t.Errorf("it was\n%s\nand is\n%s", before, after)
	}
}

// TestConditions: each kind of condition at its edges.
func TestConditions(t *testing.T) {
	w := newWorld(t)
	eth0 := Interface{"eth0", w.Host(lab.Sidegate).Interface().Index}
	p := Packet{
		Source: netip.MustParseAddrPort("192.168.0.3:40000"), Destination: w.direct, Protocol: unix.IPPROTO_TCP, In: eth0, Out: eth0, State: New,
	}
	established := p
	established.State = Established
	const forward = "nft:table inet mine {\nchain forward { type filter hook forward priority filter; %s drop\n}\n}"
	const masquerade = "nft:table inet mine {\nchain out { type nat hook postrouting priority srcnat; masquerade\n}\n}"
	for _, c := range []struct {
		load   string
		packet Packet
		want   Verdict
	}{
		{fmt.Sprintf(forward, "tcp dport { 7, 8 }"), p, Dropped},
		{fmt.Sprintf(forward, "tcp dport { 8, 9 }"), p, Accepted},
		{fmt.Sprintf(forward, "tcp dport != { 7, 8 }"), p, Accepted},
		{fmt.Sprintf(forward, "tcp dport != { 8, 9 }"), p, Dropped},
		{fmt.Sprintf(forward, "tcp dport 7-9"), p, Dropped},
		{fmt.Sprintf(forward, "tcp dport 1-7"), p, Dropped},
		{fmt.Sprintf(forward, "tcp dport 8-9"), p, Accepted},
		{fmt.Sprintf(forward, "tcp dport != 1-7"), p, Accepted},
		{fmt.Sprintf(forward, "tcp dport > 7"), p, Accepted},
		{fmt.Sprintf(forward, "tcp dport < 8"), p, Dropped},
		{fmt.Sprintf(forward, "ip saddr { 192.168.0.0/30, 10.0.0.0/8 }"), p, Dropped},
		{fmt.Sprintf(forward, "ip saddr { 192.168.0.0/31, 10.0.0.0/8 }"), p, Accepted},
		{fmt.Sprintf(forward, "ip saddr 192.168.0.0/30"), p, Dropped},
		{fmt.Sprintf(forward, "ip saddr 192.168.0.4/30"), p, Accepted},
		{fmt.Sprintf(forward, "ip6 saddr ::/0"), p, Accepted},
		{fmt.Sprintf(forward, "meta l4proto udp"), p, Accepted},
		{fmt.Sprintf(forward, "iifname \"eth0\" oifname != \"eth0\""), p, Accepted},
		{fmt.Sprintf(forward, "iif \"lo\""), p, Accepted},
		{"nft:table inet mine {\nchain later { type filter hook forward priority 10; meta mark 5 drop\n}\nchain sooner { type filter hook forward priority 0; meta mark set 5\n}\n}", p, Dropped},
		{"nft:table inet mine {\nchain sooner { type filter hook forward priority 0; meta mark 5 drop\n}\nchain later { type filter hook forward priority 10; meta mark set 5\n}\n}", p, Accepted},
		{"sh:iptables -A FORWARD -m conntrack --ctstate ESTABLISHED -j DROP", established, Dropped},
		{"sh:iptables -A FORWARD -m conntrack --ctstate ESTABLISHED -j DROP", p, Accepted},
		{"sh:iptables -A FORWARD -m conntrack ! --ctstate ESTABLISHED -j DROP", p, Dropped},
		{"sh:iptables -A FORWARD -m mark ! --mark 5 -j DROP", p, Dropped},
		{masquerade, p, Translated},
		{masquerade, established, Accepted}, // what the first packet was given
		{"nft:table inet mine {\nchain raw { type filter hook prerouting priority raw; notrack\n}\nchain out { type nat hook postrouting priority srcnat; masquerade\n}\n}", p, Accepted},
		{"nft:table inet mine {\nchain late { type filter hook prerouting priority mangle; notrack\n}\nchain forward { type filter hook forward priority filter; ct state untracked drop\n}\n}", p, Accepted},
		{"nft:table inet mine {\nflags dormant\nchain forward { type filter hook forward priority filter; drop\n}\n}", p, Accepted},
	} {
		w.load(t, c.load)
		if j := w.read(t).Forwarded(c.packet); j.Verdict != c.want || !j.Certain {
			t.Errorf("%q: %+v, want %v", c.load, j, c.want)
		}
		w.sh(t, "nft delete table inet mine 2>/dev/null || true; iptables -F FORWARD")
	}
}
