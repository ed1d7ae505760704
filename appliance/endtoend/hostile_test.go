package endtoend

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// TestOffPathSpoofing: a host that can send as the upstream knows when the gateway asks, for what and from which port, and
// lacks one thing only: the id, the case of the letters, or the address. Its answers come while the upstream is slow, and
// the gateway believes none of them. What breaks it is one of these that is not checked: the forger who has seen the
// question itself is believed.
func TestOffPathSpoofing(t *testing.T) {
	const name = "www.the-bank-of-the-test-with-many-letters.test"
	truth, lie := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("203.0.113.66")
	for _, run := range []struct {
		name             string
		id, spelled, own bool // what the forger lacks: with own it has to use its own address
		believed         netip.Addr
	}{
		{name: "without the id", id: true, believed: truth},
		{name: "without the case", spelled: true, believed: truth},
		{name: "without the address", own: true, believed: truth},
		{name: "with everything", believed: lie},
	} {
		t.Run(run.name, func(t *testing.T) {
			w := newNamesWorld(t)
			forger, err := w.AddServer(t.Context(), "forger")
			need(t, err)
			asked := make(chan lab.Question, 16)
			forged := make(chan struct{})
			answer, err := lab.Zone(name + ". 300 A " + truth.String())
			need(t, err)
			_, err = w.resolver.StartNameserver(t.Context(), 53, func(q *dns.Msg, question lab.Question) *dns.Msg {
				if question.Network == "udp" { // nobody can forge a TCP connection that he does not see
					asked <- question
					select {
					case <-forged: // the forger has had its time
					case <-t.Context().Done():
					}
				}
				return answer(q, question)
			})
			need(t, err)
			w.start(t, fmt.Sprintf("interfaces: { lan: auto }\ndns: { upstreams: { up: \"udp://%s\" }, default: up }\ndefault: direct\n", w.resolver.Addr4()))

			arrived := captureOn(t, w.sidegate(), w.sidegate().Interface().Name)
			from := netip.AddrPortFrom(w.resolver.Addr4(), 53)
			if run.own {
				from = netip.AddrPortFrom(forger.Addr4(), 53)
			}
			var forging errgroup.Group
			sent := 0
			forging.Go(func() error {
				defer close(forged)
				var q lab.Question
				select {
				case q = <-asked:
				case <-time.After(10 * time.Second):
					return errors.New("the upstream was not asked")
				}
				m := new(dns.Msg).SetQuestion(q.Name, q.Qtype)
				if run.spelled {
					m.Question[0].Name = name + "."
				}
				m.Response, m.RecursionAvailable = true, true
				m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 300}, A: lie.AsSlice()}}
				text, err := m.Pack()
				if err != nil {
					return err
				}
				first, count := int(q.ID), 1
				if run.id {
					first, count = first+1, 1<<16-1 // all others
				}
				sent, err = forge(t.Context(), forger, from, q.From, count, func(i int) []byte {
					text[0], text[1] = byte((first+i)>>8), byte(first+i)
					return text
				})
				return err
			})
			r, err := w.laptop().Dig(within(t, 20*time.Second), somewhere, name)
			if e := forging.Wait(); e != nil {
				t.Fatal(e)
			}
			needInstalled(t, err)
			if err != nil || !slices.Equal(r.Data("A"), []string{run.believed.String()}) {
				t.Errorf("the client was told %+v, %v, want %s", r, err, run.believed)
			}
			n := packets(t, arrived, func(p lab.Packet) bool { return !p.Out && p.Protocol == lab.UDP && p.Src == from })
			if n < uint64(sent) || n == 0 {
				t.Errorf("%d of %d forged packets arrived: this test proves nothing", n, sent)
			}
		})
	}
}

// forge sends UDP datagrams that claim to be from another host.
func forge(ctx context.Context, on *lab.Host, from, to netip.AddrPort, count int, payload func(i int) []byte) (sent int, err error) {
	err = on.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		if err := errors.Join(
			unix.SetsockoptInt(s, unix.SOL_IP, unix.IP_TRANSPARENT, 1), // any source address
			unix.Bind(s, &unix.SockaddrInet4{Port: int(from.Port()), Addr: from.Addr().As4()}),
			unix.Connect(s, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}),
		); err != nil {
			return err
		}
		for i := range count {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if _, err := unix.Write(s, payload(i)); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
			sent++
		}
		return nil
	})
	return sent, err
}

// TestRebinding: no public name leads a client to an address that only its own network knows, whatever record of the
// answer says so; names that are local may, and so may a suffix that the owner allows. What breaks it is one kind of
// record that is not looked at.
func TestRebinding(t *testing.T) {
	w := newNamesWorld(t)
	// A gateway may have addresses that are not private, and they are no less its own.
	const own4, own6 = "198.51.100.9", "2001:db8:51::9"
	for _, address := range []string{own4 + "/32", own6 + "/128"} {
		_, err := w.sidegate().Exec(t.Context(), "ip", "address", "add", address, "dev", "lo")
		need(t, err)
	}
	inside4 := []string{
		own4,
		"192.168.0.1", "10.0.0.1", "172.16.0.1", "127.0.0.1", "169.254.1.1", "0.0.0.0", "100.64.0.1", "255.255.255.255",
		w.sidegate().Addr4().String(), w.laptop().Addr4().String(),
	}
	inside6 := []string{
		own6, "::1", "::", "fe80::1", "fd00::1", "::ffff:192.168.0.1", "64:ff9b::c0a8:1", w.sidegate().Addr6().String(),
	}
	const public4, public6 = "203.0.113.10", "2001:db8:113::10"
	type question struct {
		name, kind string
		inside     string
		outside    string // an address of the same answer that clients may have
	}
	var records []string
	var questions []question
	add := func(inside, kind, public string, i int) {
		one, chain, end, hint := fmt.Sprintf("a%d-%s.test.", i, kind), fmt.Sprintf("c%d-%s.test.", i, kind), fmt.Sprintf("e%d-%s.test.", i, kind), fmt.Sprintf("h%d-%s.test.", i, kind)
		parameter := map[string]string{"A": "ipv4hint", "AAAA": "ipv6hint"}[kind]
		records = append(
			records,
			fmt.Sprintf("%s 300 %s %s", one, kind, inside),
			fmt.Sprintf("%s 300 CNAME %s", chain, end), fmt.Sprintf("%s 300 %s %s", end, kind, inside),
			fmt.Sprintf("%s 300 %s %s", end, kind, public), // it has an honest one too
			fmt.Sprintf("%s 300 HTTPS 1 . alpn=h2 %s=%s,%s", hint, parameter, inside, public),
		)
		questions = append(questions, question{one, kind, inside, ""}, question{chain, kind, inside, public}, question{hint, "HTTPS", inside, public})
	}
	for i, a := range inside4 {
		add(a, "A", public4, i)
	}
	for i, a := range inside6 {
		if a == "::ffff:192.168.0.1" {
			continue // zone files have no such hint; tried below
		}
		add(a, "AAAA", public6, i)
	}
	records = append(records, "mapped.test. 300 AAAA ::ffff:192.168.0.1", "nas.lan. 300 A 192.168.0.9", "nas.corp.test. 300 A 192.168.0.9")
	questions = append(questions, question{"mapped.test.", "AAAA", "192.168.0.1", ""})
	zone, err := lab.Zone(records...)
	need(t, err)
	_, err = w.resolver.StartNameserver(t.Context(), 53, zone)
	need(t, err)
	w.start(t, fmt.Sprintf("interfaces: { lan: auto }\ndns: { upstreams: { up: \"udp://%s\" }, default: up, rebind_allow: [corp.test] }\ndefault: direct\n", w.resolver.Addr4()))

	for _, q := range questions {
		r, err := w.laptop().Dig(within(t, 10*time.Second), somewhere, q.name, q.kind)
		needInstalled(t, err)
		if err != nil {
			t.Errorf("%s %s: %v", q.name, q.kind, err)
			continue
		}
		data := r.Data(q.kind)
		if !strings.Contains(strings.Join(data, " "), q.outside) {
			t.Errorf("%s %s has lost %s: %+v", q.name, q.kind, q.outside, r)
		}
		for _, data := range data {
			for _, token := range strings.FieldsFunc(data, func(c rune) bool { return c == ' ' || c == ',' || c == '=' || c == '"' }) {
				if a, err := netip.ParseAddr(token); err == nil && a.String() != public4 && a.String() != public6 {
					t.Errorf("%s %s leads to %s: %+v", q.name, q.kind, q.inside, r)
				}
			}
		}
	}
	for _, name := range []string{"nas.lan", "nas.corp.test"} {
		r, err := w.laptop().Dig(within(t, 10*time.Second), somewhere, name)
		if err != nil || !slices.Equal(r.Data("A"), []string{"192.168.0.9"}) {
			t.Errorf("%s may have an address inside: %+v, %v", name, r, err)
		}
	}
	// The upstream does say these things: the filter is what keeps them.
	r, err := w.sidegate().Dig(within(t, 10*time.Second), w.resolver.Addr4(), "a0-A.test")
	if err != nil || !slices.Equal(r.Data("A"), inside4[:1]) {
		t.Errorf("the upstream says %+v, %v: this test proves nothing", r, err)
	}
}

// TestBadUpstreams: an upstream that is dead, silent, slow, lying, or truncates its answers. A client has an answer or
// SERVFAIL within two seconds and never a lie, and names that were known before go on being answered. What breaks it is
// waiting without end, or an upstream that is believed too easily.
func TestBadUpstreams(t *testing.T) {
	const address = "203.0.113.10"
	honest, err := lab.Zone("www.test. 300 A " + address)
	need(t, err)
	lying := func(change func(*dns.Msg)) lab.Answer {
		return func(q *dns.Msg, asked lab.Question) *dns.Msg {
			m := honest(q, asked)
			for _, r := range m.Answer {
				r := dns.Copy(r).(*dns.A)
				r.A = []byte{203, 0, 113, 66}
				m.Answer = []dns.RR{r}
			}
			change(m)
			return m
		}
	}
	for _, c := range []struct {
		name   string
		answer lab.Answer // nil: nobody listens
		status string
	}{
		{"refused", nil, "SERVFAIL"},
		{"silent", func(*dns.Msg, lab.Question) *dns.Msg { return nil }, "SERVFAIL"},
		{"slow", func(q *dns.Msg, asked lab.Question) *dns.Msg {
			time.Sleep(time.Second) // this is what is slow about it
			return honest(q, asked)
		}, "NOERROR"},
		{"another id", lying(func(m *dns.Msg) { m.Id ^= 1 }), "SERVFAIL"},
		{"another question", lying(func(m *dns.Msg) { m.Question[0].Name = "bank.test." }), "SERVFAIL"},
		{"a question instead", lying(func(m *dns.Msg) { m.Response = false }), "SERVFAIL"},
		{"truncated", func(q *dns.Msg, asked lab.Question) *dns.Msg {
			m := honest(q, asked)
			if asked.Network == "udp" {
				m.Answer, m.Truncated = nil, true
			}
			return m
		}, "NOERROR"},
		{"other names besides", func(q *dns.Msg, asked lab.Question) *dns.Msg {
			m := honest(q, asked)
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: "bank.test.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: []byte{203, 0, 113, 66}})
			return m
		}, "NOERROR"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newNamesWorld(t)
			if c.answer != nil {
				_, err := w.resolver.StartNameserver(t.Context(), 53, c.answer)
				need(t, err)
			}
			w.start(t, fmt.Sprintf("interfaces: { lan: auto }\ndns: { upstreams: { up: \"udp://%s\" }, default: up }\ndefault: direct\n", w.resolver.Addr4()))
			r, err := w.laptop().Dig(within(t, 20*time.Second), somewhere, "www.test")
			needInstalled(t, err)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s after %v", r.Status, r.Took)
			if r.Status != c.status || c.status == "NOERROR" && !slices.Equal(r.Data("A"), []string{address}) {
				t.Errorf("%+v, want %s", r, c.status)
			}
			if limit := 2*time.Second + 500*time.Millisecond; r.Took > limit { // dig itself and a busy machine take some
				t.Errorf("it took %v, want at most 2 s", r.Took)
			}
			if names := w.cli(t, "names", "--json"); strings.Contains(names, "203.0.113.66") {
				t.Errorf("a lie was learned: %s", names)
			}
		})
	}
}

// TestUpstreamDies: when the upstream stops answering, what clients asked before is answered still, past its TTL; and when
// it is back new names are found at once. What breaks it is an answer that is thrown away on time, or a failure that is
// remembered too long.
func TestUpstreamDies(t *testing.T) {
	w := newNamesWorld(t)
	answer, err := lab.Zone("www.test. 1 A 203.0.113.10", "new.test. 1 A 203.0.113.10")
	need(t, err)
	dead := make(chan bool, 1)
	dead <- false
	_, err = w.resolver.StartNameserver(t.Context(), 53, func(q *dns.Msg, asked lab.Question) *dns.Msg {
		d := <-dead
		dead <- d
		if d {
			return nil
		}
		return answer(q, asked)
	})
	need(t, err)
	setDead := func(d bool) {
		<-dead
		dead <- d
	}
	w.start(t, fmt.Sprintf("interfaces: { lan: auto }\ndns: { upstreams: { up: \"udp://%s\" }, default: up, cache: { failure_ttl: 1s } }\ndefault: direct\n", w.resolver.Addr4()))
	ask := func(name string) (lab.Reply, error) {
		return w.laptop().Dig(within(t, 10*time.Second), somewhere, name)
	}
	r, err := ask("www.test")
	needInstalled(t, err)
	if err != nil || len(r.Data("A")) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	setDead(true)
	err = lab.Wait(within(t, 20*time.Second), "the answer to be stale", func() error {
		r, err := ask("www.test")
		if err != nil || len(r.Data("A")) != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		if r.Took > 2500*time.Millisecond {
			t.Errorf("a stale answer took %v", r.Took)
		}
		if status := w.cli(t, "status", "--json"); strings.Contains(status, `"stale": 0`) || strings.Contains(status, `"stale":0`) {
			return errors.New("no answer was")
		}
		return nil
	})
	need(t, err)
	if r, err := ask("new.test"); err != nil || r.Status != "SERVFAIL" {
		t.Errorf("a name that nobody knows: %+v, %v, want SERVFAIL", r, err)
	}
	setDead(false)
	err = lab.Wait(within(t, 5*time.Second), "a new name, now that the upstream answers", func() error {
		r, err := ask("new.test")
		if err == nil && len(r.Data("A")) != 1 {
			err = fmt.Errorf("%+v", r)
		}
		return err
	})
	need(t, err)
}
