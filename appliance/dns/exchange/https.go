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
	"golang.org/x/net/http2"
)

const (
	// mediaType of questions and answers (RFC 8484 section 6).
	mediaType = "application/dns-message"
	// maxHeader is what a server may say before its answer, in bytes.
	maxHeader = 16 << 10
)

// https is a session over HTTP/2.
type https struct {
	conn   *watched
	client *http2.ClientConn
	url    string
}

func openHTTPS(e *endpoint, secure *tls.Config, url string) func(context.Context) (session, error) {
	t := &http2.Transport{
		DisableCompression: true,
		MaxHeaderListSize:  maxHeader,
		WriteByteTimeout:   writeTimeout,
		// What is more than the server allows at a time waits, instead of failing.
		StrictMaxConcurrentStreams: true,
	}
	return func(ctx context.Context) (session, error) {
		return reach(ctx, e, func(ctx context.Context, to netip.AddrPort) (session, error) {
			c, err := dialStream(ctx, e.dialer, to, secure)
			if err != nil {
				return nil, err
			}
			s, err := secureHTTPS(ctx, t, c.(*tls.Conn), url)
			if err != nil {
				c.Close()
				return nil, err
			}
			return s, nil
		}, session.close)
	}
}

func secureHTTPS(ctx context.Context, t *http2.Transport, c *tls.Conn, url string) (session, error) {
	if c.ConnectionState().NegotiatedProtocol != "h2" {
		return nil, errors.New("the server does not speak HTTP/2")
	}
	// The client's preface is sent at once, and no context bounds it.
	deadline, _ := ctx.Deadline()
	c.SetWriteDeadline(deadline)
	w := &watched{Conn: c, ended: make(chan struct{})}
	client, err := t.NewClientConn(w)
	if err != nil {
		return nil, bare(err)
	}
	c.SetWriteDeadline(time.Time{})
	return &https{w, client, url}, nil
}

func (s *https) ask(ctx context.Context, q *question) (reply, error) {
	return post(ctx, s.client, s.url, q)
}

func (s *https) dead() <-chan struct{} { return s.conn.ended }

func (s *https) close() {
	s.client.Close()
	<-s.conn.ended
}

// watched says when reading from a connection ended. HTTP/2 always reads, and tells nobody.
type watched struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err != nil {
		w.once.Do(func() { close(w.ended) })
	}
	return n, err
}

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
