package exchange

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// lettered is a name with so many letters that chance hardly leaves it as it is.
const lettered = "a-name-with-so-many-letters.that-chance-hardly-leaves-it-as-it-is.example."

// lowered answers with the name in lower case.
func lowered(q *dns.Msg) *dns.Msg {
	m := honest(q)
	m.Question[0].Name = strings.ToLower(m.Question[0].Name)
	return m
}

// TestCase has servers, and attackers, that do not repeat the case of a name, and TCP to ask.
func TestCase(t *testing.T) {
	for _, row := range []struct {
		name    string
		tcp     func(*dns.Msg) *dns.Msg
		learned bool
	}{
		{"a server's habit", lowered, true},
		{"a forgery", honest, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			noLeaks(t)
			var byUDP, byTCP atomic.Int32
			at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
				byUDP.Add(1)
				d.reply(pack(lowered(d.Msg)))
			})
			serveTCP(t, at.String(), func(c *net.TCPConn) {
				converse(c, func(q *dns.Msg) []byte {
					byTCP.Add(1)
					return frame(pack(row.tcp(q)))
				})
			})
			u := upstream(t, "udp://"+at.String(), Options{})
			for range 5 {
				wantA(t, u, lettered)
			}
			want := int32(5)
			if row.learned {
				want = 1
			}
			if byUDP.Load() != 5 || byTCP.Load() != want {
				t.Errorf("%d questions by udp and %d by tcp; want 5 and %d", byUDP.Load(), byTCP.Load(), want)
			}
		})
	}
}

// unconnected is a Dialer whose TCP connections never come about.
type unconnected struct{ Dialer }

func (unconnected) Stream(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestCaseWithoutTCP has a server that lowers names and has no TCP, which is refused or meets with silence: when three
// answers agree, each to a question with an id, a port and a spelling of its own, they are believed, and the server is for
// an hour, which is logged once. What breaks it is to give such a server up, or to believe it for ever.
func TestCaseWithoutTCP(t *testing.T) {
	for name, d := range map[string]Dialer{"refused": Direct(nil), "silent": unconnected{Direct(nil)}} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			var log bytes.Buffer
			type asked struct{ from, name string }
			var mu sync.Mutex
			var all []asked
			n := 0
			at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, asked{fmt.Sprint(d.from, d.Id), d.Question[0].Name})
				m := lowered(d.Msg)
				// The order is another one each time, and the TTL less.
				other := dns.Copy(m.Answer[0]).(*dns.A)
				other.A = net.IPv4(192, 0, 2, 2)
				if m.Answer = append(m.Answer, other); n%2 == 1 {
					m.Answer[0], m.Answer[1] = m.Answer[1], m.Answer[0]
				}
				for _, r := range m.Answer {
					r.Header().Ttl -= uint32(n)
				}
				n++
				d.reply(pack(m))
			})
			const timeout = 2 * time.Second
			u := upstream(t, "udp://"+at.String(), Options{Dialer: d, Timeout: timeout, Log: slog.New(slog.NewTextHandler(&log, nil))})
			ask := func(want int) []asked {
				t.Helper()
				begun := time.Now()
				m, err := u.Exchange(t.Context(), query(lettered, dns.TypeA))
				if err != nil || len(m.Answer) != 2 || m.Question[0].Name != lettered {
					t.Errorf("%v, %v", m, err)
				}
				if took := time.Since(begun); took > timeout*3/4 {
					t.Errorf("it took %v", took)
				}
				mu.Lock()
				defer mu.Unlock()
				these := all
				if all = nil; len(these) != want {
					t.Errorf("%d questions, want %d", len(these), want)
				}
				return these
			}
			independent := ask(agreeing)
			from, spelling := map[string]bool{}, map[string]bool{}
			for _, a := range independent {
				from[a.from], spelling[a.name] = true, true
			}
			if len(from) != agreeing || len(spelling) != agreeing {
				t.Errorf("they are not independent: %v", independent)
			}
			ask(1)
			over := time.Now()
			if left := time.Until(*u.transport.(*udp).until.Swap(&over)); left > foldingKnown || left < foldingKnown-time.Minute {
				t.Errorf("it is known for %v", left)
			}
			ask(agreeing)
			ask(1)
			if strings.Count(log.String(), "\n") != 1 {
				t.Errorf("logged:\n%s", &log)
			}
		})
	}
}

// TestForgedCase has an attacker who hits the id and the port, but not the case, of a server that has no TCP: of the first
// question, and of the next but not of all. The server itself keeps the case, or it does not and its answers differ
// from the attacker's. What breaks it is to believe fewer than three, or three that say different things.
func TestForgedCase(t *testing.T) {
	for _, row := range []struct {
		hits  int
		folds bool // the server's own habit
	}{{1, false}, {agreeing - 1, false}, {1, true}, {agreeing - 1, true}} {
		t.Run(fmt.Sprint(row), func(t *testing.T) {
			noLeaks(t)
			n := 0
			at := serveUDP(t, "127.0.0.1:0", func(d datagram) {
				if n++; n <= row.hits {
					d.reply(evil(d.Msg, func(m *dns.Msg) { m.Question[0].Name = strings.ToLower(m.Question[0].Name) }))
				}
				if row.folds {
					d.reply(pack(lowered(d.Msg)))
				} else {
					d.reply(pack(honest(d.Msg)))
				}
			})
			u := upstream(t, "udp://"+at.String(), Options{})
			err := askA(t.Context(), u, lettered)
			switch {
			case !row.folds && err != nil:
				t.Error(err)
			case row.folds && (err == nil || !strings.Contains(err.Error(), errDiffer.Error())):
				t.Errorf("the answer to a question with a forged one is believed, or: %v", err)
			}
			if u.transport.(*udp).folds() {
				t.Error("it is believed not to keep the case")
			}
			wantA(t, u, lettered)
		})
	}
}
