package sniff_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"sidegate/appliance/sniff"
)

func captured(t *testing.T, name string) []byte {
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

func TestChromiumTLS(t *testing.T) {
	b := captured(t, "chromium-tls.hex")
	want := sniff.Result{Status: sniff.Found, Protocol: sniff.ProtocolTLS, Name: "www.tls.example", ECH: true}
	for n := range len(b) {
		if got := sniff.Stream(b[:n:n]); got.Status != sniff.More {
			t.Fatalf("at byte %d of %d: %+v", n, len(b), got)
		}
	}
	if got := sniff.Stream(b); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestChromiumQUIC: Chromium cuts its hello into pieces, shuffles them and puts PING and PADDING between, over two datagrams.
func TestChromiumQUIC(t *testing.T) {
	datagrams := [][]byte{captured(t, "chromium-quic-1.hex"), captured(t, "chromium-quic-2.hex")}
	want := sniff.Result{Status: sniff.Found, Protocol: sniff.ProtocolQUIC, Name: "www.quic.example", ECH: true}
	for range 2 {
		var q sniff.QUIC
		for i, b := range datagrams {
			if sniff.QUICDatagram(b) != sniff.InitialDatagram {
				t.Errorf("datagram %d does not look like an Initial", i+1)
			}
			got := q.Datagram(b)
			if i == 0 && got.Status != sniff.More {
				t.Errorf("after one: %+v", got)
			}
			if i == 1 && got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		}
		slices.Reverse(datagrams)
	}
}

// TestClients runs Debian's own, which connect to a listener that reads, says nothing and hangs up.
func TestClients(t *testing.T) {
	for _, c := range []struct {
		command string // PORT is the listener's
		want    sniff.Result
	}{
		{"openssl s_client -connect 127.0.0.1:PORT -servername WWW.openssl.example", sniff.Result{Protocol: sniff.ProtocolTLS, Name: "www.openssl.example"}},
		{"openssl s_client -connect 127.0.0.1:PORT -tls1_2 -servername www.openssl.example", sniff.Result{Protocol: sniff.ProtocolTLS, Name: "www.openssl.example"}},
		{"openssl s_client -connect 127.0.0.1:PORT -noservername", sniff.Result{Protocol: sniff.ProtocolTLS}},
		{"openssl s_client -connect 127.0.0.1:PORT -max_send_frag 512 -split_send_frag 512 -alpn " + strings.Repeat("h2,", 200) + "h2 -servername a.example", sniff.Result{Protocol: sniff.ProtocolTLS, Name: "a.example"}},
		{"curl -sk --resolve www.curl.example:PORT:127.0.0.1 https://www.curl.example:PORT/", sniff.Result{Protocol: sniff.ProtocolTLS, Name: "www.curl.example"}},
		{"curl -sk https://127.0.0.1:PORT/", sniff.Result{Protocol: sniff.ProtocolTLS}},
		{"curl -s --resolve www.curl.example:PORT:127.0.0.1 http://www.curl.example:PORT/", sniff.Result{Protocol: sniff.ProtocolHTTP1, Name: "www.curl.example"}},
		{"curl -s http://127.0.0.1:PORT/", sniff.Result{Protocol: sniff.ProtocolHTTP1}},
		{"curl -s -x 127.0.0.1:PORT http://www.curl.example/", sniff.Result{Protocol: sniff.ProtocolHTTP1, Name: "www.curl.example"}},
		{"curl -s -p -x 127.0.0.1:PORT https://www.curl.example/", sniff.Result{Protocol: sniff.ProtocolHTTP1, Name: "www.curl.example"}},
		{"curl -s --http2 --resolve www.curl.example:PORT:127.0.0.1 http://www.curl.example:PORT/", sniff.Result{Protocol: sniff.ProtocolHTTP1, Name: "www.curl.example"}},
		{"curl -s --http2-prior-knowledge --resolve www.curl.example:PORT:127.0.0.1 http://www.curl.example:PORT/", sniff.Result{Protocol: sniff.ProtocolHTTP2, Name: "www.curl.example"}},
	} {
		t.Run(c.command[:min(len(c.command), 70)], func(t *testing.T) {
			words := strings.Fields(c.command)
			if _, err := exec.LookPath(words[0]); err != nil {
				t.Skipf("needs %s: %v", words[0], err)
			}
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			_, port, _ := net.SplitHostPort(listener.Addr().String())
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			client := exec.CommandContext(ctx, words[0])
			for _, word := range words[1:] {
				client.Args = append(client.Args, strings.ReplaceAll(word, "PORT", port))
			}
			client.Env = append(os.Environ(), "no_proxy=", "http_proxy=", "https_proxy=", "all_proxy=")
			if err := client.Start(); err != nil {
				t.Fatal(err)
			}
			defer client.Wait()
			context.AfterFunc(ctx, func() { listener.Close() })

			conn, err := listener.Accept()
			if err != nil {
				t.Fatalf("no connection came: %v", err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			var b []byte
			chunk := make([]byte, 4096)
			got := sniff.Stream(b)
			for got.Status == sniff.More {
				n, err := conn.Read(chunk)
				if err != nil {
					t.Fatalf("after %q: %v", b, err)
				}
				b = append(b, chunk[:n]...)
				got = sniff.Stream(b)
			}
			if c.want.Status = sniff.Found; c.want.Name == "" {
				c.want.Status = sniff.Nothing
			}
			if got != c.want {
				t.Errorf("got %+v, want %+v from %q", got, c.want, b)
			}
		})
	}
}

// wire keeps what a client sends.
type wire struct {
	net.PacketConn
	enough int // so many datagrams, and end is called
	end    func()

	mu   sync.Mutex
	sent [][]byte
}

func (w *wire) WriteTo(b []byte, to net.Addr) (int, error) {
	w.mu.Lock()
	w.sent = append(w.sent, bytes.Clone(b))
	if len(w.sent) == w.enough {
		w.end()
	}
	w.mu.Unlock()
	return w.PacketConn.WriteTo(b, to)
}

func (w *wire) datagrams() [][]byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.sent)
}

func loopback(t *testing.T) net.PacketConn {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// quicGo is all that quic-go's client sends to a server of its own until they have shaken hands.
func quicGo(t *testing.T, name string, client, server *quic.Config, retry bool) [][]byte {
	t.Helper()
	t.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	transport := &quic.Transport{Conn: loopback(t), VerifySourceAddress: func(net.Addr) bool { return retry }}
	defer transport.Close()
	listener, err := transport.Listen(&tls.Config{Certificates: []tls.Certificate{certificate(t)}, NextProtos: []string{"h3"}}, server)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()

	w := &wire{PacketConn: loopback(t)}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn, err := quic.Dial(ctx, w, listener.Addr(), &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: []string{"h3"}}, client)
	if err != nil {
		t.Fatal(err)
	}
	conn.CloseWithError(0, "")
	return w.datagrams()
}

func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// feed says what a flow of such datagrams is, and how many it took.
func feed(datagrams [][]byte) (sniff.Result, int) {
	var q sniff.QUIC
	var got sniff.Result
	for i, b := range datagrams {
		if got = q.Datagram(b); got.Status != sniff.More {
			return got, i + 1
		}
	}
	return got, len(datagrams)
}

func TestQUICGo(t *testing.T) {
	for _, c := range []struct {
		what    string
		version quic.Version
		retry   bool
	}{
		{"v1", quic.Version1, false},
		{"v2", quic.Version2, false},
		{"v1 with a retry", quic.Version1, true},
		{"v2 with a retry", quic.Version2, true},
	} {
		t.Run(c.what, func(t *testing.T) {
			config := &quic.Config{Versions: []quic.Version{c.version}}
			sent := quicGo(t, "www.quic-go.example", config, config, c.retry)
			want := sniff.Result{Status: sniff.Found, Protocol: sniff.ProtocolQUIC, Name: "www.quic-go.example"}
			if got, _ := feed(sent); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
			if sniff.QUICDatagram(sent[0]) != sniff.InitialDatagram {
				t.Error("the first datagram does not look like an Initial")
			}

			first := destination(sent[0])
			second := slices.IndexFunc(sent, func(b []byte) bool { return hasToken(b) })
			if c.retry != (second >= 0) {
				t.Fatalf("retried: %v, with token in datagram %d", c.retry, second)
			}
			if !c.retry {
				return
			}
			if bytes.Equal(first, destination(sent[second])) {
				t.Error("the connection ID is the same after the Retry")
			}
			if got, _ := feed(sent[second:]); got != want {
				t.Errorf("of what came after the Retry: %+v, want %+v", got, want)
			}
		})
	}
}

// TestQUICGoToNobody: what a client sends again and again, because nobody answers, tells the same in any order.
func TestQUICGoToNobody(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	w := &wire{PacketConn: loopback(t), enough: 4, end: cancel}
	_, err := quic.Dial(ctx, w, loopback(t).LocalAddr(), &tls.Config{ServerName: "silent.example", NextProtos: []string{"h3"}}, nil)
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("it is meant to be called off, and said %v", err)
	}
	sent := w.datagrams()
	want := sniff.Result{Status: sniff.Found, Protocol: sniff.ProtocolQUIC, Name: "silent.example"}
	if got, n := feed(sent); got != want || n == len(sent) {
		t.Fatalf("got %+v after %d of %d datagrams", got, n, len(sent))
	}
	slices.Reverse(sent)
	if got, _ := feed(sent); got != want {
		t.Errorf("in the other order: %+v", got)
	}
}

// destination is a long header's destination connection ID.
func destination(b []byte) []byte { return b[6:][:b[5]] }

func hasToken(b []byte) bool {
	if sniff.QUICDatagram(b) != sniff.InitialDatagram {
		return false
	}
	rest := b[6+int(b[5]):]
	return rest[1+int(rest[0])] != 0
}
