// Package gateway is the composition root: it makes the running gateway out of the other packages, keeps
// the kernel's state equal to what the configuration and the network ask for, and replaces the policy while
// traffic flows.
//
// The order of start is configuration, outbounds, proxy (listening), datapath, policy in force, proxy
// (serving); the order of stop is the reverse. Thus the programs never name an outbound or a socket that is
// not there, and no proxied packet is forwarded because the programs went first.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/admin"
	"sidegate/appliance/advertise"
	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/dns"
	"sidegate/appliance/netstate"
	"sidegate/appliance/proxy"
	"sidegate/appliance/sysctl"
)

// Options are what the command line says. Log is required.
type Options struct {
	ConfigFile string              // empty: the built-in default
	StateDir   string              // of the datapath's pins; empty: DefaultStateDir
	DataDir    string              // of what is remembered over reboots; empty: DefaultDataDir
	Socket     admin.SocketOptions // an empty path is admin.DefaultSocket
	Version    string
	Log        *slog.Logger
	// ApplySysctls sets the kernel parameters that are wrong, and puts back what was there when the gateway is stopped.
	ApplySysctls bool
	// Signals steer the gateway: SIGHUP reads the configuration again, SIGTERM and SIGINT stop it and remove
	// everything, SIGUSR2 stops it and leaves the kernel's state, for a successor to take over.
	Signals <-chan os.Signal
	// Ready is called once, when the policy is in force and everything serves. May be nil.
	Ready func()
}

// Where the datapath's pins are if there is no better place.
const (
	systemBPF   = "/sys/fs/bpf"
	fallbackBPF = "/run/sidegate/bpf"
)

// DefaultStateDir is in the system's BPF file system if it is mounted, and else one that the datapath mounts.
func DefaultStateDir() string {
	var fs unix.Statfs_t
	if unix.Statfs(systemBPF, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC {
		return filepath.Join(systemBPF, "sidegate")
	}
	return fallbackBPF
}

type gateway struct {
	options Options
	log     *slog.Logger
	notify  notifier
	started time.Time

	outbounds  outbounds
	dns        *dns.Server    // nil: its sockets could not be opened, and no configuration asked for them
	noDNS      error          // why
	retired    sync.WaitGroup // resolutions that are being closed
	neighbours neighbours
	path       path
	exemption  exemption // for whoever puts the policy in force
	verdicts   *verdicts
	proxy      *proxy.Server
	relay      proxy.Options // what the proxy was started with
	datapath   *datapath.Datapath
	watcher    *netstate.Watcher
	advertiser *advertise.Advertiser
	admin      *admin.Server
	metrics    *admin.Metrics
	parameters *sysctl.Keeper

	reloads chan chan<- admin.Reload
	settled chan struct{} // closed when the reconciler has ended
	renamed chan struct{} // names have been looked up again

	mu      sync.Mutex
	force   inForce
	trouble map[string]string // what is wrong at present, by what it concerns
}

// inForce is what the kernel was last made equal to.
type inForce struct {
	plan       *Plan
	names      *names // of its upstreams
	policy     *combined
	desired    datapath.Desired
	lan        []lan
	routing    []advertise.Interface // where clients are told of the box
	lastReload admin.Reload
}

// errLeave ends the tasks when the kernel's state is to stay.
var errLeave = errors.New("leaving the kernel's state to a successor")

// Run is the daemon. It returns nil after it was asked to stop, by ctx or a signal.
func Run(ctx context.Context, o Options) error {
	if o.StateDir == "" {
		o.StateDir = DefaultStateDir()
	}
	if o.DataDir == "" {
		o.DataDir = DefaultDataDir()
	}
	if o.Socket.Path == "" {
		o.Socket.Path = admin.DefaultSocket
	}
	g := &gateway{
		options: o,
		log:     o.Log,
		notify:  notifier{o.Log},
		started: time.Now(),
		reloads: make(chan chan<- admin.Reload),
		settled: make(chan struct{}),
		renamed: make(chan struct{}, 1),
		trouble: map[string]string{},
	}
	g.path.memory = newMemory(o.DataDir)
	err := g.run(ctx)
	if errors.Is(err, fs.ErrPermission) {
		err = lacking(err)
	}
	return err
}

func (g *gateway) run(ctx context.Context) (err error) {
	plan, err := loadFor(g.options.ConfigFile, g.surroundings())
	if err != nil {
		return err
	}
	for _, w := range plan.Config.Warnings {
		g.log.Warn(w)
	}
	release, err := g.open(ctx, plan)
	if err != nil {
		return err
	}
	defer func() {
		left := release(err)
		if errors.Is(err, errLeave) {
			err = nil
		}
		err = errors.Join(err, left)
	}()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, g.notify.stopping)()
	err = runTasks(ctx, g.tasks(cancel), g.announce)
	if err == nil {
		err = context.Cause(ctx)
	}
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// open acquires everything in the order of start. Release gives it back in reverse, and leaves the
// kernel's state where the gateway ends for another reason than being stopped.
func (g *gateway) open(ctx context.Context, plan *Plan) (_ func(error) error, err error) {
	var undo []func(error) error
	release := func(cause error) error {
		var errs error
		for i := len(undo) - 1; i >= 0; i-- {
			errs = errors.Join(errs, undo[i](cause))
		}
		return errs
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, release(err))
		}
	}()
	onRelease := func(f func()) { undo = append(undo, func(error) error { f(); return nil }) }

	onRelease(func() {
		last := g.current().plan
		if last == nil {
			last = plan
		}
		last.resolution.close()
		g.retired.Wait()
	})
	g.verdicts = &verdicts{lookup: g.lookup, log: g.log}
	g.relay = g.proxyOptions(plan, g.verdicts)
	if g.proxy, err = proxy.Listen(g.relay); err != nil {
		return nil, err
	}
	onRelease(g.proxy.Close) // it is closed already if it has served, and so are the others
	pupils := &pupils{neighbours: &g.neighbours}
	if err := g.listenDNS(plan, pupils); err != nil {
		return nil, err
	}
	onRelease(func() {
		if g.dns != nil {
			g.dns.Close()
		}
	})

	if g.admin, err = admin.Listen(g.options.Socket, g, g.log); err != nil {
		return nil, err
	}
	onRelease(g.admin.Close)
	g.metrics = admin.NewMetrics(g, g.log)
	commit, _, err := g.metrics.Prepare(plan.Config.Metrics.Listen)
	if err != nil {
		return nil, plan.Config.Metrics.Position.Errorf("metrics: %w", err)
	}
	commit()
	onRelease(g.metrics.Close)

	if g.watcher, err = netstate.Watch(ctx, g.log); err != nil {
		return nil, err
	}
	onRelease(g.watcher.Close)

	g.datapath, err = datapath.Open(ctx, datapath.Options{StateDir: g.options.StateDir, Log: g.log})
	if err != nil {
		return nil, fmt.Errorf("opening the datapath: %w", err)
	}
	g.verdicts.datapath, pupils.datapath = g.datapath, g.datapath
	undo = append(undo, g.closeDatapath)
	if g.parameters, err = newKeeper(); err != nil { // nobody else has it: the datapath has locked the namespace
		return nil, err
	}
	undo = append(undo, g.restoreParameters)

	g.advertiser = advertise.New(advertise.Options{Mark: uint32(datapath.MarkOwn), Log: g.log, Report: func(name string, problem error) {
		g.report("router advertisements on "+name, problem)
	}})
	onRelease(g.advertiser.Close)

	names := newNames()
	g.report("upstreams", names.refresh(ctx, plan.lookup, plan.upstreams))
	if err := g.establish(ctx, plan, names, g.watcher.Snapshot()); err != nil {
		return nil, fmt.Errorf("putting the policy in force: %w", err)
	}
	g.recordReload(plan, nil)
	return release, nil
}

// closeDatapath removes what the gateway owns in the kernel, unless it ends without having been asked to:
// then proxied destinations stay closed, and direct flows open, until somebody starts it again.
func (g *gateway) closeDatapath(cause error) error {
	if cause != nil && (g.datapath.Generation() > 0 || g.datapath.Inherited()) {
		if errors.Is(cause, errLeave) {
			g.log.Info("stopped; the kernel's state stays for the successor: direct flows go on, proxied ones wait")
		}
		return g.datapath.Detach()
	}
	err := g.datapath.Close()
	if cause == nil && err == nil {
		err = g.sayStopped()
	}
	return err
}

func (g *gateway) proxyOptions(plan *Plan, v proxy.Verdicts) proxy.Options {
	c, share := plan.Config.Proxy, plan.Config.PerClient
	return proxy.Options{
		Verdicts:    v,
		Outbounds:   &g.outbounds,
		Log:         g.log,
		Mark:        uint32(datapath.MarkOwn),
		RuleMarks:   ^uint32(config.OwnedMarks),
		DialTimeout: c.HandshakeTimeout,
		HalfClosed:  c.HalfClosed,
		UDPIdle:     c.UDPIdle,
		Limits: proxy.Limits{
			Connections: int(share.Connections),
			Sessions:    int(share.UDPSessions),
			Flows:       int(share.UDPFlows),
		},
	}
}

func (g *gateway) tasks(cancel context.CancelCauseFunc) []task {
	tasks := []task{
		newTask("proxy", g.proxy.Serve),
		newTask("network watcher", g.watcher.Run),
		newTask("flow table sweeper", g.datapath.Sweep),
		newTask("reconciler", g.reconcile),
		newTask("return path watch", g.watchPath),
		&lookups{
			refresh: func(ctx context.Context) error {
				force := g.current()
				return force.names.refresh(ctx, force.plan.lookup, force.plan.upstreams)
			},
			failed:  func(err error) { g.report("upstreams", err) },
			changed: g.renamed,
			ready:   make(chan struct{}),
		},
		g.advertiser,
		g.admin,
		g.metrics,
		newTask("signals", func(ctx context.Context) error { return g.obey(ctx, cancel) }),
	}
	if g.dns != nil {
		tasks = append(tasks, newTask("dns", g.dns.Serve))
	}
	return tasks
}

// obey acts on signals.
func (g *gateway) obey(ctx context.Context, cancel context.CancelCauseFunc) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-g.options.Signals:
			switch s {
			case syscall.SIGHUP:
				g.Reload(ctx) // logs
			case syscall.SIGUSR2:
				cancel(errLeave)
			default:
				g.log.Info("stopping", "signal", s.String())
				cancel(nil)
			}
		}
	}
}

// announce says that everything serves.
func (g *gateway) announce() {
	force := g.current()
	summary := g.summary(force)
	g.log.Info("running: "+summary, "generation", g.datapath.Generation())
	g.notify.ready(summary)
	if g.options.Ready != nil {
		g.options.Ready()
	}
}

// summary is the gateway in one line.
func (g *gateway) summary(f inForce) string {
	var names []string
	for _, l := range f.lan {
		if l.index != 0 {
			names = append(names, l.device)
		}
	}
	where := "no LAN interface yet"
	if len(names) > 0 {
		where = "LAN " + strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s, %d rules, default %s", where, len(f.policy.file.Rules), f.policy.file.Default)
}
