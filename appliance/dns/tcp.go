package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

const (
	// tcpIdle is how long a connection may be silent (RFC 7766 section 6.2.3 asks for seconds).
	tcpIdle = 10 * time.Second
	// tcpWrite bounds sending an answer to a client that does not read.
	tcpWrite = 5 * time.Second
	// tcpPipeline is how many queries of a connection are answered at once. Meanwhile no more are read.
	tcpPipeline = 16
	// maxQuery bounds what a connection can make us keep. Queries with every usual option have a tenth of it.
	maxQuery = 4096
	// maxConnections bounds the connections of all clients together.
	maxConnections = 512
	// acceptPause is how long to wait after accept failed, mostly for want of descriptors.
	acceptPause = 50 * time.Millisecond
)

// tcp answers queries on connections, several on each, in whatever order the answers come (RFC 7766).
type tcp struct {
	server    *Server
	listeners []*net.TCPListener // IPv4, then IPv6 where the box has it

	mu      sync.Mutex
	devices map[device]int // connections
	open    map[*net.TCPConn]bool
}

func listenTCP(s *Server) (_ *tcp, err error) {
	t := &tcp{server: s, devices: make(map[device]int), open: make(map[*net.TCPConn]bool)}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	for _, f := range families {
		l, err := t.listen(&f)
		if f.missing(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		t.listeners = append(t.listeners, l)
	}
	return t, nil
}

func (t *tcp) listen(f *family) (*net.TCPListener, error) {
	config := net.ListenConfig{
		Control: func(_, _ string, c syscall.RawConn) error {
			var failed error
			err := c.Control(func(fd uintptr) { failed = f.setTransparent(int(fd), t.server.options.Mark) })
			return errors.Join(err, failed)
		},
	}
	config.SetMultipathTCP(false) // a sockmap takes no MPTCP listener
	l, err := config.Listen(context.Background(), "tcp"+f.suffix, netip.AddrPortFrom(f.loopback, 0).String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func (t *tcp) sockets() (v4, v6 syscall.Conn) {
	v4 = t.listeners[0]
	if len(t.listeners) > 1 {
		v6 = t.listeners[1]
	}
	return v4, v6
}

func (t *tcp) close() {
	for _, l := range t.listeners {
		l.Close()
	}
}

// serve answers until ctx ends, and returns when every connection is closed.
func (t *tcp) serve(ctx context.Context) error {
	failed := make(chan error, len(t.listeners))
	var accepting, serving sync.WaitGroup
	for _, l := range t.listeners {
		accepting.Go(func() {
			if err := t.accept(ctx, l, &serving); err != nil {
				failed <- err
			}
		})
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	t.close()
	accepting.Wait()
	t.mu.Lock()
	for c := range t.open {
		c.Close()
	}
	t.mu.Unlock()
	serving.Wait()
	return err
}

func (t *tcp) accept(ctx context.Context, l *net.TCPListener, serving *sync.WaitGroup) error {
	for {
		c, err := l.AcceptTCP()
		switch {
		case err == nil:
			client := addressOf(c.RemoteAddr())
			from := t.server.clients.device(client.Addr())
			if reason := t.admit(c, client.Addr(), from); reason != 0 {
				t.server.counters.drop(reason, 1)
				c.SetLinger(0)
				c.Close()
				continue
			}
			serving.Go(func() {
				defer t.released(c, from)
				t.converse(ctx, c, client.Addr())
			})
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accepting on %s: %w", l.Addr(), err)
		default:
			t.server.counters.drop(Overloaded, 1)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
		}
	}
}

// admit counts a connection until released. One to our own listener was opened by somebody on this box: a
// transparent socket's local address is where the client wanted to go.
func (t *tcp) admit(c *net.TCPConn, client netip.Addr, from device) Reason {
	for _, l := range t.listeners {
		if addressOf(c.LocalAddr()) == addressOf(l.Addr()) {
			return NotAllowed
		}
	}
	if !t.server.options.Allow(client) {
		return NotAllowed
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.devices[from] >= t.server.options.Limits.Connections:
		return ClientLimit
	case len(t.open) >= maxConnections:
		return Overloaded
	}
	t.devices[from]++
	t.open[c] = true
	t.server.counters.connections.Add(1)
	return 0
}

func (t *tcp) released(c *net.TCPConn, from device) {
	c.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.devices[from]--; t.devices[from] == 0 {
		delete(t.devices, from)
	}
	delete(t.open, c)
	t.server.counters.connections.Add(-1)
}

// converse answers the queries of one connection until the client is silent or gone.
func (t *tcp) converse(ctx context.Context, c *net.TCPConn, client netip.Addr) {
	var answering sync.WaitGroup
	defer answering.Wait()
	var writing sync.Mutex
	slots := make(chan struct{}, tcpPipeline)
	for {
		c.SetReadDeadline(time.Now().Add(tcpIdle))
		packet, err := readFrame(c)
		if err != nil {
			return // what is being answered may still be wanted: the client may have closed its half only
		}
		t.server.counters.queries.Add(1)
		slots <- struct{}{}
		answering.Go(func() {
			defer func() { <-slots }()
			answer := t.server.respond(ctx, arrival{packet: packet, client: client.As16(), limit: wholeFrame})
			if len(answer) == 0 {
				return
			}
			writing.Lock()
			defer writing.Unlock()
			c.SetWriteDeadline(time.Now().Add(tcpWrite))
			if _, err := c.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(answer)), uint16(len(answer))), answer...)); err != nil {
				c.Close() // half a frame is on the wire, or will be
			}
		})
	}
}

// wholeFrame is the limit of an answer by TCP.
func wholeFrame(*query) int { return maxMessage }

func readFrame(c io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, fmt.Errorf("reading a query's length: %w", err)
	}
	size := binary.BigEndian.Uint16(length[:])
	if size > maxQuery {
		return nil, fmt.Errorf("reading a query of %d bytes: there is none of more than %d", size, maxQuery)
	}
	packet := make([]byte, size)
	if _, err := io.ReadFull(c, packet); err != nil {
		return nil, fmt.Errorf("reading a query: %w", err)
	}
	return packet, nil
}

func addressOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
