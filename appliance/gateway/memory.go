package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// DefaultDataDir is where a gateway keeps what it has found out: systemd's StateDirectory= if there is one.
func DefaultDataDir() string {
	if dir := os.Getenv("STATE_DIRECTORY"); dir != "" {
		return dir
	}
	return "/var/lib/sidegate"
}

// finding is that the network behind a router drops connections of which it sees one half.
type finding struct {
	Router netip.Addr `json:"router"` // the default route's, when it was found
	Since  time.Time  `json:"since"`
	Seen   string     `json:"seen"` // the evidence, for people
}

// memory is the file that keeps a finding over restarts and reboots.
type memory struct{ path string }

func newMemory(dir string) memory { return memory{filepath.Join(dir, "return-path.json")} }

// recall returns what is remembered of a router; nil if nothing is. Another router is another network.
func (m memory) recall(router netip.Addr) (*finding, error) {
	text, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("recalling the return path: %w", err)
	}
	var f finding
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, fmt.Errorf("recalling the return path: %s: %w; remove the file", m.path, err)
	}
	if f.Router != router {
		return nil, nil
	}
	return &f, nil
}

func (m memory) keep(f finding) error {
	text, err := json.MarshalIndent(f, "", "  ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(m.path), 0o755)
	}
	if err == nil {
		err = os.WriteFile(m.path+".new", append(text, '\n'), 0o644)
	}
	if err == nil {
		err = os.Rename(m.path+".new", m.path)
	}
	if err != nil {
		return fmt.Errorf("remembering the return path: %w", err)
	}
	return nil
}
