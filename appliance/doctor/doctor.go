// Package doctor examines what surrounds a side router: the box that it runs on, and the LAN around it. Most of what breaks or
// bypasses a gateway is there and not in its rules.
//
// It is a table of checks. Each looks at one thing and returns findings: what was seen, why it matters to people, and the fix. It
// works before the gateway is started the first time, and beside one that runs.
package doctor

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sidegate/appliance/firewall"
	"sidegate/appliance/netstate"
	"sidegate/appliance/sysctl"
)

// Severity is how much a finding matters.
type Severity string

// Severities, the least first.
const (
	Note    Severity = "note"    // nothing fails now
	Warning Severity = "warning" // clients bypass the gateway, or some connections fail
	Failure Severity = "failure" // connections fail
)

var severities = []Severity{Note, Warning, Failure}

// Finding is one thing that is not as it should be.
type Finding struct {
	Check    string   `json:"check"` // the name of the check
	Severity Severity `json:"severity"`
	Object   string   `json:"object"` // what it is about, such as eth0
	Seen     string   `json:"seen"`
	Why      string   `json:"why"`
	Fix      string   `json:"fix"`              // a command, a setting, or what a person has to do
	Repair   *Repair  `json:"repair,omitempty"` // nil: it takes a person
}

// Repair is a fix that is safe to be made without a person.
type Repair struct {
	Does  string                      `json:"does"` // in a few words, or as a command
	Apply func(context.Context) error `json:"-"`
}

// LAN is a LAN interface of the configuration.
type LAN struct {
	Name  string // as configured
	Index int    // 0: there is none at present
}

// Program is somebody's BPF program where the gateway's meet packets.
type Program struct {
	ID   uint32
	Name string
}

// Box is what is examined, as far as the caller knows it.
type Box struct {
	Network    *netstate.Snapshot
	LAN        []LAN
	Parameters sysctl.Surroundings
	DNS        bool // the gateway answers the LAN's DNS
	Advertises bool // the gateway announces itself as IPv6 router
	Asymmetric bool // direct flows are not translated
	Proxies    bool // some flows go to the proxy, or DNS does
	Marks      Marks
	Own        *Own     // nil: the box's own connections are left alone
	Problems   []string // what a running gateway says of itself; lines with the fix
	// Before returns the programs that packets of an interface meet before the gateway's, or would if it was started now.
	Before func(index int) ([]Program, error)

	firewall func() (*firewall.Ruleset, error) // read once, for all checks that ask
}

// Marks are what the box's firewall can tell the gateway's packets by, and the nftables table that is the gateway's own.
type Marks struct {
	Direct, Proxy, Daemon, Mask uint32
	OwnTable                    string
}

// Own is how the box's own connections are decided for.
type Own struct {
	Sources []netip.Addr // what those that are proxied have for a source on their way by lo, one of each family that the box has
	Problem error        // why they cannot be decided for
}

// Check is one line of the table.
type Check struct {
	Name  string // kebab-case; it does not change between versions
	Looks string // what it looks at
	run   func(context.Context, *Box) ([]Finding, error)
}

// Checks is the table.
func Checks() []Check { return slices.Clone(checks) }

// patience bounds every check: an examination takes no longer.
const patience = 1800 * time.Millisecond

// Examine runs all checks at once and returns their findings in the order of the table. A check that cannot look is a finding too.
func Examine(ctx context.Context, b *Box) []Finding {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	b.firewall = sync.OnceValues(func() (*firewall.Ruleset, error) { return firewall.Read(ctx) })
	results := make([][]Finding, len(checks))
	var running sync.WaitGroup
	for i, c := range checks {
		running.Go(func() {
			findings, err := c.run(ctx, b)
			if err != nil {
				findings = append(findings, Finding{
					Severity: Warning, Object: "this check", Seen: err.Error(),
					Why: "it could not look at " + c.Looks, Fix: "what the error says, or leave it",
				})
			}
			for j := range findings {
				findings[j].Check = c.Name
			}
			results[i] = findings
		})
	}
	running.Wait()
	return slices.Concat(results...)
}

// Worst is the highest severity among findings; none have the empty one.
func Worst(findings []Finding) Severity {
	if len(findings) == 0 {
		return ""
	}
	return slices.MaxFunc(findings, func(a, b Finding) int {
		return cmp.Compare(slices.Index(severities, a.Severity), slices.Index(severities, b.Severity))
	}).Severity
}

// link is the interface itself.
func (b *Box) link(l LAN) (netstate.Link, bool) { return b.Network.Link(l.Index) }

// eachLAN runs a check for every LAN interface that can carry packets, all at once.
func eachLAN(look func(context.Context, *Box, netstate.Link) ([]Finding, error)) func(context.Context, *Box) ([]Finding, error) {
	return func(ctx context.Context, b *Box) ([]Finding, error) {
		findings, errs := make([][]Finding, len(b.LAN)), make([]error, len(b.LAN))
		var running sync.WaitGroup
		for i, l := range b.LAN {
			link, ok := b.link(l)
			if !ok || !link.Up {
				continue // the check of interfaces says so
			}
			running.Go(func() {
				findings[i], errs[i] = look(ctx, b, link)
				if errs[i] != nil {
					errs[i] = fmt.Errorf("%s: %w", link.Name, errs[i])
				}
			})
		}
		running.Wait()
		return slices.Concat(findings...), cmp.Or(errs...)
	}
}
