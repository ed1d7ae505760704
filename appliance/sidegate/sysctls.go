package main

import (
	"strings"

	"sidegate/appliance/gateway"
	"sidegate/appliance/sysctl"
)

type sysctlsCmd struct {
	Config string `short:"c" placeholder:"FILE" help:"Configuration that names the LAN interfaces (default: the interface of the default route)."`
	JSON   bool   `help:"Print the list itself as JSON, with placeholders for interfaces: for programs that set the parameters."`
}

// Help says how the parameters are set.
func (sysctlsCmd) Help() string {
	return `A parameter that is wrong is marked with an exclamation mark. Set them for good in /etc/sysctl.d, or by
sidegate run --apply-sysctls, which puts them back when it is stopped. On NixOS the module sets them.`
}

func (c *sysctlsCmd) Run(e *env) error {
	if c.JSON {
		return e.json(sysctl.List())
	}
	plan, err := gateway.Load(c.Config)
	if err != nil {
		return err
	}
	settings, err := gateway.Parameters(plan)
	t := e.table("", "PARAMETER", "IS", "SHOULD BE", "OR ELSE")
	for _, s := range settings {
		mark := "!"
		if s.Good() {
			mark = " "
		}
		t.row(mark, s.Name, s.Seen, strings.Join(append([]string{s.Value}, s.Also...), " or "), s.Why)
	}
	t.print()
	return err
}
