package proxy

import (
	"bytes"

	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
	"sidegate/appliance/sniff"
)

// flow is one client endpoint and one remote: a socket between them, and the session that its
// datagrams go through.
type flow struct {
	shard   *shard
	key     flowKey
	session *session
	byUse   node[flow] // in the client's flows
	inside  node[flow] // in session.flows
	socket  udpSocket
	used    int64 // last datagram either way
	over    bool
	unasked bool // the remote began it: the policy has not been asked about the client's side
	past    bool // if it is QUIC, the client is past its handshake

	header []byte   // before each datagram to the remote; built when the session is open
	down   [][]byte // what of the current batch goes to the client
}

// openFlow opens the socket and registers it.
func (s *shard) openFlow(x *session, key flowKey, now int64) (*flow, error) {
	fd, err := openFlow(key, s.server().options.Mark)
	if err != nil {
		return nil, err
	}
	f := &flow{shard: s, key: key, session: x, used: now}
	if f.socket.registration, err = s.add(fd, unix.EPOLLIN, f); err != nil {
		unix.Close(fd)
		return nil, err
	}
	s.flows[key] = f
	x.owner.flows.push(&f.byUse, f)
	x.flows.push(&f.inside, f)
	s.server().flows.Add(1)
	return f, nil
}

// end closes the flow's socket; further datagrams come to a listener. A second time does nothing.
func (f *flow) end() {
	if f.over {
		return
	}
	f.over = true
	s := f.shard
	fd := f.socket.fd
	s.remove(&f.socket.registration)
	unix.Close(fd)
	delete(s.flows, f.key)
	f.byUse.leave()
	f.inside.leave()
	s.server().flows.Add(-1)
	s.server().descriptors.give(flowDescriptors)
}

// touch keeps the flow and its session from expiring.
func (f *flow) touch(now int64) {
	f.used = now
	f.byUse.touch()
	f.session.used = now
	f.session.byUse.touch()
}

// ready passes on what the client sent.
func (f *flow) ready(uint32) {
	s := f.shard
	if s.gathering != f.session || s.in.filled > batchSize/2 {
		s.emptied()
	}
	first, end := s.in.receive(f.socket.fd)
	if first == end {
		return
	}
	f.up(s.received(first, end), monotonic())
}

// received are the datagrams of the batch from first to before end; valid until the next call.
func (s *shard) received(first, end int) [][]byte {
	s.payloads = s.payloads[:0]
	for i := first; i < end; i++ {
		s.payloads = append(s.payloads, s.in.payload(i))
	}
	return s.payloads
}

// up sends datagrams of the client to the remote. Where another QUIC connection begins in those of a flow that is relayed directly, the
// flow ends: that connection may be meant for another site, and is decided by itself. (bpf/flow.h: opens_quic.)
func (f *flow) up(payloads [][]byte, now int64) {
	if f.unasked && !f.settle(payloads, now) {
		return
	}
	next := f.nextConnection(payloads)
	if next > 0 {
		f.send(payloads[:next], now)
	}
	if next < len(payloads) {
		f.again(payloads[next:], now)
	}
}

// again gives up the flow, and has what its client sends decided as if it were the first: those datagrams, what else waits at the
// socket, and whatever comes. The socket is out of the way before anything is decided. Were it not, the kernel, told to forward
// the flow, would find it for the next datagram (early demux), and ip_forward drops what has a socket.
func (f *flow) again(payloads [][]byte, now int64) {
	s := f.shard
	disconnect(f.socket.fd) // so that what comes from now on reaches the listener
	all := s.drained(f.socket.fd, payloads)
	f.end()
	s.arrived(f.key, all, now)
}

// drained is copies of datagrams, and of all others that wait at a socket.
func (s *shard) drained(fd int, payloads [][]byte) (all [][]byte) {
	for {
		for _, p := range payloads {
			all = append(all, bytes.Clone(p))
		}
		if payloads = s.received(s.emptied().receive(fd)); len(payloads) == 0 {
			return all
		}
	}
}

// nextConnection is where another connection begins; at the end, if none does.
func (f *flow) nextConnection(payloads [][]byte) int {
	if f.session.key.outbound != policy.OutboundDirect {
		return len(payloads)
	}
	for i, p := range payloads {
		switch sniff.QUICDatagram(p) {
		case sniff.InitialDatagram:
			if f.past {
				return i
			}
		case sniff.OtherDatagram:
			f.past = true
		}
	}
	return len(payloads)
}

func (f *flow) send(payloads [][]byte, now int64) {
	f.touch(now)
	x := f.session
	if x.state == dialing {
		x.enqueue(f.key.remote, payloads)
		return
	}
	remote := f.key.remote.addrPort()
	if f.header == nil {
		f.header = x.association.Header(remote)
	}
	for _, p := range payloads {
		x.put(remote, f.header, p)
	}
}

// settle asks the policy about a flow that the remote began, now that the client sends too, and
// moves it to the session that the policy wants. It reports whether there is one; the datagrams are
// dealt with otherwise.
func (f *flow) settle(datagrams [][]byte, now int64) bool {
	s := f.shard
	route, ok := s.server().flow(policy.UDP, f.key.client.addrPort(), f.key.remote.addrPort())
	if ok && (route.Sniff || route.forwarded()) {
		f.again(datagrams, now)
		return false
	}
	var x *session
	refused := NotProxied
	switch {
	case ok && route.Outbound == policy.OutboundBlock:
		refused = Blocked
	case ok:
		x, refused = s.session(f.session.owner, f.key.client, route, now)
	}
	if refused == 0 && f.over {
		refused = ClientLimit // the new session took the place of this flow's own
	}
	if refused != 0 {
		s.server().refuse(refused, len(datagrams))
		return false
	}
	f.unasked = false
	if f.session != x {
		f.inside.leave()
		x.flows.push(&f.inside, f)
		f.session, f.header = x, nil
	}
	return true
}

// deliver sends the gathered datagrams to the client.
func (f *flow) deliver(t *traffic, now int64) {
	defer func() { f.down = f.down[:0] }()
	if f.over {
		f.shard.server().refuse(ClientLimit, len(f.down)) // evicted by another remote of this batch
		return
	}
	f.touch(now)
	out := f.shard.out
	out.begin(&f.socket)
	for _, p := range f.down {
		out.add(nil, p, nil, 0)
	}
	r := out.end()
	t.down.add(r.packets, r.bytes)
	if r.lost > 0 {
		f.shard.server().refuse(SendFailed, r.lost)
	}
}
