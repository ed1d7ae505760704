package proxy

import (
	"sidegate/appliance/policy"
)

// shard is one thread and the clients that live there. Everything below is guarded by the loop's
// mutex, including what sessions and flows consist of.
type shard struct {
	*loop
	udp      *udp
	clients  map[[16]byte]*udpClient
	sessions map[sessionKey]*session
	flows    map[flowKey]*flow
	holding  holding

	in        *batch
	out       *sender
	gathering *session // the one that out holds datagrams for; they may lie in in
	payloads  [][]byte // scratch
}

// udpClient is one client address, and what it holds.
type udpClient struct {
	may         *allowance
	sessions    list[session]
	flows       list[flow]
	held        list[held]
	dialing     int
	sessionRate bucket
	flowRate    bucket
}

// mayOpenSession reports whether the client may open one more session now, and if so counts it.
func (c *udpClient) mayOpenSession(now int64) bool { return c.sessionRate.take(now, c.may.sessionRate) }

// mayOpenFlow is the same for a flow.
func (c *udpClient) mayOpenFlow(now int64) bool { return c.flowRate.take(now, c.may.flowRate) }

const (
	maxClients = 1 << 14 // per shard
	maxDialing = 1024    // sessions being opened at once
)

func newShard(u *udp, name string) (_ *shard, err error) {
	s := &shard{
		udp:      u,
		clients:  make(map[[16]byte]*udpClient),
		sessions: make(map[sessionKey]*session),
		flows:    make(map[flowKey]*flow),
		out:      new(sender),
	}
	if s.in, err = newBatch(); err != nil {
		return nil, err
	}
	if s.loop, err = newLoop(name); err != nil {
		s.in.close()
		return nil, err
	}
	s.loop.after = s.flush
	s.holding = holding{shard: s, flows: make(map[flowKey]*held)}
	if s.holding.timer, err = newTimer(s.loop, &s.holding); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *shard) close() {
	s.holding.timer.close()
	s.loop.close()
	s.in.close()
}

func (s *shard) server() *Server { return s.udp.server }

// arrived takes datagrams of one flow from a listener.
func (s *shard) arrived(key flowKey, payloads [][]byte, now int64) {
	if f := s.flows[key]; f != nil {
		f.up(payloads, now)
		s.flush() // the payloads are the listener's
		return
	}
	if h := s.holding.flows[key]; h != nil {
		h.take(payloads, now)
		s.relieve(h.owner, now)
		return
	}
	if refused := s.admit(key, payloads, now); refused != 0 {
		s.server().refuse(refused, len(payloads))
	}
}

// gather makes out ready for datagrams to a session's upstream. They leave with the next flush: what
// several flows of one session have received in one round leaves together.
func (s *shard) gather(x *session) {
	if s.gathering != x {
		s.flush()
		s.out.begin(&x.socket)
		s.gathering = x
	}
}

// flush sends what was gathered.
func (s *shard) flush() {
	x := s.gathering
	if x == nil {
		return
	}
	s.gathering = nil
	r := s.out.end()
	x.traffic.up.add(r.packets, r.bytes)
	if r.lost > 0 {
		s.server().refuse(SendFailed, r.lost)
	}
}

// emptied empties the batch, but not before all of it was sent.
func (s *shard) emptied() *batch {
	s.flush()
	s.in.empty()
	return s.in
}

// admit deals with a client's first datagrams to somebody. What costs a system call or memory comes
// after the client's own limits.
func (s *shard) admit(key flowKey, payloads [][]byte, now int64) Reason {
	c := s.clients[key.client.addr]
	if c != nil && !c.mayOpenFlow(now) {
		return ClientRate
	}
	route, ok := s.server().flow(policy.UDP, key.client.addrPort(), key.remote.addrPort())
	if !ok {
		return NotProxied
	}
	if c == nil {
		if len(s.clients) >= maxClients {
			return ClientLimit
		}
		c = &udpClient{may: &s.udp.allowance}
		if route.Own {
			c.may = &s.udp.ownAllowance
		}
		s.clients[key.client.addr] = c
	}
	if route.Sniff {
		s.sniff(c, key, payloads, now)
		return 0
	}
	return s.follow(c, key, route, payloads, now)
}

// follow sends a flow's first datagrams where its route leads.
func (s *shard) follow(c *udpClient, key flowKey, route Route, payloads [][]byte, now int64) Reason {
	switch {
	case route.Outbound == policy.OutboundBlock:
		return Blocked
	case route.forwarded():
		return s.replay(key, route.Mark, payloads)
	}
	session, refused := s.session(c, key.client, route, now)
	if refused != 0 {
		return refused
	}
	f, refused := s.open(session, key, now)
	if refused != 0 {
		return refused
	}
	f.up(payloads, now)
	s.flush() // the payloads are the caller's
	return 0
}

// session finds or begins the session of a client's endpoint with the outbound of a route.
func (s *shard) session(c *udpClient, from endpoint, route Route, now int64) (*session, Reason) {
	key := sessionKey{from, route.Outbound, s.server().directMark(route)}
	if old := s.sessions[key]; old != nil {
		return old, old.reason
	}
	out, ok := s.server().options.Outbounds.Outbound(route.Outbound)
	switch {
	case !ok:
		return nil, NoOutbound
	case !c.mayOpenSession(now):
		return nil, ClientRate
	case c.dialing >= c.may.dialing || s.udp.dialing.Load() >= maxDialing:
		return nil, ClientLimit
	}
	if c.sessions.length >= c.may.sessions {
		c.sessions.oldest().end()
	}
	if !s.makeRoom(sessionDescriptors) {
		return nil, Descriptors
	}
	return s.begin(c, key, out, now), 0
}

// open makes the flow of a session to somebody.
func (s *shard) open(session *session, key flowKey, now int64) (*flow, Reason) {
	c := session.owner
	if c.flows.length >= c.may.flows {
		c.flows.oldest().end()
	}
	if !s.makeRoom(flowDescriptors) {
		return nil, Descriptors
	}
	f, err := s.openFlow(session, key, now)
	if err != nil {
		s.server().descriptors.give(flowDescriptors)
		s.server().log.Debug("udp flow refused", "client", key.client.addrPort(), "destination", key.remote.addrPort(), "error", err)
		return nil, SocketFailed
	}
	return f, 0
}

// makeRoom takes descriptors. When all are in use, the client that has most gives up its own.
func (s *shard) makeRoom(descriptors int64) bool {
	for !s.server().descriptors.take(descriptors) {
		if c := s.heaviest(func(c *udpClient) int { return c.flows.length }); c != nil {
			c.flows.oldest().end()
			continue
		}
		// A session's are closed a little later, so that only the next attempt finds room.
		if c := s.heaviest(func(c *udpClient) int { return c.sessions.length }); c != nil {
			c.sessions.oldest().end()
		}
		return false
	}
	return true
}

// heaviest is the client that has most of something; nil if nobody has any.
func (s *shard) heaviest(weight func(*udpClient) int) *udpClient {
	var found *udpClient
	most := 0
	for _, c := range s.clients {
		if w := weight(c); w > most {
			found, most = c, w
		}
	}
	return found
}

// expire ends what has been idle for too long.
func (s *shard) expire(now int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	since := now - int64(s.server().options.UDPIdle)
	for addr, c := range s.clients {
		for f := c.flows.oldest(); f != nil && f.used < since; f = c.flows.oldest() {
			f.end()
		}
		for x := c.sessions.oldest(); x != nil && x.used < since; x = c.sessions.oldest() {
			x.end()
		}
		if c.sessions.length == 0 && c.held.length == 0 && c.dialing == 0 && c.flowRate.full(now) && c.sessionRate.full(now) {
			delete(s.clients, addr)
		}
	}
}

// endAll ends everything, after run has returned.
func (s *shard) endAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holding.end()
	for _, x := range s.sessions {
		x.end()
	}
}

// plausible says whether a client may be sent something from a remote. An upstream can name any: what
// could only come from the client's own box or link is not for it to say.
func plausible(flow flowKey) bool {
	remote := flow.remote.addrPort()
	return remote.Addr().IsGlobalUnicast() && remote.Port() != 0 &&
		flow.remote.is4() == flow.client.is4() && flow.remote.addr != flow.client.addr
}
