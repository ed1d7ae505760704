package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sidegate/appliance/lab"
)

// TestDemoNotices breaks what the demonstration claims, one thing after the other, and looks for the steps that say so.
func TestDemoNotices(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces and runs the gateway")
	}
	binary := filepath.Join(t.TempDir(), "sidegate")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	s, err := newStage(t.Context(), binary)
	if missing := (lab.MissingError{}); errors.As(err, &missing) {
		t.Skip("needs a program: ", missing)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	config := s.config
	_, rest, _ := strings.Cut(config, "dns:\n")
	section, _, _ := strings.Cut(rest, "sniff:")
	for _, c := range []struct {
		name     string
		old, new string       // in the configuration
		crash    bool         // the gateway is killed before it is stopped
		want     map[int]bool // numbers of the steps that fail
	}{
		{name: "as it is"},
		{"direct is proxied", "default: direct", "default: upstream", false, map[int]bool{2: true, 3: true, 4: true, 11: true, 14: true}},
		{"proxied is direct", "outbound: upstream", "outbound: direct", false, map[int]bool{5: true, 6: true, 7: true, 11: true, 13: true, 14: true, 15: true}},
		{"blocked is direct", "outbound: block }", "outbound: direct }", false, map[int]bool{8: true, 12: true, 14: true}},
		{"rejected is dropped", ", reject: true", "", false, map[int]bool{9: true}},
		{"DNS is ordinary traffic", "dns:\n" + section, "", false, map[int]bool{10: true, 11: true, 12: true, 13: true, 14: true, 16: true}},
		{"names are confused", "sniff: ambiguous", "sniff: off", false, map[int]bool{12: true, 13: true, 14: true, 16: true}},
		{"names are not told", "sniff:", "dial: ip\nsniff:", false, map[int]bool{11: true}},
		{"a crash leaves everything", "", "", true, map[int]bool{17: true, 18: true}},
	} {
		if s.config = strings.ReplaceAll(config, c.old, c.new); c.old != "" && s.config == config {
			t.Fatalf("%s: the configuration does not say %q", c.name, c.old)
		}
		s.flows = nil
		if err := errors.Join(s.upstream.Stop(), s.startUpstream(t.Context())); err != nil { // it remembers names
			t.Fatal(err)
		}
		var shown strings.Builder
		p := &script{out: io.Writer(&shown)}
		failed, err := p.play(t.Context(), s, steps)
		if err == nil && c.crash {
			err = s.gateway.Kill()
		}
		if err == nil {
			var more []string
			more, err = p.play(t.Context(), s, lastSteps)
			failed = append(failed, more...)
		}
		if err != nil {
			t.Fatalf("%s: %v\n%s", c.name, err, &shown)
		}
		for n := 1; n <= p.steps; n++ {
			said := slices.ContainsFunc(failed, func(f string) bool { return strings.HasPrefix(f, fmt.Sprintf("step %d,", n)) })
			if said != c.want[n] {
				t.Errorf("%s: step %d: failed is %t, expected %t\n%s", c.name, n, said, c.want[n], &shown)
			}
		}
	}
}

func TestDifference(t *testing.T) {
	for _, c := range []struct{ before, after, want []string }{
		{[]string{"a", "b"}, []string{"b", "a"}, nil},
		{[]string{"a"}, []string{"a", "a"}, []string{"left: a"}},
		{[]string{"a", "a"}, []string{"a"}, []string{"gone: a"}},
		{[]string{"a"}, []string{"b"}, []string{"gone: a", "left: b"}},
	} {
		if got := difference(c.before, c.after); !slices.Equal(got, c.want) {
			t.Errorf("from %q to %q: %q, expected %q", c.before, c.after, got, c.want)
		}
	}
}
