package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"sidegate/appliance/policy"
)

// direct sends flows out of this box itself, by its own routes.
type direct struct {
	options Options
	dialer  *net.Dialer
}

func (d *direct) Name() string { return policy.OutboundDirect }

func (d *direct) Upstream() (string, uint16, bool) { return "", 0, false }

func (d *direct) DialTCP(ctx context.Context, to Destination) (net.Conn, error) {
	if !to.Addr.Addr().IsValid() || to.Addr.Port() == 0 {
		return nil, fmt.Errorf("dialing %s directly: %w", to, errors.New("an address and a port are needed"))
	}
	ctx, cancel := context.WithTimeout(ctx, d.options.timeout())
	defer cancel()
	dialer := d.dialer
	if to.Mark != 0 {
		marked := *d.dialer
		marked.Control = d.options.marking(to.Mark)
		dialer = &marked
	}
	c, err := dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, unmap(to.Addr))
	if err != nil {
		return nil, fmt.Errorf("dialing %s directly: %w", to.Addr, bare(err))
	}
	return c, nil
}

// AssociateUDP opens one dual-stack socket: a client's mapping then is one port towards IPv4 and IPv6
// alike, and the relay has one descriptor to wait for. On a box without IPv6 it is an IPv4 socket;
// PutName and GetName hide the difference.
func (d *direct) AssociateUDP(ctx context.Context) (*Association, error) {
	config := net.ListenConfig{Control: udpControl(d.options)}
	c, err := config.ListenPacket(ctx, "udp", ":0")
	if err != nil {
		return nil, fmt.Errorf("opening a direct udp socket: %w", bare(err))
	}
	a, err := newAssociation(c.(*net.UDPConn))
	if err != nil {
		return nil, fmt.Errorf("opening a direct udp socket: %w", err)
	}
	return a, nil
}

// block refuses everything.
type block struct{}

func (block) Name() string                     { return policy.OutboundBlock }
func (block) Upstream() (string, uint16, bool) { return "", 0, false }

func (block) DialTCP(_ context.Context, to Destination) (net.Conn, error) {
	return nil, fmt.Errorf("dialing %s: %w", to, ErrBlocked)
}

func (block) AssociateUDP(context.Context) (*Association, error) { return nil, ErrBlocked }
