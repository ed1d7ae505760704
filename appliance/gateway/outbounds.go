package gateway

import (
	"sync/atomic"

	"sidegate/appliance/outbound"
)

// outbounds is what the proxy asks, once per flow. It has those of the configuration in force and, behind
// them, those of the one before: a flow that was decided before a reload, and reaches the proxy after it,
// keeps the outbound that it was decided for.
type outbounds struct {
	sets atomic.Pointer[[2]*outbound.Set]
}

// Outbound finds one by name.
func (o *outbounds) Outbound(name string) (outbound.Outbound, bool) {
	for _, set := range o.sets.Load() {
		if set == nil {
			continue
		}
		if found, ok := set.Outbound(name); ok {
			return found, true
		}
	}
	return nil, false
}

// use puts a set in force, before the datapath can name its outbounds. Undo goes back.
func (o *outbounds) use(set *outbound.Set) (undo func()) {
	before := o.sets.Load()
	next := [2]*outbound.Set{set}
	if before != nil {
		next[1] = before[0]
	}
	o.sets.Store(&next)
	return func() { o.sets.Store(before) }
}
