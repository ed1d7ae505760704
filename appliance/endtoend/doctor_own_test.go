package endtoend

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"sidegate/appliance/lab"
)

// ownAilments are of the box's own proxied connections, which come to the proxy by lo, as the answers do. The box's firewall does the
// clients nothing, except where it says so.
var ownAilments = []ailment{
	{
		name: "NixOS's reverse path filter, where the LAN is trusted", own: true, works: ownReach(ownWays...), finding: "firewall-own lo",
		cause: filters(`chain rpfilter { type filter hook prerouting priority mangle + 10; policy drop; iifname "eth0" accept; fib saddr . mark . iif oif exists accept; }`),
	},
	{
		name: "NixOS's reverse path filter, whose fix for clients is one for the box", own: true, works: ownReach(ownWays...), finding: "firewall-input eth0",
		cause: filters("chain rpfilter { type filter hook prerouting priority mangle + 10; policy drop; fib saddr . mark . iif oif exists accept; }"),
	},
	{
		name: "an input chain that does not know lo", own: true, works: ownReach(ownWays...), finding: "firewall-own lo",
		cause: filters(`chain input { type filter hook input priority 0; policy drop; ct state established accept; meta l4proto { icmp, ipv6-icmp } accept; iifname "eth0" accept; }`),
	},
	{
		name: "an output chain against forged loopback addresses", own: true, works: ownReach("tcp v4", "udp v4", "datagram v4"), finding: "firewall-own lo",
		cause: filters("chain output { type filter hook output priority 0; ip saddr 127.0.0.0/8 ip daddr != 127.0.0.0/8 drop; }"),
	},
	{
		name: "an output chain against foreign addresses on lo", own: true, works: ownReach("tcp v4", "udp v4", "datagram v4"), finding: "firewall-own lo",
		cause: filters(`chain output { type filter hook output priority 0; oifname "lo" ip saddr != { 127.0.0.0/8, 192.168.0.2 } reject; }`),
	},
	{
		name: "a masquerade of all that does not go to the LAN", own: true, works: ownReach(ownWays...), finding: "firewall-own lo",
		cause: filters(`chain postrouting { type nat hook postrouting priority srcnat; oifname != "eth0" masquerade; }`),
	},
	{
		name: "the same of the old iptables", own: true, works: ownReach("tcp v4", "udp v4", "datagram v4"), finding: "firewall-own lo",
		cause: func(t *testing.T, w world) {
			run(t, w.sidegate(), "iptables-legacy -t nat -A POSTROUTING ! -o eth0 -j MASQUERADE")
		},
	},
}

// ownWays are those by which an agent of the box asks the witness: over TCP, a connected socket of UDP, or one that is not connected.
var ownWays = []string{"tcp v4", "tcp v6", "udp v4", "udp v6", "datagram v4", "datagram v6"}

// ownReach works if a program of the box reaches the witness by the ways, and proxied. Some of them alone are not to fail, and the
// others never.
func ownReach(ways ...string) func(*testing.T, world) error {
	return func(t *testing.T, w world) error {
		t.Helper()
		b := &box{world: w}
		a := b.agent(t, "/proc/self/exe", b.unit(t, "program.service"))
		var failed []string
		for i, way := range ownWays {
			network, family := way[:len(way)-3], way[len(way)-2:]
			to := netip.AddrPortFrom(both(w.laptop(), w.server())[family][1], 7)
			open, say := order{Do: "open", Conn: i, Network: network, To: to}, order{Do: "say", Conn: i}
			if network == "datagram" {
				open, say = order{Do: "open", Conn: i, Network: "udp"}, order{Do: "say", Conn: i, To: to}
			}
			open.Timeout, say.Timeout = 2*time.Second, 2*time.Second
			s := a.tell(t, open)
			if s.Error == "" {
				s = a.tell(t, say)
			}
			if s.Error != "" {
				failed = append(failed, way)
			} else if !is(w.upstream(), s.Seen.Addr()) {
				t.Errorf("%s: the server saw %s, which is not the upstream", way, s.Seen)
			}
		}
		if len(failed) == 0 {
			return nil
		}
		if !slices.Equal(failed, ways) {
			t.Errorf("%q fail, and not %q", failed, ways)
		}
		return fmt.Errorf("%q fail", failed)
	}
}

// TestDoctorOwnConnections: doctor says, before the first start and beside a gateway which says so itself, why the box's own
// connections cannot be decided for, once; and nothing where they can be.
func TestDoctorOwnConnections(t *testing.T) {
	b := newBox(t)
	config := func(cgroup string) string {
		return "interfaces: { lan: auto }\ngateway: { local: true" + cgroup + " }\ndefault: direct\n"
	}
	expect := func(when, seen, fix string, found []finding) {
		t.Helper()
		switch {
		case seen == "" && len(found) > 0:
			t.Errorf("%s: %+v, want nothing", when, found)
		case seen != "" && (len(found) != 1 || found[0].Check != "own-connections" || !strings.Contains(found[0].Seen, seen) || !strings.Contains(found[0].Fix, fix)):
			t.Errorf("%s: %+v, want one that says %q, and the fix %q", when, found, seen, fix)
		}
	}
	plain := t.TempDir()
	for _, c := range []struct {
		when, cgroup, seen, fix string
		before                  func()
	}{
		{when: "a cgroup", cgroup: b.cgroup},
		{when: "a directory that is no cgroup", cgroup: plain, seen: "no directory of cgroup v2", fix: "mount -t cgroup2"},
		{
			when: "a cgroup whose program admits no other", cgroup: b.cgroup, seen: "own-connect4: ", fix: "bpftool cgroup show",
			before: func() { monopolize(t, b.cgroup) },
		},
	} {
		if c.before != nil {
			c.before()
		}
		file := filepath.Join(t.TempDir(), "sidegate.yaml")
		need(t, os.WriteFile(file, []byte(config(", cgroup: "+c.cgroup)), 0o644))
		found, _ := b.examine(t, file)
		expect(c.when, c.seen, c.fix, found)

		g, err := b.sidegate().StartGateway(t.Context(), lab.GatewayOptions{Binary: binary, Config: config(", cgroup: " + c.cgroup)})
		need(t, err)
		running := world{Lab: b.Lab, gateway: g}
		found, _ = running.examine(t, "")
		expect(c.when+", beside a gateway", c.seen, c.fix, found)
		need(t, g.Stop())
	}

	file := filepath.Join(t.TempDir(), "sidegate.yaml")
	need(t, os.WriteFile(file, []byte(config("")), 0o644))
	out, err := b.sidegate().Exec(t.Context(), "unshare", "-m", "sh", "-c",
		`umount -a -l -t cgroup2; `+binary+` doctor --json --socket `+plain+`/none.sock -c `+file)
	var result struct{ Findings []finding }
	if json.Unmarshal([]byte(out), &result) != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	expect("no cgroup v2", "cgroup v2 is not mounted", "mount -t cgroup2", result.Findings)
}

// monopolize attaches a program to a cgroup, as it was before there could be several (no BPF_F_ALLOW_MULTI).
func monopolize(t *testing.T, cgroup string) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	need(t, err)
	defer p.Close()
	dir, err := os.Open(cgroup)
	need(t, err)
	defer dir.Close()
	need(t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect}))
}
