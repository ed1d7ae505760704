// Package datapath owns every kernel object of the gateway: the BPF programs and maps, their links and
// pins, the policy routing that delivers proxied packets, and the firewall marks.
//
// Its shape is Open, Apply, Close. Apply takes the whole desired state and makes the kernel equal to it,
// however it was before: after a crash, after foreign edits, after an upgrade. A new policy is a new
// generation of programs and maps, built and tested beside the old one and put in its place by an atomic
// replacement of the links' program; what fails before that changes nothing.
//
// Everything is pinned, so a daemon that dies takes nothing with it: direct flows go on, and flows that
// need the daemon are dropped and counted, or sent direct where the owner chose so.
package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sidegate/appliance/policy"
)

// Options say where a Datapath keeps its pins and whom it tells.
type Options struct {
	// StateDir holds the pins. It is, or lies in, a BPF file system; where it does not, one is mounted there.
	StateDir string
	Log      *slog.Logger
}

// Interface is a LAN interface to attach to.
type Interface struct {
	Name     string
	Index    int
	Ethernet bool // false: packets begin with the IP header
}

// Sockets are the transparent listeners that proxied flows are assigned to.
type Sockets struct {
	TCP4, TCP6, UDP4, UDP6 syscall.Conn
}

// Service is one that a LAN client offers to the outside, through the main router.
type Service struct {
	Address netip.Addr
	Port    uint16
	Network policy.Network
}

// Desired is the whole state that Apply establishes.
type Desired struct {
	Policy       *policy.Policy
	OnFailure    policy.Verdict // Block or Direct: proxied flows while no listener is there
	ReturnPath   ReturnPath     // of direct flows of which no rule says
	Untracked    bool           // direct flows that leave by the interface that they came by are kept from the kernel's conntrack
	Interfaces   []Interface
	OwnAddresses []netip.Addr
	Published    []Service
	Sockets      Sockets      // of the proxy
	DNS          Sockets      // of the DNS server; without any, DNS is ordinary traffic
	Resolvers    []netip.Addr // DNS servers whose own questions are left alone: those that the DNS server asks
	Sniff        Sniff
	TrustSniffed bool   // a name that a flow told decides the client's next flows to that address, if it led direct
	Own          *Own   // the box's own sockets are treated as clients' are; nil: they are left alone
	ClientFlows  uint32 // flows of one client in the flow table; 0 is DefaultClientFlows
	ClientFresh  uint32 // packets a second of one client to the proxy's listeners; 0 is DefaultClientFresh
	ClientAsks   uint32 // … to the DNS server's; 0 is DefaultClientAsks
}

// ReturnPath is how the replies of a direct flow reach the client. Its zero value is Asymmetric.
type ReturnPath uint8

// The return paths. A live flow keeps the one that it began with.
const (
	Asymmetric ReturnPath = iota // past the gateway: the flow is not translated
	Symmetric                    // through the gateway: the flow is masqueraded, by the kernel's NAT
)

// Sniff says whose name is read from the first bytes. Its zero value is SniffOff.
type Sniff uint8

// The modes.
const (
	SniffOff       Sniff = iota
	SniffAmbiguous       // flows whose names lead to different outbounds
	SniffUnknown         // and those without a name, where one could matter
)

func (want *Desired) interceptsDNS() bool { return want.DNS != Sockets{} }

func (want *Desired) answersOwn() bool {
	return want.interceptsDNS() && want.Own != nil && want.Own.DNS
}

// The shares of one client, where Desired names none.
const (
	DefaultClientFlows = 8192
	DefaultClientFresh = 4096
	DefaultClientAsks  = 250_000
)

// Datapath is the one writer of the kernel's state. Its methods are safe for concurrent use.
type Datapath struct {
	log      *slog.Logger
	state    *state // shared maps and pins
	lock     *lock
	learning *learning

	applying sync.Mutex // one Apply at a time; held before mu

	mu         sync.RWMutex
	generation *generation // nil before the first Apply
	applied    *Desired    // by the last Apply that succeeded
	links      *links
	markTable  markTable
	rules      map[uint32][]string
	history    counters // of generations that are gone
	inherited  bool     // a predecessor's links were there
	told       map[string]time.Time
	ownProblem error // what keeps the programs for the box's own sockets from their places

	// By policy.OutboundID; grows, so that old flows keep their names. Replaced whole, so that the proxy, which
	// asks for every flow, never waits for an Apply.
	outbounds atomic.Pointer[map[uint32]string]
}

// Open takes over the pinned state of a predecessor, or creates it. It refuses a kernel that is too old,
// and a second daemon in the same network namespace.
func Open(ctx context.Context, o Options) (*Datapath, error) {
	if err := checkKernel(); err != nil {
		return nil, err
	}
	lock, err := lockNamespace()
	if err != nil {
		return nil, err
	}
	state, err := openState(o.StateDir)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("opening the pinned state in %s: %w", o.StateDir, err)
	}
	learning, err := openLearning(&state.maps)
	if err != nil {
		return nil, errors.Join(err, state.Close(), lock.Close())
	}
	d := &Datapath{
		log:      o.Log,
		state:    state,
		lock:     lock,
		learning: learning,
		links:    newLinks(state),
		rules:    map[uint32][]string{},
		told:     map[string]time.Time{},
	}
	d.outbounds.Store(&map[uint32]string{
		policy.OutboundID(policy.OutboundDirect): policy.OutboundDirect,
		policy.OutboundID(policy.OutboundBlock):  policy.OutboundBlock,
	})
	pins, err := os.ReadDir(d.links.dir)
	d.inherited = err == nil && len(pins) > 0
	if state.rebuilt {
		o.Log.Warn("the pinned state has another layout: it is rebuilt, and live flows are decided again")
	}
	return d, nil
}

// Apply makes the kernel's state equal to want. It is idempotent, and cheap when nothing differs. A new
// policy (another pointer) or other constants build a new generation; when that fails, or when its program
// cannot be put in place everywhere, the old generation goes on.
func (d *Datapath) Apply(ctx context.Context, want Desired) error {
	if err := want.complete(); err != nil {
		return err
	}
	d.applying.Lock()
	defer d.applying.Unlock()

	// Nobody else replaces the generation; building one takes long, and readers need not wait for it.
	next := d.generation
	if next == nil || !next.serves(want) {
		built, err := d.build(want)
		if err != nil {
			return err
		}
		next = built
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	err := ctx.Err()
	if err == nil {
		err = d.install(next, want)
	}
	if err != nil {
		if next != d.generation {
			d.learning.unfollow(next)
			next.Close()
		}
		if d.applied != nil { // what was changed before the failure goes back
			err = errors.Join(err, d.state.setOwnAddresses(d.applied.OwnAddresses), d.state.setResolvers(d.applied.Resolvers))
		}
		return err
	}
	d.applied = &want
	return nil
}

func (want *Desired) complete() error {
	if want.Policy == nil {
		return errors.New("applying the datapath: no policy")
	}
	if want.ClientFlows == 0 {
		want.ClientFlows = DefaultClientFlows
	}
	if want.ClientFresh == 0 {
		want.ClientFresh = DefaultClientFresh
	}
	if want.ClientAsks == 0 {
		want.ClientAsks = DefaultClientAsks
	}
	if want.OnFailure != policy.Direct {
		want.OnFailure = policy.Block
	}
	return nil
}

func (d *Datapath) build(want Desired) (*generation, error) {
	number, err := d.state.nextGeneration()
	if err != nil {
		return nil, err
	}
	g, err := newGeneration(number, want, &d.state.maps)
	if err != nil {
		return nil, fmt.Errorf("building generation %d: %w", number, err)
	}
	if err := d.learning.follow(g); err != nil {
		g.Close()
		return nil, fmt.Errorf("building generation %d: %w", number, err)
	}
	return g, nil
}

// install does what packets can see, in the order in which it cannot be seen half done: everything that
// the programs rely on, then the programs.
func (d *Datapath) install(next *generation, want Desired) error {
	if err := d.state.setOwnAddresses(want.OwnAddresses); err != nil {
		return err
	}
	if err := next.setInterfaces(want.Interfaces); err != nil {
		return err
	}
	if err := d.state.setSources(want.Own); err != nil {
		return err
	}
	hooked := want.Own != nil || d.links.pinned(ownPin)
	restored, err := applyRouting(hooked)
	if err != nil {
		return err
	}
	table, err := d.markTable.apply(want)
	if err != nil {
		return err
	}
	if err := d.state.setResolvers(want.Resolvers); err != nil {
		return err
	}
	if err := d.state.setSockets(want.Sockets, want.DNS); err != nil {
		return err
	}
	pins, err := d.state.repin()
	if err != nil {
		return err
	}
	lan := places(want.Interfaces)
	linked, err := d.links.apply(next, next == d.generation, lan)
	if err != nil {
		return err
	}
	own, hooks, err := d.attachOwn(next, next == d.generation, want.Own)
	d.ownProblem = err
	d.links.want(slices.Concat(lan, own))
	if next == d.generation {
		d.healed(slices.Concat(restored, table, pins, linked, hooks))
	} else {
		d.commit(next)
	}
	// The new policy is in force: what follows is worth a warning, and is tried again at the next Apply.
	for what, err := range map[string]error{
		"publishing services":                   d.state.setPublished(want.Published, want.OwnAddresses),
		"detaching what is not wanted any more": d.links.removeOther(),
		"removing the state of another version": d.state.removeOther(),
	} {
		if err != nil {
			d.log.Warn(what, "error", err)
		}
	}
	if hooked && want.Own == nil { // after the hooks: what they steer must not go elsewhere
		if _, err := applyRouting(false); err != nil {
			d.log.Warn("removing the routing of the box's own connections", "error", err)
		}
	}
	return nil
}

// commit makes a generation whose programs are in place the one in force.
func (d *Datapath) commit(next *generation) {
	if d.generation != nil {
		d.history.add(d.generation)
		d.learning.unfollow(d.generation)
		d.generation.Close()
	}
	d.generation = next
	d.rules[next.number] = next.ruleNames()
	known := maps.Clone(*d.outbounds.Load())
	maps.Copy(known, next.outboundNames())
	d.outbounds.Store(&known)
	d.log.Debug("policy in force", "generation", next.number, "rules", len(next.desired.Policy.Rules), "default", next.desired.Policy.Default)
}

// Inherited reports whether a predecessor left its programs attached: then giving up before the first Apply
// must leave them so (Detach), as the predecessor's own end did.
func (d *Datapath) Inherited() bool { return d.inherited }

// healed tells that things were put back which somebody had removed, or which a new interface lacked; once a
// minute for each, for whoever removes them may go on doing so.
func (d *Datapath) healed(restored []string) {
	for _, what := range restored {
		if now := time.Now(); now.Sub(d.told[what]) > time.Minute {
			d.told[what] = now
			d.log.Warn("put back what was missing", "what", what)
		}
	}
}

// Generation is the number of the policy in force; 0 before the first Apply.
func (d *Datapath) Generation() uint32 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return 0
	}
	return d.generation.number
}

// Answer is what the program in force says.
type Answer struct {
	policy.Decision
	Doubtful   bool // the flow's one true name might lead it to another outbound
	Translated bool // it is direct, and masqueraded
}

// Query asks the program in force what it decides on a flow with these facts.
func (d *Datapath) Query(f policy.Flow) (Answer, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return Answer{}, errors.New("asking the kernel: no policy is in force")
	}
	return d.generation.query(f)
}

// QueryFrom is Query of a flow as its first packet would be decided now: by the names that its client, or else anybody,
// knows the destination by. Doubtful means that its first bytes are read, if it is one that can have a name there.
func (d *Datapath) QueryFrom(f policy.Flow) (Answer, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return Answer{}, errors.New("asking the kernel: no policy is in force")
	}
	return d.generation.queryNamed(f, d.generation.nameFor(d.pageOf(f.Source.Addr(), f.SourceMAC, f.Destination.Addr())))
}

// Detach ends the daemon's part and leaves the kernel's: what a restart or an upgrade wants. Direct flows
// go on; proxied ones wait for the successor as Desired.OnFailure says.
func (d *Datapath) Detach() error {
	d.applying.Lock()
	defer d.applying.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.closeGeneration(), d.links.Close(), d.state.Close(), d.lock.Close())
}

// Close removes everything that the datapath owns: what the box forwards it forwards plainly afterwards.
func (d *Datapath) Close() error {
	d.applying.Lock()
	defer d.applying.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(
		d.links.remove(),
		removeRouting(),
		d.markTable.remove(),
		d.closeGeneration(),
		d.state.remove(),
		d.lock.Close(),
	)
}

func (d *Datapath) closeGeneration() error {
	if d.generation == nil {
		return nil
	}
	d.learning.unfollow(d.generation)
	err := d.generation.Close()
	d.generation = nil
	return err
}

// serves reports whether the generation is what want asks for, apart from what can be changed in place.
func (g *generation) serves(want Desired) bool {
	return g.desired.Policy == want.Policy && g.desired.OnFailure == want.OnFailure &&
		g.desired.ClientFlows == want.ClientFlows && g.desired.ClientFresh == want.ClientFresh &&
		g.desired.ClientAsks == want.ClientAsks && g.desired.Sniff == want.Sniff &&
		g.desired.TrustSniffed == want.TrustSniffed && g.desired.ReturnPath == want.ReturnPath &&
		g.desired.interceptsDNS() == want.interceptsDNS() && g.desired.answersOwn() == want.answersOwn()
}

// ruleNames are what people call the rules, by index.
func (g *generation) ruleNames() []string {
	names := make([]string, len(g.desired.Policy.Rules))
	for i := range g.desired.Policy.Rules {
		names[i] = g.desired.Policy.Rules[i].Name
	}
	return names
}

func (g *generation) outboundNames() map[uint32]string {
	names := map[uint32]string{g.tables.Default.OutboundID: g.tables.Default.Outbound}
	for _, action := range g.tables.Rules {
		names[action.OutboundID] = action.Outbound
	}
	return names
}

func sortedKeys[K interface{ ~string }, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
