package exchange

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// forgeries are what an attacker, or a broken server, may send instead of the answer.
var forgeries = []struct {
	name  string
	forge func(q *dns.Msg) []byte
}{
	{"wrong id", func(q *dns.Msg) []byte { return evil(q, func(m *dns.Msg) { m.Id++ }) }},
	{"wrong name", func(q *dns.Msg) []byte { return evil(q, func(m *dns.Msg) { m.Question[0].Name = "evil.example." }) }},
	{"wrong type", func(q *dns.Msg) []byte { return evil(q, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }) }},
	{"wrong class", func(q *dns.Msg) []byte { return evil(q, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }) }},
	{"no question", func(q *dns.Msg) []byte { return evil(q, func(m *dns.Msg) { m.Question = nil }) }},
	{"two questions", func(q *dns.Msg) []byte {
		return evil(q, func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) })
	}},
	{"a query", func(q *dns.Msg) []byte { return evil(q, func(m *dns.Msg) { m.Response = false }) }},
	{"a notification", func(q *dns.Msg) []byte { return evil(q, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }) }},
	{"nothing", func(*dns.Msg) []byte { return []byte{} }},
	{"half a header", func(q *dns.Msg) []byte { return pack(honest(q))[:6] }},
	{"half a name", func(q *dns.Msg) []byte { return pack(honest(q))[:headerSize+3] }},
	{"half a record", func(q *dns.Msg) []byte { b := pack(honest(q)); return b[:len(b)-2] }},
	{"a name in a circle", func(q *dns.Msg) []byte { return append(pack(honest(q))[:headerSize], 0xc0, headerSize, 0, 1, 0, 1) }},
}

// evil is an answer with another address, changed.
func evil(q *dns.Msg, change func(*dns.Msg)) []byte {
	m := honest(q)
	m.Answer = []dns.RR{&dns.A{Hdr: *truth(q.Question[0].Name).Header(), A: net.IPv4(6, 6, 6, 6)}}
	change(m)
	return pack(m)
}

// TestForgedDatagrams has each forgery come before the answer, which must be waited for.
func TestForgedDatagrams(t *testing.T) {
	noLeaks(t)
	for _, f := range forgeries {
		t.Run(f.name, func(t *testing.T) {
			at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
				d.reply(f.forge(d.Msg))
				d.reply(pack(honest(d.Msg)))
			})
			wantA(t, upstream(t, "udp://"+at.String(), Options{}), "www.example.")
		})
	}
}

// anywhere is a Dialer whose UDP sockets take datagrams from anybody, as those of a detour do.
type anywhere struct{ Dialer }

func (anywhere) Packets(ctx context.Context, to netip.AddrPort) (net.PacketConn, error) {
	return net.ListenPacket("udp", "127.0.0.1:0")
}

// TestForgedSource has the perfect forgery come from another port. With a connected socket the kernel
// drops it, with another one we do.
func TestForgedSource(t *testing.T) {
	noLeaks(t)
	for _, d := range []Dialer{Direct(nil), anywhere{Direct(nil)}} {
		other, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
			other.WriteTo(evil(d.Msg, func(*dns.Msg) {}), d.from)
			d.reply(pack(honest(d.Msg)))
		})
		wantA(t, upstream(t, "udp://"+at.String(), Options{Dialer: d}), "www.example.")
	}
}

// TestGuessed has a server's address send many wrong answers: the question goes by TCP.
func TestGuessed(t *testing.T) {
	noLeaks(t)
	var byTCP atomic.Int32
	at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
		for i := range uint16(maxWrong + 1) {
			d.reply(evil(d.Msg, func(m *dns.Msg) { m.Id += i + 1 }))
		}
	})
	serveTCP(t, at.String(), func(c *net.TCPConn) {
		converse(c, func(q *dns.Msg) []byte {
			byTCP.Add(1)
			return honestly(q)
		})
	})
	wantA(t, upstream(t, "udp://"+at.String(), Options{}), "www.example.")
	if byTCP.Load() != 1 {
		t.Errorf("%d questions by tcp", byTCP.Load())
	}
}

// TestTruncated wants TCP after a truncated answer, whatever else is in it, and never its content.
func TestTruncated(t *testing.T) {
	noLeaks(t)
	at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
		b := evil(d.Msg, func(m *dns.Msg) { m.Truncated = true })
		d.reply(b[:len(b)-2])
	})
	u := upstream(t, "udp://"+at.String(), Options{})
	err := wantError(t, u, time.Second, "asking again by tcp: connecting: "+at.String()+": ", "connection refused")
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v is not ECONNREFUSED", err)
	}
	serveTCP(t, at.String(), func(c *net.TCPConn) { converse(c, honestly) })
	wantA(t, u, "www.example.")
}

// TestLost loses the first datagram, or all but the last.
func TestLost(t *testing.T) {
	for lost := range len(resend) + 1 {
		t.Run(fmt.Sprint(lost), func(t *testing.T) {
			noLeaks(t)
			n := 0
			at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
				if n++; n > lost {
					d.reply(pack(honest(d.Msg)))
				}
			})
			wantA(t, upstream(t, "udp://"+at.String(), Options{Timeout: 500 * time.Millisecond, Overtime: 5 * time.Second}), "www.example.")
		})
	}
}

// TestLate takes the answer to the first sending when the timeout is over, as long as there is overtime, and no longer.
func TestLate(t *testing.T) {
	for _, overtime := range []time.Duration{0, 10 * time.Second} {
		t.Run(overtime.String(), func(t *testing.T) {
			noLeaks(t)
			const timeout = 100 * time.Millisecond
			var first datagram
			sendings := 0
			at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
				if sendings++; sendings == 1 {
					first = d
				}
				if sendings == len(resend)+1 { // the last one, when the timeout is over
					first.reply(pack(honest(first.Msg)))
				}
			})
			u := upstream(t, "udp://"+at.String(), Options{Timeout: timeout, Overtime: overtime})
			if overtime == 0 {
				wantError(t, u, timeout+5*time.Second, "no answer within ")
				return
			}
			wantA(t, u, "www.example.")
		})
	}
}

// TestSlowAnswer takes the answer to the first sending after the second.
func TestSlowAnswer(t *testing.T) {
	noLeaks(t)
	var first datagram
	at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
		if first.Msg == nil {
			first = d
			return
		}
		if first.from.String() != d.from.String() || first.Id != d.Id {
			t.Errorf("sent again from %v under %d, before from %v under %d", d.from, d.Id, first.from, first.Id)
		}
		first.reply(pack(honest(first.Msg)))
	})
	wantA(t, upstream(t, "udp://"+at.String(), Options{Timeout: 500 * time.Millisecond}), "www.example.")
}

// TestDead has nobody there: a port that refuses, and one that is silent.
func TestDead(t *testing.T) {
	noLeaks(t)
	const timeout = 400 * time.Millisecond
	refusing := upstream(t, "udp://"+loopback(freePort(t)).String(), Options{Timeout: timeout})
	if err := wantError(t, refusing, timeout+5*time.Second, "connection refused"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v is not ECONNREFUSED", err)
	}
	at := serveUDP(t, "127.0.0.1:0", func(datagram) {})
	silent := upstream(t, "udp://"+at.String(), Options{Timeout: timeout})
	if err := wantError(t, silent, timeout+5*time.Second, "no answer within ", ": "+at.String()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is not DeadlineExceeded", err)
	}
}

// TestRestarting has a server that refuses at first.
func TestRestarting(t *testing.T) {
	noLeaks(t)
	at := loopback(freePort(t))
	u := upstream(t, "udp://"+at.String(), Options{Timeout: 5 * time.Second})
	asked := make(chan error)
	go func() { asked <- askA(t.Context(), u, "www.example.") }()
	if !eventually(5*time.Second, func() bool { return udpSockets(t, at) > 0 }) {
		t.Fatal("nothing was asked")
	}
	serveUDP(t, at.String(), func(d datagram) { d.reply(pack(honest(d.Msg))) })
	if err := <-asked; err != nil {
		t.Error(err)
	}
}

// TestUnpredictable looks at what an attacker off the path must guess.
func TestUnpredictable(t *testing.T) {
	noLeaks(t)
	const questions, letters = 400, 10
	ids, ports, cases := map[uint16]bool{}, map[string]bool{}, map[string]bool{}
	upper := 0
	var mu sync.Mutex
	at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
		mu.Lock()
		defer mu.Unlock()
		ids[d.Id], ports[d.from.String()], cases[d.Question[0].Name] = true, true, true
		if c := d.Question[0].Name[0]; c >= 'A' && c <= 'Z' {
			upper++
		}
		d.reply(pack(honest(d.Msg)))
	})
	u := upstream(t, "udp://"+at.String(), Options{})
	for range questions {
		wantA(t, u, "abcdefg.hij.")
	}
	mu.Lock()
	defer mu.Unlock()
	// By chance some coincide: about 1 of the ids, 3 of the ports and 70 of the cases.
	if len(ids) < questions-10 || len(ports) < questions-30 || len(cases) < questions-120 {
		t.Errorf("of %d questions: %d ids, %d ports, %d spellings", questions, len(ids), len(ports), len(cases))
	}
	if upper < questions/3 || upper > questions*2/3 {
		t.Errorf("the first letter was upper case %d times of %d", upper, questions)
	}
}

// TestNoEDNS has a server from before EDNS, in both ways that they refuse it.
func TestNoEDNS(t *testing.T) {
	for _, rcode := range []int{dns.RcodeFormatError, dns.RcodeNotImplemented} {
		noLeaks(t)
		old := func(q *dns.Msg) *dns.Msg {
			if q.IsEdns0() != nil {
				return new(dns.Msg).SetRcode(q, rcode)
			}
			return honest(q)
		}
		at := serveUDP(t, "127.0.0.1:0", func(d datagram) { d.reply(pack(old(d.Msg))) })
		serveTCP(t, at.String(), func(c *net.TCPConn) {
			converse(c, func(q *dns.Msg) []byte { return frame(pack(old(q))) })
		})
		wantA(t, upstream(t, "udp://"+at.String(), Options{}), "www.example.")
		wantA(t, upstream(t, "tcp://"+at.String(), Options{}), "www.example.")
	}
}

// TestBounded asks more than may be asked at once, of a server that is silent, and counts sockets.
func TestBounded(t *testing.T) {
	noLeaks(t)
	at := serveUDP(t, "127.0.0.1:0", func(datagram) {})
	u := upstream(t, "udp://"+at.String(), Options{Timeout: time.Minute})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const questions = maxQuestions + 200
	var waiting atomic.Int32
	var asking sync.WaitGroup
	for range questions {
		asking.Go(func() {
			waiting.Add(1)
			if err := askA(ctx, u, "www.example."); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	if !eventually(20*time.Second, func() bool { return waiting.Load() == questions && udpSockets(t, at) >= maxQuestions }) {
		t.Errorf("%d questions, %d sockets", waiting.Load(), udpSockets(t, at))
	}
	if n := udpSockets(t, at); n > maxQuestions {
		t.Errorf("%d sockets", n)
	}
	cancel()
	asking.Wait()
}
