// Package lab builds the network that a side router lives in, out of Linux network namespaces: a laptop whose gateway
// is the side router, the side router, the main router behind it, and an internet of a server and an upstream proxy.
// The demo, the tests and the benchmark share it. Everything in a lab ends with Close, and what a crashed process left
// behind is removed by the next New.
//
//	laptop 192.168.0.3 ──┐
//	(gateway .0.2)       ├── one L2 segment ── router .0.1 ── internet: server 203.0.113.10, upstream .20
//	sidegate 192.168.0.2 ┘
//
// The router does not translate addresses and its route to the LAN is the segment itself, so replies of direct traffic
// go to the laptop without touching sidegate. Nothing of the machine's own network is used or changed.
package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"
)

// Names of the hosts that every lab begins with.
const (
	Laptop   = "laptop"   // a client whose default gateway is sidegate
	Sidegate = "sidegate" // forwards; its default gateway is the router
	Router   = "router"   // forwards between the LAN (interface "lan") and the internet (interface "wan")
	Server   = "server"   // a host of the internet
	Upstream = "upstream" // another one, where proxy servers run
)

// Options are what may differ between labs; the zero value is the ordinary network.
type Options struct {
	// MTU of every interface on the LAN in bytes, 1280 to 65535; 0 means 1500.
	MTU int
	// InternetMTU is the same for the segment behind the router; 0 means MTU. A smaller one makes the router answer
	// too large packets with ICMP errors.
	InternetMTU int
	// LinkLocalGateways makes hosts reach their IPv6 gateway by its link-local address, as after a router
	// advertisement. Only then does Linux send IPv6 redirects, and only then do clients believe them; there is no
	// sysctl against sending them. With this option a plain forwarder tells its clients to bypass it.
	LinkLocalGateways bool
}

// Lab is one running network. Its methods may be called from any goroutine.
type Lab struct {
	options Options
	claim   *claim

	starting chan func()   // work for the thread that starts processes
	stop     chan struct{} // asks that thread to end
	stopped  chan struct{} // it did

	authority func() (*Authority, error)

	mu         sync.Mutex
	closed     bool
	namespaces []*namespace
	hosts      map[string]*Host // complete ones
	order      []string         // their names in order of creation, the switch first
	closers    map[int]func() error
	sequence   int // numbers closers and files
	clients    int
	servers    int
}

// New builds the network and returns when packets flow through it, IPv4 and IPv6. It needs root and, of the kernel,
// network namespaces, bridges, veth and IPv6. ctx bounds the building only; the lab lives until Close.
func New(ctx context.Context, o Options) (_ *Lab, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("building the lab: creating network namespaces needs root: run it with sudo")
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.InternetMTU == 0 {
		o.InternetMTU = o.MTU
	}
	for _, mtu := range []int{o.MTU, o.InternetMTU} {
		if mtu < 1280 || mtu > 65535 {
			return nil, fmt.Errorf("building the lab: MTU %d is outside 1280 to 65535 (IPv6 needs 1280)", mtu)
		}
	}
	c, err := newClaim()
	if err != nil {
		return nil, fmt.Errorf("building the lab: %w", err)
	}
	l := &Lab{
		options:  o,
		claim:    c,
		starting: make(chan func()),
		stop:     make(chan struct{}),
		stopped:  make(chan struct{}),
		hosts:    make(map[string]*Host),
		closers:  make(map[int]func() error),
	}
	l.authority = sync.OnceValues(l.newAuthority)
	go l.startProcesses()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("building the lab: %w", err), l.Close())
		}
	}()

	if err := l.buildSwitch(); err != nil {
		return nil, err
	}
	for _, s := range []site{
		{name: Router, interfaces: []attachment{{"lan", &lan, 1}, {"wan", &internet, 1}}, forwards: true},
		{name: Sidegate, interfaces: []attachment{{"eth0", &lan, 2}}, forwards: true, gateway: 1},
		{name: Laptop, interfaces: []attachment{{"eth0", &lan, 3}}, gateway: 2},
		{name: Server, interfaces: []attachment{{"eth0", &internet, 10}}, gateway: 1},
		{name: Upstream, interfaces: []attachment{{"eth0", &internet, 20}}, gateway: 1},
	} {
		if _, err := l.build(s); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{Server, Upstream} {
		if err := l.verify(ctx, l.Host(Laptop), l.Host(name)); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// verify waits until packets go from one host to another and back, IPv4 and IPv6: the kernel takes a moment to notice
// that a new link is up.
func (l *Lab) verify(ctx context.Context, from, to *Host) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, address := range []netip.Addr{to.Addr4(), to.Addr6()} {
		err := Wait(ctx, fmt.Sprintf("%s to reach %s at %s", from.name, to.name, address), func() error {
			brief, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			defer cancel()
			_, err := from.Ping(brief, address)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ID is unique among the labs that run on this machine; namespaces are called sg-<ID>-<host>.
func (l *Lab) ID() string { return l.claim.id }

// Dir is a directory of this lab for configuration files and logs, removed by Close. Every user may read it, because
// the servers give up their privileges.
func (l *Lab) Dir() string { return l.claim.path }

// Host returns the host of that name. It panics if there is none: names are constants of the program that asks.
func (l *Lab) Host(name string) *Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, ok := l.hosts[name]
	if !ok {
		panic(fmt.Sprintf("lab: no host %q (have: %v)", name, l.order))
	}
	return h
}

// Hosts returns all hosts in order of creation, without the switch.
func (l *Lab) Hosts() []*Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	var hosts []*Host
	for _, name := range l.order {
		if name != switchName {
			hosts = append(hosts, l.hosts[name])
		}
	}
	return hosts
}

// hostName keeps names valid as interface names of the switch (15 bytes) and as parts of file names.
var hostName = regexp.MustCompile(`^[a-z][a-z0-9]{0,10}$`)

// AddClient adds another client beside the laptop: 192.168.0.100, fd00:c0a8::100 and onwards, with sidegate as its
// gateway. It returns when the client reaches the router.
func (l *Lab) AddClient(ctx context.Context, name string) (*Host, error) {
	return l.add(ctx, name, &lan, 2, &l.clients)
}

// AddServer adds another host of the internet: 203.0.113.100, 2001:db8:113::100 and onwards. It returns when
// the router reaches it.
func (l *Lab) AddServer(ctx context.Context, name string) (*Host, error) {
	return l.add(ctx, name, &internet, 1, &l.servers)
}

func (l *Lab) add(ctx context.Context, name string, on *segment, gateway int, counter *int) (*Host, error) {
	if !hostName.MatchString(name) {
		return nil, fmt.Errorf("adding host %q: a name is a letter and up to 10 more lower-case letters or digits", name)
	}
	l.mu.Lock()
	number := 100 + *counter
	*counter++
	l.mu.Unlock()
	if number > 254 {
		return nil, fmt.Errorf("adding host %q: the %s segment is full", name, on.name)
	}
	h, err := l.build(site{name: name, interfaces: []attachment{{"eth0", on, number}}, gateway: gateway})
	if err == nil {
		// Not through sidegate, where a gateway may run that lets nothing pass.
		from, to := l.Host(Router), h
		if on == &lan {
			from, to = h, from
		}
		err = l.verify(ctx, from, to)
	}
	if err != nil {
		return nil, fmt.Errorf("adding host %q: %w", name, err)
	}
	return h, nil
}

// onClose registers work for Close, done in reverse order, and returns how to take it back. It reports false if the
// lab is already closed.
func (l *Lab) onClose(f func() error) (forget func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return func() {}, false
	}
	l.sequence++
	key := l.sequence
	l.closers[key] = f
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.closers, key)
	}, true
}

func (l *Lab) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// Close ends every process in the lab, also those that it did not start, closes its servers and captures, and removes
// mounts, files and namespaces. Sockets that the caller took from a host are the caller's: as long as one is open, the
// kernel keeps its (unnamed) namespace.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	closers, namespaces := maps.Clone(l.closers), l.namespaces
	l.mu.Unlock()

	close(l.stop)
	<-l.stopped
	var errs []error
	for _, key := range slices.Backward(slices.Sorted(maps.Keys(closers))) {
		errs = append(errs, closers[key]())
	}
	var names []string
	for _, ns := range namespaces {
		names = append(names, ns.name)
	}
	errs = append(errs, killInside(names))
	for _, ns := range slices.Backward(namespaces) {
		errs = append(errs, ns.close())
	}
	errs = append(errs, l.claim.release())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing the lab: %w", err)
	}
	return nil
}

// file returns a path in the lab's directory that no earlier call returned.
func (l *Lab) file(prefix, suffix string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sequence++
	return filepath.Join(l.claim.path, fmt.Sprintf("%s-%d%s", prefix, l.sequence, suffix))
}
