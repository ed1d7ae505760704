package exchange

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"syscall"
)

// Dialer opens sockets towards an upstream: from this box, or through a proxy. Both methods return
// soon after the context ends.
type Dialer interface {
	// Stream connects by TCP.
	Stream(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	// Packets opens a UDP socket that is used with one remote only, and gives WriteTo nothing else. Its
	// datagrams come from a port that nobody can guess, another one each time.
	Packets(ctx context.Context, to netip.AddrPort) (net.PacketConn, error)
}

// Direct dials from this box itself. The UDP sockets are connected: the kernel chooses a random port
// and drops what comes from anybody else. Control is called for each socket before it is connected,
// to mark it; it may be nil.
func Direct(control func(network, address string, c syscall.RawConn) error) Dialer {
	d := &direct{net.Dialer{Control: control}}
	d.SetMultipathTCP(false) // it gains nothing on one path
	return d
}

type direct struct{ net.Dialer }

func (d *direct) Stream(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return d.DialContext(ctx, "tcp", to.String())
}

func (d *direct) Packets(ctx context.Context, to netip.AddrPort) (net.PacketConn, error) {
	c, err := d.DialContext(ctx, "udp", to.String())
	if err != nil {
		return nil, err
	}
	return connected{c.(*net.UDPConn)}, nil
}

// connected is a connected socket that lets WriteTo name the peer, which *net.UDPConn refuses.
type connected struct{ *net.UDPConn }

func (c connected) WriteTo(b []byte, _ net.Addr) (int, error) { return c.Write(b) }

// aimed makes a net.Conn of a net.PacketConn, for who wants to name the remote once.
type aimed struct {
	net.PacketConn
	to net.Addr
}

func (a aimed) Write(b []byte) (int, error) { return a.WriteTo(b, a.to) }
func (a aimed) RemoteAddr() net.Addr        { return a.to }

func (a aimed) Read(b []byte) (int, error) {
	for {
		n, from, err := a.ReadFrom(b)
		if err != nil || sameAddress(from, a.to) {
			return n, err
		}
	}
}

// sameAddress compares UDP addresses, IPv4-mapped ones as IPv4, and without zones, which have several
// spellings.
func sameAddress(a, b net.Addr) bool {
	x, ok := a.(*net.UDPAddr)
	y, same := b.(*net.UDPAddr)
	return ok && same && x.Port == y.Port && x.IP.Equal(y.IP)
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func hostPort(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// bare strips the "dial tcp 10.0.0.1:53->…" that the net package puts around a cause: the message
// around ours names the parties already.
func bare(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err
	}
	return err
}
