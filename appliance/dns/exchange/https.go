package exchange

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// mediaType of questions and answers (RFC 8484 section 6).
	mediaType = "application/dns-message"
	// maxHeader is what a server may say before its answer, in bytes.
	maxHeader = 16 << 10
)

// https is a session over HTTP/2.
type https struct {
	client *http.ClientConn
	url    string
	once   sync.Once
	ended  chan struct{}
}

func openHTTPS(e *endpoint, secure *tls.Config, url string) func(context.Context) (session, error) {
	return func(ctx context.Context) (session, error) {
		return reach(ctx, e, func(ctx context.Context, to netip.AddrPort) (session, error) {
			c, err := dialStream(ctx, e.dialer, to, secure)
			if err != nil {
				return nil, err
			}
			s, err := speakHTTP(ctx, c.(*tls.Conn), url)
			if err != nil {
				c.Close()
				return nil, err
			}
			return s, nil
		}, session.close)
	}
}

// speakHTTP makes a session of a connection.
func speakHTTP(ctx context.Context, c *tls.Conn, url string) (session, error) {
	if c.ConnectionState().NegotiatedProtocol != "h2" {
		return nil, errors.New("the server does not speak HTTP/2")
	}
	t := &http.Transport{
		DialTLSContext:         func(context.Context, string, string) (net.Conn, error) { return c, nil },
		Protocols:              new(http.Protocols),
		HTTP2:                  &http.HTTP2Config{WriteByteTimeout: writeTimeout},
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
	}
	t.Protocols.SetHTTP2(true)
	// Our side of the connection begins at once, and no context bounds that.
	deadline, _ := ctx.Deadline()
	c.SetWriteDeadline(deadline)
	client, err := t.NewClientConn(ctx, "https", c.RemoteAddr().String())
	if err != nil {
		return nil, bare(err)
	}
	c.SetWriteDeadline(time.Time{})
	s := &https{client: client, url: url, ended: make(chan struct{})}
	client.SetStateHook(s.watch)
	s.watch(client) // what happened before
	return s, nil
}

// watch is told of changes.
func (s *https) watch(client *http.ClientConn) {
	if client.Err() != nil {
		s.once.Do(func() { close(s.ended) })
	}
}

func (s *https) ask(ctx context.Context, q *question) (reply, error) {
	return post(ctx, s.client, s.url, q)
}

func (s *https) dead() <-chan struct{} { return s.ended }
func (s *https) close()                { s.client.Close() }

// post asks by HTTP, with the id 0 (RFC 8484 section 4.1). The method is POST: it puts no limit on the
// question's length and leaves nothing in the logs of URLs.
func post(ctx context.Context, client http.RoundTripper, url string, q *question) (reply, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(q.wire))
	if err != nil {
		return reply{}, err
	}
	request.Header = http.Header{"Content-Type": {mediaType}, "Accept": {mediaType}, "User-Agent": nil}
	response, err := client.RoundTrip(request)
	if err != nil {
		return reply{}, ended(ctx, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		// The code's own text instead of the server's, which could be anything.
		return reply{}, &badAnswer{fmt.Sprintf("the server answered %d %s", response.StatusCode, http.StatusText(response.StatusCode))}
	}
	if kind, _, err := mime.ParseMediaType(response.Header.Get("Content-Type")); err != nil || kind != mediaType {
		return reply{}, &badAnswer{"the server answered with something else than " + mediaType}
	}
	wire, err := io.ReadAll(io.LimitReader(response.Body, dns.MaxMsgSize+1))
	switch {
	case err != nil:
		return reply{}, ended(ctx, fmt.Errorf("reading the answer: %w", err))
	case len(wire) > dns.MaxMsgSize:
		return reply{}, &badAnswer{fmt.Sprintf("the answer is longer than %d bytes", dns.MaxMsgSize)}
	}
	return q.read(wire, 0)
}
