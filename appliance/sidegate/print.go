package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"sidegate/appliance/policy"
)

// json prints a value for programs: indented, because people read it too.
func (e *env) json(value any) error {
	out := json.NewEncoder(e.stdout)
	out.SetIndent("", "  ")
	out.SetEscapeHTML(false)
	if err := out.Encode(value); err != nil {
		return fmt.Errorf("printing: %w", err)
	}
	return nil
}

// table prints columns for people.
type table struct {
	e      *env
	header []any
	rows   [][]any
}

// table begins one. A single empty heading stands for none; a first one that is empty indents.
func (e *env) table(header ...string) *table {
	t := &table{e: e}
	if len(header) == 1 && header[0] == "" {
		return t
	}
	for _, h := range header {
		t.header = append(t.header, h)
	}
	return t
}

func (t *table) row(cells ...any) { t.rows = append(t.rows, cells) }

func (t *table) print() {
	w := tabwriter.NewWriter(t.e.stdout, 0, 0, 2, ' ', tabwriter.StripEscape)
	line := func(cells []any) {
		for i, c := range cells {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, c)
		}
		fmt.Fprintln(w)
	}
	if t.header != nil {
		line(t.header)
	}
	for _, r := range t.rows {
		line(r)
	}
	w.Flush()
}

// section prints a table with rows after an empty line, and one without not at all.
func (t *table) section() {
	if len(t.rows) > 0 {
		fmt.Fprintln(t.e.stdout)
		t.print()
	}
}

// errorLines are the lines of an error, none for nil.
func errorLines(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func decided(verdict, outbound string, translated bool) string {
	if verdict == policy.Proxy.String() {
		return "proxy " + outbound
	}
	return direct(verdict, translated)
}

// direct is a verdict with what a direct flow is called whose replies come back through the gateway.
func direct(verdict string, translated bool) string {
	if translated {
		return verdict + ", translated"
	}
	return verdict
}

// quoteName quotes the name of a rule, but not the number of one without.
func quoteName(name string) string {
	if strings.HasPrefix(name, "#") {
		return name
	}
	return fmt.Sprintf("%q", name)
}

func ruleText(name string, implicit bool) string {
	if implicit {
		return name + " (implicit)"
	}
	return name
}

// duration is short: two units at most.
func duration(d time.Duration) string {
	switch {
	case d < time.Second:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

func percent(n, of uint32) string {
	if of == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(n)/float64(of))
}
