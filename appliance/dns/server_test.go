package dns

import (
	"bytes"
	"context"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// On every path the answer leaves after Learn has returned, and not at all if it failed.
func TestLearnBeforeAnswer(t *testing.T) {
	z := newZone(t, "www.example. 100 A 192.0.2.1")
	paths := []struct {
		name    string
		prepare func(d *desk)
		host    string
		want    string
	}{
		{"exchanged", func(d *desk) {}, "www.example", "NOERROR 192.0.2.1"},
		{"cached", func(d *desk) { d.send(other4, question("www.example", dns.TypeA)) }, "www.example", "NOERROR 192.0.2.1"},
		{"cached, taught long ago", func(d *desk) {
			d.ask("www.example", dns.TypeA)
			d.age(time.Duration(teachAgain) + time.Second)
		}, "www.example", "NOERROR 192.0.2.1"},
		{"stale", func(d *desk) {
			d.ask("www.example", dns.TypeA)
			d.age(200 * time.Second)
			z.set(func(z *zone) { z.err = errDown })
		}, "www.example", "NOERROR 192.0.2.1"},
		{"stale, again", func(d *desk) {
			d.ask("www.example", dns.TypeA)
			d.age(200 * time.Second)
			z.set(func(z *zone) { z.err = errDown })
			d.ask("www.example", dns.TypeA)
		}, "www.example", "NOERROR 192.0.2.1"},
		{"renewed", func(d *desk) {
			d.ask("www.example", dns.TypeA)
			d.age(95 * time.Second)
			d.ask("www.example", dns.TypeA)
			d.server.work.Wait()
		}, "www.example", "NOERROR 192.0.2.1"},
		{"hosts", func(d *desk) {}, "nas.lan", "NOERROR 192.168.0.9"},
		{"hosts, cached", func(d *desk) { d.send(other4, question("nas.lan", dns.TypeA)) }, "nas.lan", "NOERROR 192.168.0.9"},
		{"fixed", func(d *desk) {}, "fixed.example", "NOERROR 203.0.113.5"},
	}
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			z.set(func(z *zone) { z.err = nil })
			d := over(t, z, func(s *Settings) {
				s.Hosts = map[string][]netip.Addr{"nas.lan": addrs("192.168.0.9")}
				s.Rules = []Rule{{Match: match(t, "domain: fixed.example"), Answer: addrs("203.0.113.5")}}
				s.Cache = Cache{Stale: time.Hour, Prefetch: true}
			})
			path.prepare(d)
			d.pupil.mu.Lock()
			hold := make(chan struct{})
			d.pupil.hold, d.pupil.lessons = hold, nil
			d.pupil.mu.Unlock()
			got := make(chan *dns.Msg, 1)
			go func() { got <- d.ask(path.host, dns.TypeA) }()
			eventually(t, "Learn is called", func() bool {
				d.pupil.mu.Lock()
				defer d.pupil.mu.Unlock()
				return d.pupil.holding > 0
			})
			select {
			case m := <-got:
				t.Fatalf("answered before it was learned: %v", m)
			default:
			}
			close(hold)
			if m := <-got; brief(m) != path.want {
				t.Errorf("%s, want %s", brief(m), path.want)
			}

			d.forgetTaught()
			d.pupil.mu.Lock()
			d.pupil.hold, d.pupil.err = nil, errForgetful
			d.pupil.mu.Unlock()
			if m := d.ask(path.host, dns.TypeA); brief(m) != "SERVFAIL" {
				t.Errorf("unlearned: %s", brief(m))
			}
		})
	}
}

// A client that was taught gets cached answers without a further call, and another client does not.
func TestTaughtOnce(t *testing.T) {
	d := over(t, newZone(t, "www.example. 1000 A 192.0.2.1"), nil)
	packet, _ := question("www.example", dns.TypeA).Pack()
	for i, step := range []struct {
		client netip.Addr
		age    time.Duration
		quick  bool
		taught int
	}{
		{client4, 0, false, 1},
		{client4, 0, true, 1},
		{client4, time.Duration(teachAgain) - time.Second, true, 1},
		{other4, 0, false, 2},
		{client4, 0, true, 2},
		{client4, time.Second, false, 3},
		{other4, 0, true, 3},
	} {
		d.age(step.age)
		if _, quick := d.wire(step.client, packet); quick != step.quick {
			t.Errorf("step %d: quick %v", i, quick)
		}
		if n := len(d.pupil.all()); n != step.taught {
			t.Errorf("step %d: taught %d times, want %d", i, n, step.taught)
		}
	}
	client := netip.MustParseAddr("10.0.0.1")
	for range 3 * maxTaught {
		d.wire(client, packet)
		client = client.Next()
	}
	if _, quick := d.wire(client.Prev(), packet); !quick {
		t.Error("the last of many clients is not remembered")
	}
}

// The client's question comes back as it was written, and EDNS is answered with EDNS.
func TestEcho(t *testing.T) {
	z := newZone(t, "www.example.com. 60 A 192.0.2.1")
	z.rewrite = func(m *dns.Msg) {
		m.AuthenticatedData = true
		m.Answer[0].Header().Name = "wWW.EXample.com."
	}
	d := over(t, z, nil)
	for range 2 {
		for _, name := range []string{"www.example.com.", "WWW.eXample.COM.", "wWw.ExAmPlE.cOm."} {
			q := question(name, dns.TypeA)
			m := d.send(client4, q)
			if m.Question[0] != q.Question[0] || m.Answer[0].Header().Name != name {
				t.Errorf("asked %s, got\n%v", name, m)
			}
			if m.IsEdns0() != nil || m.AuthenticatedData || !m.RecursionDesired || !m.RecursionAvailable || m.Authoritative || m.CheckingDisabled {
				t.Errorf("got\n%v", m)
			}
			q.SetEdns0(4096, false)
			if opt := d.send(client4, q).IsEdns0(); opt == nil || opt.UDPSize() != maxReply || opt.Do() || opt.Version() != 0 {
				t.Errorf("EDNS: %v", opt)
			}
			q.AuthenticatedData, q.CheckingDisabled, q.RecursionDesired = true, true, false
			if m := d.send(client4, q); !m.AuthenticatedData || !m.CheckingDisabled || m.RecursionDesired {
				t.Errorf("flags:\n%v", m)
			}
			q = question(name, dns.TypeA)
			q.SetEdns0(1232, true)
			if m := d.send(client4, q); !m.IsEdns0().Do() || !m.AuthenticatedData {
				t.Errorf("DO:\n%v", m)
			}
		}
	}
	var seen []string
	for _, q := range z.seen {
		flags := ""
		if q.CheckingDisabled {
			flags += " cd"
		}
		if q.IsEdns0().Do() {
			flags += " do"
		}
		seen = append(seen, q.Question[0].Name+flags)
	}
	if want := []string{"www.example.com.", "www.example.com. cd", "www.example.com. do"}; !slices.Equal(seen, want) {
		t.Errorf("the upstream saw %q, want %q", seen, want)
	}
}

// DNSSEC's records go to who asks for them, unless something was taken out of what they sign.
func TestSignatures(t *testing.T) {
	const signature = " 60 RRSIG A 8 2 60 20300101000000 20200101000000 1 example. AAAA"
	z := newZone(t, "www.example. 60 A 192.0.2.1", "www.example."+signature, "bad.example. 60 A 192.0.2.2", "bad.example. 60 A 127.0.0.1", "bad.example."+signature)
	d := over(t, exchangeFunc(func(q *dns.Msg) *dns.Msg {
		m := z.answer(q)
		for _, record := range z.records {
			if s, ok := record.(*dns.RRSIG); ok && s.Hdr.Name == q.Question[0].Name && q.IsEdns0().Do() {
				m.Answer = append(m.Answer, record)
			}
		}
		m.AuthenticatedData = true
		return m
	}), nil)
	for name, want := range map[string]int{"www.example": 2, "bad.example": 1} {
		q := question(name, dns.TypeA)
		q.SetEdns0(1232, true)
		m := d.send(client4, q)
		if len(m.Answer) != want || m.AuthenticatedData != (want == 2) {
			t.Errorf("%s:\n%v", name, m)
		}
		if m := d.ask(name, dns.TypeA); len(m.Answer) != 1 {
			t.Errorf("without DO:\n%v", m)
		}
	}
}

// A long answer is cut by UDP at what the client takes, and at what passes every path.
func TestTruncation(t *testing.T) {
	z := newZone(t)
	for i := range 60 { // 60 × 16 bytes
		z.add(t, "www.example. 60 A "+netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}).String())
	}
	for i := range 20 { // 20 × 110 bytes
		z.add(t, "long.example. 60 TXT "+strings.Repeat(string(rune('a'+i)), 97))
	}
	d := over(t, z, nil)
	for range 2 {
		for _, c := range []struct {
			name  string
			qtype uint16
			size  uint16
			whole bool
		}{
			{"www.example", dns.TypeA, 0, false},
			{"www.example", dns.TypeA, 100, false}, // less than every client takes
			{"www.example", dns.TypeA, 999, false},
			{"www.example", dns.TypeA, 1000, true},
			{"long.example", dns.TypeTXT, 65535, false},
		} {
			q := question(c.name, c.qtype)
			if c.size > 0 {
				q.SetEdns0(c.size, false)
			}
			m := d.send(client4, q)
			if m.Truncated == c.whole || (len(m.Answer) > 0) != c.whole || (m.IsEdns0() != nil) != (c.size > 0) {
				t.Errorf("%s %d: truncated %v, %d records", c.name, c.size, m.Truncated, len(m.Answer))
			}
			packet, _ := q.Pack()
			answer := d.server.respond(t.Context(), arrival{packet: packet, client: client4.As16(), limit: wholeFrame})
			if m := new(dns.Msg); m.Unpack(answer) != nil || m.Truncated || len(m.Answer) < 20 {
				t.Errorf("%s by TCP:\n%v", c.name, m)
			}
		}
	}
	if n := d.server.Stats().Truncated; n != 8 {
		t.Errorf("%d counted", n)
	}
}

// What is no proper question gets the error that says so, or nothing.
func TestImproperQueries(t *testing.T) {
	good := func() *dns.Msg { return question("www.example", dns.TypeA) }
	pack := func(change func(*dns.Msg)) []byte {
		m := good()
		m.Id = 0x1234
		change(m)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	plain := pack(func(*dns.Msg) {})
	patched := func(at int, with ...byte) []byte {
		b := bytes.Clone(plain)
		copy(b[at:], with)
		return b
	}
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	d := over(t, z, nil)
	for _, known := range []bool{false, true} { // by both paths
		for _, c := range []struct {
			what   string
			packet []byte
			want   string
		}{
			{"nothing", nil, "silence"},
			{"half a header", plain[:11], "silence"},
			{"an answer", patched(2, 0x81), "silence"},
			{"a header alone", plain[:12], "FORMERR"},
			{"no question", patched(4, 0, 0), "FORMERR"},
			{"two questions", patched(4, 0, 2), "FORMERR"},
			{"a cut name", plain[:20], "FORMERR"},
			{"a cut question", plain[:len(plain)-1], "FORMERR"},
			{"rubbish behind", append(bytes.Clone(plain), 0), "FORMERR"},
			{"a pointer in the name", patched(12, 0xc0, 12), "FORMERR"},
			{"a label of 100 bytes", slices.Concat(plain[:12], []byte{100}, bytes.Repeat([]byte("a"), 100), []byte{0, 0, 1, 0, 1}), "FORMERR"},
			{"a name of 256 bytes", slices.Concat(plain[:12], bytes.Repeat(append([]byte{50}, bytes.Repeat([]byte("a"), 50)...), 5), []byte{0, 0, 1, 0, 1}), "FORMERR"},
			{"a record that is not there", patched(10, 0, 1), "FORMERR"},
			{"an update", patched(2, 5<<3), "NOTIMP"},
			{"a notification", patched(2, 4<<3), "NOTIMP"},
			{"a status", patched(2, 2<<3), "NOTIMP"},
			{"class CH", pack(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), "REFUSED"},
			{"class ANY", pack(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassANY }), "REFUSED"},
			{"a transfer", pack(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }), "REFUSED"},
			{"type OPT", pack(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeOPT }), "REFUSED"},
			{"EDNS 1", pack(func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }), "BADVERS"},
			{"EDNS twice", pack(func(m *dns.Msg) { m.SetEdns0(1232, false); m.Extra = append(m.Extra, m.Extra[0]) }), "FORMERR"},
			{"EDNS in the answer", pack(func(m *dns.Msg) { m.SetEdns0(1232, false); m.Answer, m.Extra = m.Extra, nil }), "FORMERR"},
			{"EDNS with options", pack(func(m *dns.Msg) {
				m.SetEdns0(1232, false)
				m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}}
			}), "NOERROR 192.0.2.1"},
			{"another record beside", pack(func(m *dns.Msg) {
				m.Extra = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: "x.", Rrtype: 16, Class: 1}, Txt: []string{"x"}}}
			}), "NOERROR 192.0.2.1"},
			{"a name of 255 bytes", pack(func(m *dns.Msg) {
				m.Question[0].Name = strings.Repeat(strings.Repeat("a", 62)+".", 3) + strings.Repeat("b", 63) + "."
			}), "NXDOMAIN"},
			{"strange bytes", pack(func(m *dns.Msg) { m.Question[0].Name = `a\000\.\255\\b.example.` }), "NXDOMAIN"},
			{"the root", pack(func(m *dns.Msg) { m.Question[0].Name, m.Question[0].Qtype = ".", dns.TypeNS }), "NXDOMAIN"},
		} {
			if !known {
				d.server.clients.all = map[[16]byte]*client{}
			}
			answer, _ := d.wire(client4, c.packet)
			if len(answer) == 0 {
				if c.want != "silence" {
					t.Errorf("%s: silence, want %s", c.what, c.want)
				}
				continue
			}
			m := new(dns.Msg)
			if err := m.Unpack(answer); err != nil || m.Id != 0x1234 || !m.Response {
				t.Errorf("%s: %x: %v", c.what, answer, err)
				continue
			}
			if got := strings.ReplaceAll(brief(m), "BADSIG", "BADVERS"); got != c.want {
				t.Errorf("%s: %s, want %s", c.what, got, c.want)
			}
			if c.want != "FORMERR" && c.want != "NOTIMP" && !bytes.Contains(c.packet, answer[12:bytes.IndexByte(answer[12:], 0)+12]) {
				t.Errorf("%s: the question is not the client's", c.what)
			}
		}
	}
}

// Who may not ask hears nothing.
func TestAllow(t *testing.T) {
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	d := over(t, z, nil)
	for text, want := range map[string]string{
		"192.168.7.3": "NOERROR 192.0.2.1", "fd07::3": "NOERROR 192.0.2.1", "fe80::3": "NOERROR 192.0.2.1",
		"203.0.113.9": "silence", "2001:db8::1": "silence", "127.0.0.1": "silence",
	} {
		for range 2 {
			if got := brief(d.send(netip.MustParseAddr(text), question("www.example", dns.TypeA))); got != want {
				t.Errorf("%s: %s, want %s", text, got, want)
			}
		}
	}
	if n := d.server.Stats().Dropped[NotAllowed]; n != 6 {
		t.Errorf("%d counted", n)
	}
}

// One client's questions that nobody answers do not keep others from theirs.
func TestOneClientDoesNotStarveOthers(t *testing.T) {
	z := newZone(t)
	z.hold = make(chan struct{})
	fast := newZone(t, "www.fast.example. 60 A 192.0.2.1")
	s := Settings{
		Upstreams: map[string]Exchanger{"slow": z, "fast": fast}, Default: "slow",
		Rules: []Rule{{Match: match(t, "domain_suffix: fast.example"), Upstream: "fast"}},
	}
	d := newDesk(t, Options{Limits: Limits{Outstanding: 100}}, s)
	var asking sync.WaitGroup
	for i := range 500 {
		asking.Go(func() {
			q := question("n"+strings.Repeat("x", i%50)+string(rune('a'+i/50))+".example", dns.TypeA)
			d.send(other4, q)
		})
	}
	eventually(t, "the limit is reached", func() bool { return d.server.Stats().Dropped[ClientLimit] == 400 })
	d.expect("www.fast.example", dns.TypeA, "NOERROR 192.0.2.1")
	close(z.hold)
	asking.Wait()
	if got := brief(d.send(other4, question("www.fast.example", dns.TypeA))); got != "NOERROR 192.0.2.1" {
		t.Errorf("afterwards: %s", got)
	}
}

// When all have much under way, who has little still gets something.
func TestReservedShare(t *testing.T) {
	c := newClients(Options{Limits: Limits{Outstanding: 1 << 20, Queries: 1 << 30}, Allow: allowPrivate})
	r := newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": newZone(t)}, Default: "up"})
	greedy, modest := client4.As16(), other4.As16()
	n := 0
	for ; ; n++ {
		if _, reason := c.admit(greedy, r, 1); reason != 0 {
			break
		}
	}
	if n != maxOutstanding*3/4 {
		t.Errorf("one client has %d under way", n)
	}
	for i := range reserved {
		if _, reason := c.admit(modest, r, 1); reason != 0 {
			t.Fatalf("query %d of a modest client: %s", i, reason)
		}
	}
	if _, reason := c.admit(modest, r, 1); reason != Overloaded {
		t.Errorf("beyond its share: %v", reason)
	}
}

func TestClientRate(t *testing.T) {
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	d := newDesk(t, Options{Limits: Limits{Queries: 50}}, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"})
	start := time.Now()
	got := 0
	for range 200 {
		if d.ask("www.example", dns.TypeA) != nil {
			got++
		}
	}
	if most := 52 + int(50*time.Since(start).Seconds()); got < 50 || got > most {
		t.Errorf("%d answers, want 50 to %d", got, most)
	}
	if got := brief(d.send(other4, question("www.example", dns.TypeA))); got != "NOERROR 192.0.2.1" {
		t.Errorf("the other client: %s", got)
	}
}

// Clients are remembered within bounds, and those with something under way are not forgotten.
func TestClientsAreBounded(t *testing.T) {
	c := newClients(Options{Limits: Limits{Outstanding: 10, Queries: 10}, Allow: allowPrivate})
	r := newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": newZone(t)}, Default: "up"})
	first, _ := c.admit(client4.As16(), r, 1)
	addr := netip.MustParseAddr("fd00::1")
	for i := range 2 * maxClients {
		k, _ := c.admit(addr.As16(), r, int64(i+2))
		c.leave(k)
		addr = addr.Next()
	}
	if len(c.all) != maxClients || c.all[client4.As16()] != first.client {
		t.Errorf("%d clients; the one that waits is forgotten: %v", len(c.all), c.all[client4.As16()] != first.client)
	}
	c.leave(first)
	if c.outstanding != 0 {
		t.Errorf("%d under way", c.outstanding)
	}
}

// A reload in the middle of a question costs no answer.
func TestReload(t *testing.T) {
	slow, fast := newZone(t), newZone(t, "www.example. 60 A 192.0.2.1")
	slow.hold = make(chan struct{})
	d := over(t, slow, nil)
	got := make(chan *dns.Msg, 1)
	go func() { got <- d.ask("www.example", dns.TypeA) }()
	eventually(t, "it is asked", func() bool { return len(slow.questions()) == 1 })
	old := d.server.resolver.Load()
	d.server.Use(newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": fast}, Default: "up"}))
	old.Close()
	if m := <-got; brief(m) != "NOERROR 192.0.2.1" {
		t.Errorf("%s", brief(m))
	}
	if s := d.server.Stats(); s.Upstreams["up"].Queries != 2 || s.Failed != 0 {
		t.Errorf("%+v", s)
	}
	if _, err := old.Lookup(t.Context(), "x.example"); err == nil {
		t.Error("a closed resolver answers")
	}
}

// upstreamBehindUs asks its client.
type upstreamBehindUs struct {
	ask func(q *dns.Msg) *dns.Msg
}

func (u *upstreamBehindUs) Addresses() []netip.Addr { return []netip.Addr{other4} }

func (u *upstreamBehindUs) Exchange(_ context.Context, q *dns.Msg) (*dns.Msg, error) {
	again := q.Copy()
	m := u.ask(again)
	m.Id = q.Id
	return m, nil
}

// An upstream whose own questions come to us is told at once, instead of both waiting for each other.
func TestCircle(t *testing.T) {
	up := new(upstreamBehindUs)
	d := over(t, up, nil)
	up.ask = func(q *dns.Msg) *dns.Msg { return d.send(other4, q) }
	start := time.Now()
	d.expect("www.example", dns.TypeA, "SERVFAIL")
	if took := time.Since(start); took > exchangeTime*3/4 {
		t.Errorf("it took %v", took)
	}
}

func TestWithoutResolver(t *testing.T) {
	d := &desk{t: t, server: newServer(Options{Learner: new(pupil)})}
	d.server.ctx = t.Context()
	d.expect("www.example", dns.TypeA, "SERVFAIL")
}

// A resolver that was replaced is let go with its cache, even if its clients stay silent.
func TestReplacedResolverIsLetGo(t *testing.T) {
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	s := newServer(Options{Learner: new(pupil)})
	s.ctx = t.Context()
	gone := make(chan struct{})
	func() {
		r, err := NewResolver(Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"})
		if err != nil {
			t.Fatal(err)
		}
		s.Use(r)
		d := &desk{t: t, server: s}
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
		s.Use(newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}))
		r.Close()
		runtime.AddCleanup(r.cache, func(gone chan struct{}) { close(gone) }, gone)
	}()
	eventually(t, "the collector found it", func() bool {
		runtime.GC()
		select {
		case <-gone:
			return true
		default:
			return false
		}
	})
	runtime.KeepAlive(s)
}

// A reload counts at once for clients that are known already.
func TestReloadChangesWhatClientsMay(t *testing.T) {
	z := newZone(t, "www.example. 60 A 192.0.2.1")
	d := over(t, z, nil)
	d.expect("www.example", dns.TypeA, "NOERROR 192.0.2.1")
	d.server.Use(newResolver(t, Settings{
		Upstreams: map[string]Exchanger{"up": z}, Default: "up",
		Rules: []Rule{{Match: match(t, "source_ip_cidr: "+client4.String()), Reject: NXDomain}},
	}))
	d.expect("www.example", dns.TypeA, "NXDOMAIN")
}

// TestLimitQueries: the limit changes for clients that are known already.
func TestLimitQueries(t *testing.T) {
	r := newResolver(t, Settings{Upstreams: map[string]Exchanger{"up": newZone(t)}, Default: "up"})
	s := newServer(Options{Limits: Limits{Queries: 1}, Learner: new(pupil)})
	client, now := client4.As16(), monotonic()
	ask := func(n int) (lost int) {
		for range n {
			a, reason := s.clients.admit(client, r, now)
			if reason != 0 {
				lost++
				continue
			}
			s.clients.leave(a)
		}
		return lost
	}
	if lost := ask(100); lost != 98 {
		t.Fatalf("at one a second %d of 100 at once are lost, want 98", lost)
	}
	s.LimitQueries(1000)
	now += int64(3 * time.Second)
	if lost := ask(100); lost != 0 {
		t.Errorf("at 1000 a second %d of 100 at once are lost", lost)
	}
	s.LimitQueries(0)
	now += int64(3 * time.Second)
	if lost := ask(2000); lost != 0 {
		t.Errorf("at the default %d of 2000 at once are lost", lost)
	}
}
