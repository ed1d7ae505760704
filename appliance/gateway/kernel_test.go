package gateway_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// network is everything of a host's network that a gateway could leave behind, as text.
func network(t *testing.T, h *lab.Host) string {
	t.Helper()
	var all strings.Builder
	for _, what := range [][]string{
		{"rule"}, {"-6", "rule"}, {"route", "show", "table", "all"}, {"-6", "route", "show", "table", "all"}, {"-o", "link"}, {"-o", "address"},
	} {
		out, err := h.Exec(t.Context(), "ip", what...)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(out), "\n")
		for i, line := range lines { // lifetimes run down
			lines[i] = strings.Join(strings.Fields(line), " ")
		}
		slices.Sort(lines)
		fmt.Fprintf(&all, "ip %s\n%s\n", strings.Join(what, " "), strings.Join(lines, "\n"))
	}
	return all.String()
}

// object is a BPF object of the kernel by its id.
type object struct {
	kind string // as fdinfo calls the id
	id   uint32
}

// bpfObjects are those that a process has open: maps, programs and links.
func bpfObjects(t *testing.T, pid int) []object {
	t.Helper()
	var found []object
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil || len(infos) == 0 {
		t.Fatalf("process %d has no descriptors: %v", pid, err)
	}
	for _, path := range infos {
		info, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(info)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			if _, known := getFDByID[key]; known {
				o := object{kind: key}
				if _, err := fmt.Sscan(value, &o.id); err != nil {
					t.Fatal(err)
				}
				if !slices.Contains(found, o) {
					found = append(found, o)
				}
				break // a link's info names its program too
			}
		}
	}
	return found
}

// getFDByID are the commands of bpf(2) that open an object by its id.
var getFDByID = map[string]uintptr{"prog_id": unix.BPF_PROG_GET_FD_BY_ID, "map_id": unix.BPF_MAP_GET_FD_BY_ID, "link_id": unix.BPF_LINK_GET_FD_BY_ID}

// alive reports whether the kernel still has the object.
func (o object) alive() (bool, error) {
	attr := struct{ id, next, flags uint32 }{id: o.id}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, getFDByID[o.kind], uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	switch errno {
	case 0:
		return true, unix.Close(int(fd))
	case unix.ENOENT:
		return false, nil
	}
	return false, fmt.Errorf("asking for %s %d: %w", o.kind, o.id, errno)
}

// awaitGone waits until the kernel has freed all: it does so when nobody runs in them any more.
func awaitGone(t *testing.T, objects []object) {
	t.Helper()
	await(t, "the BPF objects to be freed", func() error {
		for _, o := range objects {
			if alive, err := o.alive(); err != nil || alive {
				return fmt.Errorf("%s %d is still there (%v)", o.kind, o.id, err)
			}
		}
		return nil
	})
}

// descriptors counts the open files of a process.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
