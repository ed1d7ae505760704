package datapath

import (
	"path"
	"strings"
	"testing"

	"sidegate/appliance/policy"
)

// The hashes are an agreement with the programs, which compute them of what they find in the kernel: the expected numbers are
// those of the published FNV-1a test vectors, and of another implementation. A different order of the path's components, a slash
// too many or another constant makes every rule on processes match nothing.
func TestProcessHashes(t *testing.T) {
	for _, test := range []struct {
		process policy.Process
		want    gatewayProcess
	}{
		{policy.Process{}, gatewayProcess{}},
		{policy.Process{Name: "a", Unit: "foobar"}, gatewayProcess{Name: 0xaf63dc4c8601ec8c, Unit: 0x85944171f73967e8}},
		{
			policy.Process{Name: "curl", Path: "/usr/bin/curl", Unit: "transmission.service"},
			gatewayProcess{Name: 0x4c968a90ace3649b, Path: 0x3d5dd0e2815b6449, Unit: 0x1c33b3d2cab0f3e0},
		},
		{policy.Process{Path: "/init"}, gatewayProcess{Path: 0x6a72e88f82511bf4}},
	} {
		if got := processOf(test.process); got != test.want {
			t.Errorf("%+v: %#x, want %#x", test.process, got, test.want)
		}
	}
}

// dentry is a directory entry as the kernel has it: a name, and the directory that holds it. The root is its own parent.
type dentry struct {
	name   string
	parent *dentry
}

func dentryOf(p string) *dentry {
	if p == "/" {
		root := &dentry{name: "/"}
		root.parent = root
		return root
	}
	return &dentry{path.Base(p), dentryOf(path.Dir(p))}
}

// The hash of a path is what a walk from the file's entry to the root sums up, byte by byte: it never has the path in one piece.
func TestPathHashIsTheWalk(t *testing.T) {
	walk := func(d *dentry) uint64 {
		hash := uint64(0xcbf29ce484222325)
		add := func(c byte) { hash = (hash ^ uint64(c)) * 0x100000001b3 }
		for ; d != d.parent; d = d.parent {
			for i := range len(d.name) {
				add(d.name[i])
			}
			add('/')
		}
		return hash
	}
	for _, p := range []string{"/init", "/usr/bin/curl", "/bin/usr/curl", "/usr/bin", "/bin", "/opt/a b/ü", "/" + strings.Repeat("d/", 40) + "x"} {
		if got, want := hashPath(p), walk(dentryOf(p)); got != want {
			t.Errorf("%s: %#x, the walk says %#x", p, got, want)
		}
	}
}

// Two texts with one hash would be one process to the programs, and a text whose hash is zero none: such a policy is refused with
// the rule's name, and what was in force stays. The same texts in different fields do not meet, and one text twice is no collision.
func TestProcessesWithOneHash(t *testing.T) {
	d := opened(t)
	// Known collisions of 64-bit FNV-1a, and a text whose hash is zero.
	const one, other, zero = "8yn0iYCKYHlIj4-BwPqk", "GReLUrM4wMqfg9yzV3KQ", "77kepQFQ8Kl"
	for _, test := range []struct {
		rules []policy.Rule
		want  string // part of the error; empty: none
	}{
		{
			[]policy.Rule{rule(t, "first", "block", "process_name", one), rule(t, "second", "block", "!process_name", other)},
			`rule "second": process_name "` + other + `" has the same 64-bit hash as "` + one + `"`,
		},
		{[]policy.Rule{rule(t, "", "block", "unit", one), rule(t, "", "block", "unit", other)}, `rule #2: unit "` + other + `" has the same 64-bit hash`},
		{[]policy.Rule{rule(t, "none", "block", "unit", zero)}, `rule "none": the 64-bit hash of unit "` + zero + `" is zero`},
		{[]policy.Rule{rule(t, "", "block", "process_name", one, "process_name", one, "unit", other, "process_path", "/"+zero)}, ""},
	} {
		err := d.Apply(t.Context(), Desired{Policy: &policy.Policy{Default: "direct", Rules: test.rules}})
		switch {
		case test.want == "" && err != nil:
			t.Errorf("refused: %v", err)
		case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%v\nwant one line with %s", err, test.want)
		}
	}
}
