package main

import (
	"fmt"

	"sidegate/appliance/gateway"
)

type checkCmd struct {
	Config string `short:"c" required:"" placeholder:"FILE" help:"Configuration to check."`
	JSON   bool   `help:"Print JSON."`
}

// Help says what the exit status means.
func (checkCmd) Help() string {
	return `Exit status: 0 if run would take the file and its tests pass, 1 if not. Nothing is opened and nothing changes;
root is not needed.`
}

// checked is the result in JSON.
type checked struct {
	File     string   `json:"file"`
	OK       bool     `json:"ok"`
	Rules    int      `json:"rules"`
	Tests    int      `json:"tests"`
	Errors   []string `json:"errors"`
	Warnings []string `json:"warnings"`
}

func (c *checkCmd) Run(e *env) error {
	result := checked{File: c.Config, Errors: []string{}, Warnings: []string{}}
	plan, err := gateway.Load(c.Config)
	if err == nil {
		result.Rules, result.Tests = len(plan.Config.Policy.Rules), len(plan.Config.Tests)
		result.Warnings = append(result.Warnings, plan.Config.Warnings...)
		err = plan.Config.Check()
	}
	result.OK = err == nil
	if c.JSON {
		result.Errors = append(result.Errors, errorLines(err)...)
		if err := e.json(result); err != nil {
			return err
		}
		if !result.OK {
			return exit(1)
		}
		return nil
	}
	for _, w := range result.Warnings {
		fmt.Fprintln(e.stderr, w)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(e.stdout, "%s is good: %s, default %s", c.Config, plural(result.Rules, "rule"), plan.Config.Policy.Default)
	if result.Tests > 0 {
		fmt.Fprintf(e.stdout, "; %s passed", plural(result.Tests, "test"))
	}
	fmt.Fprintln(e.stdout)
	return nil
}
