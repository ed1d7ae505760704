package datapath

import (
	"fmt"
	"sync"

	"github.com/cilium/ebpf"

	"sidegate/appliance/policy"
)

// Rows of name_bits beyond the two fixed ones: distinct effects of sets of names. Some are kept for single names, without
// which nothing at all would be known of an address.
const (
	maxNameClasses    = 8192
	singleNameClasses = 2048
)

// nameClasses are the rows that a generation has for sets of names, each made when the first such set is met.
type nameClasses struct {
	mu    sync.Mutex
	table *policy.NameTable
	any   *ebpf.Map // name_bits
	each  *ebpf.Map // certain_bits
	rows  map[[2]policy.Bits]policy.Class
	next  policy.Class
}

func newNameClasses(t *policy.NameTable, any, each *ebpf.Map) *nameClasses {
	return &nameClasses{table: t, any: any, each: each, next: policy.ClassOther + 1, rows: map[[2]policy.Bits]policy.Class{
		{t.Unknown, t.Unknown}: policy.ClassUnknown,
		{t.Other, t.Other}:     policy.ClassOther, // which may be the same row
	}}
}

// of is what the programs know an address by of which this is known; without any name it is unknown. It is not ok if there
// are more effects than rows.
func (c *nameClasses) of(k knowledge) (_ gatewayName, ok bool, err error) {
	union, common := c.table.Bits(k.sets...), c.table.Common(k.sets...)
	if k.open {
		common = c.table.Unknown // a name that we do not know need not have what those have in common
	}
	name := gatewayName{Flags: uint32(gatewayNameFlagNAME_CERTAIN)}
	if union != common {
		name.Flags = uint32(gatewayNameFlagNAME_ONE_OF)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	class, known := c.rows[[2]policy.Bits{union, common}]
	if !known {
		limit := policy.Class(2 + maxNameClasses)
		if len(k.sets) > 1 {
			limit -= singleNameClasses
		}
		if class = c.next; class >= limit {
			return gatewayName{}, false, nil
		}
		if err := c.each.Put(class, gatewayBits{W: common}); err != nil {
			return name, false, fmt.Errorf("adding a class of names: %w", err)
		}
		if err := c.any.Put(class, gatewayBits{W: union}); err != nil {
			return name, false, fmt.Errorf("adding a class of names: %w", err)
		}
		c.rows[[2]policy.Bits{union, common}] = class
		c.next++
	}
	name.Class = class
	return name, true, nil
}

// setNames tells the programs what is known of an address: for one client, and for all who know nothing of it.
func (g *generation) setNames(key gatewayNameKey, b *book) error {
	if !g.usesNames {
		return nil
	}
	if err := g.setName(key, b.of(key, g.desired.TrustSniffed)); err != nil {
		return err
	}
	shared := b.shared(key.Address)
	if g.desired.Sniff == SniffUnknown && len(shared.sets) > 0 {
		shared.open = true // who knows nothing of an address resolves elsewhere, and may know it by another name
	}
	return g.setName(gatewayNameKey{Address: key.Address}, shared)
}

func (g *generation) setName(key gatewayNameKey, k knowledge) error {
	if len(k.sets) == 0 && !k.open {
		return remove(g.objects.Names, key)
	}
	name, ok, err := g.names.of(k)
	if err != nil {
		return err
	}
	if last := len(k.sets) - 1; !ok && last > 0 && g.desired.Sniff == SniffOff {
		// without sniffing, one name is better than none
		if name, ok, err = g.names.of(knowledge{sets: k.sets[last:]}); err != nil {
			return err
		}
	}
	if k.open || !ok {
		name.Flags = uint32(gatewayNameFlagNAME_ANY)
	}
	if err := g.objects.Names.Put(key, name); err != nil {
		return fmt.Errorf("writing the class of a name: %w", err)
	}
	return nil
}
