package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ErrNoCgroup is why there is no Cgroup on this machine.
var ErrNoCgroup = errors.New("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")

// Cgroup is a directory of cgroup v2, alone or beside version 1, with those that its user makes in it.
type Cgroup string

// NewCgroup makes one, with a name that begins or, before and after a star, goes as the pattern says (os.MkdirTemp).
func NewCgroup(pattern string) (Cgroup, error) {
	root, err := cgroupHierarchy()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(root, pattern)
	if err != nil {
		return "", fmt.Errorf("making a cgroup: %w", err)
	}
	return Cgroup(dir), os.Chmod(dir, 0o755) // as systemd makes them: a gateway that is not root opens it
}

func cgroupHierarchy() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("looking for cgroup v2: %w", err)
	}
	for line := range strings.Lines(string(mounts)) {
		place, kind, _ := strings.Cut(line, " - ") // proc_pid_mountinfo(5)
		if fields := strings.Fields(place); strings.HasPrefix(kind, "cgroup2 ") && len(fields) > 4 {
			return fields[4], nil
		}
	}
	return "", ErrNoCgroup
}

// Enter moves this process into the cgroup: sockets that it opens from now on are of it. leave moves it back.
func (c Cgroup) Enter() (leave func() error, err error) {
	home, err := ownCgroup()
	if err != nil {
		return nil, err
	}
	return home.enter, c.enter()
}

func (c Cgroup) enter() error {
	if err := os.WriteFile(filepath.Join(string(c), "cgroup.procs"), []byte("0"), 0); err != nil { // the writer
		return fmt.Errorf("entering a cgroup: %w", err)
	}
	return nil
}

// ownCgroup is the one that this process is in.
func ownCgroup() (Cgroup, error) {
	root, err := cgroupHierarchy()
	if err != nil {
		return "", err
	}
	memberships, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("asking for this process's cgroup: %w", err)
	}
	for line := range strings.Lines(string(memberships)) {
		if path, found := strings.CutPrefix(strings.TrimSpace(line), "0::"); found { // cgroups(7)
			return Cgroup(filepath.Join(root, path)), nil
		}
	}
	return "", ErrNoCgroup
}

// Close removes the cgroup and those in it, when nobody is in them any more: the kernel counts an ended process for a moment longer.
func (c Cgroup) Close() error {
	return Wait(context.Background(), "the cgroup to be empty", func() error { return removeCgroup(string(c)) })
}

func removeCgroup(dir string) error {
	below, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range below {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(dir)
}
