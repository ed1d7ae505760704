package outbound

import "strconv"

// Set is the outbounds of one configuration by name. It always has "direct" and "block". It does
// not change: a reload makes a new one.
type Set struct {
	byName map[string]Outbound
}

// NewSet collects outbounds and adds direct and block. A name given twice is an error.
func NewSet(o Options, outbounds ...Outbound) (*Set, error) { return nil, nil }

// Outbound finds one by name.
func (s *Set) Outbound(name string) (Outbound, bool) {
	o, ok := s.byName[name]
	return o, ok
}

// Upstream is the address of a proxy that some outbound talks to.
type Upstream struct {
	Host string // IP address or DNS name
	Port uint16
}

// Upstreams lists the proxies of the set, each once, sorted: the policy leaves them direct.
func (s *Set) Upstreams() []Upstream { return nil }

func portText(port uint16) string { return strconv.Itoa(int(port)) }
