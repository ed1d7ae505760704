package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/netstate"
)

// How often direct connections are looked at, and how long the box itself waits for a server that clients do not reach.
const (
	watchEvery   = 2 * time.Second
	proofTimeout = 2 * time.Second
	proofPause   = 10 * time.Second // between proofs: servers are not to be bothered
	proofServers = 3                // of the failing ones are tried
)

// path is what is known of how replies of direct flows may reach the client.
type path struct {
	memory memory
	router netip.Addr // that the box is behind; for whoever puts the policy in force

	mu    sync.Mutex
	found *finding // behind the present router; nil: nothing speaks against asymmetric
}

func (p *path) known() *finding {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.found
}

func (p *path) set(f *finding) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.found = f
}

// returnPath is that of direct flows of which no rule says. Found is what speaks against asymmetric; nil: nothing.
func returnPath(c *config.Config, found *finding) datapath.ReturnPath {
	if c.ReturnPath == config.Symmetric || c.ReturnPath == config.ReturnPathAuto && found != nil {
		return datapath.Symmetric
	}
	return datapath.Asymmetric
}

// describe says it for people: auto with what it has come to, and is in force.
func (p *path) describe(f inForce) string {
	if f.plan.Config.ReturnPath != config.ReturnPathAuto {
		return string(f.plan.Config.ReturnPath)
	}
	if found := p.known(); found != nil && f.desired.ReturnPath == datapath.Symmetric {
		return fmt.Sprintf("auto: symmetric, found out on %s", found.Since.Local().Format(time.DateTime))
	}
	return "auto: asymmetric"
}

// defaultRouter is whom the box sends to what is beyond the LAN.
func defaultRouter(s *netstate.Snapshot) netip.Addr {
	for _, ipv6 := range []bool{false, true} {
		if r, ok := s.Default(ipv6); ok && r.Gateway.IsValid() {
			return r.Gateway
		}
	}
	return netip.Addr{}
}

// recallPath takes up what was found out before, when the box comes to be behind a router. Another router is another network.
func (g *gateway) recallPath(s *netstate.Snapshot) {
	router := defaultRouter(s)
	if !router.IsValid() || router == g.path.router || router.Is6() && g.path.router.Is4() { // an IPv4 route that is away for a moment
		return
	}
	g.path.router = router
	f, err := g.path.memory.recall(router)
	g.report("memory", err)
	g.path.set(f)
}

// watchPath looks for direct connections of which the network drops the half that it sees.
func (g *gateway) watchPath(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var s suspicion
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		halves, err := g.datapath.Halves()
		if err != nil {
			return fmt.Errorf("watching the return path: %w", err)
		}
		evidence, ok := weigh(halves)
		if reached, proved := s.look(halves, func(e datapath.Evidence) (netip.AddrPort, bool) { return reach(ctx, e) }); proved {
			g.foundDropping(evidence, reached)
		}
		if !ok && carried(halves) || g.current().desired.ReturnPath == datapath.Symmetric {
			g.report("return path", nil)
		}
	}
}

// suspicion is that the network drops half-seen connections. The evidence is what clients send again and again, to whatever
// destinations; the proof is that the box itself reaches these, twice, and that clients fail there in between: a server that was away
// when they tried, or all of them behind an uplink that was, is reached as well when it is back, but then clients reach it too.
type suspicion struct {
	tried   time.Time // when servers were last bothered
	reached time.Time // when the box last reached what clients did not; zero: that is to be found out
}

// look weighs the connections, tries to reach the failing servers if it is time to, and reports whether the suspicion is proved, by
// reaching which.
func (s *suspicion) look(halves datapath.Halves, reach func(datapath.Evidence) (netip.AddrPort, bool)) (to netip.AddrPort, proved bool) {
	evidence, ok := weigh(halves)
	if !ok {
		s.reached = time.Time{}
		return to, false
	}
	first := s.reached.IsZero()
	if first && time.Since(s.tried) < proofPause {
		return to, false
	}
	if !first {
		if evidence, ok = weigh(halves.Since(time.Since(s.reached))); !ok { // nobody has tried since
			return to, false
		}
	}
	s.tried, s.reached = time.Now(), time.Time{}
	if to, ok = reach(evidence); ok && first {
		s.reached = time.Now()
	}
	return to, ok && !first
}

// weigh returns the evidence of the first interface and family that there is any for: a network may treat them differently, but a
// network that reaches some of what a client wants by one of them does not drop all there.
func weigh(all datapath.Halves) (datapath.Evidence, bool) {
	type way struct {
		link int
		ipv6 bool
	}
	groups := map[way]datapath.Halves{}
	for _, h := range all {
		w := way{h.Interface, h.Destination.Addr().Is6()}
		groups[w] = append(groups[w], h)
	}
	for _, halves := range groups {
		e := halves.Evidence()
		// Data that does not arrive may also be too large for the path, or name what somebody drops; several servers at once make that
		// unlikely. That the box connects says nothing of either.
		if e.Against == 0 && (e.Pattern == datapath.Unanswered || e.Pattern == datapath.Stalled && e.Convincing()) {
			return e, true
		}
	}
	return datapath.Evidence{}, false
}

func carried(all datapath.Halves) bool {
	for _, h := range all {
		if h.Outcome == datapath.Carried {
			return true
		}
	}
	return false
}

// reach tries to connect to what clients do not reach, from the box's own address.
func reach(ctx context.Context, e datapath.Evidence) (reached netip.AddrPort, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	answers := make(chan netip.AddrPort, proofServers)
	var dialing sync.WaitGroup
	for _, to := range e.Failing[:min(proofServers, len(e.Failing))] {
		dialing.Go(func() {
			if c, err := ownDialer().DialContext(ctx, "tcp", to.String()); err == nil {
				c.Close()
				answers <- to
				cancel() // one is enough
			}
		})
	}
	dialing.Wait()
	select {
	case reached = <-answers:
		return reached, true
	default:
		return netip.AddrPort{}, false
	}
}

// foundDropping acts on a proof: what is to find the return path by itself changes it for new flows, anybody else is told.
func (g *gateway) foundDropping(e datapath.Evidence, reached netip.AddrPort) {
	seen := fmt.Sprintf("direct connections of %d clients to %d destinations are %s, and the box itself reaches %s", e.Clients, len(e.Failing), e.Pattern, reached)
	force := g.current()
	if force.plan.Config.ReturnPath != config.ReturnPathAuto {
		g.report("return path", errors.New("the network drops asymmetric connections: "+seen+": use return_path: symmetric, or auto; `sidegate doctor` names a firewall on the box itself"))
		return
	}
	if g.path.known() != nil {
		return
	}
	f := finding{Router: defaultRouter(g.watcher.Snapshot()), Since: time.Now(), Seen: seen}
	g.path.set(&f)
	g.log.Warn("the network drops asymmetric connections: new direct flows are symmetric from now on", "seen", seen, "remembered", g.path.memory.path)
	g.report("memory", g.path.memory.keep(f))
	select {
	case g.renamed <- struct{}{}: // the reconciler has something to do
	default:
	}
}
