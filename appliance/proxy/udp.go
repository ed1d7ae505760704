package proxy

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// udp is the UDP relay. One thread reads the listeners, where the first datagrams of a flow arrive;
// the shards' threads read the sockets of flows and sessions. A client lives in one shard, with
// everything that it holds, so that its limits need no coordination.
type udp struct {
	server    *Server
	listeners []*udpListener // IPv4, then IPv6 where the box has it
	door      *loop          // reads the listeners
	shards    []*shard
	seed      maphash.Seed

	allowance, ownAllowance allowance // of a client, and of this box as one

	ctx      context.Context // of serve: sessions are opened by whichever thread needs one
	sessions sync.WaitGroup  // goroutines of sessions
	dialing  atomic.Int64    // sessions being opened
}

func listenUDP(s *Server) (_ *udp, err error) {
	u := &udp{
		server: s, seed: maphash.MakeSeed(),
		allowance:    s.options.Limits.allowance(1, s.descriptors.limit),
		ownAllowance: s.options.Limits.allowance(ownShare, s.descriptors.limit),
	}
	defer func() {
		if err != nil {
			u.close()
		}
	}()
	if u.door, err = newLoop("relay-udp"); err != nil {
		return nil, err
	}
	for _, f := range families {
		l, err := newUDPListener(u, f)
		if errors.Is(err, unix.EAFNOSUPPORT) && f.optional {
			continue
		}
		if err != nil {
			return nil, err
		}
		u.listeners = append(u.listeners, l)
	}
	for i := range s.options.Threads {
		shard, err := newShard(u, fmt.Sprintf("relay-udp-%d", i))
		if err != nil {
			return nil, err
		}
		u.shards = append(u.shards, shard)
	}
	return u, nil
}

func (u *udp) sockets() (v4, v6 syscall.Conn) {
	v4 = rawSocket(u.listeners[0].fd)
	if len(u.listeners) > 1 {
		v6 = rawSocket(u.listeners[1].fd)
	}
	return v4, v6
}

func (u *udp) close() {
	for _, l := range u.listeners {
		l.close()
	}
	for _, s := range u.shards {
		s.close()
	}
	if u.door != nil {
		u.door.close()
	}
}

func (u *udp) serve(ctx context.Context) error {
	defer u.close()
	g, ctx := errgroup.WithContext(ctx)
	u.ctx = ctx
	g.Go(u.door.run)
	for _, s := range u.shards {
		g.Go(s.run)
	}
	g.Go(func() error {
		u.sweep(ctx)
		u.door.stop()
		for _, s := range u.shards {
			s.stop()
		}
		return nil
	})
	err := g.Wait()
	for _, s := range u.shards {
		s.endAll()
	}
	u.sessions.Wait()
	return err
}

// sweep ends what is idle, until ctx ends.
func (u *udp) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepInterval(u.server.options.UDPIdle))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, s := range u.shards {
				s.expire(monotonic())
			}
		}
	}
}

// shardOf is where a client lives.
func (u *udp) shardOf(client endpoint) *shard {
	return u.shards[maphash.Bytes(u.seed, client.addr[:])%uint64(len(u.shards))]
}

// udpListener is a socket for datagrams whose flow has no socket yet.
type udpListener struct {
	udp      *udp
	fd       int
	in       *batch
	payloads [][]byte
}

func newUDPListener(u *udp, f family) (*udpListener, error) {
	in, err := newBatch()
	if err != nil {
		return nil, err
	}
	fd, err := f.openListener(u.server.options.Mark)
	if err != nil {
		in.close()
		return nil, err
	}
	l := &udpListener{udp: u, fd: fd, in: in}
	if _, err := u.door.add(fd, unix.EPOLLIN, l); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *udpListener) close() {
	unix.Close(l.fd)
	l.in.close()
}

// ready passes on what arrived, each run of datagrams of one flow together.
func (l *udpListener) ready(uint32) {
	l.in.empty()
	_, end := l.in.receive(l.fd)
	now := monotonic()
	var run flowKey
	for i := range end {
		client, known := l.in.source(i)
		remote, told := l.in.destination(i)
		key := flowKey{client, remote}
		if !known || !told {
			l.udp.server.refuse(Malformed, 1)
			continue
		}
		if key != run && len(l.payloads) > 0 {
			l.flush(run, now)
		}
		run = key
		l.payloads = append(l.payloads, l.in.payload(i))
	}
	if len(l.payloads) > 0 {
		l.flush(run, now)
	}
}

func (l *udpListener) flush(key flowKey, now int64) {
	s := l.udp.shardOf(key.client)
	s.mu.Lock()
	s.arrived(key, l.payloads, now)
	s.mu.Unlock()
	l.payloads = l.payloads[:0]
}
