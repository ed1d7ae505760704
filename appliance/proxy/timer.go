package proxy

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// timer wakes a loop, once for each time that it is armed. The loop's mutex guards it.
type timer struct {
	fd    int
	armed bool
}

// newTimer makes one that is ready for the handler of a loop.
func newTimer(l *loop, h handler) (timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return timer{fd: -1}, fmt.Errorf("creating a timer: %w", err)
	}
	if _, err := l.add(fd, unix.EPOLLIN, h); err != nil {
		unix.Close(fd)
		return timer{fd: -1}, err
	}
	return timer{fd: fd}, nil
}

// arm has it ring after a time in nanoseconds, unless it is going to ring anyway: the first to ask must
// be the first to be due.
func (t *timer) arm(after int64) {
	if !t.armed {
		t.armed = true
		t.set(max(after, 1))
	}
}

// rang ends the ringing. It can be armed again.
func (t *timer) rang() {
	t.armed = false
	t.set(0)
}

func (t *timer) set(after int64) {
	unix.TimerfdSettime(t.fd, 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(after)}, nil)
}

func (t *timer) close() {
	if t.fd >= 0 {
		unix.Close(t.fd)
	}
}
