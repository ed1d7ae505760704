package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"

	"sidegate/appliance/policy"
)

// query runs policy_query: the very code that decides packets, on facts instead of a packet.
func (g *generation) query(f policy.Flow) (policy.Decision, error) {
	facts, err := g.facts(f)
	if err != nil {
		return policy.Decision{}, err
	}
	d, err := g.ask(facts)
	if err != nil {
		return policy.Decision{}, err
	}
	if d.Reason != 0 {
		return policy.Decision{}, fmt.Errorf("asking the kernel: %s", reasonText(d.Reason))
	}
	return g.decision(d)
}

// now is the time by which flows' times are read.
func (g *generation) now() (uint64, error) {
	d, err := g.ask(gatewayFacts{})
	return d.Now, err
}

func (g *generation) ask(facts gatewayFacts) (d gatewayDecision, err error) {
	var in bytes.Buffer
	if err := binary.Write(&in, binary.NativeEndian, facts); err != nil {
		return d, fmt.Errorf("writing the flow's facts: %w", err)
	}
	ret, out, err := g.objects.PolicyQuery.Test(in.Bytes())
	if err != nil {
		return d, fmt.Errorf("asking the kernel: %w", err)
	}
	if ret != 0 {
		return d, fmt.Errorf("asking the kernel: the program says %d", ret)
	}
	if err := binary.Read(bytes.NewReader(out), binary.NativeEndian, &d); err != nil {
		return d, fmt.Errorf("reading the kernel's decision: %w", err)
	}
	return d, nil
}

func (g *generation) decision(d gatewayDecision) (policy.Decision, error) {
	decision := policy.Decision{Verdict: policy.Verdict(d.Action.Verdict), Rule: int(d.Rule)}
	action := g.tables.Default
	switch {
	case d.Rule == ruleDefault:
		decision.Rule = -1
	case int(d.Rule) < len(g.tables.Rules):
		action = g.tables.Rules[d.Rule]
	default:
		return decision, fmt.Errorf("the kernel names rule %d of %d", d.Rule, len(g.tables.Rules))
	}
	if action.OutboundID != d.Action.Outbound {
		return decision, fmt.Errorf("the kernel's outbound of rule %d is not %q", d.Rule, action.Outbound)
	}
	decision.Outbound = action.Outbound
	return decision, nil
}

// facts are the flow as the kernel sees it; what only user space knows is already a class.
func (g *generation) facts(f policy.Flow) (gatewayFacts, error) {
	name, err := g.nameClass(f.Names)
	if err != nil {
		return gatewayFacts{}, err
	}
	facts := gatewayFacts{
		Source:          addressOf(f.Source.Addr()),
		Destination:     addressOf(f.Destination.Addr()),
		SourcePort:      bigEndian(f.Source.Port()),
		DestinationPort: bigEndian(f.Destination.Port()),
		Dscp:            f.DSCP,
		Mac:             f.SourceMAC,
		Ipv6:            boolByte(!f.Destination.Addr().Unmap().Is4()),
		NameClass:       name,
	}
	switch f.Network {
	case policy.TCP:
		facts.Network = 1
	case policy.UDP:
		facts.Network = 2
	}
	if f.Interface != "" {
		facts.Interface = g.interfaceIndex(f.Interface)
	}
	if f.Process != "" {
		class, ok := g.tables.Process.Class[f.Process]
		if !ok {
			class = policy.ClassOther
		}
		facts.ProcessClass = class
	}
	return facts, nil
}

// nameClass finds or makes the row of a set of names.
func (g *generation) nameClass(names []string) (policy.Class, error) {
	if len(names) == 0 {
		return policy.ClassUnknown, nil
	}
	row := g.tables.Name.Bits(names)
	switch row {
	case g.tables.Name.Unknown:
		return policy.ClassUnknown, nil
	case g.tables.Name.Other:
		return policy.ClassOther, nil
	}
	if class, ok := g.nameClasses[row]; ok {
		return class, nil
	}
	if len(g.nameClasses) == maxNameClasses {
		return 0, fmt.Errorf("names lead to more than %d different sets of rules", maxNameClasses)
	}
	class := policy.Class(2 + len(g.nameClasses))
	if err := g.objects.NameBits.Put(class, gatewayBits{W: row}); err != nil {
		return 0, fmt.Errorf("adding a class of names: %w", err)
	}
	g.nameClasses[row] = class
	return class, nil
}

// Flows that a new generation is asked about before any packet is.
const selfTestFlows = 64

// selfTest compares the loaded program with the tables that it was filled from.
func (g *generation) selfTest() error {
	r := rand.New(rand.NewPCG(uint64(g.number), 0))
	for range selfTestFlows {
		f := g.desired.Policy.RandomFlow(r)
		want := g.tables.Match(f)
		got, err := g.query(f)
		if err != nil {
			return fmt.Errorf("self-test: %w", err)
		}
		if got.Verdict != want.Verdict || got.Rule != want.Rule || got.Outbound != want.Outbound {
			return errors.New("self-test: " + disagreement(f, got, want))
		}
	}
	return nil
}

func disagreement(f policy.Flow, kernel, tables policy.Decision) string {
	return fmt.Sprintf("the kernel decides %s by rule %d, the policy %s by rule %d, on %+v",
		kernel.Verdict, kernel.Rule, tables.Verdict, tables.Rule, f)
}
