package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/outbound"
	"sidegate/appliance/policy"
)

type sessionKey struct {
	client   endpoint
	outbound string
	mark     uint32 // of the rule, if it is direct: each may go another way
}

// session is the mapping of one client endpoint at one outbound: whatever the endpoint sends that way
// leaves by the same association, and whoever answers it is passed on (RFC 4787: endpoint-independent
// mapping and filtering).
type session struct {
	shard   *shard
	key     sessionKey
	owner   *udpClient
	byUse   node[session] // in owner.sessions
	flows   list[flow]
	state   sessionState
	used    int64 // last datagram either way
	traffic *traffic
	cancel  context.CancelFunc // of its goroutine

	// While dialing:
	queue      []queued
	queueBytes int

	// While open:
	association *outbound.Association
	socket      udpSocket

	reason Reason // why it failed
}

type sessionState uint8

const (
	dialing sessionState = iota + 1
	open
	failed // remembered for a moment, so that an upstream that is down is not asked per datagram
	ended
)

const failedFor = time.Second

// What waits for a session that is being opened: a burst of ordinary datagrams, or two long ones.
const (
	maxQueue      = 64
	maxQueueBytes = 128 << 10
)

type queued struct {
	remote  endpoint
	payload []byte
}

// begin starts opening a session.
func (s *shard) begin(c *udpClient, key sessionKey, out outbound.Outbound, now int64) *session {
	ctx, cancel := context.WithCancel(s.udp.ctx)
	x := &session{shard: s, key: key, owner: c, state: dialing, used: now, traffic: s.server().traffic(key.outbound), cancel: cancel}
	s.sessions[key] = x
	c.sessions.push(&x.byUse, x)
	c.dialing++
	s.udp.dialing.Add(1)
	s.server().sessions.Add(1)
	s.udp.sessions.Go(func() { x.run(ctx, out) })
	return x
}

// run opens the association, waits for its end or the session's, and closes it.
func (x *session) run(ctx context.Context, out outbound.Outbound) {
	dial, cancel := context.WithTimeout(ctx, x.shard.server().options.DialTimeout)
	association, err := out.AssociateUDP(dial)
	cancel()
	if err == nil {
		defer association.Close()
		err = association.Mark(x.key.mark)
	}
	if x.dialed(association, err) {
		select {
		case <-association.Done():
		case <-ctx.Done():
		}
	} else {
		select {
		case <-time.After(failedFor):
		case <-ctx.Done():
		}
	}
	x.shard.mu.Lock()
	x.end()
	x.shard.mu.Unlock()
	x.shard.server().descriptors.give(sessionDescriptors)
}

// dialed opens the session for traffic, or records the failure.
func (x *session) dialed(association *outbound.Association, err error) (ok bool) {
	s := x.shard
	s.mu.Lock()
	defer s.mu.Unlock()
	x.owner.dialing--
	s.udp.dialing.Add(-1)
	if x.state == ended {
		return false
	}
	if err == nil {
		x.socket.registration, err = s.add(association.FD, unix.EPOLLIN, x)
	}
	if err != nil {
		x.fail(err)
		return false
	}
	x.association, x.state = association, open
	x.traffic.sessions.Add(1)
	s.server().log.Debug("udp session opened", "client", x.key.client.addrPort(), "outbound", x.key.outbound)
	x.flushQueue()
	return true
}

func (x *session) fail(err error) {
	server := x.shard.server()
	x.state, x.reason = failed, UpstreamFailed
	if errors.Is(err, outbound.ErrNoUDP) {
		x.reason = NoUDP
	}
	refused := len(x.queue)
	for f := x.flows.oldest(); f != nil; f = x.flows.oldest() {
		_, waiting := x.shard.emptied().receive(f.socket.fd) // would go uncounted with the socket
		refused += waiting
		f.end()
	}
	server.refuse(x.reason, refused)
	x.queue = nil
	if x.shard.udp.ctx.Err() == nil {
		x.traffic.failed(server.log, fmt.Errorf("opening a udp session: %w", err))
	}
}

// end forgets the session and its flows; its goroutine closes the association. A second time does
// nothing.
func (x *session) end() {
	if x.state == ended {
		return
	}
	s := x.shard
	s.server().refuse(QueueFull, len(x.queue))
	for f := x.flows.oldest(); f != nil; f = x.flows.oldest() {
		f.end()
	}
	if x.state == open {
		if s.gathering == x {
			s.flush()
		}
		s.remove(&x.socket.registration)
		s.server().log.Debug("udp session ended", "client", x.key.client.addrPort(), "outbound", x.key.outbound)
	}
	x.state, x.queue = ended, nil
	x.byUse.leave()
	delete(s.sessions, x.key)
	s.server().sessions.Add(-1)
	x.cancel()
}

// enqueue keeps copies of datagrams until the association is there.
func (x *session) enqueue(remote endpoint, payloads [][]byte) {
	for i, p := range payloads {
		if len(x.queue) >= maxQueue || x.queueBytes+len(p) > maxQueueBytes {
			x.shard.server().refuse(QueueFull, len(payloads)-i)
			return
		}
		x.queue = append(x.queue, queued{remote, append([]byte(nil), p...)})
		x.queueBytes += len(p)
	}
}

func (x *session) flushQueue() {
	for _, q := range x.queue {
		x.put(q.remote.addrPort(), x.association.Header(q.remote.addrPort()), q.payload)
	}
	x.shard.flush()
	x.queue, x.queueBytes = nil, 0
}

// put gathers a datagram for the upstream.
func (x *session) put(remote netip.AddrPort, header, payload []byte) {
	x.shard.gather(x)
	if x.association.Connected {
		x.shard.out.add(header, payload, nil, 0)
		return
	}
	var name sockaddr
	length := x.association.PutName(&name, remote)
	x.shard.out.add(nil, payload, &name, length)
}

// ready passes on what came from the upstream, the datagrams of one remote together.
func (x *session) ready(uint32) {
	s := x.shard
	_, end := s.emptied().receive(x.socket.fd)
	if end == 0 {
		return
	}
	now := monotonic()
	x.used = now
	x.byUse.touch()
	var touched [batchSize]*flow
	flows := touched[:0]
	var last *flow
	for i := range end {
		remote, payload, ok := x.parse(i)
		if !ok {
			s.server().refuse(Malformed, 1)
			continue
		}
		f := last
		if f == nil || f.key.remote != remote || f.over {
			if f = x.answering(remote, now); f == nil {
				continue
			}
			last = f
		}
		if len(f.down) == 0 {
			flows = append(flows, f)
		}
		f.down = append(f.down, payload)
	}
	for _, f := range flows {
		f.deliver(x.traffic, now)
	}
}

// parse finds out who sent the i-th datagram of the batch, and its payload.
func (x *session) parse(i int) (remote endpoint, payload []byte, ok bool) {
	s := x.shard
	payload = s.in.payload(i)
	if !x.association.Connected {
		remote, ok = s.in.source(i)
		return remote, payload, ok
	}
	from, offset, err := x.association.Parse(payload)
	if err != nil {
		return remote, nil, false
	}
	return endpointOf(from), payload[offset:], true
}

// answering is the flow by which the client gets what a remote sent. If the client never sent
// anything there, it is made now.
func (x *session) answering(remote endpoint, now int64) *flow {
	s := x.shard
	key := flowKey{x.key.client, remote}
	if f := s.flows[key]; f != nil {
		return f
	}
	if s.holding.flows[key] != nil { // a moment, and it is known whether the client may talk to it
		s.server().refuse(NotProxied, 1)
		return nil
	}
	if route, ok := s.server().flow(policy.UDP, key.client.addrPort(), remote.addrPort()); ok && !route.Sniff && route.forwarded() {
		s.server().refuse(NotProxied, 1) // a socket of ours would take the client's packets from the kernel, which forwards them
		return nil
	}
	if !plausible(key) {
		s.server().refuse(Malformed, 1)
		return nil
	}
	if !x.owner.mayOpenFlow(now) {
		s.server().refuse(ClientRate, 1)
		return nil
	}
	f, refused := s.open(x, key, now)
	if refused != 0 {
		s.server().refuse(refused, 1)
		return nil
	}
	f.unasked = true
	return f
}
