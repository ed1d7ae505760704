package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killInside ends every process whose network is one of the named namespaces, except this one, and waits until they
// are gone. Finding them by namespace catches those that left their process group.
func killInside(names []string) error {
	inodes := inodesOf(names)
	return killAll(func() ([]int, error) { return processesIn(inodes) })
}

// killGroup does the same with the members of a process group that are in one namespace. The namespace tells them from
// strangers that have got the number since.
func killGroup(group int, name string) error {
	inodes := inodesOf([]string{name})
	return killAll(func() ([]int, error) {
		pids, err := processesIn(inodes)
		return slices.DeleteFunc(pids, func(pid int) bool {
			of, err := unix.Getpgid(pid)
			return err != nil || of != group
		}), err
	})
}

func killAll(find func() ([]int, error)) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		pids, err := find()
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not end", pids)
		}
		for _, pid := range pids {
			// A process that ended in between is what is wanted.
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("ending process %d: %w", pid, err)
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func inodesOf(names []string) map[uint64]bool {
	inodes := make(map[uint64]bool)
	for _, name := range names {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(namesRoot, name), &st) == nil {
			inodes[st.Ino] = true
		}
	}
	return inodes
}

// processesIn lists the processes in the namespaces, without this one.
func processesIn(inodes map[uint64]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		var st unix.Stat_t
		// Unreadable: ended, a zombie, or a kernel thread. None of them is in a lab.
		if unix.Stat(filepath.Join("/proc", e.Name(), "ns/net"), &st) == nil && inodes[st.Ino] {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
