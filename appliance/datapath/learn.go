package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// How long a name is kept beyond its time to live: programs go on using what they have looked up. Where it makes
// a difference an address with two names is ambiguous, and its flows are sniffed.
const nameLife = time.Hour

// sniffedLife is the life of a name that a flow told. It is short: the client's other names for the address are not
// known, and where such names are trusted its flows there are decided by this one until it is over.
const sniffedLife = time.Minute

// Lesson is what a DNS answer tells a client.
type Lesson struct {
	Client    netip.Addr
	Names     []string // lower case, no final dot: the name that was asked for, then its aliases
	Addresses []netip.Addr
	TTL       time.Duration
}

// learning keeps the kernel's maps equal to the book.
type learning struct {
	mu          sync.Mutex
	book        *book
	durable     *ebpf.Map               // learned: what a successor starts from
	askers      *ebpf.Map               // address → MAC
	own         *ebpf.Map               // the box's own addresses
	generations []*generation           // whose names follow: the one in force, and one that is being built
	unpublished map[gatewayNameKey]bool // pages that the maps do not have as they are
}

// openLearning takes over what a predecessor knew.
func openLearning(m *gatewayMaps) (*learning, error) {
	l := &learning{book: newBook(), durable: m.Learned, askers: m.Askers, own: m.OwnAddresses, unpublished: map[gatewayNameKey]bool{}}
	now, err := sinceBoot()
	if err != nil {
		return nil, err
	}
	var key gatewayNameKey
	var value gatewayLessons
	var damaged []gatewayNameKey
	entries := m.Learned.Iterate()
	for entries.Next(&key, &value) {
		var p page
		if p.decode(&value) != nil {
			damaged = append(damaged, key)
			continue
		}
		kept := l.book.add(key)
		kept.lessons, kept.full = p.lessons, p.full
		kept.prolong(now, nameLife) // it is not written down when a name is asked for again
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("reading the names that are known: %w", err)
	}
	for _, key := range damaged {
		l.durable.Delete(key)
	}
	return l, nil
}

func sinceBoot() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("reading the clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// Learn makes the programs know addresses by names: when it returns, a flow to them is decided so.
func (d *Datapath) Learn(_ context.Context, l Lesson) error {
	if len(l.Names) == 0 || len(l.Addresses) == 0 {
		return nil
	}
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	client := d.learning.clientAt(l.Client)
	learned := lesson{names: l.Names, source: FromDNS, learned: now, expires: now + l.TTL + nameLife}
	d.learning.mu.Lock()
	defer d.learning.mu.Unlock()
	for _, a := range l.Addresses {
		if err := d.learning.learn(gatewayNameKey{Client: client, Address: addressOf(a)}, learned); err != nil {
			return fmt.Errorf("learning that %s is %s: %w", a, l.Names[0], err)
		}
	}
	return nil
}

// sniffed is Learn for a name that the first bytes of a flow told, which went direct or not.
func (l *learning) sniffed(key gatewayNameKey, name string, direct bool) error {
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.learn(key, lesson{names: []string{name}, source: FromSniffing, direct: direct, learned: now, expires: now + sniffedLife})
}

// clientAt is the client that has an address: its MAC if it has asked by DNS, which we then know.
func (l *learning) clientAt(a netip.Addr) gatewayClientKey {
	var number uint32
	if a == netip.IPv6Loopback() || a.Unmap() == ownSource4() || l.own.Lookup(addressOf(a), &number) == nil {
		return boxKey()
	}
	var who gatewayAsker
	if l.askers.Lookup(addressOf(a), &who) != nil {
		who = gatewayAsker{}
	}
	return clientBy(addressOf(a), who.Mac)
}

func (l *learning) learn(key gatewayNameKey, learned lesson) error {
	changed, forgotten := l.book.learn(key, learned)
	for _, gone := range forgotten {
		l.unpublished[gone] = true
		_ = l.publish(gone) // it makes room; if it fails the sweep tries again
	}
	if changed {
		l.unpublished[key] = true
	}
	if !l.unpublished[key] {
		return nil
	}
	return l.publish(key)
}

// publishAll makes the maps equal to the book. What fails is tried again the next time.
func (l *learning) publishAll() (err error) {
	for key := range l.unpublished {
		err = errors.Join(err, l.publish(key))
	}
	return err
}

// publish writes a page, or that there is none any more, and what all clients together know of its address.
func (l *learning) publish(key gatewayNameKey) error {
	if p := l.book.page(key); p != nil {
		entry := p.encode()
		if err := l.durable.Put(key, &entry); err != nil {
			return fmt.Errorf("writing it down: %w", err)
		}
	} else if err := remove(l.durable, key); err != nil {
		return err
	}
	for _, g := range l.generations {
		if err := g.setNames(key, l.book); err != nil {
			return err
		}
	}
	delete(l.unpublished, key)
	return nil
}

func remove(m *ebpf.Map, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("removing a name: %w", err)
	}
	return nil
}

// follow makes a generation's names what is known, and keeps them so until unfollow. Learning goes on meanwhile.
func (l *learning) follow(g *generation) error {
	l.mu.Lock()
	l.generations = append(l.generations, g)
	keys := make([]gatewayNameKey, 0, l.book.pages)
	for _, client := range l.book.pupils {
		for _, p := range client.pages {
			keys = append(keys, p.key)
		}
	}
	l.mu.Unlock()
	for chunk := range slices.Chunk(keys, 256) {
		if err := l.tell(g, chunk); err != nil {
			l.unfollow(g)
			return err
		}
	}
	return nil
}

func (l *learning) tell(g *generation, keys []gatewayNameKey) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range keys {
		if err := g.setNames(key, l.book); err != nil {
			return err
		}
	}
	return nil
}

func (l *learning) unfollow(g *generation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.generations = slices.DeleteFunc(l.generations, func(other *generation) bool { return other == g })
}

// sweep forgets what is too old. Used are the addresses that clients have flows to.
func (l *learning) sweep(used map[gatewayNameKey]bool) error {
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range l.book.expire(now, nameLife, used) {
		l.unpublished[key] = true
	}
	return l.publishAll()
}

// KnownName is one name by which a client knows an address.
type KnownName struct {
	Client  string // MAC, or address where the link has none
	Address netip.Addr
	Names   []string // the one that was asked for, then its aliases
	Source  NameSource
	Age     time.Duration
	Expires time.Duration // from now; flows keep it longer
}

// Names lists what is known, by client and address.
func (d *Datapath) Names() []KnownName {
	now, _ := sinceBoot()
	d.learning.mu.Lock()
	defer d.learning.mu.Unlock()
	var all []KnownName
	for _, client := range d.learning.book.pupils {
		for _, p := range client.pages {
			all = append(all, p.known(now)...)
		}
	}
	slices.SortFunc(all, func(a, b KnownName) int {
		if c := strings.Compare(a.Client, b.Client); c != 0 {
			return c
		}
		if c := a.Address.Compare(b.Address); c != 0 {
			return c
		}
		return int(b.Age - a.Age)
	})
	return all
}

func (p *page) known(now time.Duration) []KnownName {
	out := make([]KnownName, 0, len(p.lessons))
	for _, l := range p.lessons {
		out = append(out, KnownName{
			Client: clientText(p.key.Client), Address: p.key.Address.addr(), Names: l.names, Source: l.source,
			Age: now - l.learned, Expires: max(0, l.expires-now),
		})
	}
	return out
}

// NamesOf is what a flow of a client to an address is decided by: what the client itself knows, else what others
// do. A zero MAC stands for the one that the client's address last asked with.
func (d *Datapath) NamesOf(client netip.Addr, mac policy.MAC, address netip.Addr) []KnownName {
	now, _ := sinceBoot()
	key := d.pageOf(client, mac, address)
	d.learning.mu.Lock()
	defer d.learning.mu.Unlock()
	if p := d.learning.book.page(key); p != nil {
		return p.known(now)
	}
	var all []KnownName
	for _, p := range d.learning.book.sharers[key.Address] {
		for _, k := range p.known(now) {
			if k.Source == FromDNS {
				all = append(all, k)
			}
		}
	}
	return all
}

// pageOf is where a client's knowledge of an address is. Without a client it is nobody's.
func (d *Datapath) pageOf(client netip.Addr, mac policy.MAC, address netip.Addr) gatewayNameKey {
	key := gatewayNameKey{Address: addressOf(address)}
	switch {
	case mac != policy.MAC{}:
		key.Client = clientBy(gatewayAddress{}, mac)
	case client.IsValid():
		key.Client = d.learning.clientAt(client)
	}
	return key
}

// Asker is the MAC address and the LAN interface of who last asked by DNS from an address.
func (d *Datapath) Asker(client netip.Addr) (policy.MAC, int) {
	var who gatewayAsker
	if d.state.maps.Askers.Lookup(addressOf(client), &who) != nil {
		return policy.MAC{}, 0
	}
	return who.Mac, int(who.Interface)
}

// clientText is a client as people know it, by how client_identify (bpf/client.h) fills the key.
func clientText(c gatewayClientKey) string {
	switch {
	case c.W[3] == 0:
		b := gatewayAddress{W: c.W}.addr().As16()
		return net.HardwareAddr(b[:6]).String()
	case c.W[2] == 0:
		c.W[3] = 0
		return netip.PrefixFrom(gatewayAddress{W: c.W}.addr(), 64).String()
	}
	return gatewayAddress{W: c.W}.addr().String()
}
