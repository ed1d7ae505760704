package proxy

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// Reason is why a TCP connection or a UDP datagram was refused or lost. The zero value is invalid.
type Reason uint8

// The reasons. Each counts connections (TCP) and datagrams (UDP).
const (
	NotProxied     Reason = iota + 1 // the policy does not know the flow as proxied
	Blocked                          // the policy blocks it, now that its name is known
	NoOutbound                       // the outbound that it names does not exist
	NoUDP                            // the outbound carries no UDP
	UpstreamFailed                   // the outbound could not be reached, or refused
	ClientLimit                      // the client has as much as it may have
	ClientRate                       // the client opens flows faster than it may
	Descriptors                      // the process may open no more
	QueueFull                        // too much arrived while the session was being opened
	SocketFailed                     // no socket could be made for the flow
	Malformed                        // a reply that no client can be given
	SendFailed                       // the kernel refused it: too long, no route, no buffer
	numReasons
)

var reasonNames = [numReasons]string{
	NotProxied:     "not_proxied",
	Blocked:        "blocked",
	NoOutbound:     "no_outbound",
	NoUDP:          "no_udp",
	UpstreamFailed: "upstream_failed",
	ClientLimit:    "client_limit",
	ClientRate:     "client_rate",
	Descriptors:    "descriptors",
	QueueFull:      "queue_full",
	SocketFailed:   "socket_failed",
	Malformed:      "malformed",
	SendFailed:     "send_failed",
}

// String is the name as metrics show it.
func (r Reason) String() string {
	if r == 0 || r >= numReasons {
		return "invalid"
	}
	return reasonNames[r]
}

// Stats is a snapshot. Its parts are read one after the other, not at one instant.
type Stats struct {
	Connections int // TCP connections, those being dialed included
	Sessions    int // UDP sessions
	Flows       int // UDP flows
	Outbounds   map[string]Traffic
	Refused     map[Reason]uint64 // has every reason
	Sniffed     Sniffed
}

// Sniffed counts the flows whose first bytes were looked at, by what they told.
type Sniffed struct {
	TLS, HTTP1, HTTP2, QUIC uint64 // a name
	Nothing                 uint64 // no name, and none would have come
	TimedOut                uint64 // no name in time
}

// Traffic is what went through one outbound since the start. Up is from the client.
type Traffic struct {
	Connections, Sessions  uint64 // opened
	Failures               uint64 // failed to open
	BytesUp, BytesDown     uint64 // payload of TCP and UDP
	PacketsUp, PacketsDown uint64 // UDP datagrams
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	stats := Stats{
		Connections: int(s.connections.Load()),
		Sessions:    int(s.sessions.Load()),
		Flows:       int(s.flows.Load()),
		Outbounds:   make(map[string]Traffic),
		Refused:     make(map[Reason]uint64),
	}
	for r := Reason(1); r < numReasons; r++ {
		stats.Refused[r] = s.refused[r].Load()
	}
	stats.Sniffed = s.sniffed.snapshot()
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, t := range s.outbounds {
		stats.Outbounds[name] = t.snapshot()
	}
	return stats
}

// counters are what the relay's threads write.
type counters struct {
	connections, sessions, flows atomic.Int64 // alive
	refused                      [numReasons]atomic.Uint64
	sniffed                      sniffed

	mu        sync.Mutex
	outbounds map[string]*traffic // never forgotten: bounded by the names that were ever configured
}

func (c *counters) refuse(r Reason, n int) { c.refused[r].Add(uint64(n)) }

// traffic returns the counters of an outbound. Relays keep the pointer.
func (c *counters) traffic(outbound string) *traffic {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.outbounds[outbound]
	if t == nil {
		if c.outbounds == nil {
			c.outbounds = make(map[string]*traffic)
		}
		t = &traffic{outbound: outbound}
		c.outbounds[outbound] = t
	}
	return t
}

type traffic struct {
	outbound                        string
	connections, sessions, failures atomic.Uint64
	up, down                        direction
	warned                          atomic.Int64 // when the last warning was written, monotonic; 0 never
}

type direction struct {
	bytes, packets atomic.Uint64
}

func (d *direction) add(packets, bytes int) {
	d.packets.Add(uint64(packets))
	d.bytes.Add(uint64(bytes))
}

func (t *traffic) snapshot() Traffic {
	return Traffic{
		Connections: t.connections.Load(),
		Sessions:    t.sessions.Load(),
		Failures:    t.failures.Load(),
		BytesUp:     t.up.bytes.Load(),
		BytesDown:   t.down.bytes.Load(),
		PacketsUp:   t.up.packets.Load(),
		PacketsDown: t.down.packets.Load(),
	}
}

const warningInterval = 10 * time.Second

// failed counts a failure to open, and warns of it at most once per interval: an upstream that is
// down fails for every flow.
func (t *traffic) failed(log *slog.Logger, err error) {
	failures := t.failures.Add(1)
	now, last := monotonic(), t.warned.Load()
	if last != 0 && now-last < int64(warningInterval) || !t.warned.CompareAndSwap(last, now) {
		return
	}
	log.Warn("outbound failed", "outbound", t.outbound, "error", err, "failures", failures)
}
