package config

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what the broken configs say into their .want files, to be read by a person")

// TestBroken loads every file of testdata/broken. What it says must be its .want file to the letter:
// file, line, object and fix are what a user has when a gateway refuses to start.
func TestBroken(t *testing.T) {
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	t.Chdir("testdata/broken")
	files, err := filepath.Glob("*.*")
	if err != nil {
		t.Fatal(err)
	}
	form := regexp.MustCompile(`^(\S+):[1-9]\d*: .+$`)
	tried := 0
	for _, file := range files {
		if strings.HasSuffix(file, ".want") || strings.HasSuffix(file, ".pass") {
			continue
		}
		tried++
		t.Run(file, func(t *testing.T) {
			_, err := Load(file)
			if err == nil {
				t.Fatal("it loads")
			}
			got := err.Error() + "\n"
			for line := range strings.Lines(got) {
				if m := form.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m == nil || m[1] != file {
					t.Errorf("not of the form FILE:LINE: …: %s", line)
				}
			}
			if strings.Contains(got, "hunter") {
				t.Errorf("a password is shown:\n%s", got)
			}
			if *update {
				if err := os.WriteFile(file+".want", []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file + ".want")
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("it says\n%sbut should say\n%s", got, want)
			}
		})
	}
	if tried < 30 {
		t.Errorf("only %d broken configs were found", tried)
	}
}
