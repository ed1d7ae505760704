package gateway

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/policy"
	"sidegate/appliance/proxy"
)

// verdicts is what the proxy asks about flows: the datapath, which is opened after the proxy, because its programs
// need the proxy's sockets, and set before it serves; and whether an upstream is told names.
type verdicts struct {
	datapath *datapath.Datapath
	lookup   lookup
	log      *slog.Logger
	naming   atomic.Pointer[naming]
}

// naming is what the configuration says about names.
type naming struct {
	dial  config.Dial
	trust bool // of names that were only read from first bytes
	dns   *config.DNS
}

// ours reports whether only our DNS knows the name: an upstream that is told it would look in vain.
func (n *naming) ours(name string, address netip.Addr) bool {
	if address.IsPrivate() || address.IsLinkLocalUnicast() || !strings.Contains(name, ".") {
		return true
	}
	if n.dns == nil {
		return false
	}
	if _, listed := n.dns.Hosts[name]; listed {
		return true
	}
	below := func(suffix string) bool {
		bare := strings.TrimPrefix(suffix, ".")
		return name == bare || strings.HasSuffix(name, "."+bare)
	}
	if slices.ContainsFunc(n.dns.RebindAllow, below) {
		return true
	}
	return slices.ContainsFunc(n.dns.Rules, func(r config.DNSRule) bool { return slices.Contains(r.Answer, address) })
}

func (v *verdicts) use(c *config.Config) {
	v.naming.Store(&naming{c.Dial, c.TrustSniffed, c.DNS})
}

// Flow is what the kernel decided.
func (v *verdicts) Flow(network policy.Network, client, destination netip.AddrPort) (proxy.Route, bool) {
	a, ok := v.datapath.Assigned(network, client, destination)
	if !ok {
		return proxy.Route{}, false
	}
	route := proxy.Route{Outbound: a.Outbound, Own: a.Own, Mark: a.Mark, Sniff: a.Sniff}
	// With several names an address does not tell which is meant.
	if v.tellsNames(network, a.Outbound) && len(a.Names) == 1 && !v.naming.Load().ours(a.Names[0], destination.Addr()) {
		route.Name = a.Names[0]
	}
	return route, true
}

// Decide asks the policy again, with the name that the first bytes told.
func (v *verdicts) Decide(ctx context.Context, network policy.Network, client, destination netip.AddrPort, told proxy.Told) (proxy.Route, bool) {
	a, ok := v.datapath.Assigned(network, client, destination)
	if !ok {
		return proxy.Route{}, false
	}
	name := told.Name
	if told.Hidden && len(a.Names) > 0 && !slices.Contains(a.Names, name) {
		name = "" // the outer name of an encrypted hello: what the client asked for says more
	}
	outbound, mark := a.Outbound, a.Mark
	if a.Sniff {
		var err error
		if outbound, mark, err = v.datapath.Decide(a, name); err != nil {
			v.log.Warn("deciding a flow again", "client", client, "destination", destination, "error", err)
			return proxy.Route{}, false
		}
	}
	route := proxy.Route{Outbound: outbound, Own: a.Own, Mark: mark}
	if name != "" && v.tellsNames(network, outbound) && v.believes(ctx, a, destination.Addr(), name) {
		route.Name = name
	}
	return route, true
}

func (v *verdicts) tellsNames(network policy.Network, outbound string) bool {
	return network == policy.TCP && v.naming.Load().dial == config.DialDomain &&
		outbound != policy.OutboundDirect && outbound != policy.OutboundBlock
}

// verifyTimeout bounds asking DNS whether a sniffed name has the flow's address; the flow waits meanwhile, and its upstream
// can do without.
const verifyTimeout = 200 * time.Millisecond

// believes reports whether the name may stand for the address. First bytes can say anything: what the client got from
// us for that name is true, and what DNS says now.
func (v *verdicts) believes(ctx context.Context, a datapath.Assignment, address netip.Addr, name string) bool {
	naming := v.naming.Load()
	switch {
	case naming.ours(name, address):
		return false
	case naming.trust, slices.Contains(a.Names, name):
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	addrs, err := v.lookup(ctx, name)
	return err == nil && slices.Contains(addrs, address.Unmap())
}
