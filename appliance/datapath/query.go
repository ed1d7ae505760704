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
func (g *generation) query(f policy.Flow) (Answer, error) {
	name, err := g.nameOf(f.NameSets())
	if err != nil {
		return Answer{}, err
	}
	return g.queryNamed(f, name)
}

func (g *generation) queryNamed(f policy.Flow, name gatewayName) (Answer, error) {
	d, err := g.ask(g.facts(f, name))
	if err != nil {
		return Answer{}, err
	}
	if d.Reason != 0 {
		return Answer{}, fmt.Errorf("asking the kernel: %s", reasonText(d.Reason))
	}
	decision, err := g.decision(d)
	translated := decision.Verdict == policy.Direct && isTranslated(d.Action.Mark)
	return Answer{decision, d.Doubtful != 0, translated}, err
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

// facts are the flow as the kernel sees it.
func (g *generation) facts(f policy.Flow, name gatewayName) gatewayFacts {
	facts := gatewayFacts{
		Source:          addressOf(f.Source.Addr()),
		Destination:     addressOf(f.Destination.Addr()),
		SourcePort:      bigEndian(f.Source.Port()),
		DestinationPort: bigEndian(f.Destination.Port()),
		Dscp:            f.DSCP,
		Mac:             f.SourceMAC,
		Ipv6:            boolByte(!f.Destination.Addr().Unmap().Is4()),
		Name:            name,
		Process:         processOf(f.Process),
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
	return facts
}

// nameFor is what find_name (bpf/names.h) finds.
func (g *generation) nameFor(key gatewayNameKey) (name gatewayName) {
	others := gatewayNameKey{Address: key.Address}
	if g.objects.Names.Lookup(key, &name) != nil && g.objects.Names.Lookup(others, &name) != nil && g.desired.Sniff == SniffUnknown {
		name.Flags = uint32(gatewayNameFlagNAME_ANY)
	}
	if g.desired.Sniff == SniffOff || !g.usesNames {
		name.Flags = uint32(gatewayNameFlagNAME_CERTAIN)
	}
	return name
}

// nameOf is what the programs would find for these names, whoever sniffs.
func (g *generation) nameOf(sets [][]string) (gatewayName, error) {
	if sets == nil {
		return gatewayName{Flags: uint32(gatewayNameFlagNAME_ANY)}, nil
	}
	name, ok, err := g.names.of(knowledge{sets: sets})
	if err == nil && !ok {
		err = fmt.Errorf("names lead to more than %d different sets of rules", maxNameClasses)
	}
	return name, err
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
			return errors.New("self-test: " + disagreement(f, got.Decision, want))
		}
		if translated := g.translates(want); got.Translated != translated {
			return fmt.Errorf("self-test: the kernel translates: %t, the policy: %t, on %+v", got.Translated, translated, f)
		}
		if doubtful := g.tables.Doubtful(f); got.Doubtful != doubtful {
			return fmt.Errorf("self-test: the kernel's doubt is %t, the policy's %t, on %+v", got.Doubtful, doubtful, f)
		}
	}
	return nil
}

// translates is Answer.Translated as the policy has it.
func (g *generation) translates(d policy.Decision) bool {
	return d.Verdict == policy.Direct && g.desired.Policy.Translated(d.Rule, g.desired.ReturnPath == Symmetric)
}

func disagreement(f policy.Flow, kernel, tables policy.Decision) string {
	return fmt.Sprintf("the kernel decides %s by rule %d, the policy %s by rule %d, on %+v",
		kernel.Verdict, kernel.Rule, tables.Verdict, tables.Rule, f)
}
