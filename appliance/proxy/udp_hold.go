package proxy

import (
	"bytes"

	"sidegate/appliance/policy"
	"sidegate/appliance/sniff"
)

// held is a flow whose name is not known yet, and what its client has sent so far. Most flows tell
// theirs in the first datagram and are never held; those of TLS with post-quantum keys, in two.
type held struct {
	shard     *shard
	owner     *udpClient
	key       flowKey
	quic      sniff.QUIC
	known     sniff.Result
	datagrams [][]byte
	bytes     int
	deadline  int64      // monotonic
	byAge     node[held] // in shard.holding
	mine      node[held] // in owner.held
}

// What may be held. Nothing is lost at a limit: the flow that has waited longest, or that has grown too
// long, is decided with what is known of it. So a flood of beginnings, which is what waits long, makes
// room for those that soon tell their names.
const (
	maxHeldDatagrams = 16
	maxHeldBytes     = 32 << 10
	maxClientHeld    = 64       // flows of one client address
	maxHolding       = 32 << 20 // bytes in all, shared out to the shards: more than one MAC address can fill before the deadline
	heldState        = 20 << 10 // bytes of a sniff.QUIC, at most
)

// sniff looks for the name in a flow's first datagrams, and holds them if more are needed to tell.
func (s *shard) sniff(c *udpClient, key flowKey, datagrams [][]byte, now int64) {
	h := &held{shard: s, owner: c, key: key, deadline: now + int64(s.server().options.SniffTimeout)}
	s.holding.flows[key] = h
	s.holding.bytes += heldState
	s.holding.byAge.push(&h.byAge, h)
	c.held.push(&h.mine, h)
	if !h.take(datagrams, now) {
		s.holding.timer.arm(h.deadline - now)
		s.relieve(c, now)
	}
}

// relieve decides what is beyond the limits.
func (s *shard) relieve(c *udpClient, now int64) {
	for c.held.length > maxClientHeld {
		c.held.oldest().decide(false, nil, now)
	}
	for s.holding.bytes > maxHolding/s.server().options.Threads {
		s.holding.byAge.oldest().decide(false, nil, now)
	}
}

// take looks at further datagrams, which are in the caller's memory, and reports whether they decided
// the flow: then they are on their way.
func (h *held) take(datagrams [][]byte, now int64) (decided bool) {
	for i, d := range datagrams {
		h.known = h.quic.Datagram(d)
		full := len(h.datagrams) == maxHeldDatagrams || h.bytes+len(d) > maxHeldBytes
		if h.known.Status != sniff.More || full {
			h.decide(false, datagrams[i:], now)
			return true
		}
		h.datagrams = append(h.datagrams, bytes.Clone(d))
		h.bytes += len(d)
		h.shard.holding.bytes += len(d)
	}
	return false
}

// decide has the policy decide by what is known, and sends the datagrams, and then the rest, that way.
func (h *held) decide(timedOut bool, rest [][]byte, now int64) {
	s := h.shard
	h.forget()
	s.server().sniffed.count(h.known, timedOut)
	datagrams := append(h.datagrams, rest...)
	refused := NotProxied
	if route, ok := s.server().decide(s.udp.ctx, policy.UDP, h.key.client.addrPort(), h.key.remote.addrPort(), h.known); ok {
		refused = s.follow(h.owner, h.key, route, datagrams, now)
	}
	if refused != 0 {
		s.server().refuse(refused, len(datagrams))
	}
}

func (h *held) forget() {
	s := h.shard
	delete(s.holding.flows, h.key)
	s.holding.bytes -= h.bytes + heldState
	h.byAge.leave()
	h.mine.leave()
}

// holding is what a shard holds.
type holding struct {
	shard *shard
	flows map[flowKey]*held
	byAge list[held]
	bytes int
	timer timer
}

// ready decides the flows whose time is up.
func (g *holding) ready(uint32) {
	now := monotonic()
	for h := g.byAge.oldest(); h != nil && h.deadline <= now; h = g.byAge.oldest() {
		h.decide(true, nil, now)
	}
	g.timer.rang()
	if h := g.byAge.oldest(); h != nil {
		g.timer.arm(h.deadline - now)
	}
}

// end forgets everything.
func (g *holding) end() {
	for h := g.byAge.oldest(); h != nil; h = g.byAge.oldest() {
		h.forget()
	}
}
