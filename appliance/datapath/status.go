package datapath

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
)

// Status is what the datapath is and has done.
type Status struct {
	Generation uint32            `json:"generation"`
	Rules      int               `json:"rules"`
	Links      []string          `json:"links"` // names of what is attached
	Drops      map[string]uint64 `json:"drops"` // packets dropped or refused, by reason
	Flows      Table             `json:"flows"`
	Crowd      Table             `json:"crowd"`
	Clients    Table             `json:"clients"`
}

// Table is how full a table is. Entries of a table that evicts by itself include what is about to be.
type Table struct {
	Entries uint32 `json:"entries"`
	Max     uint32 `json:"max"`
}

// RuleCount is one rule of the policy in force and the flows that it decided, restarts and reloads of the
// same rule not included.
type RuleCount struct {
	Index    int    `json:"index"` // -1: the default
	Name     string `json:"name"`
	Rule     string `json:"rule"`
	Verdict  string `json:"verdict"`
	Outbound string `json:"outbound"`
	Flows    uint64 `json:"flows"`
}

// counters are kept for what is gone, so that figures never fall.
type counters struct {
	flows map[ruleKey]uint64
}

type ruleKey struct{ rule, verdict, outbound string }

func (c *counters) add(g *generation) {
	counts, err := g.flowsByRule()
	if err != nil {
		return // figures of a generation that cannot be read any more
	}
	if c.flows == nil {
		c.flows = map[ruleKey]uint64{}
	}
	for i, n := range counts {
		c.flows[g.ruleKey(i)] += n
	}
}

func (g *generation) ruleKey(i int) ruleKey {
	if i == len(g.tables.Rules) {
		return ruleKey{"default", g.tables.Default.Verdict.String(), g.tables.Default.Outbound}
	}
	name := g.desired.Policy.Rules[i].Name
	if name == "" {
		name = fmt.Sprintf("#%d", i+1)
	}
	return ruleKey{name, g.tables.Rules[i].Verdict.String(), g.tables.Rules[i].Outbound}
}

// Status reads the counters. It walks the flow tables.
func (d *Datapath) Status() (Status, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	s := Status{Drops: map[string]uint64{}, Links: sortedKeys(d.links.open)}
	if d.generation != nil {
		s.Generation, s.Rules = d.generation.number, len(d.generation.tables.Rules)
	}
	for reason := gatewayReasonREASON_INVALID + 1; reason < gatewayReasonREASON_COUNT; reason++ {
		n, err := perCPUSum(d.state.maps.Drops, uint32(reason))
		if err != nil {
			return s, fmt.Errorf("reading the drops: %w", err)
		}
		s.Drops[reasonText(uint32(reason))] = n
	}
	for table, m := range map[*Table]*ebpf.Map{&s.Flows: d.state.maps.Flows, &s.Crowd: d.state.maps.CrowdFlows} {
		table.Max = m.MaxEntries()
		if err := eachFlow(m, func(gatewayFlowKey, gatewayFlow) { table.Entries++ }); err != nil {
			return s, err
		}
	}
	s.Clients.Max = d.state.maps.Clients.MaxEntries()
	var key gatewayClientKey
	var client gatewayClient
	for clients := d.state.maps.Clients.Iterate(); clients.Next(&key, &client); {
		s.Clients.Entries++
	}
	return s, nil
}

// Rules lists the policy in force in order, the default last, with the flows that each rule decided.
func (d *Datapath) Rules() ([]RuleCount, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return nil, nil
	}
	g := d.generation
	counts, err := g.flowsByRule()
	if err != nil {
		return nil, err
	}
	rules := make([]RuleCount, len(counts))
	for i, n := range counts {
		key := g.ruleKey(i)
		rules[i] = RuleCount{Index: i, Name: key.rule, Verdict: key.verdict, Outbound: key.outbound, Flows: n}
		if i == len(g.tables.Rules) {
			rules[i].Index, rules[i].Rule = -1, "everything else"
			continue
		}
		rules[i].Rule = describeRule(g, i)
	}
	return rules, nil
}

func describeRule(g *generation, i int) string {
	return g.desired.Policy.Rules[i].String()
}

// FlowCount is a figure that never falls while the daemon lives: flows decided, by rule.
type FlowCount struct {
	Rule, Verdict, Outbound string
	Flows                   uint64
}

// FlowCounts adds up all generations of this daemon.
func (d *Datapath) FlowCounts() ([]FlowCount, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	sum := map[ruleKey]uint64{}
	for k, n := range d.history.flows {
		sum[k] += n
	}
	if d.generation != nil {
		counts, err := d.generation.flowsByRule()
		if err != nil {
			return nil, err
		}
		for i, n := range counts {
			sum[d.generation.ruleKey(i)] += n
		}
	}
	out := make([]FlowCount, 0, len(sum))
	for k, n := range sum {
		out = append(out, FlowCount{Rule: k.rule, Verdict: k.verdict, Outbound: k.outbound, Flows: n})
	}
	slices.SortFunc(out, func(a, b FlowCount) int {
		return strings.Compare(a.Rule+"\x00"+a.Outbound, b.Rule+"\x00"+b.Outbound)
	})
	return out, nil
}
