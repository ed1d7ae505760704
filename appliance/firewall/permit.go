package firewall

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// permitted is how the comment of rules that Permit inserts begins.
const permitted = "sidegate"

// Kind is what packets are permitted by.
type Kind interface {
	nft(Place) string
	iptables(Place) []string
	expressions(Place) []expr.Any
	comment() string // tells the rule of this kind from others of Permit's
}

// Marked are packets whose mark is Mark in the bits of Mask.
type Marked struct{ Mark, Mask uint32 }

func (k Marked) nft(Place) string { return fmt.Sprintf("meta mark and %#x == %#x", k.Mask, k.Mark) }

func (k Marked) iptables(Place) []string {
	return []string{"-m", "mark", "--mark", fmt.Sprintf("%#x/%#x", k.Mark, k.Mask)}
}

func (k Marked) expressions(Place) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(k.Mask), Xor: native(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: native(k.Mark)},
	}
}

func (k Marked) comment() string { return fmt.Sprintf("%s %#x", permitted, k.Mark) }

// By are packets that come or leave by an interface, as the place has it.
type By Interface

func (k By) nft(at Place) string {
	if at.Leaving {
		return fmt.Sprintf("oifname %q", k.Name)
	}
	return fmt.Sprintf("iifname %q", k.Name)
}

func (k By) iptables(at Place) []string {
	if at.Leaving {
		return []string{"-o", k.Name}
	}
	return []string{"-i", k.Name}
}

func (k By) expressions(at Place) []expr.Any {
	key := expr.MetaKeyIIFNAME
	if at.Leaving {
		key = expr.MetaKeyOIFNAME
	}
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname(k.Name)}}
}

func (k By) comment() string { return permitted + " " + k.Name }

// Permit inserts a rule at the head of the chain of a place that accepts packets of a kind, unless one is there. It lasts until the
// firewall is loaded again.
func Permit(ctx context.Context, at Place, k Kind) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	fail := func(err error) error {
		return fmt.Errorf("permitting %s in %s %s %s: %w", k.nft(at), familyName(at.Family), at.Table, at.Chain, err)
	}
	if at.Legacy {
		if err := permitLegacy(ctx, at, k); err != nil {
			return fail(err)
		}
		return nil
	}
	c, err := nftables.New()
	if err != nil {
		return fail(err)
	}
	table := &nftables.Table{Family: at.Family, Name: at.Table}
	ch := &nftables.Chain{Table: table, Name: at.Chain}
	rules, err := c.GetRules(table, ch)
	if err != nil {
		return fail(err)
	}
	for _, r := range rules {
		if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok && comment == k.comment() {
			return nil
		}
	}
	c.InsertRule(&nftables.Rule{
		Table: table, Chain: ch,
		Exprs:    append(k.expressions(at), &expr.Verdict{Kind: expr.VerdictAccept}),
		UserData: userdata.AppendString(nil, userdata.TypeComment, k.comment()),
	})
	if err := c.Flush(); err != nil {
		return fail(err)
	}
	return nil
}

func permitLegacy(ctx context.Context, at Place, k Kind) error {
	if exec.CommandContext(ctx, at.tool(), legacyRule("-C", at, k)...).Run() == nil {
		return nil
	}
	if out, err := exec.CommandContext(ctx, at.tool(), legacyRule("-I", at, k)...).CombinedOutput(); err != nil {
		return fmt.Errorf("running %s: %w: %s", at.tool(), err, bytes.TrimSpace(out))
	}
	return nil
}

func legacyRule(how string, at Place, k Kind) []string {
	return slices.Concat([]string{"-w", "-t", at.Table, how, at.Chain}, k.iptables(at), []string{"-m", "comment", "--comment", permitted, "-j", "ACCEPT"})
}

// Command is what Permit does, for people.
func Command(at Place, k Kind) string {
	if at.Legacy {
		return at.tool() + " " + strings.Join(legacyRule("-I", at, k), " ")
	}
	return fmt.Sprintf("nft insert rule %s %s %s %s accept", familyName(at.Family), at.Table, at.Chain, k.nft(at))
}

// Lasting says how packets of a kind are accepted for good by the program whose rules these seem to be.
func Lasting(at Place, k Kind) string {
	rule := k.nft(at) + " accept"
	match := strings.Join(k.iptables(at), " ") + " -j ACCEPT"
	switch {
	case at.Table == "nixos-fw" && at.Chain == "rpfilter":
		return fmt.Sprintf("in NixOS: networking.firewall.extraReversePathFilterRules = %q", rule)
	case at.Table == "nixos-fw":
		return fmt.Sprintf("in NixOS: networking.firewall.extraForwardRules or extraInputRules = %q", rule)
	case at.Table == "firewalld" && strings.HasSuffix(at.Chain, "_PREROUTING"):
		return "in firewalld: IPv6_rpfilter=no in /etc/firewalld/firewalld.conf"
	case at.Table == "firewalld":
		return "in firewalld: firewall-cmd --permanent --zone=trusted --add-interface=INTERFACE"
	case strings.HasPrefix(at.Chain, "ufw"), at.Table == "filter" && at.Family != nftables.TableFamilyINet && at.Rule == "":
		return "in ufw: a line -A ufw-before-forward (or -input) " + match + " in /etc/ufw/before.rules; beside Docker: iptables -I DOCKER-USER " + match
	}
	return "in the file that loads the rules: " + rule
}
