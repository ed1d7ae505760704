package outbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultDialTimeout = 5 * time.Second
	defaultTimeout     = 10 * time.Second
)

// keepAlive finds a peer that vanished within two minutes, and costs an idle connection one packet a
// minute. A SOCKS5 association lives exactly as long as its silent control connection, so this is
// what ends one whose server is gone.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

func (o Options) dialTimeout() time.Duration {
	if o.DialTimeout > 0 {
		return o.DialTimeout
	}
	return defaultDialTimeout
}

func (o Options) timeout() time.Duration {
	if o.Timeout > 0 {
		return o.Timeout
	}
	return defaultTimeout
}

// dialer makes marked TCP connections. Names are looked up by Go's own resolver as /etc/resolv.conf
// and /etc/hosts say, because only there can its sockets be marked too: an unmarked query would be
// steered like any program's on this box, into the proxy that is waiting for its answer.
func (o Options) dialer() *net.Dialer {
	d := &net.Dialer{
		Timeout:         o.dialTimeout(),
		KeepAliveConfig: keepAlive,
		Control:         o.Control,
		Resolver: &net.Resolver{
			PreferGo: true,
			Dial:     o.dialNameserver,
		},
	}
	// An MPTCP socket cannot be spliced into a sockmap and gains nothing on one path.
	d.SetMultipathTCP(false)
	return d
}

// marking is Control, followed by more bits of the firewall mark.
func (o Options) marking(bits uint32) func(network, address string, c syscall.RawConn) error {
	return func(network, address string, c syscall.RawConn) error {
		if o.Control != nil {
			if err := o.Control(network, address, c); err != nil {
				return err
			}
		}
		var failed error
		err := c.Control(func(fd uintptr) { failed = addMark(int(fd), bits) })
		return errors.Join(err, failed)
	}
}

// addMark adds bits to a socket's firewall mark (SO_MARK in socket(7); it needs CAP_NET_ADMIN).
func addMark(fd int, bits uint32) error {
	if bits == 0 {
		return nil
	}
	mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark|int(bits))
	}
	if err != nil {
		return fmt.Errorf("marking the socket with %#x: %w", bits, err)
	}
	return nil
}

// dialNameserver opens the socket of one query. The resolver heeds its context only between queries:
// without the closing here, one to a silent nameserver would keep a goroutine and a descriptor for
// five seconds (or what resolv.conf says) after the caller has gone.
func (o Options) dialNameserver(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{Control: o.Control}
	c, err := d.DialContext(ctx, network, address)
	if err == nil {
		context.AfterFunc(ctx, func() { c.Close() })
	}
	return c, err
}

// upstream is the proxy server behind an outbound.
type upstream struct {
	outbound string // the outbound's name, for errors
	kind     string // what the server is, for errors: "socks5 server"
	host     string // IP address or DNS name
	port     uint16
	options  Options
	dialer   *net.Dialer // one for all: its resolver joins look-ups that coincide
}

func (u *upstream) Name() string { return u.outbound }

func (u *upstream) Upstream() (host string, port uint16, ok bool) { return u.host, u.port, true }

func (u *upstream) address() string { return hostPort(u.host, u.port) }

func (u *upstream) String() string { return u.kind + " " + u.address() }

// open connects to the upstream and has the handshake with it, all within the timeouts and the
// context: whatever talk waits for on the connection is interrupted when they end. The connection
// comes back without a deadline, or closed.
func (u *upstream) open(ctx context.Context, talk func(context.Context, *net.TCPConn) error) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, u.options.timeout())
	defer cancel()

	c, err := u.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s cannot be reached: %w", u, bare(err))
	}
	conn := c.(*net.TCPConn)

	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err = talk(ctx, conn)
	if !stop() {
		// The interruption has happened or is about to: the deadline on the connection is lost to us,
		// so even a handshake that just succeeded is given up.
		err = ctx.Err()
	}
	if err == nil {
		return conn, nil
	}
	conn.Close()

	var op *net.OpError
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("%s did not finish the handshake in time: %w", u, err)
	case errors.Is(err, context.Canceled):
		return nil, fmt.Errorf("%s: given up during the handshake: %w", u, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("%s closed the connection during the handshake: %w", u, io.ErrUnexpectedEOF)
	case errors.As(err, &op):
		return nil, fmt.Errorf("%s broke off the handshake: %w", u, op.Err)
	}
	return nil, fmt.Errorf("%s %w", u, err)
}

// bare strips the "dial tcp 10.0.0.1:1080->…" that the net package puts around a cause: the message
// around ours names the parties already.
func bare(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err
	}
	return err
}
