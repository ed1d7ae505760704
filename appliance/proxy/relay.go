package proxy

import (
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// relayLoop splices between pairs of TCP sockets. It has no timer, no buffer and no goroutine per
// connection: an idle one costs a few hundred bytes.
type relayLoop struct {
	*loop
	server     *Server
	message    [smallMessage]byte
	pipes      []pipe              // empty ones, ready for use
	halfClosed map[*relay]struct{} // one direction has ended
}

func newRelayLoop(l *loop, s *Server) *relayLoop {
	return &relayLoop{loop: l, server: s, halfClosed: make(map[*relay]struct{})}
}

// relay is one connection in a loop.
type relay struct {
	loop             *relayLoop
	connection       *connection
	client, upstream side
	active           int64 // when something last moved; kept only while half closed
	over             bool
}

// side is one of the two sockets, together with the stream that is read from it.
type side struct {
	relay *relay
	peer  *side
	registration

	// What was read and not written yet is in the pipe. A stream has a pipe only while its peer's
	// socket is full, which is also the only time when the side is not read.
	pipe    pipe
	pending int
	bulk    bool // what was read last was no small message
	done    bool // read to its end (FIN), and the peer told so

	total   *int64
	counter *direction
}

type pipe struct{ read, write int }

const (
	// chunk is how many bytes one event moves at most, so that a fast connection and a small one
	// share a loop fairly. It is also the size asked for pipes.
	chunk = 256 << 10
	// smallMessage is what is copied and not spliced, in bytes. The rest of one fits into any pipe: the
	// smallest that the kernel gives has two pages (pipe(7), pipe-user-pages-soft).
	smallMessage = 8 << 10
	// sparePipes is how many empty pipes a loop keeps.
	sparePipes = 16
)

// start takes over both sockets. After an error the caller still owns them.
func (l *relayLoop) start(c *connection, client, upstream *net.TCPConn) (err error) {
	r := &relay{loop: l, connection: c}
	r.client = side{relay: r, peer: &r.upstream, total: &c.up, counter: &c.traffic.up}
	r.upstream = side{relay: r, peer: &r.client, total: &c.down, counter: &c.traffic.down}

	// Descriptors of our own, which the runtime's poller does not watch.
	a, err := duplicate(client)
	if err != nil {
		return err
	}
	b, err := duplicate(upstream)
	if err != nil {
		unix.Close(a)
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.client.registration, err = l.add(a, unix.EPOLLIN, &r.client); err == nil {
		if r.upstream.registration, err = l.add(b, unix.EPOLLIN, &r.upstream); err == nil {
			client.Close()
			upstream.Close()
			r.resetOnClose()
			return nil
		}
		l.remove(&r.client.registration)
	}
	unix.Close(a)
	unix.Close(b)
	return err
}

// resetOnClose makes closing the sockets a reset, until end says otherwise. If this process dies, the kernel closes
// them, and the endpoints must not take what they have by then for the whole.
func (r *relay) resetOnClose() {
	for _, s := range [...]*side{&r.client, &r.upstream} {
		unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
}

func duplicate(c *net.TCPConn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var failed error
	err = raw.Control(func(old uintptr) { fd, failed = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err == nil {
		err = failed
	}
	if err != nil {
		return -1, fmt.Errorf("duplicating a socket: %w", err)
	}
	return fd, nil
}

// ready is called with the loop locked.
func (s *side) ready(events uint32) {
	r := s.relay
	const broken = unix.EPOLLHUP | unix.EPOLLERR
	failed := false
	if events&unix.EPOLLOUT != 0 && s.peer.pending > 0 {
		failed = s.peer.move() != nil
	}
	if !failed && events&(unix.EPOLLIN|broken) != 0 {
		switch {
		case s.done:
			failed = events&broken != 0 // nothing more can be read, so this is a reset
		case s.pending > 0:
			// It can be read only after the peer has taken what is pending. Until then epoll would
			// report the same again and again.
			r.loop.want(&s.registration, parked)
		default:
			failed = s.move() != nil
		}
	}
	switch {
	case failed:
		r.end(true)
	case s.done && s.peer.done:
		r.end(false)
	default:
		r.update()
	}
}

// move carries the stream on by one step. An error means that one of the sockets is broken.
func (s *side) move() error {
	switch {
	case s.pending > 0:
		return s.drain()
	case s.bulk:
		return s.splice()
	}
	return s.copy()
}

// copy moves a small message through memory: that is less work than splicing it. What is longer is
// spliced from then on.
func (s *side) copy() error {
	message := s.relay.loop.message[:]
	n, err := unix.Read(s.fd, message)
	switch {
	case later(err):
		return nil
	case err != nil:
		return err
	case n == 0:
		return s.end()
	}
	s.bulk = n == len(message)
	written, err := unix.Write(s.peer.fd, message[:n])
	if err != nil && !later(err) {
		return err
	}
	s.count(max(written, 0))
	if rest := message[max(written, 0):n]; len(rest) > 0 {
		return s.hold(rest)
	}
	return nil
}

// hold keeps what the peer did not take.
func (s *side) hold(rest []byte) error {
	p, err := s.relay.loop.pipe()
	if err != nil {
		return err
	}
	n, err := unix.Write(p.write, rest)
	if err == nil && n < len(rest) {
		err = io.ErrShortWrite
	}
	if err != nil {
		p.close()
		return err
	}
	s.pipe, s.pending = p, n
	return nil
}

const spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK

// splice moves pages from one socket to the other.
func (s *side) splice() error {
	p, err := s.relay.loop.pipe()
	if err != nil {
		return err
	}
	n, err := unix.Splice(s.fd, nil, p.write, nil, chunk, spliceFlags)
	if n > 0 {
		s.pipe, s.pending = p, int(n)
		s.bulk = n >= smallMessage
		return s.drain()
	}
	s.relay.loop.keep(p)
	switch {
	case later(err):
		return nil
	case err != nil:
		return err
	}
	return s.end()
}

// drain writes what is in the pipe.
func (s *side) drain() error {
	n, err := unix.Splice(s.pipe.read, nil, s.peer.fd, nil, s.pending, spliceFlags)
	switch {
	case later(err):
		return nil
	case err != nil:
		return err
	}
	s.count(int(n))
	if s.pending -= int(n); s.pending == 0 {
		s.relay.loop.keep(s.pipe)
		s.pipe = pipe{}
	}
	return nil
}

// later says that there is nothing to do until epoll reports the socket again.
func later(err error) bool { return err == unix.EAGAIN || err == unix.EINTR }

func (s *side) count(n int) {
	*s.total += int64(n)
	s.counter.add(0, n)
}

// end hands on the end of the stream.
func (s *side) end() error {
	s.done = true
	return unix.Shutdown(s.peer.fd, unix.SHUT_WR)
}

// update tells epoll what the relay waits for now.
func (r *relay) update() {
	for _, s := range [...]*side{&r.client, &r.upstream} {
		var events uint32
		if !s.done && s.pending == 0 {
			events |= unix.EPOLLIN
		}
		if s.peer.pending > 0 {
			events |= unix.EPOLLOUT
		}
		if events == 0 && s.events == parked {
			continue
		}
		r.loop.want(&s.registration, events)
	}
	if r.client.done || r.upstream.done {
		r.active = monotonic()
		r.loop.halfClosed[r] = struct{}{}
	}
}

// end closes both sockets: by a RST where the relay did not come to a clean end.
func (r *relay) end(reset bool) {
	if r.over {
		return
	}
	r.over = true
	delete(r.loop.halfClosed, r)
	for _, s := range [...]*side{&r.client, &r.upstream} {
		fd := s.fd
		r.loop.remove(&s.registration)
		if !reset {
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
		}
		unix.Close(fd)
		if s.pending > 0 {
			s.pipe.close() // it is not empty, so nobody can reuse it
		}
	}
	r.connection.ended()
}

// expire resets the half-closed connections that have been silent since a time.
func (l *relayLoop) expire(since int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for r := range l.halfClosed {
		if r.active < since {
			r.end(true)
		}
	}
}

// resetAll ends everything, after run has returned.
func (l *relayLoop) resetAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, slot := range l.slots {
		if s, ok := slot.handler.(*side); ok {
			s.relay.end(true)
		}
	}
	for _, p := range l.pipes {
		p.close()
	}
	l.pipes = nil
}

// pipe returns an empty one.
func (l *relayLoop) pipe() (pipe, error) {
	if n := len(l.pipes); n > 0 {
		p := l.pipes[n-1]
		l.pipes = l.pipes[:n-1]
		return p, nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, fmt.Errorf("creating a pipe: %w", err)
	}
	// Refused above fs.pipe-user-pages-soft without CAP_SYS_RESOURCE; a smaller one works too.
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, chunk)
	return pipe{fds[0], fds[1]}, nil
}

// keep takes an empty pipe back.
func (l *relayLoop) keep(p pipe) {
	if len(l.pipes) < sparePipes {
		l.pipes = append(l.pipes, p)
		return
	}
	p.close()
}

func (p pipe) close() {
	unix.Close(p.read)
	unix.Close(p.write)
}
