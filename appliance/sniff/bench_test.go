package sniff

import (
	"strings"
	"testing"
)

func BenchmarkStream(b *testing.B) {
	chromium := readHex(b, "chromium-tls.hex")
	message, _ := handshake(chromium)
	request := fields(b, ":method", "GET", ":scheme", "http", ":path", "/", ":authority", "www.example.com", "user-agent", "x")
	for _, c := range []struct {
		what  string
		first []byte
	}{
		{"TLS/chromium", chromium},
		{"TLS/half", chromium[:len(chromium)/2]},
		{"TLS/records of 100 bytes", inRecords(message, 100)},
		{"TLS/largest", inRecords(makeHello(extension{21, make([]byte, 16_000)}, serverNameOf("a.example")), maxRecord)},
		{"HTTP1", []byte("GET / HTTP/1.1\r\nUser-Agent: x\r\nAccept: */*\r\nHost: www.example.com\r\n\r\n")},
		{"HTTP1/largest", []byte("GET / HTTP/1.1\r\nCookie: " + strings.Repeat("x", MaxStream))},
		{"HTTP2", h2(settings, frame(frameHeaders, flagEndHeaders, 1, request...))},
		{"SSH", []byte("SSH-2.0-OpenSSH_9.2p1\r\n")},
		{"hostile/records of 1 byte", inRecords(makeHello(extension{21, make([]byte, 16_000)}), 1)},
		{"hostile/lines of 1 byte", []byte("GET / HTTP/1.1\r\n" + strings.Repeat(":\n", MaxStream/2))},
		{"hostile/frames of 0 bytes", h2(settings, []byte(strings.Repeat("\x00\x00\x00\xfa\x00\x00\x00\x00\x00", MaxStream/9)))},
		{"hostile/fields of 1 byte", h2(settings, frame(frameHeaders, 0, 1, []byte(strings.Repeat("\xbe", 16_000))...))},
		{"hostile/huffman", h2(settings, frame(frameHeaders, 0, 1, fields(b, "x", strings.Repeat("o", 25_000))...))},
	} {
		b.Run(c.what, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Stream(c.first)
			}
		})
	}
}

func BenchmarkQUIC(b *testing.B) {
	one, two := readHex(b, "chromium-quic-1.hex"), readHex(b, "chromium-quic-2.hex")
	rfc := readHex(b, "rfc9001-a2.hex")
	var small []byte
	for i := range uint32(1200) {
		small = append(small, initial{version: v1, destination: someID, number: i, frames: []byte{quicPing}}.seal(b)...)
	}
	for _, c := range []struct {
		what      string
		datagrams [][]byte
	}{
		{"one datagram", [][]byte{rfc}},
		{"chromium", [][]byte{one, two}},
		{"not decryptable", [][]byte{append([]byte{0xc0}, rfc[1:]...)}},
		{"hostile/1200 packets in a datagram", [][]byte{small[:min(len(small), 65_000)]}},
		{"hostile/overlapping frames", [][]byte{initial{
			version: v1, destination: someID, frames: []byte(strings.Repeat("\x06\x7f\xff\x01x", 3_200)),
		}.seal(b)}},
	} {
		b.Run(c.what, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var q QUIC
				for _, d := range c.datagrams {
					q.Datagram(d)
				}
			}
		})
	}
}
