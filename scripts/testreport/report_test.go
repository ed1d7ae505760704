package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// outcomes are packages that each end in one way that go test knows; want is what the report must say.
var outcomes = []struct {
	name   string
	source string
	want   []string // in the report
	counts string   // on the package's own line
}{
	{
		name:   "passes",
		source: `func TestA(t *testing.T) { t.Run("x", func(t *testing.T) {}); t.Run("y", func(t *testing.T) {}) }`,
		counts: "2 passed, 0 failed, 0 skipped",
	},
	{
		name:   "fails",
		source: `func TestA(t *testing.T) { t.Log("seen before"); t.Run("x", func(t *testing.T) { t.Error("1 is not 2") }); t.Run("y", func(t *testing.T) {}) }`,
		want:   []string{"seen before", "1 is not 2", "  fails TestA/x\n"},
		counts: "1 passed, 1 failed, 0 skipped",
	},
	{
		name:   "skips",
		source: `func TestA(t *testing.T) { t.Skip("needs root: run as root") }; func TestB(t *testing.T) { t.SkipNow() }; func TestC(t *testing.T) {}`,
		want:   []string{"  needs root: run as root\n      skips TestA\n", "  no reason given\n      skips TestB\n"},
		counts: "1 passed, 0 failed, 2 skipped",
	},
	{
		name:   "panics",
		source: `func TestA(t *testing.T) {}; func TestB(t *testing.T) { panic("out of cheese") }; func TestC(t *testing.T) {}`,
		want:   []string{"panic: out of cheese", "  panics TestB"},
		counts: "1 passed, 1 failed, 0 skipped",
	},
	{
		name:   "hangs",
		source: `func TestA(t *testing.T) { t.Run("x", func(t *testing.T) { select {} }) }`,
		want:   []string{"test timed out", "  hangs TestA/x"},
		counts: "0 passed, 1 failed, 0 skipped",
	},
	{
		name:   "exits",
		source: `func TestA(t *testing.T) { os.Exit(0) }`,
		want:   []string{"  exits TestA"},
		counts: "0 passed, 1 failed, 0 skipped",
	},
	{
		name:   "testmain",
		source: `func TestA(t *testing.T) {}; func TestMain(m *testing.M) { m.Run(); println("left a file behind"); os.Exit(3) }`,
		want:   []string{"left a file behind", "  testmain (failed outside its tests)"},
		counts: "1 passed, 1 failed, 0 skipped",
	},
	{
		name:   "broken",
		source: `func TestA(t *testing.T) { undefined() }`,
		want:   []string{"undefined: undefined", "  broken (does not build)"},
		counts: "0 passed, 1 failed, 0 skipped",
	},
}

func TestEveryWayToEnd(t *testing.T) {
	files := map[string]string{"untested/untested.go": "package untested\n"}
	for _, o := range outcomes {
		files[o.name+"/a_test.go"] = "package " + o.name + "\n" +
			"import (\"os\"; \"testing\")\nvar _ = os.Args\n" + o.source + "\n"
	}
	code, out := runIn(t, files, "-timeout=2s", "-vet=off", "./...")
	if code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	for _, o := range outcomes {
		for _, want := range o.want {
			if !strings.Contains(out, want) {
				t.Errorf("package %s: the report lacks %q", o.name, want)
			}
		}
		if !hasLine(out, "module/"+o.name, o.counts) {
			t.Errorf("package %s: no line with %q", o.name, o.counts)
		}
	}
	if want := "\n6 passed, 6 failed, 2 skipped\n"; !strings.HasSuffix(out, want) {
		t.Errorf("the report does not end with %q", want)
	}
	if want := "no test files: untested\n"; !strings.Contains(out, want) {
		t.Errorf("the report lacks %q", want)
	}
	if t.Failed() {
		t.Log(out)
	}
}

func TestExitCode(t *testing.T) {
	pass := "package a\nimport \"testing\"\nfunc TestA(t *testing.T) {}\n"
	skip := "package a\nimport \"testing\"\nfunc TestA(t *testing.T) { t.Skip(\"no\") }\n"
	cases := []struct {
		name  string
		files map[string]string
		args  []string
		code  int
		want  string
	}{
		{"all pass", map[string]string{"a_test.go": pass}, []string{"./..."}, 0, "\n1 passed, 0 failed, 0 skipped\n"},
		{"only skipped", map[string]string{"a_test.go": skip}, []string{"./..."}, 1, "no test ran\n0 passed, 0 failed, 1 skipped\n"},
		{"nothing selected", map[string]string{"a_test.go": pass}, []string{"-run=^$", "./..."}, 1, "no test ran\n0 passed, 0 failed, 0 skipped\n"},
		{"no test files", map[string]string{"a.go": "package a\n"}, []string{"./..."}, 1, "no test ran\n0 passed, 0 failed, 0 skipped\n"},
		{"bad flag", map[string]string{"a_test.go": pass}, []string{"-nonsense", "./..."}, 1, "flag provided but not defined"},
		{"no such package", map[string]string{"a_test.go": pass}, []string{"./b"}, 1, "0 passed, 1 failed, 0 skipped\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			code, out := runIn(t, c.files, c.args...)
			if code != c.code || !strings.Contains(out, c.want) {
				t.Errorf("exit code %d, want %d and %q:\n%s", code, c.code, c.want, out)
			}
		})
	}
}

// runIn runs the program over a module made of files.
func runIn(t *testing.T, files map[string]string, args ...string) (code int, out string) {
	t.Helper()
	t.Setenv("GOFLAGS", "")
	dir := t.TempDir()
	files["go.mod"] = "module module\n\ngo 1.26\n"
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	code, err := run(context.Background(), dir, args, &b)
	if err != nil {
		t.Log(err)
	}
	return code, b.String()
}

func hasLine(text string, words ...string) bool {
	for line := range strings.Lines(text) {
		all := true
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			return true
		}
	}
	return false
}
