package outbound

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// Set is the outbounds of one configuration by name. It always has "direct" and "block". It does
// not change: a reload makes a new one.
type Set struct {
	byName map[string]Outbound
}

// NewSet collects outbounds and adds direct and block. A name given twice is an error.
func NewSet(o Options, outbounds ...Outbound) (*Set, error) {
	s := &Set{byName: make(map[string]Outbound)}
	for _, o := range append([]Outbound{&direct{o, o.dialer()}, block{}}, outbounds...) {
		if _, taken := s.byName[o.Name()]; taken {
			return nil, fmt.Errorf("outbound %q is defined twice", o.Name())
		}
		s.byName[o.Name()] = o
	}
	return s, nil
}

// Outbound finds one by name.
func (s *Set) Outbound(name string) (Outbound, bool) {
	o, ok := s.byName[name]
	return o, ok
}

// Names lists the outbounds, sorted.
func (s *Set) Names() []string { return slices.Sorted(maps.Keys(s.byName)) }

// Upstream is the address of a proxy that some outbound talks to.
type Upstream struct {
	Host string // IP address or DNS name
	Port uint16
}

// Upstreams lists the proxies of the set, each once, sorted: the policy leaves them direct.
func (s *Set) Upstreams() []Upstream {
	var list []Upstream
	for _, o := range s.byName {
		if host, port, ok := o.Upstream(); ok {
			list = append(list, Upstream{host, port})
		}
	}
	slices.SortFunc(list, func(a, b Upstream) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port))
	})
	return slices.Compact(list)
}
