package firewall

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// permitted is the comment of rules that Permit inserts.
const permitted = "sidegate"

// Permit inserts a rule at the head of the chain of a place that accepts packets of a mark, unless one is there. It lasts until the
// firewall is loaded again.
func Permit(ctx context.Context, at Place, mark, mask uint32) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	fail := func(err error) error {
		return fmt.Errorf("permitting packets marked %#x in %s %s %s: %w", mark, familyName(at.Family), at.Table, at.Chain, err)
	}
	if at.Legacy {
		if err := permitLegacy(ctx, at, mark, mask); err != nil {
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
		if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok && comment == commentOf(mark) {
			return nil
		}
	}
	c.InsertRule(&nftables.Rule{
		Table: table, Chain: ch,
		Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(mask), Xor: native(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: native(mark)},
			&expr.Verdict{Kind: expr.VerdictAccept},
		},
		UserData: userdata.AppendString(nil, userdata.TypeComment, commentOf(mark)),
	})
	if err := c.Flush(); err != nil {
		return fail(err)
	}
	return nil
}

func permitLegacy(ctx context.Context, at Place, mark, mask uint32) error {
	if exec.CommandContext(ctx, at.tool(), legacyRule("-C", at, mark, mask)...).Run() == nil {
		return nil
	}
	if out, err := exec.CommandContext(ctx, at.tool(), legacyRule("-I", at, mark, mask)...).CombinedOutput(); err != nil {
		return fmt.Errorf("running %s: %w: %s", at.tool(), err, bytes.TrimSpace(out))
	}
	return nil
}

func legacyRule(how string, at Place, mark, mask uint32) []string {
	return []string{
		"-w", "-t", at.Table, how, at.Chain, "-m", "mark", "--mark", fmt.Sprintf("%#x/%#x", mark, mask),
		"-m", "comment", "--comment", permitted, "-j", "ACCEPT",
	}
}

func commentOf(mark uint32) string { return fmt.Sprintf("%s %#x", permitted, mark) }

// Command is what Permit does, for people.
func Command(at Place, mark, mask uint32) string {
	if at.Legacy {
		return at.tool() + " " + strings.Join(legacyRule("-I", at, mark, mask), " ")
	}
	return fmt.Sprintf("nft insert rule %s %s %s meta mark and %#x == %#x accept", familyName(at.Family), at.Table, at.Chain, mask, mark)
}

// Lasting says how a packet of a mark is accepted for good by the program whose rules these seem to be.
func Lasting(at Place, mark, mask uint32) string {
	rule := fmt.Sprintf("meta mark & %#x == %#x accept", mask, mark)
	match := fmt.Sprintf("-m mark --mark %#x/%#x -j ACCEPT", mark, mask)
	switch {
	case at.Table == "nixos-fw":
		return fmt.Sprintf("in NixOS: networking.firewall.extraForwardRules or extraInputRules = %q, and checkReversePath = false", rule)
	case at.Table == "firewalld":
		return "in firewalld: firewall-cmd --permanent --zone=trusted --add-interface=INTERFACE"
	case strings.HasPrefix(at.Chain, "ufw"), at.Table == "filter" && at.Family != nftables.TableFamilyINet && at.Rule == "":
		return "in ufw: a line -A ufw-before-forward (or -input) " + match + " in /etc/ufw/before.rules; beside Docker: iptables -I DOCKER-USER " + match
	}
	return "in the file that loads the rules: " + rule
}
