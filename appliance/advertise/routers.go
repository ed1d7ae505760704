package advertise

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/ndp"
)

// maxRouters bounds what is remembered: anybody on the LAN can invent routers.
const maxRouters = 16

// routers are the other default routers of a LAN, by address.
type routers map[netip.Addr]router

type router struct {
	until     time.Time
	high      bool
	says      consensus
	resolvers []netip.Addr // that it names, on the LAN
	label     string
}

// hear learns from an advertisement.
func (r *routers) hear(m *ndp.RouterAdvertisement, from netip.Addr, now time.Time) {
	r.forget(now)
	if m.RouterLifetime == 0 {
		delete(*r, from)
		return
	}
	if _, known := (*r)[from]; !known && len(*r) >= maxRouters {
		return
	}
	if *r == nil {
		*r = routers{}
	}
	n := router{
		until:     now.Add(m.RouterLifetime),
		high:      m.RouterSelectionPreference == ndp.High,
		says:      consensus{m.ManagedConfiguration, m.OtherConfiguration},
		resolvers: resolversOf(m),
		label:     from.String(),
	}
	if l := sourceOf(m.Options); l != nil {
		n.label = fmt.Sprintf("%s (%s)", from, l.Addr)
	}
	(*r)[from] = n
}

// forget drops those whose time is over.
func (r *routers) forget(now time.Time) {
	maps.DeleteFunc(*r, func(_ netip.Addr, n router) bool { return !now.Before(n.until) })
}

func (r routers) consensus() (c consensus) {
	for _, n := range r {
		c.managed = c.managed || n.says.managed
		c.other = c.other || n.says.other
	}
	return c
}

// problems are what others say that leads clients past the box.
func (r routers) problems(i Interface) error {
	var errs []error
	for _, from := range slices.SortedFunc(maps.Keys(r), netip.Addr.Compare) {
		n := r[from]
		if n.high {
			errs = append(errs, fmt.Errorf("%s: the router %s advertises itself with preference high, as this box does, so IPv6 clients take either "+
				"and some of their traffic passes the policy by: set its router preference to medium or low (radvd: AdvDefaultPreference medium)", i.Name, n.label))
		}
		for _, a := range n.resolvers {
			if i.DNS && a != i.Address {
				errs = append(errs, fmt.Errorf("%s: the router %s names %s as DNS server, which clients ask past the box, so names stay unknown: "+
					"take it out of its advertisements (radvd: RDNSS)", i.Name, n.label, a))
			}
		}
	}
	return errors.Join(errs...)
}
