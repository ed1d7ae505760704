package sniff

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"math"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// goHello is what Go's TLS client sends first: real records with a real ClientHello.
func goHello(t testing.TB, config *tls.Config) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tls.Client(theirs, config).Handshake() // it fails when we hang up
	}()
	defer func() {
		ours.Close()
		<-ended
	}()
	var b []byte
	for len(b) == 0 || !wholeRecords(b) {
		chunk := make([]byte, 64<<10)
		n, err := ours.Read(chunk)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, chunk[:n]...)
	}
	return b
}

func wholeRecords(b []byte) bool {
	message, ok := handshake(b)
	return ok && complete(message)
}

// inRecords is a handshake message, or anything, in records of at most n bytes.
func inRecords(message []byte, n int) []byte {
	var b []byte
	for part := range slices.Chunk(message, n) {
		b = append(b, recordHandshake, 3, 1)
		b = binary.BigEndian.AppendUint16(b, uint16(len(part)))
		b = append(b, part...)
	}
	return b
}

type extension struct {
	kind uint16
	body []byte
}

func serverNameOf(names ...string) extension {
	var list []byte
	for _, name := range names {
		list = append(list, serverNameHost)
		list = binary.BigEndian.AppendUint16(list, uint16(len(name)))
		list = append(list, name...)
	}
	return extension{extensionServerName, append(binary.BigEndian.AppendUint16(nil, uint16(len(list))), list...)}
}

// makeHello is a ClientHello with exactly these extensions.
func makeHello(extensions ...extension) []byte {
	var all []byte
	for _, e := range extensions {
		all = binary.BigEndian.AppendUint16(all, e.kind)
		all = binary.BigEndian.AppendUint16(all, uint16(len(e.body)))
		all = append(all, e.body...)
	}
	b := append([]byte{3, 3}, make([]byte, 32)...)
	b = append(b, 0)                // no session
	b = append(b, 0, 2, 0x13, 0x01) // one suite
	b = append(b, 1, 0)             // no compression
	b = binary.BigEndian.AppendUint16(b, uint16(len(all)))
	b = append(b, all...)
	return append([]byte{handshakeClientHello, byte(len(b) >> 16), byte(len(b) >> 8), byte(len(b))}, b...)
}

func foundTLS(name string) Result {
	return Result{Status: Found, Protocol: ProtocolTLS, Name: name}
}

func TestTLSOfGo(t *testing.T) {
	for _, c := range []struct {
		what   string
		config *tls.Config
		want   Result
	}{
		{"1.3", &tls.Config{ServerName: "www.example.com"}, foundTLS("www.example.com")},
		{"1.2", &tls.Config{ServerName: "www.example.com", MaxVersion: tls.VersionTLS12}, foundTLS("www.example.com")},
		{"1.0", &tls.Config{ServerName: "Www.EXAMPLE.com.", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}, foundTLS("www.example.com")},
		{"with ALPN", &tls.Config{ServerName: "a.example", NextProtos: []string{"h2", "http/1.1"}}, foundTLS("a.example")},
		{"to an address", &tls.Config{ServerName: "192.0.2.1"}, Result{Status: Nothing, Protocol: ProtocolTLS}},
		{"without a name", &tls.Config{InsecureSkipVerify: true}, Result{Status: Nothing, Protocol: ProtocolTLS}},
	} {
		t.Run(c.what, func(t *testing.T) {
			b := goHello(t, c.config)
			checkSplit(t, b, len(b), c.want)
			message, _ := handshake(b)
			for n := 1; n <= len(message); n++ {
				check(t, Stream(inRecords(message, n)), c.want)
			}
			small := inRecords(message, 1)
			checkSplit(t, small, len(small), c.want)
			checkSplit(t, append(b, "\x14\x03\x03\x00\x01\x01\x17\x03\x03"...), len(b), c.want) // early data follows
		})
	}
}

func TestTLSSaysWhatItKnowsOfAnUnfinishedHello(t *testing.T) {
	ends := len(makeHello(serverNameOf("a.example")))
	b := inRecords(makeHello(serverNameOf("a.example"), extension{extensionECH, make([]byte, 200)}), maxRecord)
	ends += 5
	check(t, Stream(b[:ends-1]), Result{Status: More, Protocol: ProtocolTLS})
	check(t, Stream(b[:ends]), Result{Status: More, Protocol: ProtocolTLS, Name: "a.example"})
	check(t, Stream(b[:len(b)-1]), Result{Status: More, Protocol: ProtocolTLS, Name: "a.example", ECH: true})
	check(t, Stream(b), Result{Status: Found, Protocol: ProtocolTLS, Name: "a.example", ECH: true})
}

func TestTLSWithECH(t *testing.T) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b := goHello(t, &tls.Config{
		ServerName: "secret.example", MinVersion: tls.VersionTLS13,
		EncryptedClientHelloConfigList: echConfigs("public.example", key.PublicKey().Bytes()),
	})
	if bytes.Contains(b, []byte("secret")) {
		t.Fatal("the hello is meant to hide the name")
	}
	checkSplit(t, b, len(b), Result{Status: Found, Protocol: ProtocolTLS, Name: "public.example", ECH: true})
}

// echConfigs is an ECHConfigList with one configuration: RFC 9849 section 4.
func echConfigs(public string, key []byte) []byte {
	c := []byte{1, 0, 0x20} // its number, DHKEM(X25519, HKDF-SHA256)
	c = append(binary.BigEndian.AppendUint16(c, uint16(len(key))), key...)
	c = append(c, 0, 4, 0, 1, 0, 1) // HKDF-SHA256, AES-128-GCM
	c = append(c, 64, byte(len(public)))
	c = append(append(c, public...), 0, 0)
	c = append(binary.BigEndian.AppendUint16([]byte{0xfe, 0x0d}, uint16(len(c))), c...)
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(c))), c...)
}

func TestTLSExtensions(t *testing.T) {
	grease := extension{0x5a5a, nil}
	nothing := Result{Status: Nothing, Protocol: ProtocolTLS}
	for _, c := range []struct {
		what       string
		extensions []extension
		want       Result
	}{
		{"GREASE before and after", []extension{grease, serverNameOf("a.example"), {0x1a1a, []byte{0}}}, foundTLS("a.example")},
		{"ECH before", []extension{{extensionECH, make([]byte, 9)}, serverNameOf("a.example")}, Result{Found, ProtocolTLS, "a.example", true}},
		{"ECH alone", []extension{{extensionECH, make([]byte, 9)}}, Result{Nothing, ProtocolTLS, "", true}},
		{"empty block", nil, nothing},
		{"no name", []extension{grease}, nothing},
		{"no names in the list", []extension{serverNameOf()}, nothing},
		{"empty body", []extension{{extensionServerName, nil}}, nothing},
		{"empty name", []extension{serverNameOf("")}, nothing},
		{"an address", []extension{serverNameOf("192.0.2.1")}, nothing},
		{"a port", []extension{serverNameOf("a.example:443")}, nothing},
		{"a name with a NUL", []extension{serverNameOf("a.example\x00")}, nothing},
		{"two extensions", []extension{serverNameOf("a.example"), serverNameOf("b.example")}, nothing},
		{"two names", []extension{serverNameOf("a.example", "b.example")}, foundTLS("a.example")},
		{"another kind of name first", []extension{{extensionServerName, []byte("\x00\x10\x07\x00\x01x\x00\x00\x09a.example")}}, foundTLS("a.example")},
		{"list shorter than the body", []extension{{extensionServerName, []byte("\x00\x0b\x00\x00\x09a.example")}}, nothing},
		{"list longer than the body", []extension{{extensionServerName, []byte("\x00\x0d\x00\x00\x09a.example")}}, nothing},
		{"name longer than the list", []extension{{extensionServerName, []byte("\x00\x0c\x00\x00\x0aa.example")}}, nothing},
		{"half a number", []extension{{extensionServerName, []byte{0}}}, nothing},
	} {
		t.Run(c.what, func(t *testing.T) {
			if c.what == "list shorter than the body" {
				c.extensions[0].body = []byte("\x00\x0c\x00\x00\x09a.example\x00")
			}
			b := inRecords(makeHello(c.extensions...), maxRecord)
			check(t, Stream(b), c.want)
			for n := range b { // truncated anywhere it must not be found
				if got := Stream(b[:n]); got.Status == Found || c.want.Status == Found && got.Status == Nothing {
					t.Fatalf("at byte %d: %+v", n, got)
				}
			}
		})
	}
}

func TestTLSWhatIsNoHello(t *testing.T) {
	good := inRecords(makeHello(serverNameOf("a.example")), maxRecord)
	// Each change must show at the byte that it makes, at the latest that the field has.
	for _, c := range []struct {
		what   string
		change func(b []byte)
		at     int
		speaks Protocol
	}{
		{"version 2", func(b []byte) { b[1] = 2 }, 2, 0},
		{"version 3.5", func(b []byte) { b[2] = 5 }, 3, 0},
		{"empty record", func(b []byte) { b[3], b[4] = 0, 0 }, 5, 0},
		{"record beyond the limit", func(b []byte) { b[3], b[4] = 0x40, 1 }, 5, 0},
		{"server hello", func(b []byte) { b[5] = 2 }, 6, ProtocolTLS},
		{"longer than any", func(b []byte) { b[6] = 0xff }, 9, ProtocolTLS},
		{"shorter than any", func(b []byte) { b[8] = 10 }, 11, ProtocolTLS},
		{"DTLS", func(b []byte) { b[9] = 254 }, 11, ProtocolTLS},
		{"long session", func(b []byte) { b[43] = 33 }, 44, ProtocolTLS},
		{"no suites", func(b []byte) { b[45] = 0 }, 46, ProtocolTLS},
		{"odd suites", func(b []byte) { b[45] = 3 }, 46, ProtocolTLS},
		{"suites beyond the end", func(b []byte) { b[44] = 0xf0 }, 46, ProtocolTLS},
		{"no compression", func(b []byte) { b[48] = 0 }, 49, ProtocolTLS},
		{"extensions beyond the end", func(b []byte) { b[51]++ }, 52, ProtocolTLS},
		{"extensions before the end", func(b []byte) { b[51]-- }, 52, ProtocolTLS},
		{"extension beyond the end", func(b []byte) { b[55]++ }, 56, ProtocolTLS},
		{"list beyond the end", func(b []byte) { b[57]++ }, 58, ProtocolTLS},
	} {
		t.Run(c.what, func(t *testing.T) {
			b := bytes.Clone(good)
			c.change(b)
			want := Result{Status: Nothing, Protocol: c.speaks}
			for n := range len(b) + 1 {
				switch got := Stream(b[:n]); {
				case n < c.at && got.Status != More:
					t.Fatalf("at byte %d: %+v, want more until %d", n, got, c.at)
				case n >= c.at && got != want:
					t.Fatalf("at byte %d: %+v, want %+v from %d on", n, got, want, c.at)
				}
			}
		})
	}

	message := makeHello(serverNameOf("a.example"))
	alert := append(inRecords(message[:20], 20), "\x15\x03\x01\x00\x02\x02\x28"...)
	checkSplit(t, alert, 26, Result{Status: Nothing, Protocol: ProtocolTLS})
	known := append(inRecords(makeHello(serverNameOf("a.example"), extension{21, make([]byte, 100)})[:80], maxRecord), 21)
	check(t, Stream(known[:len(known)-1]), Result{Status: More, Protocol: ProtocolTLS, Name: "a.example"})
	check(t, Stream(known), Result{Status: Nothing, Protocol: ProtocolTLS})
	session := makeHello(extension{21, make([]byte, 100)})
	session[38] = 33
	check(t, Stream(inRecords(session[:39], maxRecord)), Result{Status: Nothing, Protocol: ProtocolTLS})
	session[38] = 32
	check(t, Stream(inRecords(session[:39], maxRecord)), Result{Status: More, Protocol: ProtocolTLS})
	old := inRecords(append([]byte{1, 0, 0, 41}, message[4:45]...), maxRecord) // SSL 3.0, without extensions
	checkSplit(t, old, len(old), Result{Status: Nothing, Protocol: ProtocolTLS})
}

func TestTLSOfManyBytes(t *testing.T) {
	fill := func(n int) extension { return extension{21, make([]byte, n)} } // padding: RFC 7685
	name := serverNameOf("a.example")
	bare := len(inRecords(makeHello(name, fill(0)), maxRecord))

	largest := inRecords(makeHello(fill(MaxStream-bare), name), maxRecord)
	if len(largest) != MaxStream {
		t.Fatalf("the hello has %d bytes, want %d", len(largest), MaxStream)
	}
	checkSplit(t, largest, MaxStream, foundTLS("a.example"))

	beyond := inRecords(makeHello(fill(MaxStream-bare+1), name), maxRecord)
	checkSplit(t, beyond, MaxStream, Result{Status: Nothing, Protocol: ProtocolTLS})

	early := inRecords(makeHello(name, fill(40_000)), 5_000)
	checkSplit(t, early[:20_000], MaxStream, foundTLS("a.example"))

	real := goHello(t, &tls.Config{ServerName: "a.example", NextProtos: slices.Repeat([]string{strings.Repeat("p", 250)}, 58)})
	if len(real) < 15_000 || len(real) > MaxStream {
		t.Fatalf("Go's hello has %d bytes, which is not what is to be tried", len(real))
	}
	checkSplit(t, real, len(real), foundTLS("a.example"))
}

// TestTLSOfSingleByteRecords: each byte of a hello costs six, and a real one still has room.
func TestTLSOfSingleByteRecords(t *testing.T) {
	b := inRecords(makeHello(serverNameOf("a.example"), extension{21, make([]byte, 2_000)}), 1)
	check(t, Stream(b), foundTLS("a.example"))

	stream := bytes.Repeat([]byte("\x16\x03\x01\x00\x01\x01"), MaxStream)
	if allocated := allocates(func() { Stream(stream) }); allocated > 2*MaxStream {
		t.Errorf("it allocated %d bytes for a stream of which it looks at %d", allocated, MaxStream)
	}
}

// allocates is how many bytes f allocates, at the least that is seen: other goroutines allocate too.
func allocates(f func()) uint64 {
	least := uint64(math.MaxUint64)
	for range 10 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	return least
}
