package dns

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpListener is one family's socket, and the thread that reads it and answers what the cache knows. It
// blocks in poll instead of on the Go runtime's poller, which would cost a scheduling round for each batch.
type udpListener struct {
	server *Server
	family *family
	fd     int
	wake   int // an eventfd that ends run
	batch  *batch
	key    []byte
}

func listenUDP(s *Server, f family) (_ *udpListener, err error) {
	l := &udpListener{server: s, family: &f, fd: -1, wake: -1, batch: newBatch(&f)}
	if l.fd, err = f.openUDP(s.options.Mark); err != nil {
		return nil, err
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		l.close()
		return nil, fmt.Errorf("creating an eventfd: %w", err)
	}
	return l, nil
}

func (l *udpListener) close() {
	for _, fd := range []int{l.fd, l.wake} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// stop makes run return soon.
func (l *udpListener) stop() {
	one := [8]byte{1}
	unix.Write(l.wake, one[:])
}

// run answers until stop.
func (l *udpListener) run() error {
	runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
	if name, err := unix.BytePtrFromString("dns-udp" + l.family.suffix); err == nil {
		unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0)
	}
	poll := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}, {Fd: int32(l.wake), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(poll, -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("waiting for queries: %w", err)
		}
		if poll[1].Revents != 0 {
			return nil
		}
		for l.round() == batchSize && l.server.ctx.Err() == nil {
			continue // under load there is nothing to wait for
		}
	}
}

// round answers what has arrived.
func (l *udpListener) round() int {
	n := l.batch.receive(l.fd)
	now := monotonic()
	for i := range n {
		l.arrived(i, now)
	}
	if lost := l.batch.send(l.fd); lost > 0 {
		l.server.counters.drop(SendFailed, lost)
	}
	return n
}

func (l *udpListener) arrived(i int, now int64) {
	s := l.server
	s.counters.queries.Add(1)
	client, to, ok := l.batch.prepare(i)
	if !ok || client.Port() == 0 {
		s.counters.drop(Malformed, 1)
		return
	}
	if s.own[to] {
		s.counters.drop(NotAllowed, 1)
		return
	}
	var q query
	packet := l.batch.query(i)
	rcode, ok := q.parse(packet)
	if !ok {
		s.counters.drop(Malformed, 1)
		return
	}
	addr := client.Addr().As16()
	answer, how, seat := s.quick(l.batch.answer(i), &q, rcode, &addr, &l.key, q.limit(), now)
	switch {
	case how == answered && len(answer) > 0:
		l.batch.put(i, len(answer))
	case how == strange && s.strangers.Load() >= maxStrangers:
		s.counters.drop(Overloaded, 1)
	case how != answered:
		l.wait(arrival{slices.Clone(packet), addr, (*query).limit, seat, nil}, l.batch.peers[i])
	}
}

// wait answers a query that has to wait for something.
func (l *udpListener) wait(in arrival, p peer) {
	s := l.server
	in.known = func() {}
	if in.admission.client == nil {
		s.strangers.Add(1)
		in.known = sync.OnceFunc(func() { s.strangers.Add(-1) })
	}
	s.work.Go(func() {
		defer in.known()
		answer := s.respond(s.ctx, in)
		if len(answer) > 0 && p.sendTo(l.fd, l.family, answer) != nil {
			s.counters.drop(SendFailed, 1)
		}
	})
}
