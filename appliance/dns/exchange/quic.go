package exchange

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"

	"github.com/quic-go/quic-go"
)

// quicConfig has small packets, which no detour makes too large, and streams that the server may open:
// those of HTTP/3 for itself, none in DoQ.
func quicConfig(theirs int64) *quic.Config {
	return &quic.Config{
		MaxIdleTimeout:          idle,
		MaxIncomingStreams:      -1,
		MaxIncomingUniStreams:   theirs,
		InitialPacketSize:       1200,
		DisablePathMTUDiscovery: true,
	}
}

// quicConn is a QUIC connection with all that is under it.
type quicConn struct {
	*quic.Conn
	transport *quic.Transport
	packets   net.PacketConn
}

// dialQUIC connects to one of the endpoint's addresses, without 0-RTT, which could be replayed.
func dialQUIC(ctx context.Context, e *endpoint, secure *tls.Config, config *quic.Config) (*quicConn, error) {
	return reach(ctx, e, func(ctx context.Context, to netip.AddrPort) (*quicConn, error) {
		packets, err := e.dialer.Packets(ctx, to)
		if err != nil {
			return nil, err
		}
		c := &quicConn{transport: &quic.Transport{Conn: modest{packets}}, packets: packets}
		c.Conn, err = c.transport.Dial(ctx, net.UDPAddrFromAddrPort(to), secure, config)
		if err != nil {
			c.transport.Close()
			packets.Close()
			return nil, ended(ctx, err)
		}
		return c, nil
	}, func(c *quicConn) { c.close(0) })
}

func (c *quicConn) dead() <-chan struct{} { return c.Context().Done() }

func (c *quicConn) close(code quic.ApplicationErrorCode) {
	c.CloseWithError(code, "")
	c.transport.Close()
	c.packets.Close()
}

// modest hides what a socket can do beyond datagrams, which not every Dialer's can, and its buffers:
// quic-go would make them megabytes, for a few questions, and complain where it cannot.
type modest struct{ net.PacketConn }

func (modest) SetReadBuffer(int) error  { return nil }
func (modest) SetWriteBuffer(int) error { return nil }
