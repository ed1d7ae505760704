// Package probe proves by packets that a client's connection works through the box, and says where it is lost if it does not.
//
// The box plays a client of its own LAN: an address that is free, and a MAC address that nobody has. What the client sends comes in
// by the LAN interface, past the gateway's programs, and is forwarded as anybody's packets. What others send to the client is seen
// on the wire and does not enter the box. So it is as half-seen by the box as any direct connection.
package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidegate/appliance/netstate"
	"sidegate/appliance/policy"
)

// Options are what the caller knows of the box.
type Options struct {
	Network *netstate.Snapshot
	LAN     netstate.Link  // an Ethernet interface
	IPv6    bool           // the family
	As      netip.Addr     // the client's address; none: a free one is looked for
	Target  netip.AddrPort // none: one of well-known servers
	Mark    uint32         // of the box's own sockets, which no gateway steers, and of the client's packets that pass it

	Bypass func(frame []byte) error // injects to the LAN interface, past the gateway
	// Through injects to it as clients' frames arrive, and Expect says what the policy makes of a flow. Nil: no gateway runs.
	Through func(frame []byte) error
	Expect  func(ctx context.Context, mac netstate.MAC, from, to netip.AddrPort) (Expectation, error)
}

// Expectation is what the policy makes of a flow.
type Expectation struct {
	Verdict policy.Verdict
	Sniffed bool // its first bytes are read: it begins as if it was proxied
}

// Step is one thing that was tried.
type Step struct {
	What string `json:"step"`
	OK   bool   `json:"ok"`
	Seen string `json:"seen,omitempty"` // if it failed, or where it tells more
}

// Place is where on its path a connection is lost.
type Place string

// The places.
const (
	Nowhere  Place = ""
	Unknown  Place = "unknown"   // the probe could not tell
	Target   Place = "target"    // the server answers nobody
	Box      Place = "box"       // this box does not forward
	BoxState Place = "box-state" // this box's firewall drops what follows the first packet
	Router   Place = "router"    // the router takes the client's packets from the client, and not from the box
	Stranger Place = "stranger"  // the router takes nothing from an address that it does not know
	Path     Place = "path"      // a firewall on the way drops what follows the first packet
	Gateway  Place = "gateway"   // the gateway's programs do other than the policy says
)

// Result is what became of the client's connection.
type Result struct {
	Family    string         `json:"family"` // IPv4 or IPv6
	Interface string         `json:"interface"`
	Client    netip.Addr     `json:"client,omitzero"`
	MAC       string         `json:"mac,omitempty"`
	Target    netip.AddrPort `json:"target,omitzero"`
	Steps     []Step         `json:"steps"`
	Lost      Place          `json:"lost,omitempty"`
	// Carried tells that the running gateway carries such connections all the same: Translated, or because the box's firewall
	// lets its packets pass.
	Carried    bool   `json:"carried,omitempty"`
	Translated bool   `json:"translated,omitempty"`
	Conclusion string `json:"conclusion"`
	Fix        string `json:"fix,omitempty"`
}

// WellKnown are servers that answer from everywhere, by family.
var WellKnown = map[bool][]netip.AddrPort{
	false: {
		netip.MustParseAddrPort("1.1.1.1:443"), netip.MustParseAddrPort("223.5.5.5:443"), netip.MustParseAddrPort("9.9.9.9:443"),
	},
	true: {
		netip.MustParseAddrPort("[2606:4700:4700::1111]:443"), netip.MustParseAddrPort("[2400:3200::1]:443"), netip.MustParseAddrPort("[2620:fe::fe]:443"),
	},
}

// run is a probe at work.
type run struct {
	Options
	Result
	*client
	router    netip.Addr // the next hop to the target, on the LAN; none: elsewhere
	routerMAC netstate.MAC
}

// Run probes one family on one LAN interface. It takes some seconds at most where nothing fails. An error says that it could not.
func Run(ctx context.Context, o Options) (_ Result, err error) {
	r := &run{Options: o, Result: Result{Family: "IPv4", Interface: o.LAN.Name, Steps: []Step{}}}
	if o.IPv6 {
		r.Family = "IPv6"
	}
	if !r.reach(ctx) {
		return r.Result, ctx.Err()
	}
	uplink, err := r.route()
	if err != nil {
		return r.Result, err
	}
	if r.client, err = newClient(o.LAN, uplink, r.Result.Target, o.Bypass); err != nil {
		return r.Result, err
	}
	defer func() { err = errors.Join(err, r.client.Close(), r.forget()) }()
	if err := r.settle(ctx); err != nil {
		return r.Result, err
	}
	r.Client, r.MAC = r.is(), r.mac.String()
	if ok, err := r.introduce(ctx); !ok || err != nil {
		return r.Result, err
	}
	if err := r.forwarding(ctx); err != nil {
		return r.Result, err
	}
	return r.Result, r.throughGateway(ctx)
}

func (r *run) step(ok bool, seen, what string, args ...any) {
	if ok {
		seen = ""
	}
	r.Steps = append(r.Steps, Step{What: fmt.Sprintf(what, args...), OK: ok, Seen: seen})
}

// conclude says where the connection is lost.
func (r *run) conclude(lost Place, fix, conclusion string, args ...any) {
	r.Lost, r.Fix, r.Conclusion = lost, fix, fmt.Sprintf(conclusion, args...)
}

// reach looks for a target that answers the box itself: of one that answers nobody nothing can be learned.
func (r *run) reach(ctx context.Context) bool {
	candidates := WellKnown[r.IPv6]
	if r.Options.Target.IsValid() {
		candidates = []netip.AddrPort{r.Options.Target}
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	reached := make(chan netip.AddrPort, len(candidates))
	var dialing sync.WaitGroup
	for _, to := range candidates {
		dialing.Go(func() {
			d := net.Dialer{Control: r.marked}
			d.SetMultipathTCP(false)
			if conn, err := d.DialContext(ctx, "tcp", to.String()); err == nil {
				conn.Close()
				reached <- to
				cancel() // the others: one is enough
			}
		})
	}
	dialing.Wait()
	close(reached)
	if to, ok := <-reached; ok {
		r.Result.Target = to
		r.step(true, "", "the box itself reaches %s", to)
		return true
	}
	r.Result.Target = r.Options.Target
	if r.Options.Target.IsValid() {
		r.step(false, "no answer", "the box itself reaches %s", r.Options.Target)
		r.conclude(Target, "--target ADDRESS:PORT of a server that answers, or repair the box's own way to the internet",
			"%s does not answer the box itself either", r.Options.Target)
		return false
	}
	r.step(false, "no answer", "the box itself reaches one of %v", candidates)
	r.conclude(Target, "--target ADDRESS:PORT of a server that can be reached from here",
		"no well-known server answers the box itself: nothing to probe with")
	return false
}

func (r *run) marked(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(r.Mark))
	}), err)
}

// route finds the way to the target: the uplink, and the router if it is on the LAN.
func (r *run) route() (netstate.Link, error) {
	to := r.Result.Target.Addr()
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Mark: r.Mark})
	if err != nil || len(routes) == 0 {
		return netstate.Link{}, fmt.Errorf("looking for the box's route to %s: %w", to, err)
	}
	link, ok := r.Network.Link(routes[0].LinkIndex)
	if !ok {
		return link, fmt.Errorf("looking for the box's route to %s: interface %d is new", to, routes[0].LinkIndex)
	}
	if link.Index == r.LAN.Index {
		router, ok := netip.AddrFromSlice(routes[0].Gw)
		if routes[0].Gw == nil || !ok {
			router, ok = netip.AddrFromSlice(routes[0].Dst.IP)
		}
		if ok {
			r.router = router.Unmap()
		}
	}
	return link, nil
}

// introduce makes the client known to the router, as it would be. It tells a LAN that does not carry the client at all.
func (r *run) introduce(ctx context.Context) (bool, error) {
	if !r.router.IsValid() {
		return true, nil
	}
	found, err := r.owners(ctx, []netip.Addr{r.router}, 1)
	if err != nil {
		return false, err
	}
	mac, ok := found[r.router]
	r.routerMAC = mac
	r.step(ok, "no answer to "+r.mac.String(), "the router %s answers the client on %s", r.router, r.LAN.Name)
	if !ok {
		r.conclude(Unknown, "let this port carry more than one MAC address for the time of the probe",
			"%s does not carry a client of another MAC address: it is Wi-Fi, or a hypervisor or switch that filters MAC addresses", r.LAN.Name)
	}
	return ok, nil
}

// direct sends the client's packets to the router, not through the box.
func (r *run) direct(ip []byte) error {
	return r.client.send(ethernet(r.routerMAC, r.mac, protocolOf(r.is()), ip))
}

// by sends the client's packets to the box, as its gateway.
func (r *run) by(inject func([]byte) error) way {
	return func(ip []byte) error { return inject(ethernet(r.LAN.MAC, r.mac, protocolOf(r.is()), ip)) }
}

// try connects on a way, and lets the router know when it ends.
func (r *run) try(ctx context.Context, send way) (course, error) {
	if r.routerMAC == (netstate.MAC{}) {
		return r.connect(ctx, send)
	}
	return r.connect(ctx, send, r.direct)
}

// forget removes what the box's kernel has learned of the client.
func (r *run) forget() error {
	neighbours, err := netlink.NeighList(r.LAN.Index, family(r.IPv6))
	if err != nil {
		return fmt.Errorf("listing the neighbours on %s: %w", r.LAN.Name, err)
	}
	for _, n := range neighbours {
		if a, ok := netip.AddrFromSlice(n.IP); ok && r.is().IsValid() && a.Unmap() == r.is() {
			if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("forgetting the neighbour %s: %w", a, err)
			}
		}
	}
	return nil
}

func family(ipv6 bool) int {
	if ipv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}
