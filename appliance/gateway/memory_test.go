package gateway

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMemory: a finding is of one router, and a file that is broken is named with the fix.
func TestMemory(t *testing.T) {
	m := newMemory(filepath.Join(t.TempDir(), "not", "there", "yet"))
	one, other := netip.MustParseAddr("192.168.0.1"), netip.MustParseAddr("192.168.1.1")
	if f, err := m.recall(one); f != nil || err != nil {
		t.Fatalf("before anything was kept: %v, %v", f, err)
	}
	kept := finding{Router: one, Since: time.Now().Round(0), Seen: "something"}
	if err := m.keep(kept); err != nil {
		t.Fatal(err)
	}
	if f, err := m.recall(one); err != nil || f == nil || f.Router != one || f.Seen != kept.Seen || !f.Since.Equal(kept.Since) {
		t.Errorf("recalled %+v, %v; kept %+v", f, err, kept)
	}
	if f, err := m.recall(other); f != nil || err != nil {
		t.Errorf("of another router: %v, %v", f, err)
	}
	if err := os.WriteFile(m.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.recall(one); err == nil || !strings.Contains(err.Error(), "remove the file") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a broken file: %v", err)
	}
}

// TestMemoryThatCannotBeKept: the error is one line that names the file.
func TestMemoryThatCannotBeKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := newMemory(filepath.Join(file, "dir")).keep(finding{})
	if err == nil || !strings.Contains(err.Error(), file) || strings.Contains(err.Error(), "\n") {
		t.Errorf("it is kept below a file: %v", err)
	}
}
