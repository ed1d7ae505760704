package outbound

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
)

// Numbers of RFC 1928 and RFC 1929.
const (
	socksVersion     = 5
	authVersion      = 1
	methodNone       = 0x00
	methodPassword   = 0x02
	methodUnaccepted = 0xff
	commandConnect   = 1
	commandAssociate = 3
	addressIPv4      = 1
	addressName      = 3
	addressIPv6      = 4
)

// socksReplies are the answers that mean no (RFC 1928 section 6), with the errno that an own
// connection to the destination would have met.
var socksReplies = [...]refusal{
	1: {"general socks server failure (1)", nil},
	2: {"connection not allowed by ruleset (2)", nil},
	3: {"network unreachable (3)", syscall.ENETUNREACH},
	4: {"host unreachable (4)", syscall.EHOSTUNREACH},
	5: {"connection refused by the destination (5)", syscall.ECONNREFUSED},
	6: {"ttl expired (6)", nil},
	7: {"command not supported (7)", nil},
	8: {"address type not supported (8)", nil},
}

// socks5 carries TCP by CONNECT and UDP by UDP ASSOCIATE.
type socks5 struct {
	upstream
	credentials func() Credentials // nil: none. A function, because no format verb prints what it would return
}

func (s *socks5) DialTCP(ctx context.Context, to Destination) (net.Conn, error) {
	c, err := s.connect(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("dialing %s through %q: %w", to, s.outbound, err)
	}
	return c, nil
}

func (s *socks5) AssociateUDP(ctx context.Context) (*Association, error) {
	a, err := s.associate(ctx)
	if err != nil {
		return nil, fmt.Errorf("associating udp through %q: %w", s.outbound, err)
	}
	return a, nil
}

func (s *socks5) connect(ctx context.Context, to Destination) (*net.TCPConn, error) {
	to, err := to.wire()
	if err != nil {
		return nil, err
	}
	return s.open(ctx, func(_ context.Context, c *net.TCPConn) error {
		_, err := s.handshake(c, commandConnect, appendDestination(nil, to))
		return err
	})
}

// associate opens the control connection, asks for a relay, and connects a socket to it.
func (s *socks5) associate(ctx context.Context) (*Association, error) {
	var relay netip.AddrPort
	control, err := s.open(ctx, func(_ context.Context, c *net.TCPConn) (err error) {
		// Where our datagrams will come from is not known yet; RFC 1928 section 6 has zeros for that,
		// in the family that the server sees us in.
		from := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		if local(c).Addr().Is6() {
			from = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
		}
		relay, err = s.handshake(c, commandAssociate, appendAddress(nil, from))
		if err != nil {
			return err
		}
		relay, err = relayAddress(relay, remote(c))
		return err
	})
	if err != nil {
		return nil, err
	}
	a, err := connectRelay(ctx, *s.dialer, s.options, local(control), relay)
	if err != nil {
		control.Close()
		return nil, fmt.Errorf("%s named a udp relay that cannot be used: %w", &s.upstream, err)
	}
	a.follow(control)
	return a, nil
}

// relayAddress is where to send datagrams, given what the server answered and where the server is.
func relayAddress(answer, server netip.AddrPort) (netip.AddrPort, error) {
	address := answer.Addr()
	switch {
	case !address.IsValid():
		return netip.AddrPort{}, errors.New("named its udp relay by a domain: only an address is supported")
	case answer.Port() == 0:
		return netip.AddrPort{}, errors.New("named no port for its udp relay")
	case address.IsUnspecified():
		address = server.Addr()
	case address.IsMulticast(), address == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.AddrPort{}, fmt.Errorf("named %s as its udp relay, which is not the address of a server", address)
	case address.IsLinkLocalUnicast() && address.Is6():
		address = address.WithZone(server.Addr().Zone())
	}
	return netip.AddrPortFrom(address, answer.Port()), nil
}

// handshake agrees on a method, authenticates where asked to, sends one request and returns the
// address in its reply, which is invalid when the server gave a domain. It reads exactly the bytes
// of the replies: what follows them belongs to the flow.
func (s *socks5) handshake(c io.ReadWriter, command byte, destination []byte) (netip.AddrPort, error) {
	var none netip.AddrPort
	if err := s.authenticate(c); err != nil {
		return none, err
	}
	if _, err := c.Write(append([]byte{socksVersion, command, 0}, destination...)); err != nil {
		return none, err
	}
	var reply [4]byte // version, reply, reserved, address type
	if _, err := io.ReadFull(c, reply[:]); err != nil {
		return none, err
	}
	if reply[0] != socksVersion {
		return none, fmt.Errorf("replied with socks version %d instead of 5", reply[0])
	}
	// A server that refuses need not send the rest.
	switch code := int(reply[1]); {
	case code >= len(socksReplies):
		return none, &refusal{fmt.Sprintf("unknown reply (%d)", code), nil}
	case code != 0:
		return none, &socksReplies[code]
	}
	return readAddress(c, reply[3])
}

// authenticate agrees on a method (RFC 1928 section 3) and sends the credentials (RFC 1929).
func (s *socks5) authenticate(c io.ReadWriter) error {
	hello := []byte{socksVersion, 1, methodNone}
	if s.credentials != nil {
		hello = []byte{socksVersion, 2, methodNone, methodPassword}
	}
	if _, err := c.Write(hello); err != nil {
		return err
	}
	var answer [2]byte // version, method
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return err
	}
	if answer[0] != socksVersion {
		return fmt.Errorf("replied with socks version %d instead of 5", answer[0])
	}
	switch method := answer[1]; {
	case method == methodNone:
		return nil
	case method == methodPassword && s.credentials != nil:
	case method == methodUnaccepted && s.credentials == nil:
		return &refusal{"it wants credentials and none are configured", nil}
	case method == methodUnaccepted:
		return &refusal{"it takes neither a username and password nor no authentication", nil}
	default:
		return fmt.Errorf("chose the authentication method %d, which was not offered", method)
	}

	login := s.credentials()
	request := append([]byte{authVersion, byte(len(login.Username))}, login.Username...)
	request = append(append(request, byte(len(login.Password))), login.Password...)
	if _, err := c.Write(request); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, answer[:]); err != nil { // version, status
		return err
	}
	if answer[0] != authVersion {
		return fmt.Errorf("replied with authentication version %d instead of 1", answer[0])
	}
	if answer[1] != 0 {
		return &refusal{"it did not accept the username and password", nil}
	}
	return nil
}

// readAddress reads the address and port of a reply. For a domain the result is invalid.
func readAddress(r io.Reader, kind byte) (netip.AddrPort, error) {
	var buffer [255 + 2]byte
	length := 0
	switch kind {
	case addressIPv4:
		length = 4
	case addressIPv6:
		length = 16
	case addressName:
		if _, err := io.ReadFull(r, buffer[:1]); err != nil {
			return netip.AddrPort{}, err
		}
		length = int(buffer[0])
	default:
		return netip.AddrPort{}, fmt.Errorf("replied with an address of unknown type %d", kind)
	}
	if _, err := io.ReadFull(r, buffer[:length+2]); err != nil {
		return netip.AddrPort{}, err
	}
	port := binary.BigEndian.Uint16(buffer[length:])
	if kind == addressName {
		return netip.AddrPortFrom(netip.Addr{}, port), nil
	}
	address, _ := netip.AddrFromSlice(buffer[:length])
	return netip.AddrPortFrom(address.Unmap(), port), nil
}

// appendDestination appends the type, address or name, and port of a request.
func appendDestination(b []byte, to Destination) []byte {
	if to.Name == "" {
		return appendAddress(b, to.Addr)
	}
	b = append(b, addressName, byte(len(to.Name)))
	b = append(b, to.Name...)
	return binary.BigEndian.AppendUint16(b, to.Addr.Port())
}

func appendAddress(b []byte, a netip.AddrPort) []byte {
	if address := a.Addr().Unmap(); address.Is4() {
		four := address.As4()
		b = append(append(b, addressIPv4), four[:]...)
	} else {
		sixteen := address.As16()
		b = append(append(b, addressIPv6), sixteen[:]...)
	}
	return binary.BigEndian.AppendUint16(b, a.Port())
}

func local(c net.Conn) netip.AddrPort  { return unmap(c.LocalAddr().(*net.TCPAddr).AddrPort()) }
func remote(c net.Conn) netip.AddrPort { return unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort()) }
