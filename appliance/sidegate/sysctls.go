package main

import (
	"fmt"
	"strings"

	"sidegate/appliance/gateway"
	"sidegate/appliance/sysctl"
)

type sysctlsCmd struct {
	Config string `short:"c" placeholder:"FILE" help:"Configuration that names the LAN interfaces (default: the interface of the default route)."`
	JSON   bool   `xor:"format" help:"Print the whole list as JSON, whatever this box is."`
	Conf   bool   `xor:"format" help:"Print those of this box as a file for /etc/sysctl.d, for the box to forward without the gateway, too."`
}

// Help says who sets them.
func (sysctlsCmd) Help() string {
	return `The table is of this box, with the present values. In JSON the list is that of every box, and names hold the
placeholders <lan>, each LAN interface, and <uplink>, each interface by which the box takes its IPv6 route from
router advertisements; the order is that in which they are to be set. "sidegate run --apply-sysctls" sets them until it is
stopped. To keep them: sidegate sysctls --conf >` + sysctl.ConfFile + ` && sysctl --system, and then start the
gateway, which leaves alone what is right.`
}

func (c *sysctlsCmd) Run(e *env) error {
	if c.JSON {
		return e.json(sysctl.List())
	}
	plan, err := gateway.Load(c.Config)
	if err != nil {
		return err
	}
	all, err := gateway.Parameters(plan)
	if err != nil {
		return err
	}
	if c.Conf {
		for _, s := range all {
			value := s.Value
			if s.Good() {
				value = s.Seen
			}
			fmt.Fprintf(e.stdout, "# otherwise %s\n%s = %s\n", s.Why, s.Name, value)
		}
		return nil
	}
	t := e.table("PARAMETER", "IS", "SHOULD BE", "OTHERWISE")
	for _, s := range all {
		t.row(s.Name, s.Seen, strings.Join(append([]string{s.Value}, s.Also...), " or "), s.Why)
	}
	t.print()
	return nil
}
