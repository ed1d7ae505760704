package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/mdlayher/ndp"

	"sidegate/appliance/netstate"
)

// leases asks the LAN's DHCP server what it would give a client that it does not know. Nothing is taken: an offer that is not
// requested lapses (RFC 2131 section 4.3.1).
func leases(ctx context.Context, b *Box, link netstate.Link) ([]Finding, error) {
	own := b.Network.AddressesOf(link.Index)
	if !link.Ethernet || !slices.ContainsFunc(own, func(a netstate.Address) bool { return a.Prefix.Addr().Is4() }) {
		return nil, nil
	}
	stranger := link.MAC
	stranger[0] |= 2 // locally administered
	stranger[1] ^= 0xd0
	client, err := nclient4.New(link.Name, nclient4.WithTimeout(listenFor/2), nclient4.WithRetry(2), nclient4.WithHWAddr(stranger[:]))
	if err != nil {
		return nil, fmt.Errorf("opening a DHCP client: %w", err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, listenFor)
	defer cancel()
	offer, err := client.DiscoverOffer(ctx, dhcpv4.WithBroadcast(true))
	if errors.Is(err, nclient4.ErrNoResponse) || errors.Is(err, context.DeadlineExceeded) {
		return nil, nil // there is no such server
	}
	if err != nil {
		return nil, fmt.Errorf("asking the DHCP server: %w", err)
	}
	var found []Finding
	isOwn := func(ip net.IP) bool {
		return slices.ContainsFunc(own, func(a netstate.Address) bool {
			return a.Prefix.Addr().AsSlice() != nil && ip.Equal(a.Prefix.Addr().AsSlice())
		})
	}
	server := "the DHCP server " + offer.ServerIdentifier().String()
	if gateways := offer.Router(); len(gateways) > 0 && !slices.ContainsFunc(gateways, isOwn) {
		found = append(found, Finding{
			Severity: Note, Object: link.Name, Seen: server + " gives clients the gateway " + join(gateways),
			Why: "clients that are not configured by hand go past this box",
			Fix: "to decide for all clients, make the DHCP server give this box's address as gateway (option 3)",
		})
		return found, nil
	}
	if !b.DNS {
		return found, nil
	}
	for _, ip := range offer.DNS() {
		address, _ := netip.AddrFromSlice(ip.To4())
		near := slices.ContainsFunc(own, func(a netstate.Address) bool { return a.Prefix.Masked().Contains(address) })
		if near && !isOwn(ip) {
			found = append(found, Finding{
				Severity: Warning, Object: link.Name, Seen: server + " gives clients the DNS server " + ip.String() + ", which is in their own subnet",
				Why: "clients ask it past this box, so names are not learned, and rules on names do not hold",
				Fix: "make the DHCP server give this box's address as DNS server (option 6), or any address beyond the LAN",
			})
		}
	}
	return found, nil
}

func join(all []net.IP) string {
	texts := make([]string, len(all))
	for i, ip := range all {
		texts[i] = ip.String()
	}
	return strings.Join(texts, ", ")
}

// advertisements asks for routers that announce themselves by IPv6 (RFC 4861 section 6.3.7).
func advertisements(ctx context.Context, b *Box, link netstate.Link) ([]Finding, error) {
	if b.Advertises || !link.Ethernet {
		return nil, nil
	}
	conn, err := listenNDP(link)
	if err != nil || conn == nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, listenFor)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()
	end := repeat(ctx, func() error {
		return conn.WriteTo(&ndp.RouterSolicitation{
			Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: link.MAC[:]}},
		}, nil, netip.MustParseAddr("ff02::2"))
	})
	for {
		message, _, from, err := conn.ReadFrom()
		if fatal := net.Error(nil); errors.As(err, &fatal) {
			return nil, errors.Join(unlessTimeout(err), end())
		}
		if err != nil {
			continue // somebody's malformed message
		}
		advertisement, ok := message.(*ndp.RouterAdvertisement)
		own := slices.Contains(b.Network.OwnAddresses(), from.WithZone(""))
		if !ok || advertisement.RouterLifetime == 0 || own {
			continue
		}
		return []Finding{{
			Severity: Warning, Object: link.Name, Seen: from.WithZone("").String() + " advertises itself as IPv6 router",
			Why: "clients' IPv6 goes past this box: what is to be proxied or blocked is not",
			Fix: "switch router advertisements off in the router",
		}}, end()
	}
}
