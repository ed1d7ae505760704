// Package sysctl is the one list of kernel parameters that a side router depends on, and what is done with it: showing it,
// checking it, applying it, and putting back what was there before.
//
// A parameter is in the list because a test breaks traffic by setting it wrong, and for no other reason.
//
// Parameters of the network belong to the network namespace of the calling thread.
package sysctl

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// Placeholders in a Parameter's name.
const (
	LAN    = "<lan>"    // each LAN interface
	Uplink = "<uplink>" // each interface by which the box learns its own IPv6 route from router advertisements
)

// ConfFile is where sysctl.d(5) keeps the parameters over reboots.
const ConfFile = "/etc/sysctl.d/60-sidegate.conf"

// Parameter is one line of the list.
type Parameter struct {
	Name   string   `json:"name"` // as sysctl(8) writes it, perhaps with a placeholder
	Value  string   `json:"value"`
	Also   []string `json:"also,omitempty"` // values that do as well
	When   string   `json:"when"`           // which boxes need it, for people
	Why    string   `json:"why"`            // what happens to clients otherwise
	Source string   `json:"source"`         // where the kernel documents it
	Breaks bool     `json:"breaks"`         // connections fail otherwise; if not, they go where they should not
	Plain  bool     `json:"-"`              // the box forwards nothing otherwise, with or without a gateway

	scope func(Surroundings) []string // the interfaces that it is about; none: the box does not need it
}

// Surroundings are what of a box decides which parameters it needs.
type Surroundings struct {
	LAN     []string // names of the LAN interfaces
	Bridges []string // those of them that are bridges
	Uplinks []string // interfaces by which the box learns its own IPv6 route from router advertisements
	IPv6    bool     // some LAN interface has an IPv6 address
}

const (
	ipSysctl = "Documentation/networking/ip-sysctl.rst"
	always   = "always"
)

func everywhere(s Surroundings) []string { return []string{""} }
func lan(s Surroundings) []string        { return s.LAN }
func uplinks(s Surroundings) []string    { return s.Uplinks }

func withIPv6(s Surroundings) []string {
	if s.IPv6 {
		return []string{""}
	}
	return nil
}

func withBridge(s Surroundings) []string {
	if len(s.Bridges) > 0 {
		return []string{""}
	}
	return nil
}

// parameters are in the order in which they are applied: ip_forward resets others, and IPv6 forwarding takes routes away that were
// learned from advertisements unless accept_ra says otherwise by then.
var parameters = []Parameter{
	{
		Name: "net.ipv4.ip_forward", Value: "1", When: always, scope: everywhere, Source: ipSysctl, Breaks: true, Plain: true,
		Why: "direct IPv4 traffic is not forwarded",
	},
	{
		Name: "net.ipv4.conf." + LAN + ".forwarding", Value: "1", When: always, scope: lan, Source: ipSysctl, Breaks: true, Plain: true,
		Why: "direct IPv4 traffic from this interface is not forwarded, whatever ip_forward says",
	},
	{ // the kernel sends them if either says so
		Name: "net.ipv4.conf.all.send_redirects", Value: "0", When: always, scope: everywhere, Source: ipSysctl,
		Why: "clients are told to bypass the gateway",
	},
	{
		Name: "net.ipv4.conf." + LAN + ".send_redirects", Value: "0", When: always, scope: lan, Source: ipSysctl,
		Why: "clients are told to bypass the gateway",
	},
	{ // wg-quick sets it under all
		Name: "net.ipv4.conf.all.src_valid_mark", Value: "0", When: always, scope: everywhere, Source: ipSysctl, Breaks: true,
		Why: "proxied IPv4 packets are dropped: their mark leads the check of their source to a local route",
	},
	{
		Name: "net.ipv4.conf." + LAN + ".src_valid_mark", Value: "0", When: always, scope: lan, Source: ipSysctl, Breaks: true,
		Why: "proxied IPv4 packets are dropped: their mark leads the check of their source to a local route",
	},
	{
		Name: "net.ipv4.conf.all.route_localnet", Value: "0", When: always, scope: everywhere, Source: ipSysctl,
		Why: "the LAN reaches services of the box that listen on 127.0.0.1 only",
	},
	{
		Name: "net.ipv4.conf." + LAN + ".route_localnet", Value: "0", When: always, scope: lan, Source: ipSysctl,
		Why: "the LAN reaches services of the box that listen on 127.0.0.1 only",
	},
	{ // 0: not the kernel but another program (systemd-networkd, NetworkManager) takes the route from advertisements
		Name: "net.ipv6.conf." + Uplink + ".accept_ra", Value: "2", Also: []string{"0"},
		When: "the box takes its own IPv6 route from router advertisements", scope: uplinks, Source: ipSysctl, Breaks: true,
		Why: "the box loses its own IPv6 route: a router takes no advertisements with accept_ra=1",
	},
	{
		Name: "net.ipv6.conf.all.forwarding", Value: "1", When: "the LAN has IPv6", scope: withIPv6, Source: ipSysctl, Breaks: true, Plain: true,
		Why: "direct IPv6 traffic is not forwarded",
	},
	{
		Name: "net.bridge.bridge-nf-call-iptables", Value: "0", When: "a LAN interface is a bridge", scope: withBridge, Source: ipSysctl, Breaks: true,
		Why: "frames that the bridge passes between two of its ports go through the box's IPv4 firewall and NAT",
	},
	{
		Name: "net.bridge.bridge-nf-call-ip6tables", Value: "0", When: "a LAN interface is a bridge", scope: withBridge, Source: ipSysctl, Breaks: true,
		Why: "frames that the bridge passes between two of its ports go through the box's IPv6 firewall",
	},
}

// List is the whole list, in the order in which it is to be applied.
func List() []Parameter { return slices.Clone(parameters) }

// Setting is a parameter of one box.
type Setting struct {
	Parameter        // with the interface in its name
	Interface string // what the placeholder stands for; empty: it has none
	Seen      string // its value
}

// Good reports whether the value is as it should be.
func (s Setting) Good() bool { return s.Seen == s.Value || slices.Contains(s.Also, s.Seen) }

// Fix is the command that sets it.
func (s Setting) Fix() string { return "sysctl -w " + s.Name + "=" + s.Value }

func (s Setting) String() string {
	return fmt.Sprintf("%s is %s, so %s: %s", s.Name, s.Seen, s.Why, s.Fix())
}

// Read returns the parameters that a box needs with the values that they have, in the order of the list. What the kernel does
// not have (IPv6 compiled out, an interface that is gone, br_netfilter not loaded) cannot be wrong, and is left out.
func Read(of Surroundings) ([]Setting, error) {
	var all []Setting
	var errs []error
	for _, p := range parameters {
		for _, device := range p.scope(of) {
			s := Setting{Parameter: p, Interface: device}
			for _, placeholder := range []string{LAN, Uplink} {
				s.Name = strings.ReplaceAll(s.Name, placeholder, strings.ReplaceAll(device, ".", "/"))
			}
			seen, err := get(s.Name)
			switch {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				errs = append(errs, err)
			default:
				s.Seen = seen
				all = append(all, s)
			}
		}
	}
	return all, errors.Join(errs...)
}

// Check returns those that are not as they should be, without those that become good as soon as another one among them does.
func Check(of Surroundings) ([]Setting, error) {
	all, err := Read(of)
	wrong := slices.DeleteFunc(all, Setting.Good)
	return slices.DeleteFunc(slices.Clone(wrong), func(s Setting) bool {
		return slices.ContainsFunc(wrong, func(o Setting) bool { return o.Name != s.Name && resetBy(o.Name, s.Name) })
	}), err
}

// path is the file of a parameter. In sysctl's notation a dot within an interface's name is a slash, and the other way round.
func path(name string) string {
	return "/proc/sys/" + strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
}

func get(name string) (string, error) {
	value, err := os.ReadFile(path(name))
	if err != nil {
		return "", fmt.Errorf("reading %s: %w", name, err)
	}
	return strings.TrimSpace(string(value)), nil
}

func set(name, value string) error {
	if err := os.WriteFile(path(name), []byte(value), 0); err != nil {
		return fmt.Errorf("setting %s to %s: %w", name, value, cause(err))
	}
	return nil
}

// cause drops the path of a file error, which the message says as a name, and says what the usual one means.
func cause(err error) error {
	if at := (*fs.PathError)(nil); errors.As(err, &at) {
		err = at.Err
	}
	if errors.Is(err, fs.ErrPermission) || strings.Contains(err.Error(), "read-only") {
		return fmt.Errorf("%w; set it where /proc/sys may be written: in a container, on its host", err)
	}
	return err
}
