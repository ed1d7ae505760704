package policy

import (
	"math/bits"
	"net/netip"
)

// Bits is a set of rules: bit i%64 of word i/64 stands for rule i. In a table's row, a set bit means
// that this dimension permits the rule.
type Bits [MaxRules / 64]uint64

// Class is the equivalence class of a value within one dimension: all values of a class are permitted
// the same rules. A class is an index into the Bits of its table.
type Class = uint32

// Every table has these two rows. A value that the packet does carry never has ClassUnknown.
const (
	ClassUnknown Class = 0 // the fact is absent: neither a field nor its negation holds
	ClassOther   Class = 1 // the fact is known, but no rule names its value
)

// Tables is a policy in the form that the kernel executes: one look-up per dimension yields a row,
// and the verdict is the first set bit of the AND of all rows, or Default. Mirrored by bpf/policy.h.
//
// Tables are immutable once compiled; any number of goroutines may read them.
type Tables struct {
	Words   int          // leading words of each row that can be non-zero; at least 1
	Rules   []RuleAction // by rule index
	Default RuleAction   // where no bit is left

	Destination     PrefixTable
	Source          PrefixTable
	DestinationPort PortTable
	SourcePort      PortTable
	Header          HeaderTable
	MAC             KeyTable[MAC]
	Interface       KeyTable[string]
	ProcessName     KeyTable[string]
	ProcessPath     KeyTable[string]
	ProcessUnit     KeyTable[string]
	Name            NameTable

	unversioned Bits      // the rules that do not ask for the IP version: for flows without addresses
	all         Bits      // every rule
	outcomes    []outcome // by rule
	alike       map[outcome]Bits
}

// RuleAction is what a rule does, apart from what it matches.
type RuleAction struct {
	Verdict    Verdict
	Reject     bool   // a block that answers
	OutboundID uint32 // OutboundID(Outbound)
	Mark       uint32 // extra firewall mark of direct traffic; 0: none
	SNAT       *bool  // nil: as the configuration's return path says
	Outbound   string
}

// PrefixTable classifies addresses by longest-prefix match. A look-up yields one entry only, so each
// entry already has the bits of the prefixes around it. IPv4 and IPv6 are separate: 0.0.0.0/0 and ::/0
// say nothing about each other. An address without an entry is ClassOther.
type PrefixTable struct {
	Prefixes []PrefixClass // masked, unique, IPv4 before IPv6, each before the prefixes within it
	Bits     []Bits        // by class

	around []int32 // by entry: the index of the nearest entry around it, or -1
}

// PrefixClass is one entry of a PrefixTable.
type PrefixClass struct {
	Prefix netip.Prefix
	Class  Class
}

// PortTable classifies ports. Port 0 stands for "no port", so Class[0] is ClassUnknown: a look-up for
// a flow that is neither TCP nor UDP has to use it.
type PortTable struct {
	Class [1 << 16]uint16 // by port, in host byte order
	Bits  []Bits          // by class
}

// HeaderTable classifies the small header facts together; see HeaderIndex.
type HeaderTable struct {
	Class [1 << 9]uint16 // by HeaderIndex
	Bits  []Bits         // by class
}

// HeaderIndex is dscp | net<<6 | v6<<8, where net is 0 for other protocols, 1 for TCP and 2 for UDP.
func HeaderIndex(dscp uint8, network Network, v6 bool) int {
	index := int(dscp & 63)
	switch network {
	case TCP:
		index |= 1 << 6
	case UDP:
		index |= 2 << 6
	}
	if v6 {
		index |= 1 << 8
	}
	return index
}

// KeyTable classifies values that are compared whole: MACs, interface names, what processes are told by. A known
// value without an entry is ClassOther.
type KeyTable[K comparable] struct {
	Class map[K]Class
	Bits  []Bits // by class
}

// Match is what the kernel does, in Go: the same answer as Policy.Match.
func (t *Tables) Match(f Flow) Decision {
	f = f.normal()
	row := t.row(&f)
	names := f.NameSets()
	decided := t.decide(row, t.Name.Bits(names...))
	if len(names) > 1 {
		for _, name := range names {
			if !t.sameOutcome(t.decide(row, t.Name.row(name)).Rule, decided.Rule) {
				decided.Ambiguous = true
			}
		}
	}
	return decided
}

// sameOutcome reports whether two rules, or the default, lead a flow to the same place.
func (t *Tables) sameOutcome(a, b int) bool { return t.outcome(a) == t.outcome(b) }

func (t *Tables) outcome(rule int) outcome {
	if rule < 0 {
		return outcome{outbound: t.Default.Outbound}
	}
	return t.outcomes[rule]
}

// row is the AND of all dimensions but the name.
func (t *Tables) row(f *Flow) Bits {
	v := f.version()
	row := t.Header.Bits[t.Header.Class[HeaderIndex(f.DSCP, f.Network, v == 6)]]
	if v == 0 {
		row.and(&t.unversioned)
	}
	row.and(&t.Destination.Bits[t.Destination.class(f.Destination.Addr())])
	row.and(&t.Source.Bits[t.Source.class(f.Source.Addr())])
	row.and(&t.DestinationPort.Bits[t.DestinationPort.Class[f.Destination.Port()]])
	row.and(&t.SourcePort.Bits[t.SourcePort.Class[f.Source.Port()]])
	row.and(&t.MAC.Bits[t.MAC.class(f.SourceMAC)])
	row.and(&t.Interface.Bits[t.Interface.class(f.Interface)])
	row.and(&t.ProcessName.Bits[t.ProcessName.class(f.Process.Name)])
	row.and(&t.ProcessPath.Bits[t.ProcessPath.class(f.Process.Path)])
	row.and(&t.ProcessUnit.Bits[t.ProcessUnit.class(f.Process.Unit)])
	return row
}

// decide takes the first rule that all dimensions permit.
func (t *Tables) decide(row, names Bits) Decision {
	for w := range t.Words {
		if left := row[w] & names[w]; left != 0 {
			i := w*64 + bits.TrailingZeros64(left)
			return Decision{Verdict: t.Rules[i].Verdict, Outbound: t.Rules[i].Outbound, Rule: i}
		}
	}
	return Decision{Verdict: t.Default.Verdict, Outbound: t.Default.Outbound, Rule: -1}
}

// class takes the zero value for an unknown fact.
func (t *KeyTable[K]) class(key K) Class {
	var unknown K
	if key == unknown {
		return ClassUnknown
	}
	if c, ok := t.Class[key]; ok {
		return c
	}
	return ClassOther
}
