// Package appliance_test holds the promise about the layout: imports point one way.
package appliance_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// layout says which of our packages each package may import, besides policy, which everything may.
// A package that is not in it is an error: decide where it belongs before it grows roots.
var layout = map[string][]string{
	"sidegate": {"gateway", "config", "datapath", "netstate", "dns", "outbound", "proxy", "doctor", "sysctl", "firewall", "admin", "lab"},
	"gateway":  {"config", "datapath", "netstate", "dns", "outbound", "proxy", "advertise", "doctor", "sysctl", "firewall", "admin"},
	"doctor":   {"netstate", "sysctl", "firewall"},
	"proxy":    {"sniff", "outbound"},
	"config":   {"geodata"},

	"policy": {}, "geodata": {}, "datapath": {}, "netstate": {}, "dns": {}, "sniff": {}, "outbound": {},
	"advertise": {}, "sysctl": {}, "firewall": {}, "admin": {}, "lab": {},

	// no part of the product: they measure and try the built program
	"bench": {"lab", "admin"}, "endtoend": {"lab"},
}

// pure packages see nothing but the standard library, however indirectly.
var pure = []string{"policy", "sniff", "sysctl"}

// owners of a library are the only packages that import it: what it does is theirs alone.
var owners = map[string][]string{
	"github.com/cilium/ebpf":              {"datapath", "bench"},
	"github.com/google/nftables":          {"datapath", "firewall"},
	"github.com/knadh/koanf":              {"config"},
	"github.com/miekg/dns":                {"dns", "lab"},
	"github.com/quic-go/quic-go":          {"dns", "lab"},
	"github.com/prometheus/client_golang": {"admin"},
	"github.com/mdlayher/ndp":             {"advertise", "doctor"},
	"github.com/alecthomas/kong":          {"sidegate"},
}

const root = "sidegate/appliance/"

type goPackage struct {
	ImportPath string
	Standard   bool
	Imports    []string
	Deps       []string
}

func TestImportsPointOneWay(t *testing.T) {
	packages := list(t)
	found := 0
	for _, p := range packages {
		name, ours := strings.CutPrefix(p.ImportPath, root)
		if !ours {
			continue
		}
		found++
		name, _, _ = strings.Cut(name, "/") // a package's own sub-packages are bound like itself
		allowed, known := layout[name]
		if !known {
			t.Errorf("%s is not in the layout: add it, with what it may import", p.ImportPath)
			continue
		}
		for _, path := range p.Imports {
			if to, ours := strings.CutPrefix(path, root); ours {
				to, _, _ = strings.Cut(to, "/")
				if to != name && to != "policy" && !slices.Contains(allowed, to) {
					t.Errorf("%s imports %s; it may import %v and policy", p.ImportPath, path, allowed)
				}
				continue
			}
			for library, owner := range owners {
				if (path == library || strings.HasPrefix(path, library+"/")) && !slices.Contains(owner, name) {
					t.Errorf("%s imports %s, which only %v may", p.ImportPath, path, owner)
				}
			}
		}
		if slices.Contains(pure, name) {
			for _, dep := range p.Deps {
				if d := packages[dep]; d == nil || !d.Standard {
					t.Errorf("%s depends on %s; it must see only the standard library", p.ImportPath, dep)
				}
			}
		}
	}
	if found == 0 {
		t.Error("go list found none of our packages")
	}
}

// list returns every package that ours depend on, and ours. Broken ones (-e) are someone else's failure.
func list(t *testing.T) map[string]*goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Standard,Imports,Deps", "./...")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	packages := map[string]*goPackage{}
	for d := json.NewDecoder(out); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("reading the output of go list: %v", err)
		}
		packages[p.ImportPath] = &p
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("running go list: %v", err)
	}
	return packages
}
