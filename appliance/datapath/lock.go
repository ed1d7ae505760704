package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// lockDir is root's alone, so that nobody else can keep the gateway from starting.
const lockDir = "/run/sidegate"

// lock keeps a second daemon out of the network namespace, which all that this package owns belongs to. The kernel
// releases it when the process ends, however it ends.
type lock struct{ file *os.File }

func lockNamespace() (*lock, error) {
	if err := os.MkdirAll(lockDir, 0o755); err != nil {
		return nil, fmt.Errorf("locking the network namespace: %w", err)
	}
	path := filepath.Join(lockDir, fmt.Sprintf("netns-%d.lock", threadNamespace()))
	removeStale(path)
	for {
		file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("locking the network namespace: %w", err)
		}
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			file.Close()
			return nil, errors.New("another sidegate runs in this network namespace: stop it first")
		}
		if err != nil {
			file.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		// Its owner may have removed the file between our opening and locking it.
		if held, named := stat(file.Stat), stat(func() (os.FileInfo, error) { return os.Stat(path) }); held != nil && named != nil && os.SameFile(held, named) {
			return &lock{file}, nil
		}
		file.Close()
	}
}

// removeStale takes away what daemons left that were killed, in namespaces that may be gone.
func removeStale(ours string) {
	paths, _ := filepath.Glob(filepath.Join(lockDir, "netns-*.lock")) // the pattern is well-formed
	for _, path := range paths {
		if path == ours {
			continue
		}
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.Remove(path)
		}
		file.Close()
	}
}

func stat(of func() (os.FileInfo, error)) os.FileInfo {
	info, err := of()
	if err != nil {
		return nil
	}
	return info
}

// Close removes the file first: who opens it later makes another.
func (l *lock) Close() error {
	return errors.Join(os.Remove(l.file.Name()), l.file.Close())
}
