package exchange

import (
	"context"
	"crypto/tls"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// h3 is a session over HTTP/3.
type h3 struct {
	conn   *quicConn
	client *http3.ClientConn
	url    string
}

func openH3(e *endpoint, secure *tls.Config, url string) func(context.Context) (session, error) {
	t := &http3.Transport{DisableCompression: true, MaxResponseHeaderBytes: maxHeader}
	// A server opens three streams for itself, and some that mean nothing (RFC 9114 section 6.2).
	config := quicConfig(16)
	return func(ctx context.Context) (session, error) {
		c, err := dialQUIC(ctx, e, secure, config)
		if err != nil {
			return nil, err
		}
		return &h3{c, t.NewClientConn(c.Conn), url}, nil
	}
}

func (s *h3) dead() <-chan struct{} { return s.conn.dead() }
func (s *h3) close()                { s.conn.close(quic.ApplicationErrorCode(http3.ErrCodeNoError)) }

func (s *h3) ask(ctx context.Context, q *question) (reply, error) {
	return post(ctx, s.client, s.url, q)
}
