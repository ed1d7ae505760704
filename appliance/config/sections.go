package config

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/knadh/koanf/v2"
	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// draft is a Config on the way: what refers to something further down waits here for the end.
type draft struct {
	Config
	directory string // of the file
	rules     []rule
	fallback  reference // default:
	tests     []expectation
	dns       dnsDraft

	geodataBroken bool // its section has errors
}

// reference is the name of an outbound, and where it stands.
type reference struct {
	name string
	line int
}

// config decodes the sections of a file.
func (d *decoder) config(directory string, sections *koanf.Koanf) *Config {
	entries := make([]entry, 0, len(sectionKeys))
	for _, key := range sections.Keys() {
		s := sections.Get(key).(section)
		entries = append(entries, entry{s.Key, s.Line, s.Value})
	}
	c := draft{directory: directory, Config: Config{
		File:       d.file,
		Interfaces: Interfaces{LAN: []string{Auto}, Position: Position{File: d.file}},
		OnFailure:  policy.Block,
		ReturnPath: Asymmetric,
		IPv6:       IPv6Unmanaged,
		Sniff:      SniffAmbiguous,
		Dial:       DialDomain,
	}}
	seen := decode(d, "", entries, sectionKeys, laterSections, &c)
	if !seen["default"] {
		d.errorf(1, `default is missing; add "default: direct" (or block, or an outbound)`)
	}
	d.link(&c)
	done := c.Config // without the rest of the draft
	return &done
}

// sectionKeys are the keys of the file. Each decodes one section.
var sectionKeys = keys[draft]{
	"interfaces": func(d *decoder, at string, n *yaml.Node, c *draft) {
		c.Interfaces.Position = Position{d.file, n.Line}
		decode(d, at, d.entries(at, n), interfaceKeys, nil, &c.Interfaces)
	},
	"on_failure": func(d *decoder, at string, n *yaml.Node, c *draft) {
		if word, ok := d.choice(at, n, policy.OutboundBlock, policy.OutboundDirect); ok && word == policy.OutboundDirect {
			c.OnFailure = policy.Direct
		}
	},
	"return_path": func(d *decoder, at string, n *yaml.Node, c *draft) {
		if word, ok := d.choice(at, n, string(Asymmetric), string(Symmetric), string(ReturnPathAuto)); ok {
			c.ReturnPath = ReturnPath(word)
		}
	},
	"ipv6": func(d *decoder, at string, n *yaml.Node, c *draft) {
		if word, ok := d.choice(at, n, string(IPv6Advertise), string(IPv6Unmanaged)); ok {
			c.IPv6 = IPv6(word)
		}
	},
	"sniff": func(d *decoder, at string, n *yaml.Node, c *draft) {
		if word, ok := d.choice(at, n, string(SniffOff), string(SniffAmbiguous), string(SniffUnknown)); ok {
			c.Sniff = Sniff(word)
		}
	},
	"dial": func(d *decoder, at string, n *yaml.Node, c *draft) {
		if word, ok := d.choice(at, n, string(DialIP), string(DialDomain)); ok {
			c.Dial = Dial(word)
		}
	},
	"trust_sniffed": func(d *decoder, at string, n *yaml.Node, c *draft) {
		d.boolean(at, n, &c.TrustSniffed)
	},
	"dns":     (*decoder).dns,
	"geodata": (*decoder).geodata,
	"published": func(d *decoder, at string, n *yaml.Node, c *draft) {
		for i, item := range d.list(at, n) {
			c.Published = append(c.Published, d.service(numbered(at, i), item))
		}
	},
	"gateway": func(d *decoder, at string, n *yaml.Node, c *draft) {
		c.Gateway.Position = Position{d.file, n.Line}
		decode(d, at, d.entries(at, n), gatewayKeys, nil, &c.Gateway)
	},
	"metrics": func(d *decoder, at string, n *yaml.Node, c *draft) {
		decode(d, at, d.entries(at, n), metricsKeys, nil, &c.Metrics)
	},
	"proxy": func(d *decoder, at string, n *yaml.Node, c *draft) {
		decode(d, at, d.entries(at, n), proxyKeys, nil, &c.Proxy)
	},
	"per_client": func(d *decoder, at string, n *yaml.Node, c *draft) {
		decode(d, at, d.entries(at, n), perClientKeys, nil, &c.PerClient)
	},
	"outbounds": (*decoder).outbounds,
	"rules":     (*decoder).rules,
	"default": func(d *decoder, at string, n *yaml.Node, c *draft) {
		c.fallback = d.reference(at, n)
	},
	"tests": func(d *decoder, at string, n *yaml.Node, c *draft) {
		for i, item := range d.list(at, n) {
			c.tests = append(c.tests, d.expectation(numbered("test", i), item))
		}
	},
}

// laterSections are keys of the design that this version cannot honour, and so must not accept.
var laterSections = refusals{
	"groups": notYet,
}

var gatewayKeys = keys[Gateway]{
	"local": func(d *decoder, at string, n *yaml.Node, g *Gateway) { d.boolean(at, n, &g.Local) },
	"cgroup": func(d *decoder, at string, n *yaml.Node, g *Gateway) {
		if path, ok := d.scalar(at, n); ok {
			if !filepath.IsAbs(path) {
				d.errorf(n.Line, "%s: %s is no absolute path; write that of a directory of cgroup v2, such as /sys/fs/cgroup/system.slice", at, quote(path))
			}
			g.Cgroup = path
		}
	},
}

// reference reads the name of an outbound; whether there is one is known at the end.
func (d *decoder) reference(at string, n *yaml.Node) reference {
	name, _ := d.scalar(at, n)
	return reference{name, n.Line}
}

var interfaceKeys = keys[Interfaces]{
	"lan": func(d *decoder, at string, n *yaml.Node, i *Interfaces) {
		i.Position = Position{d.file, n.Line}
		names, lines := d.texts(at, n)
		i.LAN = names
		for at2, name := range names {
			switch {
			case name == Auto && len(names) > 1:
				d.errorf(lines[at2], "%s: auto stands beside other interfaces; write either", at)
			case !validInterface(name):
				d.errorf(lines[at2], "%s: %s is not the name of an interface; write one that `ip link` lists, or auto", at, quote(name))
			case slices.Index(names, name) < at2:
				d.errorf(lines[at2], "%s: %s stands here twice; remove one", at, quote(name))
			}
		}
	},
}

// validInterface is the kernel's rule (dev_valid_name).
func validInterface(name string) bool {
	return len(name) < 16 && name != "" && name != "." && name != ".." && !strings.ContainsAny(name, "/: \t\n\v\f\r")
}

var metricsKeys = keys[Metrics]{
	"listen": func(d *decoder, at string, n *yaml.Node, m *Metrics) {
		value, ok := d.scalar(at, n)
		if !ok {
			return
		}
		m.Listen, m.Position = value, Position{d.file, n.Line}
		switch address, err := netip.ParseAddrPort(value); {
		case err != nil:
			d.errorf(n.Line, "%s: %s is not an address and a port; write 127.0.0.1:9653 or [::1]:9653", at, quote(value))
		case !address.Addr().IsLoopback():
			// The figures name clients, and there is no authentication.
			d.errorf(n.Line, "%s: %s is not a loopback address; write 127.0.0.1:%d, and let a local Prometheus or a reverse proxy with authentication read it",
				at, address.Addr(), address.Port())
		}
	},
}

// Service is a service on the LAN that is reached from outside, through a port forward of the main
// router. Its replies are never captured.
type Service struct {
	Address  netip.Addr // IPv4 in its 4-byte form
	Port     uint16
	Network  policy.Network // TCP or UDP
	Position Position
}

func (d *decoder) service(at string, n *yaml.Node) Service {
	s := Service{Position: Position{d.file, n.Line}}
	entries := d.entries(at, n)
	d.require(at, n, entries, decode(d, at, entries, serviceKeys, nil, &s), "address", "port", "network")
	return s
}

var serviceKeys = keys[Service]{
	"address": func(d *decoder, at string, n *yaml.Node, s *Service) {
		value, ok := d.scalar(at, n)
		if !ok {
			return
		}
		address, err := netip.ParseAddr(value)
		if s.Address = address.Unmap(); err != nil || address.Zone() != "" || !(address.IsGlobalUnicast() || address.IsLinkLocalUnicast()) {
			d.errorf(n.Line, "%s: %s is not the address of a host; write one like 192.168.0.3", at, quote(value))
		}
	},
	"port": func(d *decoder, at string, n *yaml.Node, s *Service) {
		port, _ := d.number(at, n, 1, 65535)
		s.Port = uint16(port)
	},
	"network": func(d *decoder, at string, n *yaml.Node, s *Service) {
		switch word, _ := d.choice(at, n, "tcp", "udp"); word {
		case "tcp":
			s.Network = policy.TCP
		case "udp":
			s.Network = policy.UDP
		}
	},
}

// require reports keys that an object must have. An object that could not be read has said so already.
func (d *decoder) require(at string, n *yaml.Node, entries []entry, seen map[string]bool, wanted ...string) {
	for _, key := range wanted {
		if !seen[key] && entries != nil {
			d.errorf(n.Line, "%s: %s is missing; add it", at, key)
		}
	}
}

var proxyKeys = keys[Proxy]{
	"dial_timeout":      wait(time.Second/10, time.Minute, func(p *Proxy) *time.Duration { return &p.DialTimeout }),
	"handshake_timeout": wait(time.Second/10, 5*time.Minute, func(p *Proxy) *time.Duration { return &p.HandshakeTimeout }),
	"half_closed":       wait(time.Second, 24*time.Hour, func(p *Proxy) *time.Duration { return &p.HalfClosed }),
	// RFC 4787 asks for at least 2 minutes. Less is for tests, and for those who know.
	"udp_idle": wait(time.Second, 24*time.Hour, func(p *Proxy) *time.Duration { return &p.UDPIdle }),
}

// wait is a key that holds a duration within bounds.
func wait[T any](least, most time.Duration, field func(*T) *time.Duration) func(*decoder, string, *yaml.Node, *T) {
	return func(d *decoder, at string, n *yaml.Node, into *T) {
		if value, ok := d.duration(at, n, least, most); ok {
			*field(into) = value
		}
	}
}

var perClientKeys = keys[PerClient]{
	"flows":        share(func(c *PerClient) *uint32 { return &c.Flows }),
	"connections":  share(func(c *PerClient) *uint32 { return &c.Connections }),
	"udp_sessions": share(func(c *PerClient) *uint32 { return &c.UDPSessions }),
	"udp_flows":    share(func(c *PerClient) *uint32 { return &c.UDPFlows }),
	"dns_queries":  share(func(c *PerClient) *uint32 { return &c.DNSQueries }),
}

// share is a key that holds how many of something there may be.
func share[T any](field func(*T) *uint32) func(*decoder, string, *yaml.Node, *T) {
	return func(d *decoder, at string, n *yaml.Node, into *T) {
		if value, ok := d.number(at, n, 1, 1<<20); ok {
			*field(into) = value
		}
	}
}
