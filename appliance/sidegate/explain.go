package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"sidegate/appliance/admin"
	"sidegate/appliance/gateway"
	"sidegate/appliance/policy"
)

type explainCmd struct {
	Config string   `short:"c" placeholder:"FILE" help:"Configuration (default: that of the running gateway)."`
	JSON   bool     `help:"Print JSON."`
	Facts  []string `arg:"" name:"key=value" help:"Facts of the flow: ip, port, network (tcp, udp, other), source_ip, source_port, source_mac, domain (again for more names), dscp, interface, process, process_path, unit."`
	socketFlag
}

// Help says what is compared with what.
func (explainCmd) Help() string {
	return `What is not given is unknown: a rule that asks for it does not match. Where a gateway runs, its kernel is
asked as well: the very program that decides packets decides this flow. With -c, the answer is that of FILE, and
the running gateway is told apart if it has another configuration.

With an address and no domain, the names are those that the running gateway has learned for the address, by the
client (source_ip, source_mac) where that is given: as for a packet. Where they came from is told.

Exit status: 0; 1 if there is no answer; 2 if the running gateway's kernel and policy disagree, which is a bug.`
}

// explained is the answer in JSON: that of the policy, and of the kernel beside it where a gateway runs.
type explained struct {
	admin.Explanation
	Kernel  *admin.Answer `json:"kernel,omitempty"`  // the running gateway's
	Gateway *runningOf    `json:"gateway,omitempty"` // the running gateway
}

// runningOf describes the gateway that was asked.
type runningOf struct {
	Config     string            `json:"config"`      // empty: the built-in default
	Same       bool              `json:"same_config"` // it runs what was explained
	Generation uint32            `json:"generation"`
	Policy     admin.Explanation `json:"policy"`
	Agrees     bool              `json:"kernel_agrees"` // its kernel decides as its policy says
}

func (c *explainCmd) Run(ctx context.Context, e *env) error {
	facts, err := parseFacts(c.Facts)
	if err != nil {
		return err
	}
	flow, err := gateway.ParseFlow(facts)
	if err != nil {
		return err
	}
	live, asked := c.client(e).Explain(ctx, facts)
	if asked != nil && !errors.Is(asked, admin.ErrNotRunning) {
		fmt.Fprintf(e.stderr, "sidegate: the running gateway was not asked: %v\n", asked)
	}
	result, err := c.explain(flow, live, asked == nil)
	if err != nil {
		return err
	}
	if c.JSON {
		if err := e.json(result); err != nil {
			return err
		}
	} else {
		result.print(e, c.Config)
	}
	if result.Gateway != nil && !result.Gateway.Agrees {
		return exit(2)
	}
	return nil
}

// explain takes the answer of the file if one was named, else of the gateway if one runs, else of the
// built-in default.
func (c *explainCmd) explain(f policy.Flow, live admin.LiveExplanation, running bool) (explained, error) {
	var result explained
	same := running && c.Config == ""
	if !same {
		plan, err := gateway.Load(c.Config)
		if err != nil {
			return result, err
		}
		if running && len(f.Names) == 0 { // FILE has learned nothing
			f.Names = live.Policy.Sources.Known()
		}
		result.Explanation = plan.Explain(f)
		result.Sources.Names = live.Policy.Sources.Names
		same = running && plan.Path == live.Config.File && plan.Digest == live.Config.Digest
	}
	if same { // its policy knows the addresses of upstreams that are given by name
		result.Explanation = live.Policy
	}
	if running {
		result.Kernel = live.Kernel
		result.Gateway = &runningOf{
			Config:     live.Config.File,
			Same:       same,
			Generation: live.Generation,
			Policy:     live.Policy,
			Agrees:     live.Kernel == nil || live.Kernel.Same(live.Policy.Answer),
		}
	}
	return result, nil
}

func parseFacts(args []string) (map[string][]string, error) {
	facts := map[string][]string{}
	for _, arg := range args {
		key, value, ok := strings.Cut(arg, "=")
		if !ok {
			return nil, fmt.Errorf("%q is not a fact: write key=value, such as port=443", arg)
		}
		facts[key] = append(facts[key], value)
	}
	return facts, nil
}

func (r *explained) print(e *env, file string) {
	fmt.Fprintln(e.stdout, sentence(r.Answer))
	switch {
	case r.Ambiguous && r.Sniff:
		fmt.Fprintln(e.stdout, "The names lead to different outcomes: the flow's first bytes decide, and this if they tell no name.")
	case r.Ambiguous:
		fmt.Fprintln(e.stdout, "The names lead to different outcomes: this is that of the first rule among them.")
	case r.Sniff:
		fmt.Fprintln(e.stdout, "Its name could make a difference: the flow's first bytes decide, and this if they tell no name.")
	}
	if len(r.Skipped) > 0 {
		fmt.Fprintln(e.stdout, "\nEarlier rules do not match:")
		t := e.table("", "RULE", "FIELD", "WHY")
		for _, s := range r.Skipped {
			t.row("", ruleText(s.Rule, s.Implicit), s.Field, s.Reason)
		}
		t.print()
	}
	e.printSources(r.Sources)
	g := r.Gateway
	if g == nil {
		return
	}
	running := g.Config
	if running == "" {
		running = "the built-in default"
	}
	fmt.Fprintln(e.stdout)
	switch {
	case !g.Agrees:
		fmt.Fprintf(e.stdout, "The kernel DISAGREES: %s\nThe running gateway's policy says: %s\n", sentence(*r.Kernel), sentence(g.Policy.Answer))
	case r.Kernel == nil:
		fmt.Fprintln(e.stdout, "The kernel was not asked: it decides packets, which have an address (ip=…).")
	case g.Same:
		fmt.Fprintf(e.stdout, "The kernel says the same (%s, generation %d).\n", running, g.Generation)
	default:
		fmt.Fprintf(e.stdout, "The running gateway has another configuration (%s, generation %d%s).\nIts kernel says: %s\n",
			running, g.Generation, reloadHint(file, g.Config), sentence(*r.Kernel))
	}
}

// printSources says where names and lists come from.
func (e *env) printSources(s admin.Sources) {
	if len(s.Names) > 0 {
		fmt.Fprintln(e.stdout, "\nThe names are learned:")
		e.nameTable("  ", s.Names).print()
	}
	if len(s.Lists) > 0 {
		fmt.Fprintln(e.stdout, "\nThe lists are read from files:")
		t := e.table("  LIST", "FILE")
		for _, l := range s.Lists {
			t.row("  "+l.Kind+" "+l.Name, l.File)
		}
		t.print()
	}
}

// reloadHint is for a file that was changed behind the gateway.
func reloadHint(file, running string) string {
	if absolute, err := filepath.Abs(file); file != "" && err == nil && absolute == running {
		return "; the file has changed since: sidegate reload"
	}
	return ""
}

func sentence(a admin.Answer) string {
	outcome := direct(a.Verdict.String(), a.Translated)
	if a.Verdict == policy.Proxy {
		outcome += " through " + a.Outbound
	}
	switch {
	case a.Rule == nil:
		return outcome + ", by default"
	case a.Implicit:
		return fmt.Sprintf("%s, by the implicit rule %q", outcome, *a.Rule)
	}
	return fmt.Sprintf("%s, by rule %s", outcome, quoteName(*a.Rule))
}
