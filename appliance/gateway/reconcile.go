package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sidegate/appliance/admin"
	"sidegate/appliance/datapath"
	"sidegate/appliance/netstate"
)

// healEvery is the time after which the kernel's state is compared with what it should be without any
// occasion: others delete rules and routes and do not say so.
const healEvery = 3 * time.Second

// reconcile is the one place that changes the datapath. It makes the kernel equal to the configuration
// and the network whenever either changes, and every healEvery.
func (g *gateway) reconcile(ctx context.Context) error {
	defer close(g.settled)
	heal := time.NewTicker(healEvery)
	defer heal.Stop()
	var watchdog <-chan time.Time
	if every := g.notify.watchdog(); every > 0 {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		watchdog = ticker.C
	}
	snapshot, changes := g.watcher.Snapshot(), g.watcher.Changes()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-watchdog:
			g.notify.alive()
			continue
		case delta, ok := <-changes:
			if !ok {
				changes = nil // the watcher ends because ctx does, or takes us with it
				continue
			}
			snapshot = delta.Snapshot
			g.logDelta(delta)
		case <-g.renamed:
		case <-heal.C:
		case done := <-g.reloads:
			done <- g.reload(ctx, snapshot)
			continue
		}
		force := g.current()
		err := g.establish(ctx, force.plan, force.names, snapshot)
		if ctx.Err() != nil {
			return nil
		}
		g.report("datapath", err)
	}
}

// establish makes the kernel equal to a plan in a network, and then everything else. A failure changes nothing that packets see.
func (g *gateway) establish(ctx context.Context, plan *Plan, names *names, snapshot *netstate.Snapshot) error {
	before := g.current()
	policy := plan.combine(names.addresses, subnets(plan.Config, snapshot))
	if before.policy != nil && before.policy.same(policy) {
		policy = before.policy // another pointer would mean another policy to the datapath
	}
	lan := lanInterfaces(plan.Config.Interfaces.LAN, snapshot, before.lan)
	g.recallPath(snapshot)
	desired := desire(plan.Config, policy, returnPath(plan.Config, g.path.known()), lan, snapshot)
	desired.Untracked = g.exemption.needed(ctx, desired.ReturnPath, lan, snapshot)
	desired.Own = own(plan, snapshot)
	desired.Sockets = datapath.Sockets(g.proxy.Sockets())
	if plan.resolution != nil {
		desired.DNS = datapath.Sockets(g.dns.Sockets())
		desired.Resolvers = plan.resolution.addresses()
	}
	g.outbounds.prepare(plan.outbounds)
	forget := g.neighbours.update(lan, snapshot)
	if plan.resolution != nil && (before.plan == nil || before.plan.resolution == nil) {
		g.dns.Use(plan.resolution.resolver) // the kernel brings it no questions yet, and then at once
	}
	if err := g.datapath.Apply(ctx, desired); err != nil {
		forget()
		return err
	}
	routing, unable := routed(plan.Config, lan, snapshot, before.routing)
	g.mu.Lock()
	g.force.plan, g.force.names, g.force.policy = plan, names, policy
	g.force.desired, g.force.lan, g.force.routing = desired, lan, routing
	force := g.force
	g.mu.Unlock()
	g.outbounds.commit()
	g.verdicts.use(plan.Config)
	g.followDNS(plan)
	g.advertiser.Set(routing)
	g.report("ipv6", unable)
	g.followInterfaces(before, force)
	g.report("own questions", ownQuestions(plan, snapshot))
	g.report("own connections", undecided(g.datapath.OwnProblem()))
	g.followParameters(parametersOf(lan, snapshot))
	return nil
}

// followDNS makes the DNS server answer by the plan in force. Without a DNS section it goes on as it did, for as long as the
// kernel brings it questions.
func (g *gateway) followDNS(plan *Plan) {
	if g.dns == nil {
		return
	}
	g.dns.LimitQueries(int(plan.Config.PerClient.DNSQueries))
	if plan.resolution != nil {
		g.dns.Use(plan.resolution.resolver)
	}
}

// followInterfaces tells which LAN interfaces came and went, and what is wrong with those that are there.
func (g *gateway) followInterfaces(before, after inForce) {
	for _, l := range after.lan {
		g.report("interface "+l.name, l.problem)
		if l.port != "" && !slices.ContainsFunc(before.lan, func(o lan) bool { return o.port == l.port && o.device == l.device }) {
			g.log.Info(l.port + " is a port of " + l.device + ", where its clients' packets are delivered: that is the LAN interface, with all of its ports")
		}
	}
	for _, l := range before.lan {
		if !containsLAN(after.lan, l.name) {
			g.report("interface "+l.name, nil)
		}
	}
	if was, is := g.summaryIf(before), g.summary(after); was != "" && was != is {
		g.log.Info("now: " + is)
		g.notify.status(is)
	}
}

func (g *gateway) summaryIf(f inForce) string {
	if f.plan == nil {
		return ""
	}
	return g.summary(f)
}

func (g *gateway) logDelta(d netstate.Delta) {
	for _, r := range d.Reasons {
		g.log.Debug("the network changed", "what", r.String())
	}
}

// Reload reads the configuration again and puts it in force. A failure changes nothing.
func (g *gateway) Reload(ctx context.Context) (admin.Reload, error) {
	done := make(chan admin.Reload, 1)
	select {
	case g.reloads <- done:
		return <-done, nil
	case <-g.settled:
		return admin.Reload{}, errors.New("reading the configuration again: the gateway is stopping")
	case <-ctx.Done():
		return admin.Reload{}, context.Cause(ctx)
	}
}

func (g *gateway) reload(ctx context.Context, snapshot *netstate.Snapshot) admin.Reload {
	g.notify.reloading()
	plan, err := g.replace(ctx, snapshot)
	g.recordReload(plan, err)
	g.notify.ready(g.summary(g.current()))
	return g.current().lastReload
}

// replace puts the configuration as it is now in force. What it is made of is made beside what is in force, and looks its own
// names up, which takes some seconds; nothing else is asked of it until the kernel has it.
func (g *gateway) replace(ctx context.Context, snapshot *netstate.Snapshot) (_ *Plan, err error) {
	plan, err := loadFor(g.options.ConfigFile, g.surroundings())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			plan.resolution.close()
		}
	}()
	if plan.resolution != nil && g.dns == nil {
		return nil, plan.Config.DNS.Position.Errorf("dns: %w; free the port and restart", g.noDNS)
	}
	commit, abort, err := g.metrics.Prepare(plan.Config.Metrics.Listen)
	if err != nil {
		return nil, plan.Config.Metrics.Position.Errorf("metrics: %w", err)
	}
	before := g.current()
	names := before.names.clone()
	unknown := names.refresh(ctx, plan.lookup, plan.upstreams)
	if err := g.establish(ctx, plan, names, snapshot); err != nil {
		abort()
		return nil, fmt.Errorf("putting the policy in force: %w", err)
	}
	commit()
	g.report("upstreams", unknown)
	g.retired.Go(before.plan.resolution.close)
	g.warnOfLater(plan)
	return plan, nil
}

// warnOfLater tells what of a plan that is in force waits for the next start.
func (g *gateway) warnOfLater(plan *Plan) {
	if g.proxyOptions(plan, g.relay.Verdicts) != g.relay {
		g.log.Warn("the proxy's times and the clients' shares of it have changed: they take effect at the next start")
	}
}

// recordReload remembers and logs how reading the configuration went.
func (g *gateway) recordReload(plan *Plan, err error) {
	r := admin.Reload{Time: time.Now(), OK: err == nil, Generation: g.datapath.Generation()}
	if err != nil {
		r.Error = err.Error()
		g.log.Error("the configuration was not taken; the one before stays in force", "error", oneLine(err))
	} else {
		r.Warnings = plan.Config.Warnings
	}
	g.mu.Lock()
	first := g.force.lastReload.Time.IsZero()
	g.force.lastReload = r
	g.mu.Unlock()
	if err != nil || first {
		return
	}
	for _, w := range r.Warnings {
		g.log.Warn(w)
	}
	g.log.Info("the configuration was read again", "file", plan.Config.File, "generation", r.Generation)
}

// oneLine joins the lines of an error.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// current is what is in force.
func (g *gateway) current() inForce {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.force
}

// report keeps what is wrong with a subject, for the status, and logs it when it changes. A nil error means
// that all is well.
func (g *gateway) report(subject string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	g.mu.Lock()
	before := g.trouble[subject]
	if text == "" {
		delete(g.trouble, subject)
	} else {
		g.trouble[subject] = text
	}
	g.mu.Unlock()
	if text == before {
		return
	}
	for line := range strings.Lines(text) {
		if !strings.Contains(before, strings.TrimSpace(line)) {
			g.log.Warn(strings.TrimSpace(line))
		}
	}
	if text == "" {
		g.log.Info("solved: " + strings.ReplaceAll(before, "\n", "; "))
	}
}

// problems are all troubles, one a line, sorted.
func (g *gateway) problems() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	lines := []string{}
	for _, subject := range sortedKeys(g.trouble) {
		for line := range strings.Lines(g.trouble[subject]) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}
