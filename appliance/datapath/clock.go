package datapath

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// clock reads the flow table's times, which are jiffies: the one clock that a program reads without a call.
type clock struct{ hertz uint64 }

// The values of the kernel's CONFIG_HZ.
var frequencies = [...]uint64{100, 250, 300, 1000}

// clockAt finds out how fast the kernel's jiffies count, which no interface tells: they begin 300 seconds before
// their lower half overflows (INITIAL_JIFFIES, include/linux/jiffies.h), so that each frequency means another
// uptime, and one is right.
func clockAt(jiffies uint64, uptime time.Duration) clock {
	var best clock
	var least time.Duration
	for _, hertz := range frequencies {
		c := clock{hertz}
		wrong := (c.since(jiffies, 1<<32-300*hertz) - uptime).Abs()
		if best.hertz == 0 || wrong < least {
			best, least = c, wrong
		}
	}
	return best
}

// since is the time from one reading to another; a packet may have come after the later one was taken.
func (c clock) since(now, then uint64) time.Duration {
	if c.hertz == 0 || now < then {
		return 0
	}
	ticks := now - then
	return time.Duration(ticks/c.hertz)*time.Second + time.Duration(ticks%c.hertz)*time.Second/time.Duration(c.hertz)
}

func uptime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("reading the clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
