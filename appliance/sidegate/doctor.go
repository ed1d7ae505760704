package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"sidegate/appliance/admin"
	"sidegate/appliance/doctor"
	"sidegate/appliance/gateway"
)

type doctorCmd struct {
	Config string `short:"c" placeholder:"FILE" help:"Configuration (default: that of the running gateway, else the built-in one)."`
	JSON   bool   `help:"Print JSON."`
	Fix    bool   `help:"Offer what can be repaired, one by one, and look again."`
	Yes    bool   `help:"With --fix: repair without asking."`
	socketFlag
}

// Help says what the exit status means.
func (doctorCmd) Help() string {
	return `It sends some packets to the LAN (ARP, neighbour and router solicitations, a DHCP discover, pings to the router)
and takes two seconds at most. Nothing is changed without --fix; what that changes lasts until the next boot.

Exit status: 0 if there is no finding, or notes only; 2 with warnings; 3 with failures; 1 if it could not examine.`
}

// exitStatus is that of the worst finding.
var exitStatus = map[doctor.Severity]exit{"": 0, doctor.Note: 0, doctor.Warning: 2, doctor.Failure: 3}

// examined is the result in JSON.
type examined struct {
	Findings []doctor.Finding `json:"findings"`
	Repaired []doctor.Finding `json:"repaired,omitempty"`
	Checks   int              `json:"checks"`
	Seconds  float64          `json:"seconds"` // of the last look
}

func (c *doctorCmd) Run(ctx context.Context, e *env) error {
	switch {
	case c.Yes && !c.Fix:
		return errors.New("--yes says what to do with --fix, which is not given")
	case c.Fix && !c.Yes && (c.JSON || !isTerminal(e.stdin)):
		return errors.New("--fix asks before it changes anything, and there is nobody to ask: add --yes")
	case os.Geteuid() != 0:
		return errors.New("examining the box takes packets of its own: become root (sudo)")
	}
	result, err := c.look(ctx, e)
	if err != nil {
		return err
	}
	if c.Fix {
		if !c.JSON {
			result.print(e)
		}
		repaired, err := c.repair(ctx, e, result.Findings)
		if err != nil {
			return err
		}
		if len(repaired) > 0 {
			if result, err = c.look(ctx, e); err != nil {
				return err
			}
			result.Repaired = repaired
			if !c.JSON {
				fmt.Fprintln(e.stdout, "\nLooking again:")
				result.print(e)
			}
		}
	} else if !c.JSON {
		result.print(e)
	}
	if c.JSON {
		if err := e.json(result); err != nil {
			return err
		}
	}
	if status := exitStatus[doctor.Worst(result.Findings)]; status != 0 {
		return status
	}
	return nil
}

// look examines the box for the configuration that was named, else that of the running gateway.
func (c *doctorCmd) look(ctx context.Context, e *env) (examined, error) {
	var running *admin.Status
	status, err := c.client(e).Status(ctx)
	switch {
	case err == nil:
		running = &status
	case !errors.Is(err, admin.ErrNotRunning):
		return examined{}, err
	}
	file := c.Config
	if file == "" && running != nil {
		file = running.Config.File
	}
	plan, err := gateway.Load(file)
	if err != nil {
		return examined{}, err
	}
	start := time.Now()
	findings, err := gateway.Examine(ctx, plan, running)
	if err != nil {
		return examined{}, err
	}
	return examined{
		Findings: append([]doctor.Finding{}, findings...), // in JSON, none are a list too
		Checks:   len(doctor.Checks()), Seconds: time.Since(start).Seconds(),
	}, nil
}

// repair applies what has a repair, and returns what it applied.
func (c *doctorCmd) repair(ctx context.Context, e *env, findings []doctor.Finding) (done []doctor.Finding, err error) {
	answers := bufio.NewScanner(e.stdin)
	for _, f := range findings {
		if f.Repair == nil {
			continue
		}
		if !c.Yes {
			fmt.Fprintf(e.stdout, "\n%s: %s? [y/N] ", f.Object, f.Repair.Does)
			if !answers.Scan() || !strings.EqualFold(strings.TrimSpace(answers.Text()), "y") {
				continue
			}
		}
		if err := f.Repair.Apply(ctx); err != nil {
			return done, fmt.Errorf("repairing %s (%s): %w", f.Object, f.Repair.Does, err)
		}
		if !c.JSON {
			fmt.Fprintf(e.stdout, "done: %s\n", f.Repair.Does)
		}
		done = append(done, f)
	}
	return done, nil
}

var colours = map[doctor.Severity]string{doctor.Note: "\x1b[36m", doctor.Warning: "\x1b[33m", doctor.Failure: "\x1b[31m"}

func (r *examined) print(e *env) {
	if len(r.Findings) == 0 {
		fmt.Fprintf(e.stdout, "no finding: %s in %.1f s\n", plural(r.Checks, "check"), r.Seconds)
		return
	}
	for i, f := range r.Findings {
		if i > 0 {
			fmt.Fprintln(e.stdout)
		}
		colour, end := "", ""
		if e.terminal(e.stdout) {
			colour, end = colours[f.Severity], "\x1b[0m"
		}
		fmt.Fprintf(e.stdout, "%s%s%s %s: %s\n", colour, f.Severity, end, f.Check, f.Object)
		fmt.Fprintf(e.stdout, "  seen  %s\n  why   %s\n  fix   %s\n", f.Seen, f.Why, f.Fix)
	}
}
