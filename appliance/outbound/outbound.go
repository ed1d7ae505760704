// Package outbound carries proxied flows to where the policy sends them: straight out ("direct"),
// nowhere ("block"), or through an upstream proxy: SOCKS5 (RFC 1928, RFC 1929) for TCP and UDP, and
// HTTP CONNECT (RFC 9110 section 9.3.6) over http and https for TCP.
//
// It is built for a relay that splices TCP and moves UDP by recvmmsg and sendmmsg: a connection is a
// plain TCP socket wherever the protocol allows, handshakes read not one byte beyond their end, and
// an Association is a descriptor with a prefix, not a net.PacketConn.
//
// Everything ends in bounded time: dialing, handshakes and the name look-ups before them have a
// deadline, and nothing outlives its Close.
package outbound

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// Outbound is one way out. Its methods may be called concurrently.
type Outbound interface {
	// Name is what the configuration calls it.
	Name() string
	// DialTCP connects to the destination and returns when bytes can flow. The connection is a
	// *net.TCPConn, except through an https proxy, where it is a *tls.Conn; both have CloseWrite. A
	// byte that the destination sent early is still there to be read. Errors name the outbound, the
	// upstream and the destination; one that the upstream answered with matches ErrRefused.
	DialTCP(ctx context.Context, to Destination) (net.Conn, error)
	// AssociateUDP opens one UDP mapping: datagrams to any destination, and back from anyone that the
	// upstream lets through. It returns ErrNoUDP where the protocol has no UDP. The context bounds
	// the opening only.
	AssociateUDP(ctx context.Context) (*Association, error)
	// Upstream is the proxy that this outbound talks to, which the policy must leave direct. Host is
	// an IP address or a DNS name; ok is false for direct and block, which have none.
	Upstream() (host string, port uint16, ok bool)
}

var (
	// ErrBlocked is the answer of the block outbound to everything.
	ErrBlocked = errors.New("blocked by policy")
	// ErrNoUDP says that the outbound's protocol carries no UDP. Such a flow is refused, never sent
	// another way.
	ErrNoUDP = errors.New("the outbound carries no udp")
	// ErrRefused marks an error that a working upstream answered with: the destination, or our
	// credentials, are at fault, and asking another upstream may help. An error without it means that
	// the upstream itself could not be reached or did not speak the protocol.
	ErrRefused = errors.New("refused by the upstream")
)

// refusal is an answer of the upstream that means no.
type refusal struct {
	reason string
	cause  error // the errno that says the same, or nil
}

func (r *refusal) Error() string        { return "refused: " + r.reason }
func (r *refusal) Is(target error) bool { return target == ErrRefused }
func (r *refusal) Unwrap() error        { return r.cause }

// Options are common to all outbounds. The zero value is usable.
type Options struct {
	// Control is called for each socket before it is bound or connected, those of name look-ups
	// included; the gateway sets its firewall mark here. May be nil.
	Control func(network, address string, c syscall.RawConn) error
	// Lookup finds the addresses of an upstream's host, best first; nil: as /etc/resolv.conf and /etc/hosts say.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	// DialTimeout bounds the look-up of the upstream's name and the TCP connection; 0 is 5 s.
	DialTimeout time.Duration
	// Timeout bounds the whole of DialTCP or AssociateUDP, DialTimeout included; 0 is 10 s.
	Timeout time.Duration
}
