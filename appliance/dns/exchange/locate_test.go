package exchange

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// locating is a locator whose nth look-up is answered by look.
func locating(look func(n int) ([]string, time.Duration, error)) (l *locator, times *[]time.Duration) {
	begun := time.Now()
	times = new([]time.Duration)
	l = &locator{host: "dns.example", timeout: 2 * time.Second, life: newLife()}
	l.look = func(context.Context, string) ([]netip.Addr, time.Duration, error) {
		*times = append(*times, time.Since(begun))
		list, ttl, err := look(len(*times))
		return addresses(list...), ttl, err
	}
	return l, times
}

// TestLocatorRenews asks every second for three hours. The TTL counts, within bounds; a look-up that
// fails, or takes long, changes nothing for who asks.
func TestLocatorRenews(t *testing.T) {
	for _, row := range []struct{ ttl, every time.Duration }{
		{0, minKnown}, {10 * time.Minute, 10 * time.Minute}, {1000 * time.Hour, maxKnown},
	} {
		synctest.Test(t, func(t *testing.T) {
			l, times := locating(func(n int) ([]string, time.Duration, error) {
				time.Sleep(10 * time.Second)
				if n == 2 {
					return nil, 0, errors.New("broken")
				}
				return []string{"192.0.2.1"}, row.ttl, nil
			})
			const span = 3 * time.Hour
			for range span / time.Second {
				begun := time.Now()
				list, err := l.addresses(t.Context())
				if fmt.Sprint(list) != "[192.0.2.1]" || err != nil {
					t.Fatal(list, err)
				}
				if took := time.Since(begun); took > 0 && len(*times) > 1 {
					t.Fatalf("waited %v for what was known", took)
				}
				time.Sleep(time.Second)
			}
			l.life.close()
			want := int(span/(row.every+11*time.Second)) + 1
			if n := len(*times); n < want-1 || n > want+2+want/20 {
				t.Errorf("a TTL of %v: %d look-ups in %v; want about %d", row.ttl, n, span, want)
			}
		})
	}
}

// TestLocatorFails wants look-ups that fail to be rare, and to be one for all who wait.
func TestLocatorFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, times := locating(func(int) ([]string, time.Duration, error) {
			time.Sleep(100 * time.Millisecond)
			return []string{"0.0.0.0", "ff02::1", "fe80::1"}, time.Hour, nil
		})
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				for range 1000 {
					if list, err := l.addresses(t.Context()); err == nil || err.Error() != "looking up dns.example: it has no usable address" {
						t.Error(list, err)
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		all.Wait()
		l.life.close()
		if n := len(*times); n < 8 || n > 12 {
			t.Errorf("%d look-ups in 10 s: %v", n, *times)
		}
		if _, err := l.addresses(t.Context()); err == nil {
			t.Error("closed, but found")
		}
	})
}

// TestLocatorDoubts wants a host that cannot be reached to be looked up again before its TTL is over.
func TestLocatorDoubts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, times := locating(func(n int) ([]string, time.Duration, error) {
			return []string{fmt.Sprintf("192.0.2.%d", n)}, time.Hour, nil
		})
		ask := func() string {
			synctest.Wait()
			list, err := l.addresses(t.Context())
			return fmt.Sprint(list, err)
		}
		ask()
		for range 100 {
			l.doubt()
			if got := ask(); got != "[192.0.2.1] <nil>" {
				t.Fatal(got)
			}
		}
		time.Sleep(retryAfter)
		ask()
		if got := ask(); got != "[192.0.2.2] <nil>" || len(*times) != 2 {
			t.Errorf("%s after look-ups at %v", got, *times)
		}
		l.life.close()
	})
}

// recording is a Dialer that counts, and sends everything to one address if there is one.
type recording struct {
	Dialer
	instead netip.AddrPort
	dialled atomic.Int32
}

func (r *recording) to(a netip.AddrPort) netip.AddrPort {
	r.dialled.Add(1)
	if r.instead.IsValid() {
		return r.instead
	}
	return a
}

func (r *recording) Stream(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return r.Dialer.Stream(ctx, r.to(to))
}

func (r *recording) Packets(ctx context.Context, to netip.AddrPort) (net.PacketConn, error) {
	c, err := r.Dialer.Packets(ctx, r.to(to))
	return posing{c, net.UDPAddrFromAddrPort(to)}, err
}

// posing is a socket whose peer seems to be the one that was asked for.
type posing struct {
	net.PacketConn
	as net.Addr
}

func (p posing) ReadFrom(b []byte) (int, net.Addr, error) {
	n, _, err := p.PacketConn.ReadFrom(b)
	return n, p.as, err
}

// directory is a nameserver that knows where dns.example is, by an alias, and may tell beside that what
// nobody asked for.
func directory(q *dns.Msg, extra bool) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	var records []string
	if extra {
		records = []string{"evil.example. 300 A 192.0.2.66", "dns.example. 300 TXT evil", "host.example. 300 AAAA 2001:db8::66"}
	}
	if q.Question[0].Qtype == dns.TypeA {
		records = append(records, "dns.example. 300 CNAME host.example.", "HOST.example. 300 A 127.0.0.1")
	}
	if !strings.EqualFold(q.Question[0].Name, "dns.example.") {
		m.Rcode = dns.RcodeNameError
		return m
	}
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return m
}

// TestLookUp finds a host by bootstrap servers, the first of which is dead, and by the system's own
// (whose address the Dialer replaces; Go's resolver believes it everything), with the sockets of the right Dialer.
func TestLookUp(t *testing.T) {
	for _, kind := range []string{"bootstrap", "system"} {
		t.Run(kind, func(t *testing.T) {
			noLeaks(t)
			nameserver := serveUDP(t, "127.0.0.1:0", func(d datagram) { d.reply(pack(directory(d.Msg, kind == "bootstrap"))) })
			server := serveUDP(t, "127.0.0.1:0", func(d datagram) { d.reply(pack(honest(d.Msg))) })
			questions, lookUps := &recording{Dialer: Direct(nil)}, &recording{Dialer: Direct(nil)}
			o := Options{Dialer: questions, BootstrapDialer: lookUps}
			if kind == "bootstrap" {
				o.Bootstrap = []netip.AddrPort{loopback(freePort(t)), nameserver}
			} else {
				lookUps.instead = nameserver
			}
			u := upstream(t, fmt.Sprintf("udp://dns.example:%d", server.Port()), o)
			if host, lookedUp := u.Host(); host != "dns.example" || !lookedUp || len(u.Addresses()) != 0 {
				t.Errorf("before: %s, %v, %v", host, lookedUp, u.Addresses())
			}
			for range 3 {
				wantA(t, u, "www.example.")
			}
			if got := fmt.Sprint(u.Addresses()); got != "[127.0.0.1]" {
				t.Errorf("the addresses are %s", got)
			}
			if q, l := questions.dialled.Load(), lookUps.dialled.Load(); q != 3 || l < 2 || l > 8 {
				t.Errorf("%d sockets for 3 questions, %d for a look-up", q, l)
			}

			o.Timeout = time.Second
			unknown := upstream(t, fmt.Sprintf("udp://unknown.example:%d", server.Port()), o)
			wantError(t, unknown, 2*time.Second, "looking up unknown.example: ")
		})
	}
}

// TestLookUpIsBounded has nameservers that are silent.
func TestLookUpIsBounded(t *testing.T) {
	for _, kind := range []string{"bootstrap", "system"} {
		t.Run(kind, func(t *testing.T) {
			noLeaks(t)
			nameserver := serveUDP(t, "127.0.0.1:0", func(datagram) {})
			o := Options{Timeout: 300 * time.Millisecond, BootstrapDialer: &recording{Dialer: Direct(nil), instead: nameserver}}
			if kind == "bootstrap" {
				o.Bootstrap = []netip.AddrPort{nameserver}
			}
			wantError(t, upstream(t, "tls://dns.example", o), 2*time.Second, "looking up dns.example")
		})
	}
}
