package config

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzParse looks for texts that crash the decoder, that make it say nothing, or that it lets through
// although the policy refuses them.
func FuzzParse(f *testing.F) {
	formats := []Format{YAML, JSON, TOML}
	for _, pattern := range []string{"default.yaml", "testdata/example.yaml", "testdata/broken/*.yaml", "testdata/broken/*.json", "testdata/broken/*.toml"} {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			f.Fatalf("no %s: %v", pattern, err)
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			if len(data) > 10_000 { // mutations of what is large are slow, and teach nothing more
				continue
			}
			for i := range formats {
				f.Add(data, uint8(i))
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, format uint8) {
		c, err := Parse("fuzz", data, formats[int(format)%len(formats)])
		if (c == nil) == (err == nil) {
			t.Fatalf("config %v, error %v", c, err)
		}
		if err != nil {
			lines := strings.Split(err.Error(), "\n")
			if len(lines) > maxErrors+1 {
				t.Fatalf("%d errors", len(lines))
			}
			for _, line := range lines {
				if !strings.HasPrefix(line, "fuzz:") || len(line) < len("fuzz: x") {
					t.Fatalf("an error without a place: %q in\n%s", line, err)
				}
			}
			return
		}
		if err := c.Policy.Validate(); err != nil {
			t.Fatal(err)
		}
		for i := range c.Policy.Rules {
			if at := c.RulePosition(i); at.Line < 1 || at.Line > strings.Count(string(data), "\n")+1 {
				t.Fatalf("%s is said to be on line %d", c.Policy.RuleLabel(i), at.Line)
			}
		}
		if _, err := json.Marshal(c); err != nil {
			t.Fatal(err)
		}
		c.Check() // whatever it finds
	})
}
