package gateway

import "golang.org/x/sys/unix"

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

// lacking are those that this process does not have.
func lacking() (names []string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if unix.Capget(&header, &has[0]) != nil {
		return nil
	}
	for _, c := range capabilities {
		if has[c.number/32].Effective&(1<<(c.number%32)) == 0 {
			names = append(names, c.name)
		}
	}
	return names
}
