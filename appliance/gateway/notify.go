package gateway

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// notifier tells systemd how the daemon fares (sd_notify(3)). Where systemd does not listen, it does nothing.
type notifier struct{ log *slog.Logger }

func (n notifier) send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Debug("notifying systemd", "error", err)
	}
}

func (n notifier) ready(status string) {
	n.send(daemon.SdNotifyReady + "\nSTATUS=" + status)
}

// reloading has the time that Type=notify-reload wants: CLOCK_MONOTONIC in microseconds.
func (n notifier) reloading() {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		n.log.Debug("reading the monotonic clock", "error", err)
	}
	n.send(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, ts.Nano()/1000))
}

func (n notifier) status(text string) { n.send("STATUS=" + text) }
func (n notifier) stopping()          { n.send(daemon.SdNotifyStopping) }
func (n notifier) alive()             { n.send(daemon.SdNotifyWatchdog) }

// watchdog is how often systemd wants to hear that we are alive, with a margin; 0: never.
func (n notifier) watchdog() time.Duration {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn("the watchdog that systemd asks for cannot be served", "error", err)
		return 0
	}
	return interval / 3
}
