package datapath

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// The kernel that brought tcx links, which this package attaches with.
const floorMajor, floorMinor = 6, 6

func checkKernel() error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return fmt.Errorf("asking for the kernel's version: %w", err)
	}
	return checkRelease(unix.ByteSliceToString(uts.Release[:]))
}

func checkRelease(release string) error {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return fmt.Errorf("kernel release %q is not a version: sidegate needs Linux %d.%d or newer", release, floorMajor, floorMinor)
	}
	if major < floorMajor || major == floorMajor && minor < floorMinor {
		return fmt.Errorf("this kernel is Linux %s; sidegate needs %d.%d or newer (tcx links)", release, floorMajor, floorMinor)
	}
	return nil
}
