package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// Hosts of the internet that the demonstration adds to those of every lab.
const (
	abroad    = "abroad"    // reached through the upstream proxy
	ads       = "ads"       // dropped
	telemetry = "telemetry" // refused
	cdn       = "cdn"       // serves several names at one address, which no rule has
	isp       = "isp"       // a DNS server: dnsmasq
)

// What every host of the internet offers.
const (
	filePort = 80
	echoPort = 7
)

// stage is the network of the demonstration with everything that runs in it.
type stage struct {
	*lab.Lab
	binary           string // of sidegate
	laptop, sidegate *lab.Host
	upstream         *lab.Daemon                // dante
	files            map[string]*lab.FileServer // by host
	echoes           map[string]*lab.Echo
	atSidegate       *lab.Capture // all packets of the side router's interface
	atRouter         *lab.Capture // all packets of the router's LAN side
	atISP            *lab.Capture // all packets of the DNS server

	config   string
	gateway  *lab.Gateway  // nil before the step that starts it
	admin    *admin.Client // of the gateway
	pristine []string      // what the side router's kernel held before that
	flows    []flow        // what the steps so far have sent
	knocks   uint16        // so far
}

// newStage builds the network, without the gateway. The caller closes the lab, which closes everything.
func newStage(ctx context.Context, binary string) (_ *stage, err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	s := &stage{
		Lab:      l,
		binary:   binary,
		laptop:   l.Host(lab.Laptop),
		sidegate: l.Host(lab.Sidegate),
		files:    map[string]*lab.FileServer{},
		echoes:   map[string]*lab.Echo{},
	}
	for _, name := range []string{abroad, ads, telemetry, cdn, isp} {
		if _, err := l.AddServer(ctx, name); err != nil {
			return nil, err
		}
	}
	running := context.WithoutCancel(ctx) // until the lab ends
	if _, err := l.Host(isp).StartDnsmasq(running, hosted(l.Host(cdn))); err != nil {
		return nil, err
	}
	if err := s.startUpstream(running); err != nil {
		return nil, err
	}
	for _, name := range []string{lab.Server, abroad, ads, telemetry, cdn} {
		if s.files[name], err = l.Host(name).StartFiles(ctx, filePort); err != nil {
			return nil, err
		}
		if s.echoes[name], err = l.Host(name).StartEcho(ctx, echoPort); err != nil {
			return nil, err
		}
	}
	if s.atSidegate, err = s.sidegate.Capture(); err != nil {
		return nil, err
	}
	if s.atRouter, err = l.Host(lab.Router).Capture(); err != nil {
		return nil, err
	}
	if s.atISP, err = l.Host(isp).Capture(); err != nil {
		return nil, err
	}
	s.config = demoConfig(l, s.upstream.URL("socks5", lab.Credentials{}))
	return s, nil
}

// startUpstream starts the proxy server, which knows no names yet.
func (s *stage) startUpstream(ctx context.Context) (err error) {
	s.upstream, err = s.Host(lab.Upstream).StartDante(ctx, lab.DanteOptions{Resolver: s.Host(isp).Addr4()})
	return err
}

// demoConfig is the file that the gateway of the demonstration runs on.
func demoConfig(l *lab.Lab, upstream string) string {
	host := func(name string) string {
		return fmt.Sprintf("[%s, \"%s\"]", l.Host(name).Addr4(), l.Host(name).Addr6())
	}
	return fmt.Sprintf(`interfaces: { lan: eth0 }
dns:
  upstreams: { isp: "udp://%s" }
  default: isp
sniff: ambiguous # reads first bytes where the names of an address lead to different outbounds
outbounds:
  upstream: { url: %q }
rules:
  - { name: abroad,    ip_cidr: %s, outbound: upstream }
  - { name: ads,       ip_cidr: %s, outbound: block }
  - { name: telemetry, ip_cidr: %s, outbound: block, reject: true }
  - { name: films,     domain_suffix: films.example, outbound: upstream }
  - { name: tracker,   domain_suffix: tracker.example, outbound: block }
default: direct
`, l.Host(isp).Addr4(), upstream, host(abroad), host(ads), host(telemetry))
}

// ipVersion chooses between the addresses that every host has.
type ipVersion int

const (
	ipv4 ipVersion = 4
	ipv6 ipVersion = 6
)

func (v ipVersion) of(h *lab.Host) netip.Addr {
	if v == ipv6 {
		return h.Addr6()
	}
	return h.Addr4()
}

// command runs sidegate as a person on the side router would, and returns what it printed.
func (s *stage) command(ctx context.Context, args ...string) (string, error) {
	return s.sidegate.Exec(ctx, s.binary, append(args, "--socket", s.gateway.Socket)...)
}

// kernelState lists what a gateway could leave behind on the side router: policy routing, and pinned BPF objects.
func (s *stage) kernelState(ctx context.Context) ([]string, error) {
	var state []string
	for _, arguments := range []string{"-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"} {
		out, err := s.sidegate.Exec(ctx, "ip", strings.Fields(arguments)...)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			state = append(state, strings.TrimSpace(line))
		}
	}
	pins, err := s.sidegate.MountBPF()
	if err != nil {
		return nil, err
	}
	err = filepath.WalkDir(pins, func(path string, _ fs.DirEntry, err error) error {
		if path != pins {
			state = append(state, path)
		}
		return err
	})
	slices.Sort(state)
	return state, err
}

// difference lists what is in one state and not in the other.
func difference(before, after []string) []string {
	count := map[string]int{}
	for _, line := range before {
		count["gone: "+line]++
	}
	for _, line := range after {
		if key := "gone: " + line; count[key] > 0 {
			count[key]--
		} else {
			count["left: "+line]++
		}
	}
	maps.DeleteFunc(count, func(_ string, n int) bool { return n == 0 })
	return slices.Sorted(maps.Keys(count))
}

// keepLogs copies what the lab's programs wrote to where it outlives the lab.
func (s *stage) keepLogs() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "sidegate-demo-"); err != nil {
		return "", err
	}
	for _, pattern := range []string{"*.log", "*.yaml", "*.conf"} {
		paths, err := filepath.Glob(filepath.Join(s.Dir(), pattern))
		if err != nil {
			return dir, err
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, filepath.Base(path)), text, 0o644)
			}
			if err != nil {
				return dir, err
			}
		}
	}
	return dir, nil
}
