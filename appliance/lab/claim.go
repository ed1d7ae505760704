package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// stateRoot holds one directory for each lab. The owner keeps a lock on it, which the kernel drops with the process,
// however that ends: a directory without a lock is the trace of a crash. (A process id in a name cannot tell: ids are
// reused, and differ between pid namespaces that share /run.)
const (
	stateRoot = "/run/sidegate-lab"
	namesRoot = "/run/netns"
)

// claim is a lab's name, its directory and the lock on it.
type claim struct {
	id   string
	path string
	lock *os.File
}

// newClaim first removes what crashed labs left, then takes a free id.
func newClaim() (*claim, error) {
	if err := os.MkdirAll(stateRoot, 0o755); err != nil {
		return nil, fmt.Errorf("creating the labs' directory: %w", err)
	}
	// One lock over all keeps a sweep from meeting a directory that exists but is not locked yet.
	root, err := lockDirectory(stateRoot, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := sweep(); err != nil {
		return nil, err
	}
	for n := 1; ; n++ {
		id := strconv.Itoa(os.Getpid())
		if n > 1 {
			id += "." + strconv.Itoa(n)
		}
		path := filepath.Join(stateRoot, id)
		err := os.Mkdir(path, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("creating the lab's directory: %w", err)
		}
		lock, err := lockDirectory(path, unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			return nil, err
		}
		return &claim{id: id, path: path, lock: lock}, nil
	}
}

func (c *claim) release() error {
	err := removeState(c.path)
	return errors.Join(err, c.lock.Close())
}

// Cleanup removes the namespaces, processes, mounts and files of labs whose process has died. New does the same.
func Cleanup() error {
	root, err := lockDirectory(stateRoot, unix.LOCK_EX)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	return sweep()
}

// sweep needs the lock on stateRoot.
func sweep() error {
	entries, err := os.ReadDir(stateRoot)
	if err != nil {
		return fmt.Errorf("looking for crashed labs: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(stateRoot, e.Name())
		lock, err := lockDirectory(path, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
			continue // alive, or closed this moment
		}
		if err == nil {
			err = errors.Join(removeLab(e.Name()), lock.Close())
		}
		if err != nil {
			return fmt.Errorf("removing the crashed lab %s: %w", e.Name(), err)
		}
	}
	return sweepNames()
}

// labName matches the namespaces of labs, and their ids.
var labName = regexp.MustCompile(`^sg-(\d+(?:\.\d+)?)-`)

// sweepNames removes namespaces whose lab has no directory, as after a Close that failed half-way: the directory is
// made before them and removed after them.
func sweepNames() error {
	entries, err := os.ReadDir(namesRoot)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("looking for the namespaces of crashed labs: %w", err)
	}
	for _, e := range entries {
		m := labName.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(stateRoot, m[1])); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := removeLab(m[1]); err != nil {
			return fmt.Errorf("removing the namespaces of lab %s: %w", m[1], err)
		}
	}
	return nil
}

func removeLab(id string) error {
	paths, err := filepath.Glob(filepath.Join(namesRoot, "sg-"+id+"-*"))
	if err != nil {
		return err
	}
	var names []string
	for _, p := range paths {
		names = append(names, filepath.Base(p))
	}
	errs := []error{killInside(names)}
	for _, name := range names {
		if err := netns.DeleteNamed(name); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("removing network namespace %s: %w", name, err))
			continue
		}
		// EINVAL: the owner died between creating the file and mounting on it.
		if err := os.Remove(filepath.Join(namesRoot, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, removeState(filepath.Join(stateRoot, id)))
	return errors.Join(errs...)
}

// removeState unmounts what is mounted below a lab's directory and removes it.
func removeState(path string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("reading the mounts: %w", err)
	}
	var below []string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], path+"/") {
			below = append(below, f[4])
		}
	}
	slices.Reverse(below)
	for _, m := range below {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmounting %s: %w", m, err)
		}
	}
	return os.RemoveAll(path)
}

func lockDirectory(path string, how int) (*os.File, error) {
	d, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), how); err != nil {
		d.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return d, nil
}
