package main

import (
	"fmt"
	"io"
	"regexp"
	"sort"
	"strings"
	"time"
)

// An event is one line of go test -json: see `go doc test2json` and, for the build events, `go help buildjson`.
type event struct {
	Action      string
	Package     string
	ImportPath  string // build events have this instead of Package
	Test        string
	Output      string
	Elapsed     float64 // seconds
	FailedBuild string
}

// A test is one test or subtest, from its first event on.
type test struct {
	name     string
	result   string // pass, fail, skip; empty while it runs
	children bool
	output   []string
}

// A pkg is one package under test.
type pkg struct {
	path   string
	tests  map[string]*test
	order  []*test
	output []string // what belongs to no test: TestMain, panics, the final FAIL
	shown  int      // failed tests whose output was already printed
}

type counts struct{ passed, failed, skipped int }

type skipped struct{ name, reason string }

type report struct {
	out      io.Writer
	packages map[string]*pkg
	building map[string][]string // import path → compiler output
	total    counts
	failures []string
	skips    []skipped
	untested []string // packages without test files
	now      func() time.Time
	begun    time.Time
}

func newReport(out io.Writer) *report {
	return &report{
		out: out, packages: map[string]*pkg{}, building: map[string][]string{},
		now: time.Now, begun: time.Now(),
	}
}

func (r *report) print(format string, args ...any) { fmt.Fprintf(r.out, format, args...) }

func (r *report) add(e event) {
	switch e.Action {
	case "build-output":
		r.building[e.ImportPath] = append(r.building[e.ImportPath], e.Output)
		return
	case "build-fail":
		return // the package's own fail event follows and names this one
	}
	if e.Package == "" {
		return
	}
	p := r.packages[e.Package]
	if p == nil {
		p = &pkg{path: e.Package, tests: map[string]*test{}}
		r.packages[e.Package] = p
	}
	if e.Test == "" {
		r.addPackage(p, e)
		return
	}
	t := p.test(e.Test)
	switch e.Action {
	case "output":
		t.output = append(t.output, e.Output)
	case "pass", "fail", "skip":
		t.result = e.Action
		// A subtest's output reads best inside that of its root, so print when the root is through.
		if e.Action == "fail" && !strings.Contains(e.Test, "/") {
			r.show(p, t)
		}
	}
}

func (p *pkg) test(name string) *test {
	if t := p.tests[name]; t != nil {
		return t
	}
	t := &test{name: name}
	p.tests[name] = t
	p.order = append(p.order, t)
	for i := strings.LastIndexByte(name, '/'); i > 0; i = strings.LastIndexByte(name[:i], '/') {
		if parent := p.tests[name[:i]]; parent != nil {
			parent.children = true
			break
		}
	}
	return t
}

// addPackage handles an event of the package as a whole; all but output end it.
func (r *report) addPackage(p *pkg, e event) {
	switch e.Action {
	case "output":
		p.output = append(p.output, e.Output)
	case "skip":
		r.untested = append(r.untested, p.path)
		delete(r.packages, p.path)
	case "pass", "fail":
		c := r.close(p, e)
		r.total.passed += c.passed
		r.total.failed += c.failed
		r.total.skipped += c.skipped
		status := "ok"
		if c.failed > 0 {
			status = "FAIL"
		}
		r.print("%-4s  %-40s %s  (%.1f s)\n", status, p.path, c, e.Elapsed)
		delete(r.packages, p.path) // its output can be large
	}
}

// close counts p's tests. A test with subtests stands for itself only if it failed or was skipped on its own.
func (r *report) close(p *pkg, e event) (c counts) {
	failedBelow := map[string]bool{}
	for i := len(p.order) - 1; i >= 0; i-- { // children come after their parents
		t := p.order[i]
		switch {
		case t.result == "skip":
			c.skipped++
			r.skips = append(r.skips, skipped{short(p.path) + " " + t.name, t.reason()})
		case t.result == "fail", t.result == "": // unfinished: a panic, a timeout or an early exit ended the process
			if !failedBelow[t.name] {
				c.failed++
				what := t.name
				if t.result == "" {
					what += " (did not finish)"
				}
				r.failures = append(r.failures, short(p.path)+" "+what)
			}
			for j := strings.LastIndexByte(t.name, '/'); j > 0; j = strings.LastIndexByte(t.name[:j], '/') {
				failedBelow[t.name[:j]] = true
			}
			root, _, _ := strings.Cut(t.name, "/")
			if t.result == "" && (t.name == root || p.tests[root] == nil) {
				r.show(p, t)
			}
		case !t.children:
			c.passed++
		}
	}
	if e.Action != "fail" {
		return c
	}
	switch {
	case e.FailedBuild != "":
		c.failed++
		r.failures = append(r.failures, short(p.path)+" (does not build)")
		r.print("\n%s\n", strings.Join(r.building[e.FailedBuild], ""))
	case c.failed == 0: // TestMain, init, a race found after the last test, os.Exit
		c.failed++
		r.failures = append(r.failures, short(p.path)+" (failed outside its tests)")
		r.print("\n%s\n", strings.Join(p.output, ""))
	case p.shown == 0 || p.panicked():
		r.print("\n%s\n", strings.Join(p.output, ""))
	}
	return c
}

// panicked says whether the package's own output carries more than the closing FAIL lines.
func (p *pkg) panicked() bool {
	for _, line := range p.output {
		if strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") {
			return true
		}
	}
	return false
}

// show prints what a root test and its subtests said, in full.
func (r *report) show(p *pkg, root *test) {
	p.shown++
	r.print("\n")
	for _, t := range p.order {
		if t == root || strings.HasPrefix(t.name, root.name+"/") {
			for _, line := range t.output {
				if !strings.HasPrefix(line, "=== ") {
					r.print("%s", line)
				}
			}
		}
	}
	r.print("\n")
}

var logged = regexp.MustCompile(`^\s*[\w.-]+\.go:\d+: `)

// reason is what t.Skip was given: the last thing that the test logged.
func (t *test) reason() string {
	reason := ""
	for _, line := range t.output {
		switch {
		case strings.HasPrefix(strings.TrimSpace(line), "--- "), strings.HasPrefix(line, "=== "):
		case logged.MatchString(line):
			reason = strings.TrimSpace(logged.ReplaceAllString(line, ""))
		case reason != "":
			reason += " " + strings.TrimSpace(line)
		}
	}
	if reason == "" {
		return "no reason given"
	}
	return strings.TrimSpace(reason)
}

// tick tells what is still running, for someone who wonders whether anything is.
func (r *report) tick() {
	for _, p := range r.packages {
		for _, t := range p.order {
			if t.result == "" && !t.children {
				r.print("...   %-40s %s is running  (%.0f s since the start)\n", p.path, t.name, r.now().Sub(r.begun).Seconds())
				return
			}
		}
	}
	r.print("...   compiling  (%.0f s since the start)\n", r.now().Sub(r.begun).Seconds())
}

// finish prints the summary; ok says whether something passed and nothing failed.
func (r *report) finish() (ok bool) {
	// go test died, or was interrupted, before these packages ended.
	for _, path := range sorted(r.packages) {
		p := r.packages[path]
		if len(p.order) == 0 && len(p.output) == 0 {
			continue
		}
		r.addPackage(p, event{Action: "fail"})
	}
	r.print("\n")
	if len(r.untested) > 0 {
		r.print("no test files: %s\n\n", strings.Join(shorts(r.untested), " "))
	}
	if len(r.skips) > 0 {
		r.print("skipped:\n")
		for _, group := range byReason(r.skips) {
			r.print("  %s\n", group.reason)
			for _, name := range group.names {
				r.print("      %s\n", name)
			}
		}
		r.print("\n")
	}
	if len(r.failures) > 0 {
		r.print("failed:\n")
		for _, f := range r.failures {
			r.print("  %s\n", f)
		}
		r.print("\n")
	}
	ok = r.total.failed == 0 && r.total.passed > 0
	if r.total.passed+r.total.failed == 0 {
		r.print("no test ran\n")
	}
	r.print("%s\n", r.total)
	return ok
}

func (c counts) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", c.passed, c.failed, c.skipped)
}

type skipGroup struct {
	reason string
	names  []string
}

// byReason groups skips, for one missing thing usually costs many tests.
func byReason(skips []skipped) []skipGroup {
	names := map[string][]string{}
	for _, s := range skips {
		names[s.reason] = append(names[s.reason], s.name)
	}
	groups := make([]skipGroup, 0, len(names))
	for _, reason := range sorted(names) {
		sort.Strings(names[reason])
		groups = append(groups, skipGroup{reason, names[reason]})
	}
	return groups
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// short drops the module's name from an import path.
func short(path string) string {
	_, rest, found := strings.Cut(path, "/")
	if !found {
		return path
	}
	return rest
}

func shorts(paths []string) []string {
	out := make([]string, len(paths))
	for i, p := range paths {
		out[i] = short(p)
	}
	return out
}
