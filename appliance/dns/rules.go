package dns

import (
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"net/netip"
	"slices"
	"sync"

	"sidegate/appliance/policy"
)

// rules are the rules of one kind, compiled in two halves: what they ask of the client, and what they ask of
// the question or answer. A rule matches if both halves do. The first half's answer is a client's view,
// and part of the cache's keys, so that a cached answer needs no rule to be looked at.
type rules struct {
	client, content *policy.Tables
	count           int
}

// compileRules checks and compiles. What is "rule" or "response" in errors.
func compileRules(what string, matches []policy.Rule, geo policy.GeoData, addresses bool) (rules, error) {
	client := policy.Policy{Default: policy.OutboundDirect, Geo: geo}
	content := policy.Policy{Default: policy.OutboundDirect, Geo: geo}
	var errs []error
	for i := range matches {
		c, q := policy.Rule{Outbound: policy.OutboundDirect}, policy.Rule{Outbound: policy.OutboundDirect}
		for _, side := range []struct {
			from           []policy.Condition
			client, answer *[]policy.Condition
		}{{matches[i].Is, &c.Is, &q.Is}, {matches[i].Not, &c.Not, &q.Not}} {
			for _, condition := range side.from {
				switch d := condition.Field.Dimension; {
				case clientDimension(d):
					*side.client = append(*side.client, condition)
				case d == policy.DestinationName, d == policy.DestinationAddress && addresses:
					*side.answer = append(*side.answer, condition)
				default:
					errs = append(errs, fmt.Errorf("%s: %s is not known of a DNS %s: remove it", label(what, i, matches[i].Name), condition.Field.Key, what))
				}
			}
		}
		client.Rules = append(client.Rules, c)
		content.Rules = append(content.Rules, q)
	}
	if err := errors.Join(errs...); err != nil {
		return rules{}, err
	}
	r := rules{count: len(matches)}
	if r.count == 0 {
		return r, nil // tables have fixed parts, of a MiB in all
	}
	var err error
	if r.client, err = policy.Compile(&client); err != nil {
		return rules{}, fmt.Errorf("compiling the %ss on clients: %w", what, err)
	}
	if r.content, err = policy.Compile(&content); err != nil {
		return rules{}, fmt.Errorf("compiling the %ss on names: %w", what, err)
	}
	return r, nil
}

func clientDimension(d policy.Dimension) bool {
	return d == policy.SourceAddress || d == policy.SourceMAC || d == policy.InboundInterface
}

// label names a rule in errors.
func label(what string, index int, name string) string {
	if name != "" {
		return fmt.Sprintf("dns %s %q", what, name)
	}
	return fmt.Sprintf("dns %s #%d", what, index+1)
}

// permit is the set of rules that the client of a flow satisfies.
func (r *rules) permit(client policy.Flow) policy.Bits {
	if r.count == 0 {
		return policy.Bits{}
	}
	return collect(r.client.Matching(client))
}

func collect(matching iter.Seq[int]) policy.Bits {
	var set policy.Bits
	for i := range matching {
		set[i/64] |= 1 << (i % 64)
	}
	return set
}

// each yields the rules that are in both sets, in order.
func each(a, b *policy.Bits) iter.Seq[int] {
	return func(yield func(int) bool) {
		for w := range a {
			for left := a[w] & b[w]; left != 0; left &= left - 1 {
				if !yield(w*64 + bits.TrailingZeros64(left)) {
					return
				}
			}
		}
	}
}

// view is what a client's identity permits. All clients of one view get the same answers, so they share
// entries of the cache.
type view struct {
	id                 uint16
	questions, answers policy.Bits
}

// views makes one view of all clients that no rule tells apart. There are no more of them than the
// configuration has ways to tell clients apart.
type views struct {
	questions, answers *rules
	asks               bool // some rule asks for what only ClientFacts knows

	mu  sync.Mutex
	all map[[2]policy.Bits]*view
}

// maxViews fit into a key of the cache.
const maxViews = 1 << 16

// of returns the view of a client.
func (v *views) of(client policy.Flow) (*view, error) {
	key := [2]policy.Bits{v.questions.permit(client), v.answers.permit(client)}
	v.mu.Lock()
	defer v.mu.Unlock()
	w := v.all[key]
	if w == nil {
		if len(v.all) == maxViews {
			return nil, errors.New("the rules tell too many kinds of clients apart")
		}
		w = &view{id: uint16(len(v.all)), questions: key[0], answers: key[1]}
		v.all[key] = w
	}
	return w, nil
}

// asksFacts reports whether a rule asks for a client's MAC address or interface.
func asksFacts(matches []policy.Rule) bool {
	return slices.ContainsFunc(matches, func(r policy.Rule) bool {
		return slices.ContainsFunc(slices.Concat(r.Is, r.Not), func(c policy.Condition) bool {
			return c.Field.Dimension == policy.SourceMAC || c.Field.Dimension == policy.InboundInterface
		})
	})
}

// about is what of a rule's flow is known of a name and, in an answer, of one of its addresses.
func about(names []string, address netip.Addr) policy.Flow {
	f := policy.Flow{Names: names[:1], Destination: netip.AddrPortFrom(address, 0)}
	if len(names) > 1 {
		f.Aliases = map[string][]string{names[0]: names[1:]}
	}
	return f
}

// questionRule returns the rule that decides a question, or -1.
func (r *Resolver) questionRule(a *ask) int {
	if r.questions.count == 0 {
		return -1
	}
	named := collect(r.questions.content.Matching(about([]string{a.host}, netip.Addr{})))
	for i := range each(&a.view.questions, &named) {
		if types := r.settings.Rules[i].QueryTypes; len(types) == 0 || slices.Contains(types, a.qtype) {
			return i
		}
	}
	return -1
}

// responseRule returns the rule that decides an answer, or -1. Passed over are rules that lead to an
// upstream that has been asked.
func (r *Resolver) responseRule(v *view, names []string, addrs []netip.Addr, from string, asked []string) int {
	if r.answers.count == 0 {
		return -1
	}
	if len(addrs) == 0 {
		addrs = []netip.Addr{{}}
	}
	var matching policy.Bits
	for _, a := range addrs {
		for i := range r.answers.content.Matching(about(names, a)) {
			matching[i/64] |= 1 << (i % 64)
		}
	}
	for i := range each(&v.answers, &matching) {
		rule := &r.settings.Responses[i]
		if len(rule.From) > 0 && !slices.Contains(rule.From, from) {
			continue
		}
		if rule.Upstream != "" && slices.Contains(asked, rule.Upstream) {
			continue
		}
		return i
	}
	return -1
}
