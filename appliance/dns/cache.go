package dns

import (
	"hash/maphash"
	"net/netip"
	"slices"
	"sync"
	"time"
	"unsafe"
)

// entry is the answer to one question, and what to teach before it is given. All but the guarded fields
// never change once it is in the cache.
type entry struct {
	key       string
	wire      []byte   // the message without OPT; nil: the question is met with silence
	ttls      []uint16 // where its TTLs are
	rcode     int
	authentic bool
	failed    bool         // no answer at all: the upstream failed
	refused   bool         // failed because who asked has too much under way; never in the cache
	stored    int64        // monotonic, nanoseconds
	life      int64        // nanoseconds; 0: for those who wait for it and nobody else
	guarded   bool         // it must not lead to an address of the gateway's own
	addrs     []netip.Addr // of the name, if they were asked for
	lessons   []lesson

	// guarded by the shard's mutex
	prev, next *entry // towards newer and older
	visited    bool
	renewing   bool
	retry      int64    // its upstream failed: do not ask before, but use the entry as long as it may be stale
	taught     []taught // the clients who know
}

// lesson is what one call of Learn is told.
type lesson struct {
	names []string
	addrs []netip.Addr
}

// taught is that a client was taught an entry.
type taught struct {
	client [16]byte
	at     int64
}

// expires is when the entry's life ends.
func (e *entry) expires() int64 { return e.stored + e.life }

// left is the TTL at a time, in seconds rounded up. It is 0 only if the answer must not be kept at all.
func (e *entry) left(now int64) uint32 {
	return uint32(max(e.expires()-now+int64(time.Second)-1, 0) / int64(time.Second))
}

// What things take, in bytes.
const (
	entrySize  = 512 // an entry without what it refers to, its place in a map that has grown, and its key
	lessonSize = int(unsafe.Sizeof(lesson{}))
	taughtSize = int(unsafe.Sizeof(taught{}))
	addrSize   = int(unsafe.Sizeof(netip.Addr{}))
	nameSize   = int(unsafe.Sizeof("")) + 16 // with what the allocator rounds up to
)

// size is what an entry takes, in bytes, or more: names that lessons share count for each.
func (e *entry) size() int {
	n := entrySize + cap(e.wire) + 2*cap(e.ttls) + addrSize*cap(e.addrs) + lessonSize*cap(e.lessons) + taughtSize*cap(e.taught)
	for _, l := range e.lessons {
		n += addrSize*cap(l.addrs) + nameSize*cap(l.names)
		for _, name := range l.names {
			n += len(name) + len(name)/8
		}
	}
	return n
}

const (
	shards = 16
	// maxTaught is how many clients an entry remembers to have taught. One more costs a call of Learn.
	maxTaught = 16
	// teachAgain is when a client is taught again what it knows already, in case the kernel forgot.
	teachAgain = int64(10 * time.Second)
	// renewal: an answer that is asked for in this last part of its life is renewed, unless its life is short.
	renewalPart = 10
	renewalLife = int64(10 * time.Second)
)

// cache is bounded in entries and in bytes. Which entry goes is decided by SIEVE (Zhang and others, NSDI
// 2024): being used costs one bit, and a client that asks for a million names once each does not drive out
// the names that others use.
type cache struct {
	seed     maphash.Seed
	shards   [shards]cacheShard
	prefetch bool
	stale    int64
	own      func(netip.Addr) bool // nil: none
}

type cacheShard struct {
	mu             sync.Mutex
	entries        map[string]*entry
	newest, oldest *entry
	hand           *entry // the next to be looked at for eviction
	bytes          int
	maxEntries     int
	maxBytes       int
	_              [64]byte // shards in cache lines of their own
}

// bytesPerEntry bounds the memory of a full cache. Most entries take less.
const bytesPerEntry = 1024

func newCache(c Cache, own func(netip.Addr) bool) *cache {
	all := &cache{own: own, seed: maphash.MakeSeed(), prefetch: c.Prefetch, stale: int64(c.Stale)}
	for i := range all.shards {
		s := &all.shards[i]
		s.entries = make(map[string]*entry)
		s.maxEntries = max(c.Entries/shards, 1)
		s.maxBytes = max(s.maxEntries*bytesPerEntry, 1<<17)
	}
	return all
}

func (c *cache) shard(key []byte) *cacheShard {
	return &c.shards[maphash.Bytes(c.seed, key)%shards]
}

func (c *cache) shardOf(e *entry) *cacheShard { return c.shard([]byte(e.key)) }

// found is how an entry may be used.
type found uint8

const (
	nothing found = iota
	fresh
	stale   // its life ended; its upstream should be asked
	waiting // as stale, but its upstream failed a moment ago
)

// get finds an entry for a question. If renew is true the caller has to have it renewed.
func (c *cache) get(key []byte, now int64) (e *entry, how found, renew bool) {
	s := c.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	e = s.entries[string(key)]
	switch {
	case e == nil:
		return nil, nothing, false
	case c.unsafe(e):
		s.remove(e)
		return nil, nothing, false
	case now < e.expires():
		e.visited = true
		return e, fresh, c.renews(e, now)
	case e.failed || now >= e.expires()+c.stale:
		s.remove(e)
		return nil, nothing, false
	case now < e.retry:
		return e, waiting, false
	}
	return e, stale, false
}

// ready finds an entry that can be sent to a client at once: it is fresh, and the client has been taught.
// If renew is true the caller has to have it renewed.
func (c *cache) ready(key []byte, client *[16]byte, now int64) (e *entry, renew bool) {
	s := c.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	e = s.entries[string(key)]
	if e == nil || now >= e.expires() || len(e.lessons) > 0 && !e.knows(client, now) || c.unsafe(e) {
		return nil, false
	}
	e.visited = true
	return e, c.renews(e, now)
}

// unsafe reports whether an answer leads to what has become an address of the gateway's own since it was kept. All
// addresses that passed the filter are in its lessons.
func (c *cache) unsafe(e *entry) bool {
	if !e.guarded || c.own == nil {
		return false
	}
	for _, l := range e.lessons {
		if slices.ContainsFunc(l.addrs, c.own) {
			return true
		}
	}
	return false
}

// renews decides on renewal, once for each entry. The caller holds the shard's mutex.
func (c *cache) renews(e *entry, now int64) bool {
	if !c.prefetch || e.renewing || e.failed || e.life < renewalLife || e.expires()-now > e.life/renewalPart {
		return false
	}
	e.renewing = true
	return true
}

func (e *entry) knows(client *[16]byte, now int64) bool {
	for i := range e.taught {
		if t := &e.taught[i]; t.client == *client {
			return now-t.at < teachAgain
		}
	}
	return false
}

// isTaught reports whether a client has been taught an entry.
func (c *cache) isTaught(e *entry, client *[16]byte, now int64) bool {
	s := c.shardOf(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	return e.knows(client, now)
}

// learned notes that a client was taught.
func (c *cache) learned(e *entry, client [16]byte, now int64) {
	s := c.shardOf(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	longest := 0
	for i := range e.taught {
		if e.taught[i].client == client {
			e.taught[i].at = now
			return
		}
		if e.taught[i].at < e.taught[longest].at {
			longest = i
		}
	}
	if len(e.taught) < maxTaught {
		before := e.size()
		e.taught = append(e.taught, taught{client, now})
		if s.entries[e.key] == e {
			s.bytes += e.size() - before
			s.shrink(e)
		}
		return
	}
	e.taught[longest] = taught{client, now}
}

// put stores an entry in place of the one before. An upstream's failure does not drive out what may still
// be used: it is put off until the failure may be forgotten.
func (c *cache) put(e *entry, now int64) {
	s := c.shardOf(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.entries[e.key]
	if e.failed && old != nil && !old.failed && now < old.expires()+c.stale {
		old.retry = e.expires()
		return // renewing stays set: one attempt is enough
	}
	if old != nil {
		s.remove(old)
	}
	if now >= e.expires() || e.size() > s.maxBytes/8 {
		return
	}
	s.add(e)
	s.shrink(e)
}

// shrink evicts entries, not the one given, until the shard is within its bounds.
func (s *cacheShard) shrink(not *entry) {
	for len(s.entries) > s.maxEntries || s.bytes > s.maxBytes {
		s.evict(not)
	}
}

func (s *cacheShard) add(e *entry) {
	s.entries[e.key] = e
	s.bytes += e.size()
	e.next = s.newest
	if s.newest != nil {
		s.newest.prev = e
	} else {
		s.oldest = e
	}
	s.newest = e
}

func (s *cacheShard) remove(e *entry) {
	delete(s.entries, e.key)
	s.bytes -= e.size()
	if s.hand == e {
		s.hand = e.prev
	}
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		s.newest = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	} else {
		s.oldest = e.prev
	}
	e.prev, e.next = nil, nil
}

// evict removes one entry, not the one given: the hand goes from old to new, and spares once what was used.
func (s *cacheShard) evict(not *entry) {
	for {
		e := s.hand
		if e == nil {
			e = s.oldest
		}
		s.hand = e.prev
		switch {
		case e == not: // there is another: put refuses what would fill a shard
		case e.visited:
			e.visited = false
		default:
			s.remove(e)
			return
		}
	}
}

// length is the number of entries.
func (c *cache) length() int {
	n := 0
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		n += len(s.entries)
		s.mu.Unlock()
	}
	return n
}
