package probe

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"sidegate/appliance/netstate"
)

// candidates is how many addresses are asked for at once.
const candidates = 16

// settle gives the client an address that nobody else has, or the one that was asked for.
func (r *run) settle(ctx context.Context) error {
	prefix, err := r.subnet()
	if err != nil {
		return err
	}
	free := []netip.Addr{r.As}
	if !r.As.IsValid() {
		if free, err = r.guesses(prefix); err != nil {
			return err
		}
	}
	owners, err := r.owners(ctx, free, len(free))
	if err != nil {
		return err
	}
	if mac, taken := owners[r.As]; taken {
		return fmt.Errorf("being %s: %s has this address; take a free one, or none at all", r.As, mac)
	}
	for _, a := range free {
		if _, taken := owners[a]; !taken {
			r.become(a)
			return nil
		}
	}
	return fmt.Errorf("looking for a free address in %s: %s to %s are taken; name one: --as ADDRESS", prefix, free[len(free)-1], free[0])
}

// subnet is the LAN's, of the family.
func (r *run) subnet() (netip.Prefix, error) {
	var found netip.Prefix
	for _, a := range r.Network.AddressesOf(r.LAN.Index) {
		p := a.Prefix.Masked()
		if p.Addr().Is6() != r.IPv6 || a.Prefix.Addr().IsLinkLocalUnicast() || r.As.IsValid() && !p.Contains(r.As) {
			continue
		}
		if r.As == a.Prefix.Addr() {
			return found, fmt.Errorf("being %s: this is the box's own address", r.As)
		}
		if !found.IsValid() || p.Bits() < found.Bits() { // IPv6 may have one of DHCP besides, which is alone
			found = p
		}
	}
	switch {
	case !found.IsValid() && r.As.IsValid():
		return found, fmt.Errorf("being %s: it is in no subnet of %s", r.As, r.LAN.Name)
	case !found.IsValid():
		return found, fmt.Errorf("looking for a free address: %s has no %s address", r.LAN.Name, r.Family)
	}
	return found, nil
}

// guesses are addresses that are probably free: the last ones of an IPv4 subnet; for IPv6 the one that the MAC address
// makes (RFC 4291, appendix A).
func (r *run) guesses(prefix netip.Prefix) ([]netip.Addr, error) {
	if r.IPv6 {
		if prefix.Bits() > 64 {
			return nil, fmt.Errorf("looking for a free address: %s has only %s; name one: --as ADDRESS", r.LAN.Name, prefix)
		}
		a := prefix.Addr().As16()
		copy(a[8:], interfaceID(r.mac))
		return []netip.Addr{netip.AddrFrom16(a)}, nil
	}
	own := r.Network.OwnAddresses()
	var all []netip.Addr
	for a := last(prefix).Prev(); prefix.Contains(a) && a != prefix.Addr() && len(all) < candidates; a = a.Prev() {
		if a != r.router && !slices.Contains(own, a) {
			all = append(all, a)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("looking for a free address: there is none in %s", prefix)
	}
	return all, nil
}

// last is an IPv4 subnet's broadcast address.
func last(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(a)
}

func interfaceID(m netstate.MAC) []byte {
	return []byte{m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]}
}
