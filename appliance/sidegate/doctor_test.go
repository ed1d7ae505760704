package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"sidegate/appliance/doctor"
)

// TestFixAsks: doctor --fix does what it was told yes to, one by one, and an end of its input is no yes.
func TestFixAsks(t *testing.T) {
	for _, test := range []struct {
		answers string
		yes     bool
		fails   string // the repair that fails
		want    []string
	}{
		{answers: "y\ny\ny\n", want: []string{"a", "b", "c"}},
		{answers: "n\nY\nno\n", want: []string{"b"}},
		{answers: "\n  y  \nYes\n", want: []string{"b", "c"}},
		{answers: "yesterday\nyy\ny n\n"},
		{answers: "y", want: []string{"a"}},
		{answers: ""},
		{yes: true, want: []string{"a", "b", "c"}},
		{yes: true, fails: "b", want: []string{"a"}},
	} {
		t.Run(fmt.Sprintf("%q %v %s", test.answers, test.yes, test.fails), func(t *testing.T) {
			var applied []string
			findings := []doctor.Finding{{Object: "it takes a person"}}
			for _, name := range []string{"a", "b", "c"} {
				findings = append(findings, doctor.Finding{Object: name, Repair: &doctor.Repair{
					Does: "set " + name,
					Apply: func(context.Context) error {
						if name == test.fails {
							return errors.New("read-only")
						}
						applied = append(applied, name)
						return nil
					},
				}})
			}
			var out strings.Builder
			done, err := (&doctorCmd{Yes: test.yes}).repair(t.Context(), &env{stdin: strings.NewReader(test.answers), stdout: &out, stderr: io.Discard}, findings)
			if !slices.Equal(applied, test.want) || len(done) != len(test.want) {
				t.Errorf("applied %v and said %d, want %v", applied, len(done), test.want)
			}
			if asked := strings.Count(out.String(), "? [y/N] "); !test.yes && asked != 3 || test.yes && asked != 0 {
				t.Errorf("asked %d times:\n%s", asked, out.String())
			}
			if test.fails != "" != (err != nil) || err != nil && err.Error() != "repairing b (set b): read-only" {
				t.Errorf("error %v", err)
			}
		})
	}
}
