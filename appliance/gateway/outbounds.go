package gateway

import (
	"sync/atomic"

	"sidegate/appliance/outbound"
)

// outbounds is what the proxy asks, once per flow. It has those of the configuration in force and, behind
// them, those of the one before: a flow that was decided before a reload, and reaches the proxy after it,
// keeps the outbound that it was decided for.
type outbounds struct {
	sets atomic.Pointer[sets]
}

// sets are searched in this order; nil: there is none.
type sets struct{ inForce, next, before *outbound.Set }

// Outbound finds one by name.
func (o *outbounds) Outbound(name string) (outbound.Outbound, bool) {
	s := o.sets.Load()
	for _, set := range []*outbound.Set{s.inForce, s.next, s.before} {
		if set == nil {
			continue
		}
		if found, ok := set.Outbound(name); ok {
			return found, true
		}
	}
	return nil, false
}

// prepare adds a set, before the datapath can name its outbounds. What is in force means what it did until commit; a set that
// never is, the next one takes the place of.
func (o *outbounds) prepare(set *outbound.Set) {
	s := sets{}
	if now := o.sets.Load(); now != nil {
		s = *now
	}
	if s.next = set; set == s.inForce {
		s.next = nil
	}
	o.sets.Store(&s)
}

// commit puts the set that was prepared in force.
func (o *outbounds) commit() {
	if s := o.sets.Load(); s.next != nil {
		o.sets.Store(&sets{inForce: s.next, before: s.inForce})
	}
}
