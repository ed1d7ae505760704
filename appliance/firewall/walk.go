package firewall

import (
	"cmp"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// conntrackPriority is where connection tracking looks at a packet, in prerouting and output (NF_IP_PRI_CONNTRACK).
const conntrackPriority = -200

// maxDepth is how deep the kernel lets chains jump (NFT_JUMP_STACK_SIZE).
const maxDepth = 16

// walk is a packet on its way.
type walk struct {
	*Ruleset
	packet    Packet
	hook      nftables.ChainHook
	untracked bool // by a rule that it has passed
	tracked   bool // it has passed conntrack in this hook, or an earlier one
	markKnown bool

	maybe    int  // conditions that may not hold stand around where it is
	doubt    bool // in this base chain it may have gone another way
	anyDoubt bool // the same of those behind it
	mayDrop  *Place
	verdict  Verdict // of an end
	place    Place
	nat      *Place // what translated it
	natDoubt bool
}

func (r *Ruleset) walk(p Packet, hooks ...*nftables.ChainHook) Judgement {
	w := &walk{Ruleset: r, packet: p, markKnown: true}
	w.pass(hooks...)
	return w.judgement()
}

// pass takes the packet through hooks, and reports whether it comes out.
func (w *walk) pass(hooks ...*nftables.ChainHook) bool {
	for _, hook := range hooks {
		w.hook = *hook
		for _, c := range w.at(*hook, w.packet) {
			w.tracked = w.tracked || int(*c.Priority) > conntrackPriority
			w.doubt = false
			if w.base(c) == Dropped {
				return false
			}
			w.anyDoubt = w.anyDoubt || w.doubt
		}
		w.tracked = true
	}
	return true
}

func (w *walk) judgement() Judgement {
	switch {
	case w.verdict == Dropped:
		return Judgement{Dropped, !w.doubt, w.place}
	case w.mayDrop != nil:
		return Judgement{Accepted, false, *w.mayDrop}
	case w.nat != nil:
		return Judgement{Translated, !w.natDoubt, *w.nat}
	}
	return Judgement{Verdict: Accepted, Certain: !w.anyDoubt}
}

// at are the base chains of a hook that see the packet, in order.
func (r *Ruleset) at(hook nftables.ChainHook, p Packet) []*chain {
	own := nftables.TableFamilyIPv4
	if p.Destination.Addr().Is6() {
		own = nftables.TableFamilyIPv6
	}
	var all []*chain
	for _, c := range r.bases {
		if *c.Hooknum == hook && (c.family == own || c.family == nftables.TableFamilyINet) {
			all = append(all, c)
		}
	}
	slices.SortStableFunc(all, func(a, b *chain) int { return cmp.Compare(*a.Priority, *b.Priority) })
	return all
}

// base walks a base chain, and says Dropped or Accepted.
func (w *walk) base(c *chain) Verdict {
	if c.Type == nftables.ChainTypeNAT && w.state() != New {
		return Accepted // only the first packet of a connection that is tracked sees it
	}
	w.verdict = 0
	w.chain(c, c, 0)
	if w.verdict == 0 && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
		w.verdict, w.place = Dropped, w.placeOf(c, nil)
	}
	if w.verdict == Dropped {
		return Dropped
	}
	return Accepted
}

// chain walks one, and reports whether the base chain goes on behind it.
func (w *walk) chain(c, base *chain, depth int) (goesOn bool) {
	if depth > maxDepth {
		w.doubt = true
		return true
	}
	for _, rule := range c.rules {
		e := evaluation{walk: w, chain: c, rule: rule}
		v, holds := e.run()
		if holds != no {
			for _, choice := range e.choices {
				w.consider(c, base, rule, choice, depth)
			}
		}
		switch {
		case holds == no, v == nil:
			continue
		case holds == maybe || w.maybe > 0:
			w.consider(c, base, rule, v, depth)
			continue
		}
		switch v.Kind {
		case expr.VerdictReturn:
			return true
		case expr.VerdictJump, expr.VerdictGoto:
			on := w.chain(w.chains[chainKey{c.family, c.table, v.Chain, c.legacy}].orEmpty(), base, depth+1)
			if !on {
				return false
			}
			if v.Kind == expr.VerdictGoto {
				return true
			}
		case expr.VerdictDrop:
			w.verdict, w.place = Dropped, w.placeOf(c, rule)
			return false
		case expr.VerdictAccept, expr.VerdictStop:
			w.verdict = Accepted
			return false
		case expr.VerdictQueue, expr.VerdictStolen: // a program decides
			w.verdict, w.doubt = Accepted, true
			return false
		}
	}
	return true
}

// consider walks what the packet meets if a condition holds that may not, and goes on as if it does not.
func (w *walk) consider(c, base *chain, rule *nftables.Rule, v *expr.Verdict, depth int) {
	switch v.Kind {
	case expr.VerdictJump, expr.VerdictGoto:
		w.maybe++
		w.chain(w.chains[chainKey{c.family, c.table, v.Chain, c.legacy}].orEmpty(), base, depth+1)
		w.maybe--
	case expr.VerdictDrop:
		if w.mayDrop == nil {
			place := w.placeOf(c, rule)
			w.mayDrop = &place
		}
	case expr.VerdictContinue, expr.VerdictBreak:
	default:
		w.doubt = true
	}
}

// placeOf is a rule's place; without one, the chain's policy.
func (w *walk) placeOf(c *chain, rule *nftables.Rule) Place {
	p := Place{Family: c.family, Table: c.table, Chain: c.name, Legacy: c.legacy}
	p.Leaving = w.hook == *nftables.ChainHookOutput || w.hook == *nftables.ChainHookPostrouting
	if rule != nil {
		p.Rule = describe(w.Ruleset, c, rule)
	}
	return p
}

func (c *chain) orEmpty() *chain {
	if c == nil { // it was removed between two questions to the kernel
		return &chain{}
	}
	return c
}
