package gateway

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// capabilities are all that the gateway needs beside a user who owns its files (capabilities(7)).
var capabilities = []struct {
	name   string
	number uint
}{
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN},               // routes, nftables, transparent sockets, programs where packets pass
	{"CAP_NET_RAW", unix.CAP_NET_RAW},                   // router advertisements
	{"CAP_NET_BIND_SERVICE", unix.CAP_NET_BIND_SERVICE}, // port 53
	{"CAP_BPF", unix.CAP_BPF},                           // maps and programs
	{"CAP_PERFMON", unix.CAP_PERFMON},                   // programs that read the kernel's memory: who opened a socket
}

// Capabilities are their names, which images/appliance.json has too.
func Capabilities() (names []string) {
	for _, c := range capabilities {
		names = append(names, c.name)
	}
	return names
}

// lacking says what this process may not do, if that can be why the kernel refused something.
func lacking(err error) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if unix.Capget(&header, &has[0]) != nil {
		return err
	}
	var missing []string
	for _, c := range capabilities {
		if has[c.number/32].Effective&(1<<(c.number%32)) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w; it lacks %s: start it with that, or as root", err, strings.Join(missing, ", "))
	}
	if status, _ := os.ReadFile("/proc/thread-self/status"); errors.Is(err, unix.EPERM) && strings.Contains(string(status), "\nSeccomp:\t2\n") {
		return fmt.Errorf("%w; it has the capabilities that it needs, but also a filter of system calls (seccomp), which must have bpf(2)", err)
	}
	return err
}
