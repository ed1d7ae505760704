package datapath

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
	"sidegate/appliance/policy"
)

func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "nft", args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs nft: install the package nftables")
	}
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestFirewallTable: the table is there while something is translated or exempted, as nft itself reads it; it stays for live
// flows, and goes at the end.
func TestFirewallTable(t *testing.T) {
	inNamespace(t)
	d := open(t, t.TempDir()+"/state")
	says := &policy.Policy{Default: "direct", Rules: []policy.Rule{rule(t, "", "direct", "port", "80")}}
	says.Rules[0].SNAT = new(true)
	const masquerade, notrack = "meta mark & 0x0f000000 == 0x0c000000 masquerade", "meta mark & 0x0f000000 == 0x04000000 fib daddr . mark . iif oif exists notrack"
	const taken, replies = "meta mark & 0x0f000000 == 0x01000000 meta l4proto udp notrack", "meta mark & 0x0f000000 == 0x02000000 meta l4proto udp fib saddr type != local notrack"
	for _, c := range []struct {
		what string
		want Desired
		has  []string
		not  []string
	}{
		{"nothing is translated", Desired{Policy: &policy.Policy{Default: "direct"}}, nil, []string{"sidegate"}},
		{"exempted", Desired{Policy: &policy.Policy{Default: "direct"}, Untracked: true}, []string{notrack}, []string{masquerade}},
		{"exempted no more", Desired{Policy: &policy.Policy{Default: "direct"}}, nil, []string{"sidegate"}},
		{"a rule says so", Desired{Policy: says}, []string{masquerade, taken, replies}, []string{notrack}},
		{"the return path says so", Desired{Policy: &policy.Policy{Default: "hk"}, ReturnPath: Symmetric, Untracked: true}, []string{masquerade, notrack}, nil},
		{"there may be live flows", Desired{Policy: &policy.Policy{Default: "direct"}}, []string{masquerade}, []string{notrack}},
	} {
		apply(t, d, c.want)
		rules := nft(t, "list", "ruleset")
		for _, line := range c.has {
			if strings.Count(rules, line) != 1 {
				t.Errorf("%s: there is no %q in\n%s", c.what, line, rules)
			}
		}
		for _, line := range c.not {
			if strings.Contains(rules, line) {
				t.Errorf("%s: there is %q in\n%s", c.what, line, rules)
			}
		}
	}
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	if rules := nft(t, "list", "ruleset"); !strings.Contains(rules, masquerade) {
		t.Errorf("a daemon that went took the table with it:\n%s", rules)
	}
	d = open(t, d.state.dir)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	if rules := nft(t, "list", "ruleset"); !strings.Contains(rules, masquerade) {
		t.Errorf("its successor took the table away from live flows:\n%s", rules)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if rules := nft(t, "list", "ruleset"); rules != "" {
		t.Errorf("left behind:\n%s", rules)
	}
}

// TestFirewallHeals: whatever somebody does to the table, the next Apply undoes it, and touches nobody else's.
func TestFirewallHeals(t *testing.T) {
	d := opened(t)
	want := Desired{Policy: &policy.Policy{Default: "direct"}, ReturnPath: Symmetric, Untracked: true}
	apply(t, d, want)
	whole := nft(t, "list", "table", "inet", "sidegate")
	for _, harm := range []string{
		"flush ruleset",
		"delete chain inet sidegate untracked",
		"flush chain inet sidegate translate",
		"add rule inet sidegate translate counter",
		"add chain inet sidegate theirs",
	} {
		nft(t, harm)
		nft(t, "add table inet others")
		if nft(t, "list", "ruleset") == whole {
			t.Fatalf("%q does no harm", harm)
		}
		apply(t, d, want)
		if is := nft(t, "list", "table", "inet", "sidegate"); is != whole {
			t.Errorf("after %q:\n%s\nwant\n%s", harm, is, whole)
		}
		if !strings.Contains(nft(t, "list", "tables"), "inet others") {
			t.Errorf("after %q somebody's table is gone", harm)
		}
	}
}

// TestFirewallWithoutNAT: a kernel that cannot translate is said so in one line with the fix, and what needs nothing of it is
// not bothered.
func TestFirewallWithoutNAT(t *testing.T) {
	d := opened(t)
	for _, errno := range []unix.Errno{unix.ENOENT, unix.EOPNOTSUPP} {
		d.markTable.dial = []nftables.ConnOption{nftables.WithTestDial(func([]netlink.Message) ([]netlink.Message, error) { return nil, errno })}
		apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
		before := d.Generation()
		err := d.Apply(context.Background(), Desired{Policy: &policy.Policy{Default: "direct"}, ReturnPath: Symmetric})
		if err == nil || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "return_path: asymmetric") || !strings.Contains(err.Error(), "CONFIG_NFT_MASQ") {
			t.Errorf("%v: %v", errno, err)
		}
		if d.Generation() != before {
			t.Errorf("%v: refused, and in force", errno)
		}
		d.markTable = markTable{}
	}
}

// TestFirewallUntracked: where the box's own firewall drops what it calls invalid, an asymmetric flow works if it is exempted, and
// not otherwise; what leaves by another interface is not exempted, for the box may translate it.
func TestFirewallUntracked(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: builds network namespaces and loads BPF programs")
	}
	l, err := lab.New(t.Context(), lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	box, laptop := l.Host(lab.Sidegate), l.Host(lab.Laptop)
	if err := box.DropHalfSeen(t.Context()); err != nil {
		t.Skip(err)
	}
	echo, err := l.Host(lab.Server).StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	state, err := box.MountBPF()
	if err != nil {
		t.Fatal(err)
	}
	// The box's other interface, with hosts of its own.
	must := func(args ...string) {
		t.Helper()
		if _, err := box.Exec(t.Context(), args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	must("ip", "link", "add", "other", "type", "veth", "peer", "name", "far")
	must("ip", "link", "set", "other", "up")
	must("ip", "link", "set", "far", "up")
	must("ip", "route", "add", "198.51.100.0/24", "dev", "other")
	must("ip", "neigh", "add", "198.51.100.1", "lladdr", "02:00:00:00:00:99", "dev", "other")
	must("nft", "add table inet counts; add chain inet counts passing { type filter hook forward priority 1; }; add rule inet counts passing oifname other ct state untracked counter; add rule inet counts passing oifname other ct state new counter")

	p := &policy.Policy{Default: "direct"}
	for _, untracked := range []bool{false, true} {
		err := box.Do(func() error {
			d, err := Open(t.Context(), Options{StateDir: state + "/untracked", Log: discard()})
			if err != nil {
				return err
			}
			i := box.Interface()
			err = d.Apply(t.Context(), Desired{Policy: p, Untracked: untracked, Interfaces: []Interface{{Name: i.Name, Index: i.Index, Ethernet: true}}})
			return errors.Join(err, d.Detach())
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
			err := greet(t, laptop, to)
			if works := err == nil; works != untracked {
				t.Errorf("untracked %t: a connection to %s: %v", untracked, to, err)
			}
		}
	}
	c, err := laptop.Dial(t.Context(), "udp", "198.51.100.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Write([]byte("tracked"))
	if err != nil {
		t.Fatal(err)
	}
	err = lab.Wait(t.Context(), "the packet to be counted", func() error {
		counts, err := box.Exec(t.Context(), "nft", "list", "chain", "inet", "counts", "passing")
		if err == nil && (!strings.Contains(counts, "untracked counter packets 0") || !strings.Contains(counts, "new counter packets 1")) {
			err = errors.New(counts)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// greet has a byte echoed over a new connection.
func greet(t *testing.T, from *lab.Host, to netip.AddrPort) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}
