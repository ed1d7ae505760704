package advertise

import (
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/ndp"
)

// consensus is what all routers of a link should say alike (RFC 4861 section 6.2.7): clients go by whoever spoke last, and
// one that says nothing of DHCPv6 would end it. The main router knows; we repeat.
type consensus struct {
	managed, other bool // addresses, or other settings, are to be had by DHCPv6
}

// advertisement says that the box is a router for so long; 0 withdraws it. There is no MTU in it: the link's is the main
// router's to tell.
func (i Interface) advertisement(lifetime time.Duration, c consensus) ([]byte, error) {
	m := &ndp.RouterAdvertisement{
		ManagedConfiguration:      c.managed,
		OtherConfiguration:        c.other,
		RouterSelectionPreference: ndp.High,
		RouterLifetime:            lifetime,
		Options:                   []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: i.MAC[:]}},
	}
	if lifetime == 0 {
		m.RouterSelectionPreference = ndp.Medium // RFC 4191 section 2.2
	}
	// Where clients are not to ask us, 0 tells so those who were told otherwise before a reload or restart.
	server := &ndp.RecursiveDNSServer{Servers: []netip.Addr{i.Address}}
	if i.DNS {
		server.Lifetime = lifetime
	}
	m.Options = append(m.Options, server)
	return ndp.MarshalMessage(m)
}

// parse returns a router solicitation or advertisement that RFC 4861 lets a router or host take (sections 6.1.1 and 6.1.2;
// the kernel has verified the checksum), and nil for anything else.
func parse(message []byte, from netip.Addr, limit int) ndp.Message {
	if limit != hopLimit || len(message) < 8 || message[1] != 0 {
		return nil
	}
	m, err := ndp.ParseMessage(message)
	if err != nil {
		return nil
	}
	switch m := m.(type) {
	case *ndp.RouterSolicitation:
		if !from.IsUnspecified() || sourceOf(m.Options) == nil {
			return m
		}
	case *ndp.RouterAdvertisement:
		if from.IsLinkLocalUnicast() {
			return m
		}
	}
	return nil
}

// sourceOf is the sender's MAC address, if it tells it.
func sourceOf(options []ndp.Option) *ndp.LinkLayerAddress {
	for _, o := range options {
		if l, ok := o.(*ndp.LinkLayerAddress); ok && l.Direction == ndp.Source {
			return l
		}
	}
	return nil
}

// resolversOf are the DNS servers that an advertisement names and that clients reach without a router.
func resolversOf(m *ndp.RouterAdvertisement) (servers []netip.Addr) {
	onLink := func(a netip.Addr) bool {
		return a.IsLinkLocalUnicast() || slices.ContainsFunc(m.Options, func(o ndp.Option) bool {
			p, ok := o.(*ndp.PrefixInformation)
			return ok && p.OnLink && netip.PrefixFrom(p.Prefix, int(p.PrefixLength)).Contains(a)
		})
	}
	for _, o := range m.Options {
		if r, ok := o.(*ndp.RecursiveDNSServer); ok && r.Lifetime > 0 {
			for _, a := range r.Servers {
				if onLink(a) {
					servers = append(servers, a)
				}
			}
		}
	}
	return servers
}
