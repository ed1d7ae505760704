package probe

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
)

// course is how far a connection of the client came.
type course struct {
	left     netip.AddrPort // the source address of its SYN when it left the box; none: it did not
	answered bool           // the SYN/ACK came to the client
	byBox    bool           // from the box
	followed bool           // what the client sent then left the box
	arrived  bool           // and the target acknowledged it
	reset    bool
	refuser  netip.Addr // who said by ICMP that the target cannot be reached
}

// way sends a packet of the client.
type way func(ip []byte) error

// question is what the client says to the target when it is connected: any server takes it, whatever it makes of it.
var question = []byte("HEAD / HTTP/1.0\r\n\r\n")

// connect is the shortest TCP client: it opens a connection, has one segment acknowledged, and resets the connection, on
// all ways that others may remember it by.
func (c *client) connect(ctx context.Context, send way, alsoEnd ...way) (o course, err error) {
	syn := segment{
		source:      netip.AddrPortFrom(c.is(), uint16(32768+rand.IntN(28000))),
		destination: c.target, seq: rand.Uint32(), flags: flagSYN,
	}
	hello := segment{source: syn.source, destination: c.target, seq: syn.seq + 1, flags: flagACK | flagPSH, data: question}
	ours := func(s sighting) bool {
		return s.kind == arrived && s.segment.source == c.target && s.segment.destination == syn.source
	}
	answered, err := c.until(ctx, patient, func() error { return send(syn.packet()) }, func(s sighting) bool {
		switch {
		case s.kind == left && s.seq == syn.seq && s.segment.destination == c.target:
			o.left = s.segment.source
		case s.kind == arrived && s.refuses(syn.source):
			o.refuser = s.header.source
		case ours(s) && s.flags&flagRST != 0:
			o.reset = true
		case ours(s) && s.flags&flagSYN != 0 && s.ack == hello.seq:
			o.answered, o.byBox, hello.ack = true, s.byBox, s.seq+1
		}
		return o.answered || o.reset
	})
	if err != nil || !answered || o.reset {
		return o, err
	}
	acknowledgement := hello
	acknowledgement.data, acknowledgement.flags = nil, flagACK
	end := uint32(len(question)) + hello.seq
	_, err = c.until(ctx, patient, func() error {
		return errors.Join(send(acknowledgement.packet()), send(hello.packet()))
	}, func(s sighting) bool {
		switch {
		case s.kind == left && s.seq == hello.seq && len(s.data) > 0 && s.segment.destination == c.target:
			o.followed = true
		case s.kind == arrived && s.refuses(syn.source):
			o.refuser = s.header.source
		case ours(s) && s.flags&flagACK != 0 && s.ack == end:
			o.arrived = true
		case ours(s) && s.flags&flagRST != 0:
			o.reset = true
		}
		return o.arrived || o.reset
	})
	reset := acknowledgement
	reset.flags |= flagRST
	if o.arrived {
		reset.seq = end
	}
	for _, way := range append([]way{send}, alsoEnd...) {
		err = errors.Join(err, way(reset.packet()))
	}
	return o, err
}
