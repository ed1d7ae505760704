package gateway

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// parameter is a kernel setting that a side router depends on.
type parameter struct {
	name, want, why string
}

// parameters are checked at start and in the status. A name with %s stands for each LAN interface.
var parameters = []parameter{
	{"net.ipv4.ip_forward", "1", "direct IPv4 traffic is not forwarded"},
	{"net.ipv6.conf.all.forwarding", "1", "direct IPv6 traffic is not forwarded"},
	// The kernel sends redirects if either says so (Documentation/networking/ip-sysctl.rst).
	{"net.ipv4.conf.all.send_redirects", "0", "clients are told to bypass the gateway"},
	{"net.ipv4.conf.%s.send_redirects", "0", "clients are told to bypass the gateway"},
}

// checkParameters returns a line for each parameter that is not as it should be. A parameter that the
// kernel does not have (IPv6 compiled out, an interface that is gone) cannot be wrong.
func checkParameters(interfaces []string) []string {
	var lines []string
	for _, p := range parameters {
		names := []string{p.name}
		if strings.Contains(p.name, "%s") {
			names = nil
			for _, i := range interfaces {
				names = append(names, fmt.Sprintf(p.name, i))
			}
		}
		for _, name := range names {
			value, err := os.ReadFile(parameterPath(name))
			switch {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				lines = append(lines, fmt.Sprintf("%s cannot be read: %v", name, err))
			case strings.TrimSpace(string(value)) != p.want:
				lines = append(lines, fmt.Sprintf("%s is %s, so %s: sysctl -w %s=%s",
					name, strings.TrimSpace(string(value)), p.why, name, p.want))
			}
		}
	}
	return lines
}

// parameterPath is the file of a parameter. A dot within an interface's name (eth0.5) is a slash in
// sysctl's own notation and stays a dot in the path, so only the known parts are split.
func parameterPath(name string) string {
	const conf = "net.ipv4.conf."
	if rest, ok := strings.CutPrefix(name, conf); ok {
		device, setting := rest[:strings.LastIndex(rest, ".")], rest[strings.LastIndex(rest, ".")+1:]
		return "/proc/sys/net/ipv4/conf/" + device + "/" + setting
	}
	return "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
}
