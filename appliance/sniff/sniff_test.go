package sniff

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// readHex is a file of testdata in hexadecimal, with white space.
func readHex(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil {
		t.Fatalf("reading %s: %v", name, err)
	}
	return b
}

func check(t *testing.T, got, want Result) {
	t.Helper()
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// checkSplit feeds a stream that grows byte by byte: the answer must come with the byte at the given place, be More before and
// never change afterwards.
func checkSplit(t *testing.T, b []byte, at int, want Result) {
	t.Helper()
	for n := range len(b) + 1 {
		got := Stream(b[:n:n])
		switch {
		case n < at && got.Status != More:
			t.Fatalf("at byte %d of %d: %+v, want more until byte %d", n, len(b), got, at)
		case n >= at && got != want:
			t.Fatalf("at byte %d of %d: %+v, want %+v from byte %d on", n, len(b), got, want, at)
		}
	}
}

func TestStreamOfOtherProtocols(t *testing.T) {
	for _, c := range []struct {
		what, first string
		at          int // the byte that gives it away
	}{
		{"ssh", "SSH-2.0-OpenSSH_9.2p1\r\n", 5},
		{"dns over tcp", "\x00\x1d\xab\xcd\x01\x00\x00\x01", 1},
		{"sslv2 hello", "\x80\x2e\x01\x03\x01", 1},
		{"smb", "\x00\x00\x00\x54\xfeSMB", 1},
		{"postgresql", "\x00\x00\x00\x08\x04\xd2\x16\x2f", 1},
		{"rdp", "\x03\x00\x00\x13", 1},
		{"mqtt", "\x10\x10\x00\x04MQTT", 1},
		{"redis", "*1\r\n$4\r\nPING\r\n", 1},
		{"bittorrent", "\x13BitTorrent protocol", 1},
		{"xmpp", "<?xml version='1.0'?>", 1},
		{"socks5", "\x05\x01\x00", 1},
		{"smtp", "EHLO client.example\r\n", 21},
		{"irc", "NICK a\r\nUSER", 8},
		{"memcached", "get key\r\n", 1},
		{"haproxy", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", 12},
		{"rtsp", "OPTIONS rtsp://host.example/ RTSP/1.0\r\n", 30},
		{"sip", "INVITE sip:bob@example.com SIP/2.0\r\n", 28},
		{"http/0.9", "GET /\r\n", 7},
		{"tls alert", "\x15\x03\x01\x00\x02\x01\x00", 1},
		{"server's preface", "\x00\x00\x12\x04\x00\x00\x00\x00\x00", 1},
	} {
		t.Run(c.what, func(t *testing.T) {
			checkSplit(t, []byte(c.first), c.at, Result{Status: Nothing})
		})
	}
}

func TestStreamIsBounded(t *testing.T) {
	endless := "GET / HTTP/1.1\r\nCookie: " + strings.Repeat("x", 2*MaxStream)
	check(t, Stream([]byte(endless[:MaxStream-1])), Result{Status: More, Protocol: ProtocolHTTP1})
	check(t, Stream([]byte(endless[:MaxStream])), Result{Status: Nothing, Protocol: ProtocolHTTP1})
	check(t, Stream([]byte(endless)), Result{Status: Nothing, Protocol: ProtocolHTTP1})

	late := endless[:MaxStream-20] + "\r\nHost: a.example\r\n"
	if len(late) != MaxStream-1 {
		t.Fatalf("the header is meant to end at the limit, and has %d bytes", len(late))
	}
	check(t, Stream([]byte(late)), Result{Status: Found, Protocol: ProtocolHTTP1, Name: "a.example"})
	check(t, Stream([]byte("GET / HTTP/1.1\r\n"+strings.Repeat("A: b\r\n", MaxStream)+"Host: a.example\r\n")), Result{Status: Nothing, Protocol: ProtocolHTTP1})
}

func TestHostName(t *testing.T) {
	label := strings.Repeat("a", 63)
	long := strings.Repeat(label+".", 3) + strings.Repeat("b", 61) // 253
	for text, want := range map[string]string{
		"example.com":         "example.com",
		"WWW.Example.COM.":    "www.example.com",
		"localhost":           "localhost",
		"_dmarc.a-b.example":  "_dmarc.a-b.example",
		"xn--bcher-kva.ch":    "xn--bcher-kva.ch",
		"192.0.2.1.example":   "192.0.2.1.example",
		"1e100.net":           "1e100.net",
		"a.1b":                "a.1b",
		label + ".example":    label + ".example",
		long:                  long,
		long + ".":            long,
		long + "c":            "",
		label + "a.example":   "",
		"":                    "",
		".":                   "",
		"..":                  "",
		".example.com":        "",
		"a..example":          "",
		"example.com..":       "",
		"192.0.2.1":           "",
		"192.0.2.1.":          "",
		"127.1":               "",
		"2130706433":          "",
		"::1":                 "",
		"[2001:db8::1]":       "",
		"example.com:443":     "",
		"exa mple.com":        "",
		"example.com\x00.net": "",
		"bücher.example":      "",
		"a/b":                 "",
		"*.example.com":       "",
	} {
		if got, ok := hostName(text); got != want || ok != (want != "") {
			t.Errorf("hostName(%q) = %q, %v, want %q", text, got, ok, want)
		}
	}
}

func TestWords(t *testing.T) {
	if got := ProtocolQUIC.String() + " " + Protocol(0).String() + " " + Protocol(200).String(); got != "quic unknown unknown" {
		t.Error(got)
	}
	if got := Found.String() + " " + Status(0).String() + " " + Status(200).String(); got != "found invalid invalid" {
		t.Error(got)
	}
}

func TestStreamKeepsItsInput(t *testing.T) {
	b := []byte("GET / HTTP/1.1\r\nHost: WWW.Example.com\r\n\r\n")
	before := bytes.Clone(b)
	Stream(b)
	if !bytes.Equal(b, before) {
		t.Error("it changed the bytes that it was to look at")
	}
}
