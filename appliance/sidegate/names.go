package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"sidegate/appliance/admin"
	"sidegate/appliance/policy"
)

type namesCmd struct {
	JSON    bool     `help:"Print JSON."`
	Filters []string `arg:"" optional:"" name:"key=value" help:"Show only what has: client (MAC address, address or prefix), ip (address or prefix), name (with all below it), source (dns, sniffed)."`
	socketFlag
}

// Help says what the columns are.
func (namesCmd) Help() string {
	return `What clients know addresses by: rules on names hold for their connections to them. NAMES has the one that was
asked for, and after arrows those that it stands for. FROM is dns, an answer that the client got, or sniffed, the first
bytes of a connection. KEPT FOR is how long it stays at least; connections that use it keep it longer.
Several filters must all match; values of one key are alternatives.`
}

var nameFilters = filters[admin.Name]{
	"client": func(n admin.Name, value string) (bool, error) {
		if mac, err := policy.ParseMAC(value); err == nil {
			return n.Client == mac.String(), nil
		}
		client, _ := netip.ParseAddr(n.Client) // a MAC address is within no prefix
		ok, err := within4or6(client, value)
		if err != nil {
			err = fmt.Errorf("%q is not an address, prefix or MAC address: write 192.168.0.3 or 02:00:00:00:00:03", value)
		}
		return ok, err
	},
	"ip": func(n admin.Name, value string) (bool, error) { return within4or6(n.Address, value) },
	"name": func(n admin.Name, value string) (bool, error) {
		value = strings.Trim(strings.ToLower(value), ".")
		return slices.ContainsFunc(n.Names, func(name string) bool {
			return name == value || strings.HasSuffix(name, "."+value)
		}), nil
	},
	"source": func(n admin.Name, value string) (bool, error) {
		if value != "dns" && value != "sniffed" {
			return false, fmt.Errorf("%q is not dns or sniffed", value)
		}
		return n.Source == value, nil
	},
}

func (c *namesCmd) Run(ctx context.Context, e *env) error {
	wanted, err := nameFilters.parse(c.Filters)
	if err != nil {
		return err
	}
	names, err := c.client(e).Names(ctx)
	if err != nil {
		return err
	}
	names = slices.DeleteFunc(names, func(n admin.Name) bool { return !wanted(n) })
	slices.SortFunc(names, func(a, b admin.Name) int {
		return cmp.Or(
			strings.Compare(a.Client, b.Client),
			a.Address.Compare(b.Address),
			cmp.Compare(a.Age, b.Age),
			slices.Compare(a.Names, b.Names),
		)
	})
	if c.JSON {
		return e.json(names)
	}
	e.nameTable("", names).print()
	return nil
}

// nameTable lists names; one with an indent stands in another text.
func (e *env) nameTable(indent string, names []admin.Name) *table {
	t := e.table(indent+"CLIENT", "ADDRESS", "NAMES", "FROM", "AGE", "KEPT FOR")
	for _, n := range names {
		client := n.Client
		if client == "" {
			client = "any"
		}
		t.row(indent+client, n.Address, strings.Join(n.Names, " → "), n.Source, duration(seconds(n.Age)), duration(seconds(n.Expires)))
	}
	return t
}
