package exchange

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// maxUnanswered questions on a stream mean that its server has stopped answering, though it may
	// still read.
	maxUnanswered = 1024
	// writeTimeout is how long the server may leave a question in its own buffers and ours.
	writeTimeout = time.Second
)

// openStream connects to one of the endpoint's addresses, with TLS if there is a configuration for it.
func openStream(e *endpoint, secure *tls.Config) func(context.Context) (session, error) {
	return func(ctx context.Context) (session, error) {
		c, err := reach(ctx, e, func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			return dialStream(ctx, e.dialer, to, secure)
		}, func(c net.Conn) { c.Close() })
		if err != nil {
			return nil, err
		}
		return newStream(c), nil
	}
}

func dialStream(ctx context.Context, d Dialer, to netip.AddrPort, secure *tls.Config) (net.Conn, error) {
	c, err := d.Stream(ctx, to)
	if err != nil || secure == nil {
		return c, err
	}
	s := tls.Client(c, secure)
	if err := s.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("tls handshake: %w", bare(err))
	}
	return s, nil
}

// stream is a session over TCP or TLS: messages with their length before them, pipelined, answers in
// any order (RFC 7766 section 6.2.1).
type stream struct {
	conn    net.Conn
	writing chan struct{} // holds a token while nobody writes: a lock that a context can give up on
	ended   chan struct{}
	err     error // why it ended; to be read after that

	mu      sync.Mutex
	waiting map[uint16]chan []byte // by id; nil where who asked went away, so that the id is not used again
}

func newStream(c net.Conn) *stream {
	s := &stream{conn: c, writing: make(chan struct{}, 1), ended: make(chan struct{}), waiting: make(map[uint16]chan []byte)}
	s.writing <- struct{}{}
	go s.read()
	return s
}

func (s *stream) dead() <-chan struct{} { return s.ended }

func (s *stream) close() {
	s.conn.Close()
	<-s.ended
}

func (s *stream) ask(ctx context.Context, q *question) (reply, error) {
	id, answer, err := s.expect()
	if err != nil {
		return reply{}, err
	}
	if err := s.write(ctx, q.packet(2, id)); err != nil {
		s.mu.Lock()
		delete(s.waiting, id) // it was not sent whole: nobody will answer
		s.mu.Unlock()
		return reply{}, err
	}
	select {
	case wire := <-answer:
		return q.read(wire, id)
	case <-ctx.Done():
		s.forget(id)
		return reply{}, ctx.Err()
	case <-s.ended:
		select {
		case wire := <-answer: // it came before the end
			return q.read(wire, id)
		default:
			return reply{}, s.err
		}
	}
}

// expect chooses an id that nobody waits for.
func (s *stream) expect() (uint16, chan []byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) >= maxUnanswered {
		return 0, nil, fmt.Errorf("the server left %d questions unanswered", len(s.waiting))
	}
	for {
		id := randomID()
		if _, taken := s.waiting[id]; !taken {
			answer := make(chan []byte, 1)
			s.waiting[id] = answer
			return id, answer, nil
		}
	}
}

// forget keeps the id from being used again until its answer came, which is for nobody.
func (s *stream) forget(id uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting[id] != nil {
		s.waiting[id] = nil
	}
}

// write sends a message whose first two bytes are free for its length. Half a message cannot be taken
// back: a failure is the end of the stream.
func (s *stream) write(ctx context.Context, message []byte) error {
	binary.BigEndian.PutUint16(message, uint16(len(message)-2))
	select {
	case <-s.writing:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ended:
		return s.err
	}
	defer func() { s.writing <- struct{}{} }()
	s.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := s.conn.Write(message); err != nil {
		s.conn.Close()
		return fmt.Errorf("sending the question: %w", bare(err))
	}
	return nil
}

// read gives answers to those who wait for them, until the stream ends.
func (s *stream) read() {
	defer close(s.ended)
	defer s.conn.Close()
	r := bufio.NewReader(s.conn)
	for {
		wire, err := readMessage(r)
		if err != nil {
			s.err = fmt.Errorf("the server closed the connection: %w", bare(err))
			return
		}
		if len(wire) < headerSize {
			s.err = errors.New("the server sent what is no dns message")
			return
		}
		s.mu.Lock()
		id := binary.BigEndian.Uint16(wire)
		if answer := s.waiting[id]; answer != nil {
			answer <- wire
		}
		delete(s.waiting, id)
		s.mu.Unlock()
	}
}

// readMessage reads a message with its length before it (RFC 1035 section 4.2.2).
func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	wire := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(r, wire); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return wire, nil
}
