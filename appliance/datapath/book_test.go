package datapath

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func pageKey(client, address uint32) gatewayNameKey {
	return gatewayNameKey{Client: gatewayClientKey{W: [4]uint32{client}}, Address: gatewayAddress{W: [4]uint32{0, 0, 1, address}}}
}

func dnsLesson(at time.Duration, names ...string) lesson {
	return lesson{names: names, source: FromDNS, learned: at, expires: at + time.Minute}
}

func sniffedLesson(name string, direct bool) lesson {
	return lesson{names: []string{name}, source: FromSniffing, direct: direct, expires: time.Minute}
}

// TestBookKnowledge: who is told which names, and where there can be others.
func TestBookKnowledge(t *testing.T) {
	b := newBook()
	a, other, nobody := pageKey(1, 7), pageKey(2, 7), pageKey(3, 7)
	b.learn(a, dnsLesson(1, "www.a.test", "cdn.test"))
	b.learn(other, dnsLesson(1, "b.test"))
	check := func(what string, k knowledge, open bool, names ...string) {
		t.Helper()
		known := slices.Compact(slices.Sorted(slices.Values(slices.Concat(k.sets...))))
		if !slices.Equal(known, names) || k.open != open {
			t.Errorf("%s: %v, open %t; want %v, %t", what, known, k.open, names, open)
		}
	}
	check("own", b.of(a, false), false, "cdn.test", "www.a.test")
	check("who knows nothing", b.of(nobody, true), false)
	check("all", b.shared(a.Address), false, "b.test", "cdn.test", "www.a.test")

	b.learn(nobody, sniffedLesson("s.test", true))
	check("who only told by a flow", b.of(nobody, false), true, "b.test", "cdn.test", "s.test", "www.a.test")
	check("who is trusted", b.of(nobody, true), false, "b.test", "cdn.test", "s.test", "www.a.test")
	check("all, whom a flow's word does not concern", b.shared(a.Address), false, "b.test", "cdn.test", "www.a.test")
	b.learn(nobody, sniffedLesson("p.test", false))
	check("one of whose flows was not direct", b.of(nobody, true), true, "b.test", "cdn.test", "p.test", "s.test", "www.a.test")

	b.learn(a, dnsLesson(2, "www.a.test", "other.test"))
	check("after another chain", b.of(a, false), false, "other.test", "www.a.test")
	b.learn(a, sniffedLesson("www.a.test", false))
	check("a flow that told what was asked for", b.of(a, false), false, "other.test", "www.a.test")
	b.learn(a, sniffedLesson("doh.test", true))
	check("who also resolves elsewhere", b.of(a, false), true, "doh.test", "other.test", "www.a.test")
}

// TestBookSharers: many who know an address by one name make it no address of many names.
func TestBookSharers(t *testing.T) {
	b := newBook()
	for client := range uint32(maxShared + 10) {
		b.learn(pageKey(client+1, 7), dnsLesson(1, "www.a.test", "cdn.test"))
	}
	if k := b.shared(pageKey(1, 7).Address); k.open || len(k.sets) != 1 {
		t.Errorf("%d names, open %t", len(k.sets), k.open)
	}
	for client := range uint32(maxShared + 10) {
		b.learn(pageKey(client+1, 7), dnsLesson(1, fmt.Sprintf("n%d.test", client)))
	}
	if k := b.shared(pageKey(1, 7).Address); !k.open {
		t.Errorf("%d names, and all are thought to be known", len(k.sets))
	}
}

// TestBookPageIsBounded: a page that has no room says that there can be other names, and keeps the newest.
func TestBookPageIsBounded(t *testing.T) {
	b, key := newBook(), pageKey(1, 7)
	for i := range 100 {
		b.learn(key, dnsLesson(time.Duration(i)*time.Second, fmt.Sprintf("name-%03d.of.some.length.example.com", i)))
	}
	k := b.of(key, true)
	if !k.open || len(k.sets) < 10 || !k.has("name-099.of.some.length.example.com") || k.has("name-000.of.some.length.example.com") {
		t.Errorf("%d names, open %t", len(k.sets), k.open)
	}
	long := strings.Repeat(strings.Repeat("a", 62)+".", 4) + "b"
	b.learn(key, dnsLesson(time.Hour, long, long+"c", long+"d", long+"e", long+"f"))
	if k := b.of(key, true); !k.open || k.sets[0][0] != long {
		t.Errorf("a chain that is longer than a page: %d names, open %t", len(k.sets), k.open)
	}
}

// TestBookIsFair: a client that learns without end forgets its own, and when all is full the one that has most does.
func TestBookIsFair(t *testing.T) {
	b := newBook()
	small := pageKey(9, 1)
	b.learn(small, dnsLesson(0, "small.test"))
	for i := range uint32(maxPages + 1000) {
		for client := range uint32(3) {
			b.learn(pageKey(client+1, i), dnsLesson(time.Duration(i), "n.test"))
		}
		if b.pages > maxPages || len(b.pupils[pageKey(1, 0).Client].pages) > maxClientPages {
			t.Fatalf("%d pages, %d of one client", b.pages, len(b.pupils[pageKey(1, 0).Client].pages))
		}
	}
	if b.page(small) == nil {
		t.Error("the small client's page went")
	}
	if b.page(pageKey(1, maxPages+999)) == nil || b.page(pageKey(1, 0)) != nil {
		t.Error("not the least recent went")
	}
	b.learn(pageKey(8, 1), dnsLesson(0, "kept.test"))
	for i := range uint32(maxClientPages) {
		if i%1000 == 0 {
			b.expire(time.Duration(i), time.Hour, map[gatewayNameKey]bool{pageKey(8, 1): true})
		}
		b.learn(pageKey(8, 1000+i), dnsLesson(0, "n.test"))
	}
	if b.page(pageKey(8, 1)) == nil {
		t.Error("a page that a flow uses went before those that none does")
	}
	count := 0
	for _, sharers := range b.sharers {
		count += len(sharers)
	}
	if count != b.pages {
		t.Errorf("%d pages by address, %d in all", count, b.pages)
	}
}

// TestBookExpires: what is used lives on, for a day; but not what a flow alone has told.
func TestBookExpires(t *testing.T) {
	b := newBook()
	used, unused, told := pageKey(1, 1), pageKey(1, 2), pageKey(1, 3)
	b.learn(used, dnsLesson(0, "used.test"))
	b.learn(unused, dnsLesson(0, "unused.test"))
	b.learn(told, sniffedLesson("told.test", true))
	in := func(at time.Duration) []gatewayNameKey {
		return b.expire(at, time.Hour, map[gatewayNameKey]bool{used: true, told: true})
	}
	if changed := in(30 * time.Second); len(changed) != 0 {
		t.Errorf("too early: %v", changed)
	}
	if changed := in(2 * time.Minute); len(changed) != 2 || b.page(unused) != nil || b.page(told) != nil || b.page(used) == nil {
		t.Errorf("changed %v", changed)
	}
	for at := time.Hour; at < 23*time.Hour; at += 10 * time.Minute {
		if in(at); b.page(used) == nil {
			t.Fatalf("forgotten after %v of use", at)
		}
	}
	if in(30 * time.Hour); b.page(used) != nil {
		t.Error("an address that is always in use never forgets a name")
	}
	if b.pages != 0 || len(b.pupils) != 0 || len(b.sharers) != 0 {
		t.Errorf("left: %d pages, %d clients, %d addresses", b.pages, len(b.pupils), len(b.sharers))
	}
}

// TestBookEntries: what is written down is read again.
func TestBookEntries(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		p := page{full: r.IntN(2) == 0}
		for range r.IntN(30) + 1 {
			l := lesson{
				source: NameSource(r.IntN(2) + 1), direct: r.IntN(2) == 0,
				learned: time.Duration(r.Uint32()) * time.Second, expires: time.Duration(r.Uint32()) * time.Second,
			}
			for range r.IntN(4) + 1 {
				l.names = append(l.names, strings.Repeat("x", r.IntN(253)+1))
			}
			p.lessons = append(p.lessons, l)
		}
		p.trim()
		entry := p.encode()
		var q page
		if err := q.decode(&entry); err != nil || q.full != p.full || !reflect.DeepEqual(p.lessons, q.lessons) {
			t.Fatalf("wrote %+v, read %+v, %v", p, q, err)
		}
	}
}

func FuzzBookEntry(f *testing.F) {
	p := page{lessons: []lesson{dnsLesson(time.Hour, "www.example.com", "cdn.example.net"), sniffedLesson("a.test", true)}}
	entry := p.encode()
	f.Add(entry.Text[:64])
	f.Fuzz(func(t *testing.T, data []byte) {
		var in gatewayLessons
		copy(in.Text[:], data)
		var p page
		if p.decode(&in) != nil {
			return
		}
		var again page
		out := p.encode()
		if err := again.decode(&out); err != nil || !reflect.DeepEqual(p.lessons, again.lessons) {
			t.Fatalf("%+v becomes %+v, %v", p, again, err)
		}
	})
}
