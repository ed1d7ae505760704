package datapath

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

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
	for _, c := range []struct {
		what string
		want Desired
		has  []string
		not  []string
	}{
		{"nothing is translated", Desired{Policy: &policy.Policy{Default: "direct"}}, nil, []string{"sidegate"}},
		{"exempted", Desired{Policy: &policy.Policy{Default: "direct"}, Untracked: true}, []string{notrack}, []string{masquerade}},
		{"exempted no more", Desired{Policy: &policy.Policy{Default: "direct"}}, nil, []string{"sidegate"}},
		{"a rule says so", Desired{Policy: says}, []string{masquerade}, []string{notrack}},
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
		d.firewall.dial = []nftables.ConnOption{nftables.WithTestDial(func([]netlink.Message) ([]netlink.Message, error) { return nil, errno })}
		apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
		before := d.Generation()
		err := d.Apply(context.Background(), Desired{Policy: &policy.Policy{Default: "direct"}, ReturnPath: Symmetric})
		if err == nil || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "return_path: asymmetric") || !strings.Contains(err.Error(), "CONFIG_NFT_MASQ") {
			t.Errorf("%v: %v", errno, err)
		}
		if d.Generation() != before {
			t.Errorf("%v: refused, and in force", errno)
		}
		d.firewall = firewall{}
	}
}
