package firewall

import (
	"context"
	"fmt"

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
		if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok && comment == comment4(mark) {
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
		UserData: userdata.AppendString(nil, userdata.TypeComment, comment4(mark)),
	})
	if err := c.Flush(); err != nil {
		return fail(err)
	}
	return nil
}

func comment4(mark uint32) string { return fmt.Sprintf("%s %#x", permitted, mark) }
