package datapath

import (
	"container/list"
	"encoding/binary"
	"errors"
	"slices"
	"time"
)

// NameSource is how a name became known.
type NameSource uint8

// The sources.
const (
	FromDNS      NameSource = iota + 1 // an answer that we gave
	FromSniffing                       // the first bytes of a flow
)

func (s NameSource) String() string {
	if s == FromSniffing {
		return "sniffed"
	}
	return "dns"
}

// lesson is one name that a client learned for an address, with those that it stands for.
type lesson struct {
	names   []string // the one that was asked for, then the aliases on the way to the address
	source  NameSource
	direct  bool          // sniffed, and the flow went direct
	learned time.Duration // since boot
	expires time.Duration
}

// page is what one client knows of one address.
type page struct {
	key     gatewayNameKey
	lessons []lesson
	full    bool // some lesson was given up for want of room: the address can have other names
	place   *list.Element
}

// pupil is one client.
type pupil struct {
	pages map[gatewayAddress]*page
	order list.List // of *page, least recently taught or used first
}

// book is everything that is known of addresses' names. It is bounded, by client and in all: a client that
// learns too much forgets its own.
type book struct {
	pupils  map[gatewayClientKey]*pupil
	sharers map[gatewayAddress]map[gatewayClientKey]*page
	pages   int
}

const (
	maxPages       = 32768 // as max_entries of the learned map
	maxClientPages = 16384
	maxShared      = 64 // names of an address among all clients; beyond, it can have any
)

func newBook() *book {
	return &book{pupils: map[gatewayClientKey]*pupil{}, sharers: map[gatewayAddress]map[gatewayClientKey]*page{}}
}

func (b *book) page(key gatewayNameKey) *page {
	if p := b.pupils[key.Client]; p != nil {
		return p.pages[key.Address]
	}
	return nil
}

// learn adds a lesson. Changed is false if it was known and only lives longer now. Forgotten are the pages that
// made room.
func (b *book) learn(key gatewayNameKey, l lesson) (changed bool, forgotten []gatewayNameKey) {
	p := b.page(key)
	if p == nil {
		forgotten = b.makeRoom(key.Client)
		p = b.add(key)
	}
	b.pupils[key.Client].order.MoveToBack(p.place)
	for i := range p.lessons {
		old := &p.lessons[i]
		if old.names[0] != l.names[0] || old.source != l.source {
			continue
		}
		l.expires = max(l.expires, old.expires)
		changed = old.direct != l.direct || !slices.Equal(old.names, l.names)
		*old = l
		if changed {
			p.trim()
		}
		return changed, forgotten
	}
	p.lessons = append(p.lessons, l)
	p.trim()
	return true, forgotten
}

func (b *book) add(key gatewayNameKey) *page {
	client := b.pupils[key.Client]
	if client == nil {
		client = &pupil{pages: map[gatewayAddress]*page{}}
		b.pupils[key.Client] = client
	}
	p := &page{key: key}
	p.place = client.order.PushBack(p)
	client.pages[key.Address] = p
	if b.sharers[key.Address] == nil {
		b.sharers[key.Address] = map[gatewayClientKey]*page{}
	}
	b.sharers[key.Address][key.Client] = p
	b.pages++
	return p
}

func (b *book) forget(p *page) {
	client := b.pupils[p.key.Client]
	client.order.Remove(p.place)
	delete(client.pages, p.key.Address)
	if len(client.pages) == 0 {
		delete(b.pupils, p.key.Client)
	}
	delete(b.sharers[p.key.Address], p.key.Client)
	if len(b.sharers[p.key.Address]) == 0 {
		delete(b.sharers, p.key.Address)
	}
	b.pages--
}

// makeRoom lets the client, or the one that has most, forget what it has not used for longest.
func (b *book) makeRoom(client gatewayClientKey) (forgotten []gatewayNameKey) {
	victim := b.pupils[client]
	if victim == nil || len(victim.pages) < maxClientPages {
		if b.pages < maxPages {
			return nil
		}
		for _, p := range b.pupils {
			if victim == nil || len(p.pages) > len(victim.pages) {
				victim = p
			}
		}
	}
	oldest := victim.order.Front().Value.(*page)
	b.forget(oldest)
	return []gatewayNameKey{oldest.key}
}

// expire takes out the lessons whose time is over, unless a flow still uses the page: then they last for another
// while. It returns the pages that are not what they were.
func (b *book) expire(now, life time.Duration, used map[gatewayNameKey]bool) (changed []gatewayNameKey) {
	for _, client := range b.pupils {
		for _, p := range client.pages {
			if used[p.key] {
				p.prolong(now, life)
				client.order.MoveToBack(p.place)
			}
			before := len(p.lessons)
			p.lessons = slices.DeleteFunc(p.lessons, func(l lesson) bool { return l.expires <= now })
			if len(p.lessons) == before {
				continue
			}
			if len(p.lessons) == 0 {
				b.forget(p)
			}
			changed = append(changed, p.key)
		}
	}
	return changed
}

// prolonged bounds how long flows keep a name that is not asked for again: longer, and an address that is always in use
// would never forget one.
const prolonged = 24 * time.Hour

// prolong lets what was learned by DNS live on. What was only read from a flow is one name of perhaps many.
func (p *page) prolong(now, life time.Duration) {
	for i := range p.lessons {
		if l := &p.lessons[i]; l.source == FromDNS && now-l.learned < prolonged {
			l.expires = max(l.expires, now+life)
		}
	}
}

// knowledge is what the policy is asked with.
type knowledge struct {
	sets [][]string // names, each with its aliases
	open bool       // there may be names that we do not know
}

// add takes what a page has from DNS.
func (k *knowledge) add(p *page) {
	k.open = k.open || p.full
	for _, l := range p.lessons {
		if l.source == FromDNS {
			k.addSet(l.names)
		}
	}
}

// addSet leaves out what another client knows just so.
func (k *knowledge) addSet(names []string) {
	if !slices.ContainsFunc(k.sets, func(set []string) bool { return slices.Equal(set, names) }) {
		k.sets = append(k.sets, names)
	}
}

// has reports whether a name is among those that were asked for.
func (k *knowledge) has(name string) bool {
	return slices.ContainsFunc(k.sets, func(set []string) bool { return set[0] == name })
}

// of is what the programs are told of an address for one client. A name that only a flow told shows that the client
// resolves elsewhere: there may be others, and each of its flows is looked at, unless such names are trusted and all
// have been direct. It is told besides what others know.
func (b *book) of(key gatewayNameKey, trust bool) knowledge {
	var k knowledge
	p := b.page(key)
	if p == nil {
		return k
	}
	k.add(p)
	asked := len(k.sets) > 0
	for _, l := range p.lessons {
		if l.source == FromSniffing && !k.has(l.names[0]) {
			k.open = k.open || !trust || !l.direct
			k.addSet(l.names)
		}
	}
	if !asked {
		shared := b.shared(key.Address)
		k.open = k.open || shared.open
		for _, names := range shared.sets {
			k.addSet(names)
		}
	}
	return k
}

// shared is what they are told for clients that know nothing of the address. What a client's flow says is only
// its own business: it can say anything.
func (b *book) shared(a gatewayAddress) knowledge {
	var k knowledge
	for _, p := range b.sharers[a] {
		k.add(p)
		if len(k.sets) > maxShared {
			k.open = true
			break
		}
	}
	return k
}

const lessonsSize = len(gatewayLessons{}.Text)

// A page as the learned map has it: 1 if it is full, then for each lesson its source (and 0x80 if direct), the
// times in seconds, the number of names, and each with its length before it; 0 ends it.
const lessonHeader = 1 + 4 + 4 + 1

func (l *lesson) size() int {
	n := lessonHeader
	for _, name := range l.names {
		n += 1 + len(name)
	}
	return n
}

// trim gives up the oldest lessons until the page fits its entry. Names of DNS have at most 253 bytes.
func (p *page) trim() {
	for {
		n := 2
		for i := range p.lessons {
			n += p.lessons[i].size()
		}
		if n <= lessonsSize {
			return
		}
		p.full = true
		if len(p.lessons) > 1 {
			oldest := 0
			for i := range p.lessons {
				if p.lessons[i].learned < p.lessons[oldest].learned {
					oldest = i
				}
			}
			p.lessons = slices.Delete(p.lessons, oldest, oldest+1)
			continue
		}
		l := &p.lessons[0]
		l.names = l.names[:len(l.names)-1]
	}
}

func (p *page) encode() (out gatewayLessons) {
	b := out.Text[:0]
	b = append(b, boolByte(p.full))
	for i := range p.lessons {
		l := &p.lessons[i]
		b = append(b, byte(l.source)|boolByte(l.direct)<<7)
		b = binary.BigEndian.AppendUint32(b, uint32(l.learned/time.Second))
		b = binary.BigEndian.AppendUint32(b, uint32(l.expires/time.Second))
		b = append(b, byte(len(l.names)))
		for _, name := range l.names {
			b = append(b, byte(len(name)))
			b = append(b, name...)
		}
	}
	return out
}

var errLessons = errors.New("the entry is damaged")

func (p *page) decode(in *gatewayLessons) error {
	b := in.Text[:]
	p.full = b[0] == 1
	for b = b[1:]; len(b) > 0 && b[0] != 0; {
		if len(b) < lessonHeader {
			return errLessons
		}
		l := lesson{
			source:  NameSource(b[0] &^ 0x80),
			direct:  b[0]&0x80 != 0,
			learned: time.Duration(binary.BigEndian.Uint32(b[1:])) * time.Second,
			expires: time.Duration(binary.BigEndian.Uint32(b[5:])) * time.Second,
		}
		count := int(b[9])
		b = b[lessonHeader:]
		for range count {
			if len(b) == 0 || len(b) <= int(b[0]) {
				return errLessons
			}
			length := int(b[0])
			l.names = append(l.names, string(b[1:1+length]))
			b = b[1+length:]
		}
		if count == 0 || l.source != FromDNS && l.source != FromSniffing {
			return errLessons
		}
		p.lessons = append(p.lessons, l)
	}
	return nil
}
