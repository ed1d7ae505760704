package policy

import "net/netip"

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
	Process         KeyTable[string]
	Name            NameTable
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

// KeyTable classifies values that are compared whole: MACs, interface names, process names. A known
// value without an entry is ClassOther.
type KeyTable[K comparable] struct {
	Class map[K]Class
	Bits  []Bits // by class
}

// NameTable classifies sets of names. Names have no fixed classes: whoever learns a set of names
// stores its row, so that the kernel needs no strings.
type NameTable struct {
	Unknown Bits // the row of a flow without a name, as ClassUnknown elsewhere
	Other   Bits // the row of a name that no rule names, as ClassOther elsewhere
}

// Bits returns the row of a flow that has any of these names: the union of the names' rows, because
// the lowest rule that one of them leads to decides. Without names it is Unknown.
func (t *NameTable) Bits(names []string) Bits {
	return t.Unknown
}
