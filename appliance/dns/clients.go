package dns

import (
	"net/netip"
	"sync"
	"time"

	"sidegate/appliance/policy"
)

const (
	// believed is for how long what Allow and ClientFacts said of a client is not asked again.
	believed = int64(5 * time.Second)
	// maxClients bounds the clients that are remembered. One that is forgotten only costs another question.
	maxClients = 16384
	// maxOutstanding bounds the queries that wait for something, of all clients together.
	maxOutstanding = 4096
	// maxStrangers bounds the datagrams that wait for their client to be identified.
	maxStrangers = 1024
	// reserved is what every client may have under way even when others have used up most of it all.
	reserved = 16
)

// device is who is held to account for questions. One device has as many addresses as it likes: those of a
// MAC address are one, and where that is not known those of an IPv6 subnet, because a device makes up the
// other 64 bits (RFC 8981). The zero value is the gateway itself.
type device struct {
	mac     policy.MAC
	address netip.Prefix
}

// deviceOf is the device of an address whose MAC address is zero if it is not known.
func deviceOf(addr netip.Addr, mac policy.MAC) device {
	if mac != (policy.MAC{}) {
		return device{mac: mac}
	}
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	return device{address: netip.PrefixFrom(addr.WithZone(""), bits).Masked()}
}

// clients knows who asks. Fairness is by device: what one asks must not cost others an answer.
type clients struct {
	limits Limits // Queries is guarded by the mutex
	allow  func(netip.Addr) bool
	facts  func(netip.Addr) (policy.MAC, string)

	mu          sync.Mutex
	all         map[[16]byte]*client
	outstanding int
	devices     map[device]int // queries that wait for something; no zeros
}

// client is guarded by clients.mu.
type client struct {
	generation  *generation // of the resolver whose view it is
	view        *view
	allowed     bool
	checked     int64 // monotonic
	seen        int64
	rate        bucket
	device      device
	outstanding int // while there are any it is not forgotten
}

// bucket enforces a rate (the generic cell rate algorithm, ITU-T I.371). Its zero value is full.
type bucket struct{ next int64 }

// take reports whether it may happen now, and if so counts it. A second's worth may happen at once.
func (b *bucket) take(now int64, perSecond int) bool {
	next := max(b.next, now)
	if next-now > int64(time.Second) {
		return false
	}
	b.next = next + int64(time.Second)/int64(perSecond)
	return true
}

func newClients(o Options) *clients {
	return &clients{limits: o.Limits, allow: o.Allow, facts: o.ClientFacts, all: make(map[[16]byte]*client), devices: make(map[device]int)}
}

// admission is a client's right to have one query under way; clients.leave gives it back.
type admission struct {
	client   *client
	device   device
	view     *view
	resolver *Resolver
}

// known returns the view of a client and counts a query in its rate. If not enough is known of the client,
// both results are zero.
func (c *clients) known(addr *[16]byte, r *Resolver, now int64) (*view, Reason) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.all[*addr]
	switch {
	case k == nil || k.generation != r.generation || now-k.checked > believed:
		return nil, 0
	case !k.allowed:
		return nil, NotAllowed
	case !k.rate.take(now, c.limits.Queries):
		return nil, ClientRate
	}
	k.seen = now
	return k.view, 0
}

// enter admits a query of a client that known knew a moment ago.
func (c *clients) enter(addr *[16]byte, r *Resolver, v *view) (admission, Reason) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.all[*addr]
	if k == nil {
		return admission{}, Overloaded // others were in need of its place
	}
	return c.seat(k, admission{k, k.device, v, r})
}

// admit learns who a client is, if need be, and admits a query.
func (c *clients) admit(addr [16]byte, r *Resolver, now int64) (admission, Reason) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.get(addr, now)
	if k.generation != r.generation || now-k.checked > believed {
		c.mu.Unlock()
		allowed, d, v := c.identify(netip.AddrFrom16(addr).Unmap(), r)
		c.mu.Lock()
		k = c.get(addr, now) // it may have been forgotten meanwhile
		k.allowed, k.device, k.view, k.generation, k.checked = allowed, d, v, r.generation, now
	}
	k.seen = now
	switch {
	case !k.allowed:
		return admission{}, NotAllowed
	case !k.rate.take(now, c.limits.Queries):
		return admission{}, ClientRate
	}
	return c.seat(k, admission{k, k.device, k.view, r})
}

// seat counts a query as under way, if the device may have one more.
func (c *clients) seat(k *client, a admission) (admission, Reason) {
	switch {
	case c.devices[a.device] >= c.limits.Outstanding:
		return admission{}, ClientLimit
	case c.outstanding >= maxOutstanding*3/4 && c.devices[a.device] >= reserved, c.outstanding >= maxOutstanding:
		return admission{}, Overloaded
	}
	k.outstanding++
	c.devices[a.device]++
	c.outstanding++
	return a, 0
}

func (c *clients) leave(a admission) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.outstanding--
	a.client.outstanding--
	if c.devices[a.device]--; c.devices[a.device] == 0 {
		delete(c.devices, a.device)
	}
}

func (c *clients) identify(addr netip.Addr, r *Resolver) (bool, device, *view) {
	if !c.allow(addr) {
		return false, device{}, nil
	}
	flow := policy.Flow{Source: netip.AddrPortFrom(addr, 0)}
	if c.facts != nil {
		flow.SourceMAC, flow.Interface = c.facts(addr)
	}
	d := deviceOf(addr, flow.SourceMAC)
	if !r.views.asks {
		flow.SourceMAC, flow.Interface = policy.MAC{}, ""
	}
	v, err := r.views.of(flow)
	return err == nil, d, v
}

// device finds out who has an address.
func (c *clients) device(addr netip.Addr) device {
	var mac policy.MAC
	if c.facts != nil {
		mac, _ = c.facts(addr)
	}
	return deviceOf(addr, mac)
}

// limitQueries changes what one address may ask a second.
func (c *clients) limitQueries(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limits.Queries = n
}

// get finds a client or makes room for it: of some silent ones, the one that was so for longest is
// forgotten. Which some, the order of Go's maps decides: nobody can keep all others out by inventing
// addresses. The caller holds the mutex.
func (c *clients) get(addr [16]byte, now int64) *client {
	if k := c.all[addr]; k != nil {
		return k
	}
	if len(c.all) >= maxClients {
		const some = 16
		var oldest [16]byte
		silent, n := now+1, 0
		for a, k := range c.all {
			if k.outstanding == 0 && k.seen < silent {
				oldest, silent = a, k.seen
			}
			if n++; n >= some && silent <= now {
				break
			}
		}
		delete(c.all, oldest)
	}
	k := &client{seen: now}
	c.all[addr] = k
	return k
}

// allowPrivate is who may ask if nobody says so.
func allowPrivate(a netip.Addr) bool { return a.IsPrivate() || a.IsLinkLocalUnicast() }
