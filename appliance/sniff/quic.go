package sniff

// Types of frames: RFC 9000 section 19.
const (
	quicPadding = 0x00
	quicPing    = 0x01
	quicAck     = 0x02
	quicAckECN  = 0x03
	quicCrypto  = 0x06
)

// QUIC puts a ClientHello together out of the datagrams that a client sends from one address and port to another, in whatever
// order they come. Its zero value is ready. It keeps no datagram, but up to MaxStream bytes of the handshake, a bit for each,
// and the keys of one connection: 20 KiB at most.
type QUIC struct {
	// keys are those that have opened a packet. They stay where the server's answer gives the client another connection ID to
	// write to; after a Retry they are that ID's own (RFC 9001 section 5.2).
	keys   *initialKeys
	hello  assembly
	opened bool   // some packet was an Initial indeed
	done   Result // the answer, once it is final
}

// Datagram reads one more datagram, which it neither keeps nor changes. Nothing is the answer as long as none had an Initial of
// a known version in it; a later one still may. After that, what is no Initial is passed over.
func (q *QUIC) Datagram(b []byte) Result {
	if q.done.Status != 0 {
		return q.done
	}
	q.read(b)
	if !q.opened {
		return Result{Status: Nothing}
	}
	result := clientHello(q.hello.beginning(), ProtocolQUIC)
	if result.Status == More && len(q.hello.beginning()) == MaxStream {
		result = result.last()
	}
	if result.Status != More {
		*q = QUIC{opened: true, done: result}
	}
	return result
}

// read takes what a datagram's packets say of the handshake. Only packets with the first one's connection ID are of this
// client's connection (RFC 9000 section 12.2), which also bounds the keys to derive: one set for a datagram.
func (q *QUIC) read(b []byte) {
	var own *initialKeys
	for len(b) > 0 {
		p, size := parsePacket(b)
		if p == nil {
			return
		}
		b = b[size:]
		if p.kind != p.version.initial {
			continue // 0-RTT, Handshake
		}
		if own == nil {
			if own = q.keys; !own.are(p) {
				own = deriveKeys(p.version, p.destination)
			}
		}
		if !own.are(p) {
			return
		}
		payload := own.open(p)
		if payload != nil {
			q.keys, q.opened = own, true
		} else if q.keys != nil && q.keys != own {
			payload = q.keys.open(p)
		}
		q.frames(payload)
	}
}

// frames takes the CRYPTO frames of an Initial's payload. RFC 9000 section 12.4 says which others may be with them; it ends at
// what may not.
func (q *QUIC) frames(payload []byte) {
	r := newReader(payload)
	for r.more() {
		switch kind := r.varint(); kind {
		case quicPadding, quicPing:
		case quicAck, quicAckECN:
			r.varint() // largest acknowledged
			r.varint() // delay
			ranges := r.length()
			r.varint() // first range
			for i := 0; i < ranges && r.ok(); i++ {
				r.varint()
				r.varint()
			}
			if kind == quicAckECN {
				r.varint()
				r.varint()
				r.varint()
			}
		case quicCrypto:
			offset := r.length()
			q.hello.insert(offset, r.take(r.length()))
		default:
			return // CONNECTION_CLOSE, or what is against the protocol
		}
	}
}
