// Licences lists the licence of every Go module whose code the given packages link or test with, and
// fails on one that is not permissive or cannot be recognised.
//
//	go run ./scripts/licences [packages]        default ./...
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
)

func main() {
	patterns := os.Args[1:]
	if len(patterns) == 0 {
		patterns = []string{"./..."}
	}
	modules, err := linked(patterns)
	if err != nil {
		fmt.Fprintln(os.Stderr, "licences:", err)
		os.Exit(2)
	}
	refused := 0
	for _, m := range modules {
		verdict := judge(m.Dir)
		mark := "ok  "
		if !verdict.permissive {
			mark = "FAIL"
			refused++
		}
		fmt.Printf("%s  %-50s %-45s %s\n", mark, m.Path, m.Version, verdict)
	}
	if refused > 0 {
		fmt.Fprintf(os.Stderr, "licences: %d of %d modules are not under a permissive licence that this check knows\n", refused, len(modules))
		os.Exit(1)
	}
}

type module struct {
	Path, Version, Dir string
	Main               bool
}

// linked returns the modules that the packages and their tests are built from, without the main one.
func linked(patterns []string) ([]module, error) {
	list := exec.Command("go", append([]string{"list", "-deps", "-test", "-json=Module"}, patterns...)...)
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("running go list: %w", err)
	}
	seen := map[string]module{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct{ Module *module }
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("reading the output of go list: %w", err)
		}
		if p.Module != nil && !p.Module.Main {
			seen[p.Module.Path] = *p.Module
		}
	}
	modules := make([]module, 0, len(seen))
	for _, m := range seen {
		modules = append(modules, m)
	}
	sort.Slice(modules, func(i, j int) bool { return modules[i].Path < modules[j].Path })
	return modules, nil
}

// A verdict is what the licence files of one module say.
type verdict struct {
	names      []string // as SPDX names them, or why there is none
	permissive bool
}

func (v verdict) String() string { return strings.Join(v.names, ", ") }

// judge reads every licence file at the root of a module: one that is not permissive spoils the rest.
func judge(dir string) verdict {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return verdict{names: []string{err.Error()}}
	}
	v := verdict{permissive: true}
	for _, e := range entries {
		name := strings.ToUpper(e.Name())
		if e.IsDir() || !strings.HasPrefix(name, "LICENSE") && !strings.HasPrefix(name, "LICENCE") &&
			!strings.HasPrefix(name, "COPYING") && !strings.HasPrefix(name, "UNLICENSE") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return verdict{names: []string{err.Error()}}
		}
		names, permissive := classify(string(text))
		v.names = append(v.names, names...)
		v.permissive = v.permissive && permissive
	}
	if len(v.names) == 0 {
		return verdict{names: []string{"no licence file"}}
	}
	return v
}
