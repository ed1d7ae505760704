package exchange

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/quic-go/quic-go"
)

// Error codes of RFC 9250 section 4.3.
const (
	doqNoError          = 0x0
	doqRequestCancelled = 0x3
)

// doq is a session over QUIC: one stream for each question (RFC 9250).
type doq struct{ conn *quicConn }

func openDoQ(e *endpoint, secure *tls.Config) func(context.Context) (session, error) {
	config := quicConfig(-1)
	return func(ctx context.Context) (session, error) {
		c, err := dialQUIC(ctx, e, secure, config)
		if err != nil {
			return nil, err
		}
		return &doq{c}, nil
	}
}

func (s *doq) dead() <-chan struct{} { return s.conn.dead() }
func (s *doq) close()                { s.conn.close(doqNoError) }

func (s *doq) ask(ctx context.Context, q *question) (reply, error) {
	stream, err := s.conn.OpenStreamSync(ctx)
	if err != nil {
		return reply{}, ended(ctx, err)
	}
	// Without effect on what has ended by then.
	defer stream.CancelRead(doqRequestCancelled)
	defer stream.CancelWrite(doqRequestCancelled)
	defer context.AfterFunc(ctx, func() {
		stream.CancelRead(doqRequestCancelled)
		stream.CancelWrite(doqRequestCancelled)
	})()

	message := q.packet(2, 0)
	binary.BigEndian.PutUint16(message, uint16(len(message)-2))
	if _, err = stream.Write(message); err == nil {
		err = stream.Close() // the end of the stream is the end of the question
	}
	var wire []byte
	if err == nil {
		wire, err = readMessage(stream)
	}
	var reset *quic.StreamError
	switch {
	case err == nil:
		return q.read(wire, 0)
	case ctx.Err() != nil:
		return reply{}, ctx.Err()
	case errors.As(err, &reset):
		return reply{}, &badAnswer{fmt.Sprintf("the server refused the question (code %d)", reset.ErrorCode)}
	}
	return reply{}, err
}
