package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"
)

// demonstrate shows what sidegate does, on a network of its own, and returns an error that says which steps were not
// as expected. It needs root. With keep, the network and the gateway stay until ctx ends.
func demonstrate(ctx context.Context, out io.Writer, color, keep bool) (err error) {
	start := time.Now()
	if os.Geteuid() != 0 {
		return errors.New("the demonstration needs root, for network namespaces and eBPF: sudo sidegate demo")
	}
	const self = "/proc/self/exe" // the program that is running, also after its file was replaced
	s, err := newStage(ctx, self)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	p := &script{out: out, color: color}
	p.line("%s", p.paint(bold, "The network: a laptop whose gateway is the side router, which is no more than its neighbour"))
	_, network, _ := strings.Cut(s.Describe(), "\n") // its first line is for networks that stay
	p.block(network)
	p.line("%s", p.paint(bold, "The gateway's configuration"))
	p.block(s.config)

	failed, err := p.perform(ctx, s, keep)
	if err == nil && len(failed) > 0 {
		err = fmt.Errorf("not as expected: %s", strings.Join(failed, "; "))
	}
	switch {
	case errors.Is(err, errInterrupted):
		return err
	case err != nil:
		return s.withLogs(err)
	}
	p.line("\n%s Everything was as expected, in %s.", p.paint(green, "✓"), brief(time.Since(start)))
	return nil
}

var errInterrupted = errors.New("interrupted")

// perform plays all steps and returns the titles of those of which a claim failed. An error is of the demonstration
// itself.
func (p *script) perform(ctx context.Context, s *stage, keep bool) (failed []string, err error) {
	failed, err = p.play(ctx, s, steps)
	if err != nil {
		return failed, err
	}
	if keep {
		p.block(s.entrances())
		<-ctx.Done()
		p.line("")
		ctx = context.WithoutCancel(ctx)
	}
	more, err := p.play(ctx, s, lastSteps)
	return append(failed, more...), err
}

func (p *script) play(ctx context.Context, s *stage, steps []step) (failed []string, err error) {
	for _, step := range steps {
		ok, err := p.step(ctx, s, step)
		if ctx.Err() != nil {
			return failed, errInterrupted
		}
		if err != nil {
			return failed, fmt.Errorf("step %d, %s: %w", p.steps, step.title, err)
		}
		if !ok {
			failed = append(failed, fmt.Sprintf("step %d, %s", p.steps, step.title))
		}
	}
	return failed, nil
}

func (p *script) step(ctx context.Context, s *stage, step step) (ok bool, err error) {
	var to netip.Addr
	title := step.title
	if step.host != "" {
		to = step.ip.of(s.Host(step.host))
		title += fmt.Sprintf(", laptop → %s %s", step.host, to)
	}
	p.title(title)
	s.atSidegate.Reset() // what follows counts this step
	s.atRouter.Reset()
	s.atISP.Reset()
	f, err := step.act(ctx, s, step.host, to)
	if err != nil {
		return false, err
	}
	if step.verdict != "" {
		f.verdict, f.rule = step.verdict, step.rule
		s.flows = append(s.flows, f)
	}
	if step.show != nil {
		text, err := step.show(ctx, s)
		if err != nil {
			return false, err
		}
		p.block(text)
	}
	ok = true
	for _, claim := range step.claims {
		seen, holds, err := claim.check(ctx, s, f)
		if err != nil {
			seen, holds = strings.ReplaceAll(err.Error(), "\n", "; "), false
		}
		p.verdict(claim.text, seen, holds)
		ok = ok && holds
	}
	return ok, nil
}

// entrances says how to look around in the network.
func (s *stage) entrances() string {
	program, err := os.Executable()
	if err != nil {
		program = "sidegate"
	}
	var b strings.Builder
	b.WriteString("The network stays until Ctrl-C. A shell in it:\n\n")
	for _, h := range s.Hosts() {
		fmt.Fprintf(&b, "  nsenter --net=/run/netns/%-20s bash   # %s\n", h.Namespace(), h.Addr4())
	}
	fmt.Fprintf(&b, "\nEvery host of the internet serves http://ADDRESS/whoami and /bytes/N, and echoes on port %d.\nThe laptop may ask any address for %s and %s.\nThe gateway:\n\n", echoPort, films, tracker)
	fmt.Fprintf(&b, "  %s status --socket %s\n", program, s.gateway.Socket)
	fmt.Fprintf(&b, "  less %s\n", s.gateway.Log())
	return b.String()
}

// withLogs says where the logs are kept.
func (s *stage) withLogs(cause error) error {
	dir, err := s.keepLogs()
	if err != nil {
		return errors.Join(cause, fmt.Errorf("keeping the logs: %w", err))
	}
	return fmt.Errorf("%w (logs: %s)", cause, dir)
}
