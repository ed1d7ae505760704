package gateway

import (
	"context"
	"net/netip"
	"sync/atomic"
	"time"

	"sidegate/appliance/datapath"
	"sidegate/appliance/netstate"
	"sidegate/appliance/policy"
)

// neighbourhood is what the DNS server needs to know of the network.
type neighbourhood struct {
	own   map[netip.Addr]bool
	allow []netip.Prefix // the LAN's subnets
	links map[int]string
}

// neighbours is the present neighbourhood; it is replaced whole.
type neighbours struct{ now atomic.Pointer[neighbourhood] }

// update is followed by what undoes it.
func (n *neighbours) update(lans []lan, s *netstate.Snapshot) (undo func()) {
	next := &neighbourhood{own: map[netip.Addr]bool{}, links: map[int]string{}}
	for _, a := range s.OwnAddresses() {
		next.own[a] = true
	}
	for _, l := range lans {
		if l.index == 0 {
			continue
		}
		next.links[l.index] = l.device
		for _, a := range s.AddressesOf(l.index) {
			next.allow = append(next.allow, a.Prefix.Masked())
		}
	}
	before := n.now.Swap(next)
	return func() { n.now.Store(before) }
}

func (n *neighbours) isOwn(a netip.Addr) bool {
	now := n.now.Load()
	return now != nil && now.own[a]
}

// mayAsk keeps the DNS server from answering the internet: a router without a firewall lets its IPv6 in.
func (n *neighbours) mayAsk(a netip.Addr) bool {
	if a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsLoopback() { // the last: this box itself
		return true
	}
	now := n.now.Load()
	if now == nil {
		return false
	}
	if now.own[a] {
		return true
	}
	for _, p := range now.allow {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func (n *neighbours) link(index int) string {
	if now := n.now.Load(); now != nil {
		return now.links[index]
	}
	return ""
}

// pupils teaches the datapath what clients learn from DNS, and knows who they are. The datapath is opened after the
// DNS server, whose sockets it needs, and set before that serves.
type pupils struct {
	datapath   *datapath.Datapath
	neighbours *neighbours
}

// Learn makes the kernel know, before the client does.
func (p *pupils) Learn(ctx context.Context, client netip.Addr, names []string, addrs []netip.Addr, ttl time.Duration) error {
	return p.datapath.Learn(ctx, datapath.Lesson{Client: client, Names: names, Addresses: addrs, TTL: ttl})
}

func (p *pupils) facts(client netip.Addr) (policy.MAC, string) {
	mac, index := p.datapath.Asker(client)
	return mac, p.neighbours.link(index)
}
