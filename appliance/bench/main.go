// Bench measures sidegate on this machine, in a lab of its own: what its programs cost a packet, what policies cost,
// and how direct and proxied traffic compares with a box that only forwards and a client that uses the upstream proxy
// itself. What is compared is measured in turn, in adjacent pairs: absolute figures are of this machine and this hour.
//
//	go run ./appliance/bench [--quick] [--run REGEXP] [--json FILE] [--check]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// experiment measures figures that need the same things around them.
type experiment struct {
	name string
	run  func(context.Context, *bench) ([]*Figure, error)
}

var experiments = []experiment{
	{"established", established},
	{"policies", policies},
	{"forwarding", forwarding},
	{"proxying", proxying},
	{"relaying", relaying},
	{"own", own},
	{"resolving", resolving},
}

// bench is the stage and how thoroughly to measure on it.
type bench struct {
	*stage
	pairs  int
	window time.Duration // length of one measurement
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := measure(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	binary := flags.String("binary", "bin/sidegate", "the `program` to measure")
	only := flags.String("run", "", "measure only what matches a `regexp`: "+names())
	jsonFile := flags.String("json", "", "write the result to a `file` too")
	check := flags.Bool("check", false, "fail if a ratio breaks its bound")
	quick := flags.Bool("quick", false, "3 pairs of 0.3 s: about a minute, and less certain")
	pairs := flags.Int("pairs", 7, "adjacent `pairs` of measurements for each figure")
	window := flags.Duration("window", time.Second, "`length` of one measurement")
	flags.Parse(args)
	b := &bench{pairs: *pairs, window: *window}
	if *quick {
		b.pairs, b.window = 3, 300*time.Millisecond
	}
	chosen, err := choose(*only)
	if err != nil {
		return err
	}
	path, err := filepath.Abs(*binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("%s is not there: build it first, with make build", *binary)
	}

	if b.stage, err = newStage(ctx, path); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	report, err := newReport(ctx, b)
	if err != nil {
		return err
	}
	for _, e := range chosen {
		fmt.Fprintf(os.Stderr, "measuring %s …\n", e.name)
		figures, err := e.run(ctx, b)
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		if err != nil {
			return fmt.Errorf("measuring %s: %w", e.name, err)
		}
		report.Figures = append(report.Figures, figures...)
	}
	if err := b.stop(); err != nil {
		return err
	}
	if *jsonFile != "" {
		if err := report.writeJSON(*jsonFile); err != nil {
			return err
		}
	}
	if err := report.writeText(os.Stdout); err != nil {
		return err
	}
	if *check {
		return report.check()
	}
	return nil
}

func names() string {
	var all []string
	for _, e := range experiments {
		all = append(all, e.name)
	}
	return strings.Join(all, ", ")
}

func choose(only string) (chosen []experiment, err error) {
	r, err := regexp.Compile(only)
	if err != nil {
		return nil, fmt.Errorf("--run: %w", err)
	}
	for _, e := range experiments {
		if r.MatchString(e.name) {
			chosen = append(chosen, e)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("--run: nothing matches %q (have: %s)", only, names())
	}
	return chosen, nil
}

// check is the only verdict of a benchmark: on ratios, since times are of the machine.
func (r *Report) check() error {
	var errs []error
	for _, f := range r.Figures {
		if how, broken := f.broken(); broken {
			errs = append(errs, errors.New(how))
		}
	}
	return errors.Join(errs...)
}
