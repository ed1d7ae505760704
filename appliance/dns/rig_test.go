package dns

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"sidegate/appliance/policy"
)

// desk is a Server without sockets: tests hand it queries as its listeners do.
type desk struct {
	t      testing.TB
	server *Server
	pupil  *pupil
}

func newDesk(t testing.TB, o Options, s Settings) *desk {
	t.Helper()
	d := &desk{t: t, pupil: new(pupil)}
	if o.Learner == nil {
		o.Learner = d.pupil
	}
	o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	s.Log = o.Log
	d.server = newServer(o)
	d.server.ctx = t.Context()
	d.server.Use(newResolver(t, s))
	t.Cleanup(d.server.work.Wait)
	return d
}

// over makes a desk over one upstream, "up".
func over(t testing.TB, z Exchanger, change func(*Settings)) *desk {
	t.Helper()
	s := Settings{Upstreams: map[string]Exchanger{"up": z}, Default: "up"}
	if change != nil {
		change(&s)
	}
	return newDesk(t, Options{}, s)
}

// wire is what a listener does with a datagram. It also tells whether the fast path answered.
func (d *desk) wire(client netip.Addr, packet []byte) (answer []byte, quick bool) {
	var q query
	rcode, ok := q.parse(packet)
	if !ok {
		d.server.counters.drop(Malformed, 1)
		return nil, true
	}
	addr, key := client.As16(), []byte(nil)
	answer, how, seat := d.server.quick(nil, &q, rcode, &addr, &key, q.limit(), monotonic())
	if how == answered {
		return answer, true
	}
	return d.server.respond(d.server.ctx, arrival{packet, addr, (*query).limit, seat, nil}), false
}

// send sends a query and reads the answer; nil is silence.
func (d *desk) send(client netip.Addr, q *dns.Msg) *dns.Msg {
	d.t.Helper()
	packet, err := q.Pack()
	if err != nil {
		d.t.Fatal(err)
	}
	answer, _ := d.wire(client, packet)
	if len(answer) == 0 {
		return nil
	}
	m := new(dns.Msg)
	if err := m.Unpack(answer); err != nil {
		d.t.Fatalf("the answer %x: %v", answer, err)
	}
	if m.Id != q.Id || !m.Response {
		d.t.Fatalf("no answer to the query:\n%v", m)
	}
	return m
}

func question(name string, qtype uint16) *dns.Msg {
	q := new(dns.Msg)
	q.SetQuestion(dns.Fqdn(name), qtype)
	return q
}

// ask asks as the usual client.
func (d *desk) ask(name string, qtype uint16) *dns.Msg {
	d.t.Helper()
	return d.send(client4, question(name, qtype))
}

// brief is an answer in one line: its rcode, then the data of its records, without TTLs.
func brief(m *dns.Msg) string {
	if m == nil {
		return "silence"
	}
	parts := []string{dns.RcodeToString[m.Rcode]}
	for _, record := range m.Answer {
		parts = append(parts, strings.ReplaceAll(strings.TrimPrefix(record.String(), record.Header().String()), `"`, ""))
	}
	return strings.Join(parts, " ")
}

// expect compares an answer in brief.
func (d *desk) expect(name string, qtype uint16, want string) {
	d.t.Helper()
	if got := brief(d.ask(name, qtype)); got != want {
		d.t.Errorf("%s %s: %s, want %s", name, dns.TypeToString[qtype], got, want)
	}
}

// match makes a rule's conditions, each "field: value value"; after "not" they are excluded.
func match(t testing.TB, conditions ...string) policy.Rule {
	t.Helper()
	var r policy.Rule
	for _, c := range conditions {
		to := &r.Is
		if rest, negated := strings.CutPrefix(c, "not "); negated {
			c, to = rest, &r.Not
		}
		key, values, _ := strings.Cut(c, ": ")
		field, ok := policy.LookupField(key)
		if !ok {
			t.Fatalf("no field %q", key)
		}
		condition, err := field.Parse(strings.Fields(values)...)
		if err != nil {
			t.Fatal(err)
		}
		*to = append(*to, condition)
	}
	return r
}

func (p *pupil) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lessons = nil
}

// taughtPairs are "client name address", sorted.
func (p *pupil) taughtPairs() []string {
	var all []string
	for _, l := range p.all() {
		for _, name := range l.names {
			for _, a := range l.addrs {
				all = append(all, l.client.String()+" "+name+" "+a.String())
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}
