package sniff

import (
	"bytes"
	"net"
	"net/http"
	"slices"
	"testing"

	"golang.org/x/net/http2/hpack"
)

func frame(kind, flags, stream int, payload ...byte) []byte {
	n := len(payload)
	return append([]byte{
		byte(n >> 16), byte(n >> 8), byte(n), byte(kind), byte(flags),
		byte(stream >> 24), byte(stream >> 16), byte(stream >> 8), byte(stream),
	}, payload...)
}

// fields are pairs of names and values, encoded by golang.org/x/net.
func fields(t testing.TB, pairs ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	encoder := hpack.NewEncoder(&b)
	for pair := range slices.Chunk(pairs, 2) {
		if err := encoder.WriteField(hpack.HeaderField{Name: pair[0], Value: pair[1]}); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

var settings = frame(frameSettings, 0, 0, 0, 2, 0, 0, 0, 0)

func h2(frames ...[]byte) []byte {
	return slices.Concat([]byte(preface), slices.Concat(frames...))
}

func foundHTTP2(name string) Result {
	return Result{Status: Found, Protocol: ProtocolHTTP2, Name: name}
}

// TestHTTP2OfGo reads what net/http's client sends.
func TestHTTP2OfGo(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequest("GET", "http://"+listener.Addr().String()+"/path", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Host = "H2.example.com:8080"
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		transport.RoundTrip(request) // it fails when we hang up
	}()
	b := capture(t, listener)
	<-ended
	at := slices.IndexFunc(indexes(len(b)), func(n int) bool { return Stream(b[:n]).Status == Found })
	checkSplit(t, b, at, foundHTTP2("h2.example.com"))
}

func indexes(n int) (all []int) {
	for i := range n + 1 {
		all = append(all, i)
	}
	return all
}

// capture reads from one connection until the name is found, or it ends.
func capture(t testing.TB, listener net.Listener) []byte {
	t.Helper()
	c, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var b []byte
	for Stream(b).Status == More {
		chunk := make([]byte, 4096)
		n, err := c.Read(chunk)
		if err != nil {
			t.Fatalf("the client ended after %q: %v", b, err)
		}
		b = append(b, chunk[:n]...)
	}
	return b
}

func TestHTTP2(t *testing.T) {
	request := fields(t, ":method", "GET", ":authority", "a.example:80", ":path", "/", "x", "y")
	byHost := fields(t, ":method", "GET", ":path", "/", "accept", "*/*", "host", "b.example", "x", "y")
	none := fields(t, ":method", "GET", ":path", "/", "accept", "*/*")
	hidden := fields(t, "host", "b.example")
	nothing := Result{Status: Nothing, Protocol: ProtocolHTTP2}
	const both = flagEndHeaders | 1
	for _, c := range []struct {
		what   string
		frames [][]byte
		want   Result
	}{
		{"plain", [][]byte{settings, frame(frameHeaders, both, 1, request...)}, foundHTTP2("a.example")},
		{"empty settings", [][]byte{frame(frameSettings, 0, 0), frame(frameHeaders, both, 1, request...)}, foundHTTP2("a.example")},
		{"others before", [][]byte{
			settings, frame(frameWindow, 0, 0, 0, 1, 0, 0), frame(framePriority, 0, 3, 0, 0, 0, 0, 200), frame(framePing, 0, 0, make([]byte, 8)...),
			frame(frameSettings, flagAck, 0), frame(16, 0, 0, []byte("\x00\x00\x00\x01u=1")...), frame(0xfa, 0xff, 7, 1, 2, 3), frame(frameHeaders, both, 5, request...),
		}, foundHTTP2("a.example")},
		{"padding", [][]byte{settings, frame(frameHeaders, both|flagPadded, 1, slices.Concat([]byte{4}, request, make([]byte, 4))...)}, foundHTTP2("a.example")},
		{"priority", [][]byte{settings, frame(frameHeaders, both|flagPriority, 1, slices.Concat([]byte{0, 0, 0, 0, 15}, request)...)}, foundHTTP2("a.example")},
		{"padding and priority", [][]byte{settings, frame(frameHeaders, both|flagPadded|flagPriority, 1, slices.Concat([]byte{1, 0, 0, 0, 0, 15}, request, []byte{0})...)}, foundHTTP2("a.example")},
		{"continued", [][]byte{settings, frame(frameHeaders, 0, 1, request[:3]...), frame(frameContinuation, 0, 1), frame(frameContinuation, flagEndHeaders, 1, request[3:]...)}, foundHTTP2("a.example")},
		{"host", [][]byte{settings, frame(frameHeaders, both, 1, byHost...)}, foundHTTP2("b.example")},
		{"CONNECT", [][]byte{settings, frame(frameHeaders, flagEndHeaders, 1, fields(t, ":method", "CONNECT", ":authority", "c.example:443")...)}, foundHTTP2("c.example")},

		{"an address", [][]byte{settings, frame(frameHeaders, both, 1, fields(t, ":authority", "[2001:db8::1]:80")...)}, nothing},
		{"no authority", [][]byte{settings, frame(frameHeaders, both, 1, none...)}, nothing},
		{"no fields", [][]byte{settings, frame(frameHeaders, both, 1)}, nothing},
		{"a pseudo-header too late", [][]byte{settings, frame(frameHeaders, both, 1, fields(t, "x", "y", ":authority", "a.example")...)}, nothing},
		{"a pseudo-header too late, before a host", [][]byte{settings, frame(frameHeaders, both, 1, fields(t, "x", "y", ":path", "/", "host", "a.example")...)}, nothing},
		{"a name in the padding", [][]byte{settings, frame(frameHeaders, both|flagPadded, 1, slices.Concat([]byte{byte(len(hidden))}, none, hidden)...)}, nothing},
		{"a field without a name", [][]byte{settings, frame(frameHeaders, both, 1, fields(t, "", "y", "host", "a.example")...)}, nothing},
		{"no settings", [][]byte{frame(frameHeaders, both, 1, request...)}, nothing},
		{"an acknowledgement first", [][]byte{frame(frameSettings, flagAck, 0), frame(frameHeaders, both, 1, request...)}, nothing},
		{"a stream of the server's", [][]byte{settings, frame(frameHeaders, both, 2, request...)}, nothing},
		{"stream 0", [][]byte{settings, frame(frameHeaders, both, 0, request...)}, nothing},
		{"data first", [][]byte{settings, frame(frameData, 0, 1, 1), frame(frameHeaders, both, 1, request...)}, nothing},
		{"reset first", [][]byte{settings, frame(frameReset, 0, 1, 0, 0, 0, 0)}, nothing},
		{"a push", [][]byte{settings, frame(framePush, 0, 1, 0, 0, 0, 2)}, nothing},
		{"goodbye", [][]byte{settings, frame(frameGoAway, 0, 0, make([]byte, 8)...)}, nothing},
		{"continuation of nothing", [][]byte{settings, frame(frameContinuation, flagEndHeaders, 1, request...)}, nothing},
		{"another stream's continuation", [][]byte{settings, frame(frameHeaders, 0, 1, request[:3]...), frame(frameContinuation, flagEndHeaders, 3, request[3:]...)}, nothing},
		{"a frame between", [][]byte{settings, frame(frameHeaders, 0, 1, request[:3]...), frame(framePing, 0, 1, make([]byte, 8)...)}, nothing},
		{"too long a frame", [][]byte{settings, frame(0xfa, 0, 0, make([]byte, maxFrame+1)...)[:100]}, nothing},
		{"more padding than payload", [][]byte{settings, frame(frameHeaders, both|flagPadded, 1, 9, 1, 2)}, nothing},
		{"more padding than payload, to be continued", [][]byte{settings, frame(frameHeaders, flagPadded, 1, 9, 1, 2)}, nothing},
		{"no room for the padding's length", [][]byte{settings, frame(frameHeaders, both|flagPadded, 1)}, nothing},
		{"no room for the priority", [][]byte{settings, frame(frameHeaders, both|flagPriority, 1, 0, 0)}, nothing},
		{"fields that end too early", [][]byte{settings, frame(frameHeaders, both, 1, request[:4]...)}, nothing},
	} {
		t.Run(c.what, func(t *testing.T) {
			b := h2(c.frames...)
			check(t, Stream(b), c.want)
			decided := false
			for n := range len(b) + 1 {
				got := Stream(b[:n:n])
				switch {
				case got.Status == More:
					if decided {
						t.Fatalf("at byte %d: undecided again", n)
					}
				case got != c.want:
					t.Fatalf("at byte %d: %+v", n, got)
				default:
					decided = true
				}
			}
			// the name needs no more than its own bytes
			if c.want.Status == Found && Stream(b[:len(b)-1]).Status != Found && c.what != "CONNECT" {
				t.Error("the name came only with the request's end")
			}
		})
	}
}

func TestHTTP2PrefaceIsNotHTTP1(t *testing.T) {
	for n := 1; n < len(preface); n++ {
		check(t, Stream([]byte(preface[:n])), Result{Status: More})
		if n > len("PRI * HTTP/") {
			check(t, Stream([]byte(preface[:n]+"\x7f")), Result{Status: Nothing})
		}
	}
	check(t, Stream([]byte(preface)), Result{Status: More, Protocol: ProtocolHTTP2})
}

// TestHPACK tries the examples of RFC 7541 appendix C, and each representation.
func TestHPACK(t *testing.T) {
	for _, c := range []struct {
		what, block string
		want        string
		status      Status
	}{
		{"C.3.1", "\x82\x86\x84\x41\x0fwww.example.com", "www.example.com", Found},
		{"C.4.1", "\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff", "www.example.com", Found},
		{"not indexed", "\x01\x03a.b", "a.b", Found},
		{"never indexed", "\x11\x03a.b", "a.b", Found},
		{"a new name", "\x40\x0a:authority\x03a.b", "a.b", Found},
		{"from the table", "\x40\x02:a\x01y\x40\x01x\x01y\xbf\xbe\x40\x04host\x03a.b", "a.b", Found},
		{"names from the table", "\x40\x02:a\x01y\x40\x01x\x01y\x0f\x30\x01z\x7e\x01z\x66\x03a.b", "a.b", Found},
		{"a pseudo-header after one from the table", "\x40\x02:a\x01y\xbe\x41\x03a.b", "a.b", Found},
		{"static without a value", "\x81", "", Found},
		{"a size first", "\x3f\xe1\x1f\x41\x03a.b", "a.b", Found},
		{"index 0", "\x80", "", Nothing},
		{"too large a number", "\xff\xff\xff\xff\xff\xff\x01", "", Nothing},
		{"text beyond the end", "\x41\x04a.b", "", Nothing},
		{"EOS", "\x41\x84\xff\xff\xff\xff", "", Nothing},
		{"a byte of padding", "\x41\x82\x1f\xff", "", Nothing},
		{"wrong padding", "\x41\x81\x18", "", Nothing},
		{"nothing", "", "", Nothing},
	} {
		t.Run(c.what, func(t *testing.T) {
			got, status := requestAuthority([]byte(c.block), true)
			if got != c.want || status != c.status {
				t.Errorf("got %q, %v", got, status)
			}
			for n := range len(c.block) {
				if _, status := requestAuthority([]byte(c.block[:n]), false); c.status == Found && status == Nothing {
					t.Errorf("cut off at %d: %v", n, status)
				}
			}
		})
	}
}

func TestHuffman(t *testing.T) {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
		if i > 0 { // every two neighbours, so that every code begins at every bit
			checkHuffman(t, string([]byte{byte(i - 1), byte(i)}))
		}
		checkHuffman(t, string(all[i:i+1]))
	}
	checkHuffman(t, string(all))
	checkHuffman(t, "")
}

func checkHuffman(t *testing.T, s string) {
	t.Helper()
	got, ok := unhuffman(hpack.AppendHuffmanString(nil, s))
	if string(got) != s || !ok {
		t.Errorf("%q became %q, %v", s, got, ok)
	}
}

func TestStaticNames(t *testing.T) {
	decoder := hpack.NewDecoder(4096, nil)
	for i, name := range staticNames {
		fields, err := decoder.DecodeFull([]byte{0x80 | byte(i+1)})
		if err != nil || len(fields) != 1 || fields[0].Name != name {
			t.Errorf("%d is %q here, and %v, %v at golang.org/x/net", i+1, name, fields, err)
		}
	}
}
