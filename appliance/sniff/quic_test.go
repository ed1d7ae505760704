package sniff

import (
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// initial is a client's packet to be made: what the tests vary.
type initial struct {
	version                    uint32
	destination, source, token []byte
	keysOf                     []byte // nil: of destination
	number                     uint32
	numberSize                 int // 0: 4
	frames                     []byte
	size                       int // of the packet, with PADDING; 0: as it comes
}

// seal protects a packet as RFC 9001 section 5 says. It uses the keys that the package derives, which the vectors of the RFCs hold.
func (p initial) seal(t testing.TB) []byte {
	t.Helper()
	v := versionOf(p.version)
	if p.numberSize == 0 {
		p.numberSize = 4
	}
	b := []byte{0xc0 | v.initial<<4 | byte(p.numberSize-1)}
	b = binary.BigEndian.AppendUint32(b, p.version)
	b = append(append(b, byte(len(p.destination))), p.destination...)
	b = append(append(b, byte(len(p.source))), p.source...)
	b = append(appendVarint(b, uint64(len(p.token))), p.token...)
	const tag = 16
	padding := max(p.size-len(b)-2-p.numberSize-tag, 4) - len(p.frames) // enough for the sample
	frames := append(bytes.Clone(p.frames), make([]byte, max(padding, 0))...)
	b = binary.BigEndian.AppendUint16(b, 0x4000|uint16(p.numberSize+len(frames)+tag))
	at := len(b)
	number := binary.BigEndian.AppendUint32(nil, p.number)
	b = append(b, number[4-p.numberSize:]...)

	if p.keysOf == nil {
		p.keysOf = p.destination
	}
	keys := deriveKeys(v, p.keysOf)
	nonce := bytes.Clone(keys.iv)
	for i, c := range number {
		nonce[len(nonce)-4+i] ^= c
	}
	b = keys.payload.Seal(b, nonce, frames, b)
	var mask [aes.BlockSize]byte
	keys.header.Encrypt(mask[:], b[at+4:][:aes.BlockSize])
	b[0] ^= mask[0] & 0x0f
	for i := range p.numberSize {
		b[at+i] ^= mask[1+i]
	}
	return b
}

func appendVarint(b []byte, n uint64) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n))
	case n < 1<<14:
		return binary.BigEndian.AppendUint16(b, 1<<14|uint16(n))
	case n < 1<<30:
		return binary.BigEndian.AppendUint32(b, 2<<30|uint32(n))
	}
	return binary.BigEndian.AppendUint64(b, 3<<62|n)
}

func cryptoFrame(offset int, data []byte) []byte {
	b := appendVarint([]byte{quicCrypto}, uint64(offset))
	return append(appendVarint(b, uint64(len(data))), data...)
}

func foundQUIC(name string) Result {
	return Result{Status: Found, Protocol: ProtocolQUIC, Name: name}
}

var (
	v1, v2    = quicVersions[0].number, quicVersions[1].number
	quicMore  = Result{Status: More, Protocol: ProtocolQUIC}
	someID    = []byte("\x83\x94\xc8\xf0\x3e\x51\x57\x08")
	quicHello = makeHello(extension{0x0a0a, nil}, extension{57, make([]byte, 60)}, serverNameOf("quic.example"), extension{51, make([]byte, 600)})
)

// TestQUICOfTheRFCs reads the packets of RFC 9001 appendix A.2 and RFC 9369 appendix A.2.
func TestQUICOfTheRFCs(t *testing.T) {
	for _, name := range []string{"rfc9001-a2.hex", "rfc9369-a2.hex"} {
		t.Run(name, func(t *testing.T) {
			b := readHex(t, name)
			if QUICDatagram(b) != InitialDatagram {
				t.Error("it does not look like an Initial")
			}
			before := bytes.Clone(b)
			var q QUIC
			check(t, q.Datagram(b), foundQUIC("example.com"))
			if !bytes.Equal(b, before) {
				t.Error("it changed the datagram, which is to be sent on")
			}
			check(t, q.Datagram(nil), foundQUIC("example.com"))
			for n := range b {
				var q QUIC
				check(t, q.Datagram(b[:n:n]), Result{Status: Nothing})
				if QUICDatagram(b[:n:n]) == InitialDatagram {
					t.Errorf("%d bytes look like an Initial", n)
				}
			}
			for i := range b { // a changed bit anywhere: none opens
				b[i] ^= 1
				var q QUIC
				check(t, q.Datagram(b), Result{Status: Nothing})
				b[i] ^= 1
			}
		})
	}
}

func TestQUICPackets(t *testing.T) {
	frames := cryptoFrame(0, quicHello)
	id20 := bytes.Repeat([]byte{7}, 20)
	for _, c := range []struct {
		what string
		p    initial
	}{
		{"v1", initial{version: v1, destination: someID}},
		{"v2", initial{version: v2, destination: someID}},
		{"full size", initial{version: v1, destination: someID, size: 1200}},
		{"no connection IDs", initial{version: v1}},
		{"long connection IDs", initial{version: v2, destination: id20, source: id20}},
		{"token", initial{version: v1, destination: someID, token: make([]byte, 50)}},
		{"long token", initial{version: v2, destination: someID, token: make([]byte, 900)}},
		{"later number", initial{version: v1, destination: someID, number: 0xdeadbeef}},
		{"number of 1 byte", initial{version: v1, destination: someID, number: 200, numberSize: 1}},
		{"number of 2 bytes", initial{version: v1, destination: someID, number: 20000, numberSize: 2}},
		{"number of 3 bytes", initial{version: v2, destination: someID, number: 70000, numberSize: 3}},
	} {
		t.Run(c.what, func(t *testing.T) {
			c.p.frames = frames
			b := c.p.seal(t)
			var q QUIC
			check(t, q.Datagram(b), foundQUIC("quic.example"))
			for n := range b {
				var q QUIC
				check(t, q.Datagram(b[:n:n]), Result{Status: Nothing})
			}
		})
	}

	long := initial{version: v1, destination: bytes.Repeat([]byte{7}, 21), frames: frames}.seal(t)
	var q QUIC
	check(t, q.Datagram(long), Result{Status: Nothing})
}

func TestQUICFrames(t *testing.T) {
	ack := append([]byte{quicAck}, 9, 1, 2, 0, 1, 1, 1, 1)
	ecn := append([]byte{quicAckECN}, 0x40, 9, 1, 0, 0, 1, 2, 3)
	whole := cryptoFrame(0, quicHello)
	half := len(quicHello) / 2
	for _, c := range []struct {
		what   string
		frames [][]byte
		want   Result
	}{
		{"padding, ping and ack before", [][]byte{make([]byte, 10), {quicPing}, ack, ecn, whole}, foundQUIC("quic.example")},
		{"nothing yet", [][]byte{{quicPing}, ack}, quicMore},
		{"out of order", [][]byte{cryptoFrame(half, quicHello[half:]), {quicPing}, cryptoFrame(0, quicHello[:half])}, foundQUIC("quic.example")},
		{"overlapping", [][]byte{cryptoFrame(half-100, quicHello[half-100:]), cryptoFrame(0, quicHello[:half+100])}, foundQUIC("quic.example")},
		{"contradicting", [][]byte{whole, cryptoFrame(0, makeHello(serverNameOf("other.example")))}, foundQUIC("quic.example")},
		{"empty ones", [][]byte{cryptoFrame(0, nil), cryptoFrame(half, nil), whole}, foundQUIC("quic.example")},
		{"a gap", [][]byte{cryptoFrame(half+1, quicHello[half+1:]), cryptoFrame(0, quicHello[:half])}, Result{More, ProtocolQUIC, "quic.example", false}},
		{"only the end", [][]byte{cryptoFrame(half, quicHello[half:])}, quicMore},
		{"beyond what is kept", [][]byte{cryptoFrame(1<<30, quicHello), whole}, foundQUIC("quic.example")},
		{"an offset beyond any", [][]byte{append(appendVarint([]byte{quicCrypto}, 1<<62-1), 1, 0), whole}, foundQUIC("quic.example")},
		{"a frame beyond the packet", [][]byte{appendVarint([]byte{quicCrypto, 0}, 1<<62-1), whole}, quicMore},
		{"ranges without end", [][]byte{append([]byte{quicAck, 9, 1}, appendVarint(nil, 1<<62-1)...), whole}, quicMore},
		{"a close before", [][]byte{{0x1c, 0, 0, 0}, whole}, quicMore},
		{"what may not be there", [][]byte{{0x08}, whole}, quicMore},
		{"no hello", [][]byte{cryptoFrame(0, []byte{2, 0, 0, 90})}, Result{Status: Nothing, Protocol: ProtocolQUIC}},
		{"no name", [][]byte{cryptoFrame(0, makeHello(extension{57, nil}))}, Result{Status: Nothing, Protocol: ProtocolQUIC}},
	} {
		t.Run(c.what, func(t *testing.T) {
			var q QUIC
			check(t, q.Datagram(initial{version: v1, destination: someID, frames: slices.Concat(c.frames...)}.seal(t)), c.want)
		})
	}
}

// TestQUICInPieces is what browsers do on purpose: small CRYPTO frames in any order, over several datagrams which come in any order
// and perhaps twice.
func TestQUICInPieces(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var frames [][]byte
		for at := 0; at < len(quicHello); {
			n := min(1+random.IntN(120), len(quicHello)-at)
			from := max(at-random.IntN(3)*random.IntN(20), 0) // sometimes again what was there
			frames = append(frames, cryptoFrame(from, quicHello[from:at+n]))
			at += n
		}
		random.Shuffle(len(frames), func(i, j int) { frames[i], frames[j] = frames[j], frames[i] })
		var datagrams [][]byte
		for part := range slices.Chunk(frames, 1+random.IntN(len(frames))) {
			datagrams = append(datagrams, initial{
				version: v1, destination: someID, number: uint32(len(datagrams)), frames: slices.Concat(part...), size: 1200,
			}.seal(t))
		}
		var q QUIC
		for i, d := range datagrams {
			if i > 0 && random.IntN(2) == 0 {
				d = slices.Concat(d, d)
			}
			got := q.Datagram(d)
			if last := i == len(datagrams)-1; last && got != foundQUIC("quic.example") || got.Status == Nothing {
				t.Fatalf("datagram %d of %d: %+v", i+1, len(datagrams), got)
			}
		}
	}
}

func TestQUICSplitAtEveryByte(t *testing.T) {
	for n := 1; n < len(quicHello); n++ {
		first := initial{version: v2, destination: someID, frames: cryptoFrame(0, quicHello[:n])}.seal(t)
		second := initial{version: v2, destination: someID, number: 1, frames: cryptoFrame(n, quicHello[n:])}.seal(t)
		var forward, backward, coalesced QUIC
		if got := forward.Datagram(first); got.Status != More {
			t.Fatalf("after %d bytes: %+v", n, got)
		}
		check(t, forward.Datagram(second), foundQUIC("quic.example"))
		check(t, backward.Datagram(second), quicMore)
		check(t, backward.Datagram(first), foundQUIC("quic.example"))
		check(t, coalesced.Datagram(slices.Concat(second, first)), foundQUIC("quic.example"))
	}
}

// longPacket is a packet with a long header that is not to be opened.
func longPacket(version uint32, kind byte, destination []byte, payload int) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0xc0 | kind<<4}, version)
	b = append(append(b, byte(len(destination))), destination...)
	b = append(b, 0)
	return append(appendVarint(b, uint64(payload)), make([]byte, payload)...)
}

// short is an Initial of so many bytes after its header, which nothing opens.
func short(n int) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0xc0}, v1)
	b = append(b, 0, 0, 0, byte(n)) // no IDs, no token
	return append(b, make([]byte, n)...)
}

func TestQUICCoalesced(t *testing.T) {
	hello := initial{version: v1, destination: someID, frames: cryptoFrame(0, quicHello)}.seal(t)
	other := initial{version: v1, destination: []byte("another"), frames: cryptoFrame(0, quicHello)}.seal(t)
	ping := initial{version: v1, destination: someID, frames: []byte{quicPing}}.seal(t)
	broken := bytes.Clone(hello)
	broken[len(broken)-1]++
	for _, c := range []struct {
		what    string
		packets [][]byte
		want    Result
	}{
		{"0-RTT after", [][]byte{hello, longPacket(v1, 1, someID, 300)}, foundQUIC("quic.example")},
		{"0-RTT before", [][]byte{longPacket(v1, 1, someID, 300), hello}, foundQUIC("quic.example")},
		{"Handshake before", [][]byte{longPacket(v1, 2, someID, 60), hello}, foundQUIC("quic.example")},
		{"a broken one before", [][]byte{broken, hello}, foundQUIC("quic.example")},
		{"1-RTT before", [][]byte{{0x40, 1, 2, 3}, hello}, Result{Status: Nothing}},
		{"zeros after", [][]byte{hello, make([]byte, 100)}, foundQUIC("quic.example")},
		{"another connection after", [][]byte{ping, other}, quicMore},
		{"another version before", [][]byte{longPacket(0x0a1a2a3a, 0, someID, 60), hello}, Result{Status: Nothing}},
		{"Retry before", [][]byte{longPacket(v1, 3, someID, 60), hello}, Result{Status: Nothing}},
		{"v2's Retry before", [][]byte{longPacket(v2, 0, someID, 60), hello}, Result{Status: Nothing}},
		{"version negotiation", [][]byte{longPacket(0, 0, someID, 60)}, Result{Status: Nothing}},
		{"1-RTT alone", [][]byte{{0x40, 1, 2, 3}}, Result{Status: Nothing}},
		{"nothing at all", nil, Result{Status: Nothing}},
		{"too short for a number", [][]byte{short(3)}, Result{Status: Nothing}},
		{"too short for a sample", [][]byte{short(19)}, Result{Status: Nothing}},
		{"too short for a tag", [][]byte{short(20)}, Result{Status: Nothing}},
	} {
		t.Run(c.what, func(t *testing.T) {
			var q QUIC
			b := slices.Concat(c.packets...)
			check(t, q.Datagram(b), c.want)
			if c.want == (Result{Status: Nothing}) { // it is not over for the flow
				check(t, q.Datagram(hello), foundQUIC("quic.example"))
			}
			var pending QUIC
			check(t, pending.Datagram(ping), quicMore)
			if c.want.Status == Nothing {
				check(t, pending.Datagram(b), quicMore)
			}
			check(t, pending.Datagram(hello), foundQUIC("quic.example"))
		})
	}
}

// TestQUICAfterRetry: the client begins again with the connection ID that the server gave it, a token, and the same hello.
func TestQUICAfterRetry(t *testing.T) {
	half := len(quicHello) / 2
	var q QUIC
	check(t, q.Datagram(initial{version: v1, destination: someID, frames: cryptoFrame(half, quicHello[half:])}.seal(t)), quicMore)
	again := initial{version: v1, destination: []byte("retried"), token: []byte("token"), number: 1}
	again.frames = cryptoFrame(0, quicHello[:half])
	check(t, q.Datagram(again.seal(t)), foundQUIC("quic.example"))

	again.frames = cryptoFrame(0, quicHello)
	var alone QUIC
	check(t, alone.Datagram(again.seal(t)), foundQUIC("quic.example"))
}

// TestQUICAfterAnAnswer: the client writes to the ID that the server chose, and keeps the keys.
func TestQUICAfterAnAnswer(t *testing.T) {
	half := 60
	first := initial{version: v1, destination: someID, frames: cryptoFrame(0, quicHello[:half])}.seal(t)
	second := initial{version: v1, destination: []byte("chosen"), keysOf: someID, number: 1, frames: cryptoFrame(half, quicHello[half:])}.seal(t)
	var q QUIC
	check(t, q.Datagram(first), quicMore)
	check(t, q.Datagram(second), foundQUIC("quic.example"))
	var late QUIC
	check(t, late.Datagram(second), Result{Status: Nothing})
}

func TestQUICIsBounded(t *testing.T) {
	fill := func(n int) extension { return extension{21, make([]byte, n)} }
	send := func(q *QUIC, hello []byte) (got Result) {
		for at := 0; at < len(hello) && got.Status <= More; at += 1000 {
			part := hello[at:min(at+1000, len(hello))]
			got = q.Datagram(initial{version: v1, destination: someID, frames: cryptoFrame(at, part)}.seal(t))
		}
		return got
	}
	name := serverNameOf("a.example")
	bare := len(makeHello(name, fill(0)))
	var largest, beyond, early QUIC
	check(t, send(&largest, makeHello(fill(MaxStream-bare), name)), foundQUIC("a.example"))
	check(t, send(&beyond, makeHello(fill(MaxStream-bare+1), name)), Result{Status: Nothing, Protocol: ProtocolQUIC})
	check(t, send(&early, makeHello(name, fill(40_000))), foundQUIC("a.example"))

	var q QUIC
	for at := MaxStream - 1; at > 0; at -= 1 + at/50 {
		q.Datagram(initial{version: v1, destination: someID, frames: cryptoFrame(at, []byte(strings.Repeat("x", 900)))}.seal(t))
	}
	var slow assembly
	for at := range MaxStream {
		slow.insert(at, []byte{1, 2, 3})
	}
	for _, a := range []*assembly{&q.hello, &slow} {
		if held := cap(a.bytes) + 8*cap(a.come); held != MaxStream+MaxStream/8 {
			t.Errorf("a handshake holds %d bytes", held)
		}
	}
	if keys := allocates(func() { deriveKeys(&quicVersions[0], someID) }); keys > 8<<10 {
		t.Errorf("deriving keys allocates %d bytes", keys)
	}
	if len(q.hello.beginning()) != 0 {
		t.Error("there is a beginning that nobody sent")
	}
}

// TestQUICDerivesKeysOnce: a datagram of many small packets, each with an ID of its own, would else cost a derivation for each.
func TestQUICDerivesKeysOnce(t *testing.T) {
	var b []byte
	for i := range byte(100) {
		b = append(b, initial{version: v1, destination: []byte{i}, frames: []byte{quicPing}}.seal(t)...)
	}
	one := testing.AllocsPerRun(10, func() { new(QUIC).Datagram(b[:len(b)/100]) })
	all := testing.AllocsPerRun(10, func() { new(QUIC).Datagram(b) })
	if all > one+10 {
		t.Errorf("100 packets cost %v allocations, and one %v", all, one)
	}
}

func TestQUICDatagram(t *testing.T) {
	b := initial{version: v1, destination: someID, size: 1200}.seal(t)
	for _, c := range []struct {
		what   string
		change func(b []byte) []byte
		want   Datagram
	}{
		{"v1", func(b []byte) []byte { return b }, InitialDatagram},
		{"larger", func(b []byte) []byte { return append(b, 0) }, InitialDatagram},
		{"smaller", func(b []byte) []byte { return b[:1199] }, HandshakeDatagram},
		{"empty", func([]byte) []byte { return nil }, OtherDatagram},
		{"short header", func(b []byte) []byte { b[0] &^= 0x80; return b }, OtherDatagram},
		{"no fixed bit", func(b []byte) []byte { b[0] &^= 0x40; return b }, OtherDatagram},
		{"0-RTT", func(b []byte) []byte { b[0] |= 0x10; return b }, HandshakeDatagram},
		{"v2's Retry", func(b []byte) []byte { copy(b[1:], "\x6b\x33\x43\xcf"); return b }, HandshakeDatagram},
		{"v2", func(b []byte) []byte { copy(b[1:], "\x6b\x33\x43\xcf"); b[0] |= 0x10; return b }, InitialDatagram},
		{"version negotiation", func(b []byte) []byte { copy(b[1:], "\x00\x00\x00\x00"); return b }, OtherDatagram},
		{"a draft", func(b []byte) []byte { copy(b[1:], "\xff\x00\x00\x1d"); return b }, OtherDatagram},
	} {
		if got := QUICDatagram(c.change(bytes.Clone(b))); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}
