package gateway

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
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
	lookup   func(ctx context.Context, host string) ([]netip.Addr, error)
	log      *slog.Logger
	naming   atomic.Pointer[naming]
}

// naming is what the configuration says about names.
type naming struct {
	dial  config.Dial
	trust bool // of names that were only read from first bytes
}

func (v *verdicts) use(c *config.Config) (undo func()) {
	before := v.naming.Swap(&naming{c.Dial, c.TrustSniffed})
	return func() { v.naming.Store(before) }
}

// Flow is what the kernel decided.
func (v *verdicts) Flow(network policy.Network, client, destination netip.AddrPort) (proxy.Route, bool) {
	a, ok := v.datapath.Assigned(network, client, destination)
	if !ok {
		return proxy.Route{}, false
	}
	route := proxy.Route{Outbound: a.Outbound, Mark: a.Mark, Sniff: a.Sniff}
	// With several names an address does not tell which is meant.
	if v.tellsNames(network, a.Outbound) && len(a.Names) == 1 {
		route.Name = a.Names[0]
	}
	return route, true
}

// Decide asks the policy again, with the name that the first bytes told.
func (v *verdicts) Decide(ctx context.Context, network policy.Network, client, destination netip.AddrPort, name string) (proxy.Route, bool) {
	a, ok := v.datapath.Assigned(network, client, destination)
	if !ok {
		return proxy.Route{}, false
	}
	outbound, mark := a.Outbound, a.Mark
	if a.Sniff {
		var err error
		if outbound, mark, err = v.datapath.Decide(a, name); err != nil {
			v.log.Warn("deciding a flow again", "client", client, "destination", destination, "error", err)
			return proxy.Route{}, false
		}
	}
	route := proxy.Route{Outbound: outbound, Mark: mark}
	if name != "" && v.tellsNames(network, outbound) && v.believes(ctx, a, destination.Addr(), name) {
		route.Name = name
	}
	return route, true
}

func (v *verdicts) tellsNames(network policy.Network, outbound string) bool {
	return network == policy.TCP && v.naming.Load().dial == config.DialDomain &&
		outbound != policy.OutboundDirect && outbound != policy.OutboundBlock
}

// verifyTimeout bounds asking DNS whether a sniffed name has the flow's address; the flow waits meanwhile.
const verifyTimeout = time.Second

// believes reports whether the name may stand for the address. First bytes can say anything: what the client got from
// us for that name is true, and what DNS says now.
func (v *verdicts) believes(ctx context.Context, a datapath.Assignment, address netip.Addr, name string) bool {
	if v.naming.Load().trust || slices.Contains(a.Names, name) {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	addrs, err := v.lookup(ctx, name)
	return err == nil && slices.Contains(addrs, address.Unmap())
}
