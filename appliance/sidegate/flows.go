package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sidegate/appliance/admin"
	"sidegate/appliance/policy"
)

type flowsCmd struct {
	JSON    bool     `help:"Print JSON."`
	Filters []string `arg:"" optional:"" name:"key=value" help:"Show only flows with: client, ip (addresses or prefixes), port, network, verdict, outbound, rule, state, interface, mac."`
	socketFlag
}

// Help says what the columns are.
func (flowsCmd) Help() string {
	return `PACKETS and BYTES are those of the client, as they pass the gateway: replies of direct flows do not.
Several filters must all match; values of one key are alternatives.`
}

// flowFilters says whether a flow is what the user asked for.
var flowFilters = map[string]func(f admin.Flow, value string) (bool, error){
	"client": func(f admin.Flow, value string) (bool, error) { return within4or6(f.Source.Addr(), value) },
	"ip":     func(f admin.Flow, value string) (bool, error) { return within4or6(f.Destination.Addr(), value) },
	"port": func(f admin.Flow, value string) (bool, error) {
		return fmt.Sprint(f.Destination.Port()) == value, nil
	},
	"network":   equal(func(f admin.Flow) string { return f.Network }),
	"verdict":   equal(func(f admin.Flow) string { return f.Verdict }),
	"outbound":  equal(func(f admin.Flow) string { return f.Outbound }),
	"rule":      equal(func(f admin.Flow) string { return f.Rule }),
	"state":     equal(func(f admin.Flow) string { return f.State }),
	"interface": equal(func(f admin.Flow) string { return f.Interface }),
	"mac":       equal(func(f admin.Flow) string { return f.ClientMAC }),
}

func equal(of func(admin.Flow) string) func(admin.Flow, string) (bool, error) {
	return func(f admin.Flow, value string) (bool, error) { return of(f) == strings.ToLower(value), nil }
}

func within4or6(a netip.Addr, value string) (bool, error) {
	if prefix, err := netip.ParsePrefix(value); err == nil {
		return prefix.Contains(a), nil
	}
	address, err := netip.ParseAddr(value)
	if err != nil {
		return false, fmt.Errorf("%q is not an address or prefix: write 192.168.0.3 or 192.168.0.0/24", value)
	}
	return a == address.Unmap(), nil
}

func (c *flowsCmd) Run(ctx context.Context, e *env) error {
	wanted, err := parseFilters(c.Filters)
	if err != nil {
		return err
	}
	flows, err := c.client(e).Flows(ctx)
	if err != nil {
		return err
	}
	flows = slices.DeleteFunc(flows, func(f admin.Flow) bool { return !wanted(f) })
	slices.SortFunc(flows, func(a, b admin.Flow) int {
		return cmp.Or(
			a.Source.Addr().Compare(b.Source.Addr()),
			a.Destination.Compare(b.Destination),
			cmp.Compare(a.Network, b.Network),
			cmp.Compare(a.Source.Port(), b.Source.Port()),
		)
	})
	if c.JSON {
		return e.json(flows)
	}
	t := e.table("NETWORK", "CLIENT", "DESTINATION", "VERDICT", "OUTBOUND", "RULE", "STATE", "AGE", "IDLE", "PACKETS", "BYTES")
	for _, f := range flows {
		t.row(f.Network, f.Source, f.Destination, f.Verdict, orDash(f.Outbound), f.Rule, f.State,
			duration(seconds(f.Age)), duration(seconds(f.Idle)), f.Packets, size(f.Bytes))
	}
	t.print()
	return nil
}

// parseFilters makes one predicate of all filters, and refuses those that can match nothing.
func parseFilters(args []string) (func(admin.Flow) bool, error) {
	facts, err := parseFacts(args)
	if err != nil {
		return nil, err
	}
	for key, values := range facts {
		match, known := flowFilters[key]
		if !known {
			return nil, fmt.Errorf("unknown filter %q (have: %s)", key, strings.Join(slices.Sorted(maps.Keys(flowFilters)), ", "))
		}
		for _, value := range values {
			if _, err := match(admin.Flow{}, value); err != nil {
				return nil, fmt.Errorf("%s: %w", key, err)
			}
			if key == "verdict" {
				if err := new(policy.Verdict).UnmarshalText([]byte(value)); err != nil && value != "dns" {
					return nil, err
				}
			}
		}
	}
	return func(f admin.Flow) bool {
		for key, values := range facts {
			if !slices.ContainsFunc(values, func(v string) bool { ok, _ := flowFilters[key](f, v); return ok }) {
				return false
			}
		}
		return true
	}, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
