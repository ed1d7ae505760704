package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// processorTime is what all threads of a process have used, also those that ended: the clock that
// clock_getcpuclockid(3) names.
func processorTime(pid int) (time.Duration, error) {
	const scheduler = 2 // CPUCLOCK_SCHED of the kernel's posix-timers.h: in ns, not in ticks
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|scheduler, &t); err != nil {
		return 0, fmt.Errorf("reading the processor time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// peakMemory is the largest resident set that a process had, in MiB (VmHWM of proc(5)).
func peakMemory(pid int) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("reading the peak memory: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if value, found := strings.CutPrefix(lines.Text(), "VmHWM:"); found {
			var kib float64
			if _, err := fmt.Sscan(value, &kib); err != nil {
				return 0, fmt.Errorf("reading the peak memory: %w", err)
			}
			return kib / 1024, nil
		}
	}
	return 0, fmt.Errorf("reading the peak memory: the kernel does not tell VmHWM of process %d", pid)
}
