package datapath

import (
	"testing"
	"time"

	"sidegate/appliance/policy"
)

func TestClock(t *testing.T) {
	for _, hertz := range frequencies {
		for _, up := range []time.Duration{2 * time.Second, time.Minute, 400 * time.Second, 1000 * time.Hour} {
			jiffies := 1<<32 - 300*hertz + uint64(up.Seconds())*hertz
			if c := clockAt(jiffies, up+700*time.Millisecond); c.hertz != hertz {
				t.Errorf("%d Hz, up for %v: %d", hertz, up, c.hertz)
			}
		}
	}
	if d := (clock{250}).since(1000, 250); d != 3*time.Second {
		t.Errorf("750 ticks of 250 Hz are %v", d)
	}
	if d := (clock{250}).since(1, 2); d != 0 {
		t.Errorf("a packet from after now is %v old", d)
	}
}

// TestClockOfThisKernel compares the clock with time that really passes.
func TestClockOfThisKernel(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}})
	// Each reading lies between two of a clock that is known.
	type reading struct {
		before, after time.Time
		jiffies       uint64
	}
	read := func() reading {
		before := time.Now()
		now, err := d.generation.now()
		if err != nil {
			t.Fatal(err)
		}
		return reading{before, time.Now(), now}
	}
	first := read()
	last := read()
	for last.before.Sub(first.after) < 500*time.Millisecond {
		last = read()
	}
	told := d.generation.clock.since(last.jiffies, first.jiffies)
	const tick = 10 * time.Millisecond // the longest that there is
	least, most := last.before.Sub(first.after)-2*tick, last.after.Sub(first.before)+2*tick
	if told < least || told > most {
		t.Errorf("the clock at %d Hz says %v, where %v to %v passed", d.generation.clock.hertz, told, least, most)
	}
}
