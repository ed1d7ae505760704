package outbound

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
)

// httpConnect carries TCP through an HTTP proxy by CONNECT (RFC 9110 section 9.3.6), in HTTP/1.1.
type httpConnect struct {
	upstream
	authorization func() string // the value of Proxy-Authorization (RFC 7617); nil: none. Hidden as in socks5
	secure        *tls.Config   // https proxies; nil for http
}

func (h *httpConnect) DialTCP(ctx context.Context, to Destination) (net.Conn, error) {
	c, err := h.dial(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("dialing %s through %q: %w", to, h.outbound, err)
	}
	return c, nil
}

func (h *httpConnect) AssociateUDP(context.Context) (*Association, error) {
	return nil, fmt.Errorf("associating udp through %q: %s: %w", h.outbound, &h.upstream, ErrNoUDP)
}

func (h *httpConnect) dial(ctx context.Context, to Destination) (net.Conn, error) {
	to, err := to.wire()
	if err != nil {
		return nil, err
	}
	var secured *tls.Conn
	plain, err := h.open(ctx, func(ctx context.Context, c *net.TCPConn) error {
		if h.secure == nil {
			return h.handshake(c, to)
		}
		secured = tls.Client(c, h.secure)
		if err := secured.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("failed the tls handshake: %w", bare(err))
		}
		return h.handshake(secured, to)
	})
	if err != nil {
		return nil, err
	}
	if secured != nil {
		return secured, nil
	}
	return plain, nil
}

func (h *httpConnect) handshake(c io.ReadWriter, to Destination) error {
	target := to.String()
	request := "CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n"
	if h.authorization != nil {
		request += "Proxy-Authorization: " + h.authorization() + "\r\n"
	}
	if _, err := io.WriteString(c, request+"\r\n"); err != nil {
		return err
	}
	status, err := readReply(c)
	if err != nil {
		return err
	}
	if status >= 200 && status < 300 {
		return nil
	}
	// The code's own text instead of the server's phrase, which could be anything, our request too.
	reason := fmt.Sprintf("%d %s", status, http.StatusText(status))
	if status == http.StatusProxyAuthRequired {
		if h.authorization == nil {
			reason += " (none is configured)"
		} else {
			reason += " (it did not accept the username and password)"
		}
	}
	return &refusal{strings.TrimSpace(reason), nil}
}

// basicAuthorization encodes credentials as RFC 7617 has it.
func basicAuthorization(c Credentials) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
}

// maxReply bounds what a proxy may say before the tunnel, interim replies included, in bytes.
const maxReply = 16 << 10

var errReplyTooLong = fmt.Errorf("sent a reply header of more than %d bytes", maxReply)

// readReply reads the proxy's final reply and returns its status code. For a success (2xx) it consumes
// exactly the header: the next byte on r is the tunnel's first, whatever Content-Length or
// Transfer-Encoding say (RFC 9110 section 9.3.6). Interim replies (1xx) are passed over. For any other
// status it stops after the first line.
func readReply(r io.Reader) (status int, err error) {
	budget := maxReply
	for {
		line, err := readLine(r, &budget)
		if err != nil {
			return 0, err
		}
		status, ok := parseStatus(line)
		if !ok {
			return 0, errors.New("did not answer in HTTP/1.x")
		}
		if status >= 300 || status == http.StatusSwitchingProtocols {
			return status, nil
		}
		for line != "" {
			if line, err = readLine(r, &budget); err != nil {
				return 0, err
			}
		}
		if status >= 200 {
			return status, nil
		}
	}
}

// readLine reads up to a line feed and returns what stands before it, less a carriage return. It asks
// for one byte at a time: nothing can be given back to a socket, and the few dozen small reads cost
// far less than the round trip that they end.
func readLine(r io.Reader, budget *int) (string, error) {
	var line []byte
	var b [1]byte
	for {
		if *budget == 0 {
			return "", errReplyTooLong
		}
		*budget--
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return strings.TrimSuffix(string(line), "\r"), nil
		}
		line = append(line, b[0])
	}
}

// parseStatus reads `HTTP/1.1 200 Connection established`; the phrase may be missing.
func parseStatus(line string) (status int, ok bool) {
	rest, ok := strings.CutPrefix(line, "HTTP/1.")
	if !ok || len(rest) < 5 || rest[0] < '0' || rest[0] > '9' || rest[1] != ' ' || len(rest) > 5 && rest[5] != ' ' {
		return 0, false
	}
	for _, digit := range []byte(rest[2:5]) {
		if digit < '0' || digit > '9' {
			return 0, false
		}
		status = status*10 + int(digit-'0')
	}
	return status, status >= 100
}
