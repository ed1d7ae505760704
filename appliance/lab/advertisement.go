package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Autoconfigure makes the host one that has its IPv6 address and routers from advertisements, as clients do, instead of
// those that the lab gave it, and returns when it has an address. Addr6 is that one afterwards: call it before others
// use the host.
func (h *Host) Autoconfigure(ctx context.Context) error {
	i := &h.interfaces[0]
	low := linkLocal(i.MAC).As16()
	full := i.Addr6.Masked().Addr().As16()
	copy(full[8:], low[8:])
	name := "net.ipv6.conf." + i.Name
	if err := h.setAll(name+".accept_ra=1", name+".autoconf=1", name+".router_solicitations=3", name+".router_solicitation_delay=0"); err != nil {
		return err
	}
	for _, args := range []string{
		"-6 route delete default", "-6 address delete " + i.Addr6.String() + " dev " + i.Name,
		"link set " + i.Name + " down", "link set " + i.Name + " up", // upon which the kernel asks for routers
	} {
		if _, err := h.Exec(ctx, "ip", strings.Fields(args)...); err != nil {
			return err
		}
	}
	// IPv4's went with the link.
	v4, _ := i.segment.addresses(2)
	if _, err := h.Exec(ctx, "ip", "route", "add", "default", "via", v4.Addr().String()); err != nil {
		return err
	}
	i.Addr6 = netip.PrefixFrom(netip.AddrFrom16(full), 64)
	return Wait(ctx, h.name+" to number itself", func() error {
		out, err := h.Exec(ctx, "ip", "-6", "address", "show", "dev", i.Name, "to", i.Addr6.Addr().String())
		if err == nil && out == "" {
			err = fmt.Errorf("it has no %s", i.Addr6.Addr())
		}
		return err
	})
}

// RouteTo is the gateway by which the kernel would send a packet now.
func (h *Host) RouteTo(ctx context.Context, destination netip.Addr) (netip.Addr, error) {
	out, err := h.Exec(ctx, "ip", "-j", "route", "get", destination.String())
	if err != nil {
		return netip.Addr{}, err
	}
	var routes []struct{ Gateway netip.Addr }
	if err := json.Unmarshal([]byte(out), &routes); err != nil {
		return netip.Addr{}, err
	}
	if len(routes) != 1 {
		return netip.Addr{}, errors.New(out)
	}
	return routes[0].Gateway, nil
}

// LinkLocal is the address by which others know the interface as a router.
func (i Interface) LinkLocal() netip.Addr { return linkLocal(i.MAC) }
