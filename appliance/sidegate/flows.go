package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
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
var flowFilters = filters[admin.Flow]{
	"client": func(f admin.Flow, value string) (bool, error) { return within4or6(f.Source.Addr(), value) },
	"ip":     func(f admin.Flow, value string) (bool, error) { return within4or6(f.Destination.Addr(), value) },
	"port": func(f admin.Flow, value string) (bool, error) {
		return fmt.Sprint(f.Destination.Port()) == value, nil
	},
	"network": equal(func(f admin.Flow) string { return f.Network }),
	"verdict": func(f admin.Flow, value string) (bool, error) {
		if new(policy.Verdict).UnmarshalText([]byte(value)) != nil && value != "dns" {
			return false, fmt.Errorf("%q is not direct, proxy or block", value)
		}
		return f.Verdict == value, nil
	},
	"outbound":  equal(func(f admin.Flow) string { return f.Outbound }),
	"rule":      equal(func(f admin.Flow) string { return f.Rule }),
	"state":     equal(func(f admin.Flow) string { return f.State }),
	"interface": equal(func(f admin.Flow) string { return f.Interface }),
	"mac":       equal(func(f admin.Flow) string { return f.ClientMAC }),
}

func (c *flowsCmd) Run(ctx context.Context, e *env) error {
	wanted, err := flowFilters.parse(c.Filters)
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
		t.row(f.Network, client(f), f.Destination, direct(f.Verdict, f.Translated), orDash(f.Outbound), f.Rule, f.State,
			duration(seconds(f.Age)), duration(seconds(f.Idle)), f.Packets, size(f.Bytes))
	}
	t.print()
	return nil
}

// client is who opened a flow: an address, or a process of this box.
func client(f admin.Flow) string {
	if f.Process == nil {
		return f.Source.String()
	}
	return fmt.Sprintf("%s[%d] in %s, port %d", orDash(f.Process.Name), f.Process.PID, orDash(f.Process.Unit), f.Source.Port())
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
