package sniff

import "math"

// reader walks a message of which perhaps only the beginning has come. It stops for good at the first thing that it
// cannot read: More if that has not come yet, Nothing if it does not fit into the message. What it returns from then on is zero.
type reader struct {
	b       []byte // what has come
	at, end int    // where it reads, and where the message ends: perhaps beyond what has come
	stopped Status
}

func newReader(b []byte) reader { return reader{b: b, end: len(b)} }

func (r *reader) ok() bool   { return r.stopped == 0 }
func (r *reader) more() bool { return r.ok() && r.at < r.end }

// refuse says that the message contradicts itself or the protocol. A reader that has stopped already stays as it is, so what it
// returned may be judged without asking whether it was read.
func (r *reader) refuse() { r.stop(Nothing) }

func (r *reader) stop(s Status) {
	if r.ok() {
		r.stopped = s
	}
}

func (r *reader) take(n int) []byte {
	switch {
	case !r.ok():
		return nil
	case n > r.end-r.at:
		r.stopped = Nothing
		return nil
	case n > len(r.b)-r.at: // also where at is beyond what has come
		r.stopped = More
		return nil
	}
	r.at += n
	return r.b[r.at-n : r.at]
}

// part is the message's next n bytes, as a message, whether they have come or not; r goes on behind them.
func (r *reader) part(n int) reader {
	if n > r.end-r.at {
		r.refuse()
	}
	if !r.ok() {
		return reader{stopped: r.stopped}
	}
	r.at += n
	return reader{b: r.b, at: r.at - n, end: r.at}
}

// rest is what has come of the message's rest.
func (r *reader) rest() []byte {
	if !r.ok() || r.at > len(r.b) {
		return nil
	}
	return r.b[r.at:min(r.end, len(r.b))]
}

// peek is the byte that take would begin with, or zero.
func (r *reader) peek() byte {
	if b := r.rest(); len(b) > 0 {
		return b[0]
	}
	return 0
}

// number is big-endian, of at most 4 bytes.
func (r *reader) number(bytes int) int {
	n := 0
	for _, c := range r.take(bytes) {
		n = n<<8 | int(c)
	}
	return n
}

// varint is RFC 9000 section 16.
func (r *reader) varint() uint64 {
	first := r.take(1)
	if first == nil {
		return 0
	}
	n := uint64(first[0] & 0x3f)
	for _, c := range r.take(1<<(first[0]>>6) - 1) {
		n = n<<8 | uint64(c)
	}
	return n
}

// length is a varint that counts bytes of the message: a larger one than any message is as wrong as it was.
func (r *reader) length() int { return int(min(r.varint(), math.MaxInt32)) }
