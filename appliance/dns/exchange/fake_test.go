package exchange

import (
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// The servers here are ours, since no real one misbehaves on demand, and Debian has none for HTTP/3 and
// QUIC. Each has ended, with all its goroutines, when the test's cleanup is through.

// honest answers as asked.
func honest(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	switch q.Question[0].Qtype {
	case dns.TypeA:
		m.Answer = []dns.RR{truth(q.Question[0].Name)}
	case dns.TypeTXT: // too large for UDP
		for i := range 40 {
			m.Answer = append(m.Answer, &dns.TXT{
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: uint32(i)},
				Txt: []string{string(make([]byte, 200))},
			})
		}
	}
	return m
}

func pack(m *dns.Msg) []byte {
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func unpack(b []byte) *dns.Msg {
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		panic(err)
	}
	return m
}

func frame(m []byte) []byte { return append([]byte{byte(len(m) >> 8), byte(len(m))}, m...) }

// datagram is a question that came by UDP.
type datagram struct {
	*dns.Msg
	socket net.PacketConn
	from   net.Addr
}

func (d datagram) reply(b []byte) { d.socket.WriteTo(b, d.from) }

// serveUDP gives each question to handle, one at a time.
func serveUDP(t *testing.T, address string, handle func(datagram)) netip.AddrPort {
	t.Helper()
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			handle(datagram{unpack(b[:n]), c, from})
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-finished
	})
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// serveTCP gives each connection to handle, and closes it then.
func serveTCP(t *testing.T, address string, handle func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	connections := make(chan *net.TCPConn, 1<<14)
	all.Go(func() {
		defer close(connections)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			connections <- c.(*net.TCPConn)
			all.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		for c := range connections {
			c.Close()
		}
		all.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// converse answers each message on a stream until it ends, by what answer returns: nil is silence.
func converse(c net.Conn, answer func(*dns.Msg) []byte) {
	for {
		wire, err := readMessage(c)
		if err != nil {
			return
		}
		if b := answer(unpack(wire)); b != nil {
			c.Write(b)
		}
	}
}

func honestly(q *dns.Msg) []byte { return frame(pack(honest(q))) }

// server is a fake one that speaks a scheme. What it does to a question, behave says.
type server struct {
	url         string
	connections atomic.Int32
}

// act is what a fake server does with one question.
type act int

const (
	tell act = iota
	silence
	hangUp // the connection ends
	lie    // the answer is to another question
	babble // the answer is no dns message
	refuse // an error of the protocol, where it has one
)

// serve starts a fake server of a scheme, at an address. It is told the count of the connection, from
// 1, and of the question on it.
func serve(t *testing.T, scheme, address string, pair tls.Certificate, behave func(connection, question int) act) *server {
	t.Helper()
	s := &server{}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	var at netip.AddrPort
	switch scheme {
	case "tcp", "tls":
		at = serveTCP(t, address, func(c *net.TCPConn) {
			connection, question := int(s.connections.Add(1)), 0
			var stream net.Conn = c
			if scheme == "tls" {
				stream = tls.Server(c, config)
			}
			converse(stream, func(q *dns.Msg) []byte {
				question++
				a := behave(connection, question)
				if a == hangUp {
					c.Close()
				}
				if b := a.answer(q); b != nil {
					return frame(b)
				}
				return nil
			})
		})
	case "https":
		at = serveHTTPS(t, s, address, config, behave)
	case "h3":
		at = serveH3(t, s, address, config, behave)
	case "quic":
		at = serveDoQ(t, s, address, config, behave)
	default:
		t.Fatalf("no fake server for %s", scheme)
	}
	s.url = scheme + "://" + at.String()
	return s
}

// answer is what is sent for an act: nil where nothing is.
func (a act) answer(q *dns.Msg) []byte {
	m := honest(q)
	switch a {
	case tell:
	case lie:
		m.Question[0].Name = "evil.example."
	case babble:
		return append(pack(m)[:headerSize], 0xff, 0xff)
	default:
		return nil
	}
	return pack(m)
}

// handler answers by HTTP. With connection, a key of the request's context, it finds who asks.
func handler(counts *sync.Map, hang func(r *http.Request), behave func(connection, question int) act) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, _ := counts.Load(r.RemoteAddr)
		c := who.(*counted)
		body, _ := io.ReadAll(r.Body)
		if r.Method != "POST" || r.URL.Path != "/dns-query" || r.Header.Get("Content-Type") != mediaType || r.Header.Get("Accept") != mediaType {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		switch a := behave(c.number, int(c.questions.Add(1))); a {
		case silence:
			<-r.Context().Done()
		case hangUp:
			hang(r)
		case refuse:
			http.Error(w, "out of order", http.StatusServiceUnavailable)
		default:
			w.Header().Set("Content-Type", mediaType)
			w.Write(a.answer(unpack(body)))
		}
	})
}

// counted is a connection of an HTTP server.
type counted struct {
	number    int
	questions atomic.Int32
	end       func()
}

func serveHTTPS(t *testing.T, s *server, address string, config *tls.Config, behave func(connection, question int) act) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var counts sync.Map
	hang := func(r *http.Request) {
		c, _ := counts.Load(r.RemoteAddr)
		c.(*counted).end()
		<-r.Context().Done()
	}
	quiet := log.New(io.Discard, "", 0)
	h := &http.Server{ErrorLog: quiet, TLSConfig: config, Handler: handler(&counts, hang, behave), ConnState: func(c net.Conn, state http.ConnState) {
		if state == http.StateNew {
			counts.Store(c.RemoteAddr().String(), &counted{number: int(s.connections.Add(1)), end: func() { c.(*tls.Conn).NetConn().Close() }})
		}
	}}
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		h.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		h.Close()
		<-finished
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// listenQUIC gives each connection to handle.
func listenQUIC(t *testing.T, address string, config *tls.Config, protocol string, handle func(*quic.Conn)) netip.AddrPort {
	t.Helper()
	packets, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	transport := &quic.Transport{Conn: packets}
	config = config.Clone()
	config.NextProtos = []string{protocol}
	l, err := transport.Listen(config, nil)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept(t.Context())
			if err != nil {
				return
			}
			all.Go(func() { handle(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		transport.Close()
		packets.Close()
		all.Wait()
	})
	return packets.LocalAddr().(*net.UDPAddr).AddrPort()
}

func serveH3(t *testing.T, s *server, address string, config *tls.Config, behave func(connection, question int) act) netip.AddrPort {
	var counts sync.Map
	hang := func(r *http.Request) {
		c, _ := counts.Load(r.RemoteAddr)
		c.(*counted).end()
		<-r.Context().Done()
	}
	h := &http3.Server{Handler: handler(&counts, hang, behave)}
	return listenQUIC(t, address, config, "h3", func(c *quic.Conn) {
		counts.Store(c.RemoteAddr().String(), &counted{number: int(s.connections.Add(1)), end: func() { c.CloseWithError(0, "") }})
		h.ServeQUICConn(c)
	})
}

func serveDoQ(t *testing.T, s *server, address string, config *tls.Config, behave func(connection, question int) act) netip.AddrPort {
	return listenQUIC(t, address, config, "doq", func(c *quic.Conn) {
		connection := int(s.connections.Add(1))
		var questions atomic.Int32
		var all sync.WaitGroup
		defer all.Wait()
		for {
			stream, err := c.AcceptStream(c.Context())
			if err != nil {
				return
			}
			all.Go(func() {
				wire, err := readMessage(stream)
				if n, _ := stream.Read(make([]byte, 1)); err != nil || n != 0 || wire[0] != 0 || wire[1] != 0 {
					c.CloseWithError(2, "") // RFC 9250 section 4.3: DOQ_PROTOCOL_ERROR
					return
				}
				switch a := behave(connection, int(questions.Add(1))); a {
				case silence:
					<-stream.Context().Done()
				case hangUp:
					c.CloseWithError(0, "")
				case refuse:
					stream.CancelWrite(1)
				default:
					stream.Write(frame(a.answer(unpack(wire))))
					stream.Close()
				}
			})
		}
	})
}
