package lab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OwnPrefix makes all addresses of a prefix the host's own, which is one of the internet: a server that listens on all
// of the host's addresses then answers at 100,000. The router learns the way; the addresses are not on any interface.
func (h *Host) OwnPrefix(prefix netip.Prefix) error {
	prefix = prefix.Masked()
	destination := &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
	err := h.Do(func() error {
		loopback, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{
			Dst: destination, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
			LinkIndex: loopback.Attrs().Index,
		})
	})
	if err != nil {
		return fmt.Errorf("giving %s to %s: %w", prefix, h.name, err)
	}
	via := h.Addr4()
	if prefix.Addr().Is6() {
		via = h.Addr6()
	}
	router := h.lab.Host(Router)
	err = router.Do(func() error {
		return netlink.RouteReplace(&netlink.Route{Dst: destination, Gw: via.AsSlice()})
	})
	if err != nil {
		return fmt.Errorf("telling the router that %s is at %s: %w", prefix, h.name, err)
	}
	return nil
}
