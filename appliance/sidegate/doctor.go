package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"sidegate/appliance/admin"
	"sidegate/appliance/doctor"
	"sidegate/appliance/doctor/probe"
	"sidegate/appliance/gateway"
)

type doctorCmd struct {
	Config string `short:"c" placeholder:"FILE" help:"Configuration (default: that of the running gateway, else the built-in one)."`
	JSON   bool   `help:"Print JSON."`
	Fix    bool   `help:"Offer what can be repaired, one by one, and look again."`
	Yes    bool   `help:"With --fix: repair without asking."`

	Probe  bool           `help:"Send connections of an invented client through the box, and tell where they are lost."`
	Target netip.AddrPort `placeholder:"ADDRESS:PORT" help:"With --probe: the server to connect to (default: a well-known one)."`
	As     netip.Addr     `placeholder:"ADDRESS" help:"With --probe: the client's address (default: a free one of the LAN)."`
	socketFlag
}

// Help says what the exit status means.
func (doctorCmd) Help() string {
	return `It sends some packets to the LAN (ARP, neighbour and router solicitations, a DHCP discover, pings to the router)
and takes two seconds at most. Nothing is changed without --fix; what that changes lasts until the next boot.

--probe invents a client of the LAN, with an address that nobody answers for and a MAC address of its own. Its connections
enter the box as anybody's: first past the gateway's programs, as if it was not there, then through them. It takes some
seconds, sends nothing but a few packets to the target, and leaves nothing.

Exit status: 0 if there is no finding, or notes only; 2 with warnings; 3 with failures; 1 if it could not examine.`
}

// exitStatus is that of the worst finding.
var exitStatus = map[doctor.Severity]exit{"": 0, doctor.Note: 0, doctor.Warning: 2, doctor.Failure: 3}

// examined is the result in JSON.
type examined struct {
	Findings []doctor.Finding `json:"findings"`
	Repaired []doctor.Finding `json:"repaired,omitempty"`
	Probe    []probe.Result   `json:"probe,omitempty"`
	Checks   int              `json:"checks"`
	Seconds  float64          `json:"seconds"` // of the last look
}

func (c *doctorCmd) Run(ctx context.Context, e *env) error {
	switch {
	case c.Yes && !c.Fix:
		return errors.New("--yes says what to do with --fix, which is not given")
	case c.Fix && !c.Yes && (c.JSON || !isTerminal(e.stdin)):
		return errors.New("--fix asks before it changes anything, and there is nobody to ask: add --yes")
	case !c.Probe && (c.Target.IsValid() || c.As.IsValid()):
		return errors.New("--target and --as say what to do with --probe, which is not given")
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
	if c.Probe {
		if err := c.probe(ctx, e, &result); err != nil {
			return err
		}
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

// plan is the configuration that was named, else that of the running gateway, whose status is nil if none runs.
func (c *doctorCmd) plan(ctx context.Context, e *env) (*gateway.Plan, *admin.Status, error) {
	var running *admin.Status
	status, err := c.client(e).Status(ctx)
	switch {
	case err == nil:
		running = &status
	case !errors.Is(err, admin.ErrNotRunning):
		return nil, nil, err
	}
	file := c.Config
	if file == "" && running != nil {
		file = running.Config.File
	}
	plan, err := gateway.Load(file)
	return plan, running, err
}

// look examines the box.
func (c *doctorCmd) look(ctx context.Context, e *env) (examined, error) {
	plan, running, err := c.plan(ctx, e)
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

// probe sends packets through the box. A signal ends it, and it leaves nothing behind.
func (c *doctorCmd) probe(ctx context.Context, e *env, result *examined) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	plan, running, err := c.plan(ctx, e)
	if err != nil {
		return err
	}
	options := gateway.ProbeOptions{As: c.As, Target: c.Target}
	if running != nil {
		options.Running = c.client(e)
	}
	results, findings, err := gateway.Probe(ctx, plan, options)
	result.Probe, result.Findings = results, append(result.Findings, findings...)
	if !c.JSON {
		printProbe(e, results)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("probing: %w", context.Cause(ctx))
	}
	return err
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
			answers.Scan()
			if !slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(answers.Text()))) {
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

// printProbe shows how far each connection came.
func printProbe(e *env, results []probe.Result) {
	for _, r := range results {
		fmt.Fprintf(e.stdout, "\nprobe %s %s", r.Interface, r.Family)
		if r.Client.IsValid() {
			fmt.Fprintf(e.stdout, " as %s (%s)", r.Client, r.MAC)
		}
		fmt.Fprintln(e.stdout)
		for _, s := range r.Steps {
			if s.OK {
				fmt.Fprintf(e.stdout, "  ok    %s\n", s.What)
			} else {
				fmt.Fprintf(e.stdout, "  FAIL  %s: %s\n", s.What, s.Seen)
			}
		}
		fmt.Fprintf(e.stdout, "%s\n", r.Conclusion)
		if r.Fix != "" {
			fmt.Fprintf(e.stdout, "  fix   %s\n", r.Fix)
		}
	}
}
