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
	"text/tabwriter"
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

func (r *Report) writeText(out io.Writer) error {
	fmt.Fprintf(out, "sidegate %s · Linux %s · %d × %s · %s\n", r.Commit, r.Kernel, r.CPUs, r.CPU, r.Date.Format("2006-01-02 15:04 MST"))
	fmt.Fprintf(out, "medians of %d adjacent pairs, %g s each; × is sidegate ÷ what was measured beside it\n\n", r.Pairs, r.Window)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "FIGURE\tSIDEGATE\tBESIDE IT\t×\tTARGET\n")
	for _, f := range r.Figures {
		beside, ratio := "", ""
		if f.Beside != "" {
			beside = fmt.Sprintf("%s  %s", significant(f.Reference), f.Beside)
			ratio = fmt.Sprintf("%.2f", f.Ratio)
		}
		fmt.Fprintf(t, "%s\t%s %s\t%s\t%s\t%s\n", f.Name, significant(f.Median), f.Unit, beside, ratio, f.Target)
	}
	return t.Flush()
}

func (r *Report) writeJSON(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
