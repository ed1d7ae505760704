package sniff

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

// seeds are one of everything that the other tests know.
func seeds(t testing.TB) [][]byte {
	return [][]byte{
		readHex(t, "chromium-tls.hex"),
		inRecords(makeHello(extension{0x0a0a, nil}, serverNameOf("a.example"), extension{extensionECH, make([]byte, 9)}), 20),
		[]byte("GET / HTTP/1.1\r\nAccept: */*\r\nHost: a.example:80\r\n\r\n"),
		[]byte("CONNECT a.example:443 HTTP/1.1\r\n"),
		[]byte("POST http://u@a.example/x HTTP/1.0\nX: y\n z\n\n"),
		h2(settings, frame(frameWindow, 0, 0, 0, 1, 0, 0), frame(frameHeaders, flagPadded|flagPriority, 1,
			slices.Concat([]byte{1, 0, 0, 0, 0, 15}, fields(t, ":method", "GET", ":authority", "a.example", "x", "y"), []byte{0})...),
			frame(frameContinuation, flagEndHeaders, 1, fields(t, "host", "b.example")...)),
		[]byte("SSH-2.0-x\r\n"),
	}
}

// FuzzStream: an answer is in the normal form, and stands whatever comes after it.
func FuzzStream(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b, uint(len(b)/2))
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint) {
		whole := Stream(b)
		checkForm(t, whole)
		at %= uint(len(b)) + 1
		part := Stream(b[:at:at])
		checkForm(t, part)
		if part.Status != More && part != whole {
			t.Errorf("%+v after %d bytes, and %+v after %d", part, at, whole, len(b))
		}
		if part.Status == More && part.Name != "" && whole.Status == Found && part.Name != whole.Name {
			t.Errorf("%+v after %d bytes, and %+v after %d", part, at, whole, len(b))
		}
		if len(b) >= MaxStream && whole.Status == More {
			t.Errorf("it waits for more than %d bytes", len(b))
		}
	})
}

func checkForm(t *testing.T, r Result) {
	t.Helper()
	name, ok := hostName(r.Name)
	switch {
	case r.Status < More || r.Status > Nothing,
		r.Status == Found && (!ok || name != r.Name || r.Protocol == 0),
		r.Status == Nothing && r.Name != "":
		t.Errorf("%+v", r)
	}
}

// FuzzClientHello: where Go's server reads a name, so do we, and the same.
func FuzzClientHello(f *testing.F) {
	f.Add(readHex(f, "chromium-tls.hex")[5:])
	f.Add(makeHello(extension{0x0a0a, nil}, serverNameOf("a.example"), extension{43, []byte{2, 3, 4}}))
	f.Add(makeHello(serverNameOf("a.example", "b.example")))
	f.Fuzz(func(t *testing.T, message []byte) {
		if !complete(message) || len(message) > MaxStream {
			return
		}
		message = message[:4+int(message[1])<<16+int(message[2])<<8+int(message[3])]
		got := clientHello(message, ProtocolTLS)
		checkForm(t, got)
		if got.Status == More {
			t.Fatal("more of a whole message")
		}
		name, read := goServerName(message)
		if !read || !plausible(message) {
			return
		}
		if want, ok := hostName(name); ok && (got.Status != Found || got.Name != want) || !ok && got.Status == Found {
			t.Errorf("%+v, and Go's server reads %q", got, name)
		}
	})
}

// plausible reports whether a hello has what every client's has, and Go's server looks for only after it has read the name:
// TLS's major version (DTLS has another), a session of at most 32 bytes, cipher suites, and compression methods.
func plausible(message []byte) bool {
	session := int(message[38])
	suites := message[39+session:]
	n := int(suites[0])<<8 | int(suites[1])
	return message[4] == 3 && session <= 32 && n > 0 && suites[2+n] > 0
}

var errSeen = errors.New("seen")

// goServerName is what crypto/tls reads; false if it refuses the hello.
func goServerName(message []byte) (name string, read bool) {
	config := &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		name, read = hello.ServerName, true
		return nil, errSeen
	}}
	conn := &given{Reader: bytes.NewReader(inRecords(message, maxRecord))}
	tls.Server(conn, config).HandshakeContext(context.Background())
	return name, read
}

// given is a connection on which everything has come, and to which nobody listens.
type given struct{ *bytes.Reader }

func (given) Write(b []byte) (int, error)      { return len(b), nil }
func (given) Close() error                     { return nil }
func (given) LocalAddr() net.Addr              { return nil }
func (given) RemoteAddr() net.Addr             { return nil }
func (given) SetDeadline(time.Time) error      { return nil }
func (given) SetReadDeadline(time.Time) error  { return nil }
func (given) SetWriteDeadline(time.Time) error { return nil }

// FuzzHTTP1: where net/http reads a host, so do we, and the same.
func FuzzHTTP1(f *testing.F) {
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: a.example:80\r\n\r\n", "OPTIONS * HTTP/1.0\nX: y\n z\nhost:\ta.example \n\n",
		"CONNECT a.example:443 HTTP/1.1\r\nHost: b.example\r\n\r\n", "GET http://u:p@a.example:1/?x HTTP/1.1\r\n\r\n",
		"GET a://u@/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "CONNECT /@ HTTP/1.1\r\nHost:\r\n a.example\r\n\r\n",
	} {
		f.Add(request)
	}
	f.Fuzz(func(t *testing.T, request string) {
		got := Stream([]byte(request))
		checkForm(t, got)
		if len(request) > MaxStream || strings.HasPrefix(request, "PRI * HTTP/2.0") {
			return
		}
		read, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
		if err != nil {
			return
		}
		if strings.TrimLeft(read.Method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-_") != "" || len(read.Method) > maxMethod || read.Proto[:7] != "HTTP/1." {
			return // methods that common servers refuse
		}
		if want, ok := hostName(withoutPort(read.Host)); ok && (got.Status != Found || got.Name != want) {
			t.Errorf("%+v, and net/http reads %q", got, read.Host)
		}
	})
}

// FuzzHPACK: where golang.org/x/net reads fields, so do we, and the same authority.
func FuzzHPACK(f *testing.F) {
	f.Add(fields(f, ":method", "GET", ":authority", "a.example", "x", "y"))
	f.Add(fields(f, "accept", "*/*", "x", "y", "x", "y", "host", "a.example"))
	f.Add([]byte("\x3f\xe1\x1f\x40\x04host\x03a.b"))
	f.Fuzz(func(t *testing.T, block []byte) {
		got, status := requestAuthority(block, true)
		if status == More {
			t.Fatal("more of a whole block")
		}
		read, err := hpack.NewDecoder(4096, nil).DecodeFull(block)
		if err != nil || len(block) > 4000 {
			return
		}
		want, wanted := "", Nothing
		regular := false
		for _, f := range read {
			if f.Name == "" || f.IsPseudo() && regular {
				break
			}
			if f.Name == ":authority" || f.Name == "host" {
				want, wanted = f.Value, Found
				break
			}
			regular = regular || !f.IsPseudo()
		}
		if got != want || status != wanted {
			t.Errorf("%q, %v, and golang.org/x/net reads %q, %v in %v", got, status, want, wanted, read)
		}
	})
}

// FuzzQUIC feeds datagrams: 2 bytes of length and so many of content.
func FuzzQUIC(f *testing.F) {
	one := func(datagrams ...[]byte) (all []byte) {
		for _, b := range datagrams {
			all = append(append(all, byte(len(b)>>8), byte(len(b))), b...)
		}
		return all
	}
	f.Add(one(readHex(f, "rfc9001-a2.hex")))
	f.Add(one(readHex(f, "rfc9369-a2.hex")))
	f.Add(one(readHex(f, "chromium-quic-1.hex"), readHex(f, "chromium-quic-2.hex")))
	f.Add(one(longPacket(v1, 1, someID, 40), longPacket(v2, 1, nil, 60), []byte{0x40}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var q QUIC
		var last Result
		for r := newReader(b); r.more(); {
			d := r.take(min(r.number(2), len(b)-min(r.at, len(b))))
			QUICDatagram(d)
			before := bytes.Clone(d)
			got := q.Datagram(d)
			checkForm(t, got)
			if !bytes.Equal(before, d) {
				t.Fatal("it changed a datagram")
			}
			if last.Status == Found && got != last || last.Status == More && got.Status == Nothing && got.Protocol == 0 {
				t.Fatalf("%+v became %+v", last, got)
			}
			last = got
		}
	})
}

// FuzzQUICFrames feeds what is inside of packets, which nobody finds who has to guess the keys: first the frames' length, so that
// they come in two datagrams.
func FuzzQUICFrames(f *testing.F) {
	half := len(quicHello) / 2
	f.Add(slices.Concat([]byte{quicPing, 0, quicAck, 9, 1, 1, 0, 1, 1}, cryptoFrame(half, quicHello[half:]), cryptoFrame(0, quicHello[:half])), uint(70))
	f.Add(cryptoFrame(0, quicHello), uint(0))
	f.Add(append([]byte{quicAckECN}, appendVarint(nil, 1<<62-1)...), uint(3))
	f.Fuzz(func(t *testing.T, frames []byte, at uint) {
		if len(frames) > 16000 {
			return
		}
		at %= uint(len(frames)) + 1
		var q QUIC
		for i, part := range [][]byte{frames[:at], frames[at:]} {
			checkForm(t, q.Datagram(initial{version: v1, destination: someID, number: uint32(i), frames: part}.seal(t)))
		}
		if held := cap(q.hello.bytes) + 8*cap(q.hello.come); held > MaxStream+MaxStream/8 {
			t.Errorf("it holds %d bytes", held)
		}
	})
}
