package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Report is the result of a run, as --json writes it.
type Report struct {
	Date    time.Time `json:"date"`
	Commit  string    `json:"commit"`
	Kernel  string    `json:"kernel"`
	CPU     string    `json:"cpu"`
	CPUs    int       `json:"cpus"`
	Load    string    `json:"load"`   // average of the last minute, before the run: others disturb what is measured
	Pairs   int       `json:"pairs"`  // of adjacent measurements for each figure
	Window  float64   `json:"window"` // length of a measurement in seconds
	Figures []*Figure `json:"figures"`
}

func newReport(ctx context.Context, b *bench) (*Report, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("asking for the kernel's version: %w", err)
	}
	return &Report{
		Date:   time.Now().UTC().Truncate(time.Second),
		Commit: commit(ctx),
		Kernel: unix.ByteSliceToString(uts.Release[:]),
		CPU:    processor(),
		CPUs:   runtime.NumCPU(),
		Load:   load(),
		Pairs:  b.pairs,
		Window: b.window.Seconds(),
	}, nil
}

// commit is that of the working directory; without git or outside a repository nobody knows.
func commit(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--tags").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

// processor is what the first CPU calls itself.
func processor() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if key, value, _ := strings.Cut(lines.Text(), ":"); strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if first, _, found := strings.Cut(string(text), " "); err == nil && found {
		return first
	}
	return "unknown"
}

// writeText prints a table that fits into an issue. × is sidegate ÷ what was measured beside it.
func (r *Report) writeText(out io.Writer) error {
	w := bufio.NewWriter(out)
	fmt.Fprintf(w, "sidegate %s · Linux %s · %d × %s · load %s · %s\n", r.Commit, r.Kernel, r.CPUs, r.CPU, r.Load, r.Date.Format("2006-01-02 15:04 MST"))
	fmt.Fprintf(w, "medians of %d adjacent pairs of %g s; × is sidegate ÷ beside it\n", r.Pairs, r.Window)
	row := func(cells ...any) {
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("  %-40s %10s %10s %8s   %s", cells...), " "))
	}
	var last Quantity
	for _, f := range r.Figures {
		if f.Quantity != last {
			last = f.Quantity
			fmt.Fprintf(w, "\n%s, %s; beside it: %s\n", f.What, f.Unit, f.Beside)
			row("", "sidegate", "beside it", "×", "target")
		}
		row(f.Name, significant(f.Median), significant(f.Reference), fmt.Sprintf("%.2f", f.Ratio), f.Target)
	}
	return w.Flush()
}

func (r *Report) writeJSON(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
