package config

import (
	"maps"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// DNSUpstream is a server that questions are sent to.
type DNSUpstream struct {
	URL        string           // scheme://host[:port][/path]
	Addresses  []netip.Addr     // of the host; empty: it is one itself, or it is looked up
	Bootstrap  []netip.AddrPort // plain DNS servers that are asked for the host's address; empty: the system's
	Detour     string           // the outbound that it is reached through; direct if there is none
	CAFile     string           // PEM certificates that its own is verified with; empty: the system's
	ServerName string           // that its certificate must have; empty: the host
	Position   Position
}

// dnsScheme is a protocol that questions are carried by.
type dnsScheme struct {
	tls bool // there is a certificate to verify
	udp bool // the detour has to carry UDP
}

var dnsSchemes = map[string]dnsScheme{
	"udp": {udp: true}, "tcp": {}, "tls": {tls: true}, "https": {tls: true}, "h3": {tls: true, udp: true}, "quic": {tls: true, udp: true},
}

// dnsUpstreamDraft is a DNSUpstream on the way.
type dnsUpstreamDraft struct {
	DNSUpstream
	scheme                            string
	host                              string // of the URL; empty: it could not be read
	detour                            reference
	addresses, bootstrap, ca, tlsName int // lines of the keys; 0 where they are absent
}

func (d *decoder) dnsUpstreams(at string, n *yaml.Node, c *draft) {
	entries := d.entries(at, n)
	if entries != nil && len(entries) == 0 {
		d.errorf(n.Line, "%s: there is none; add one like isp: \"udp://192.168.0.1\"", at)
	}
	for _, e := range entries {
		at := "dns upstream " + quote(e.key)
		if !validName(e.key) {
			d.errorf(e.line, "%s: a name is 1 to %d of a-z, 0-9, - and _; choose another", at, maxNameLength)
		}
		u := dnsUpstreamDraft{DNSUpstream: DNSUpstream{Position: Position{d.file, e.line}, Detour: policy.OutboundDirect}}
		if follow(e.value).Kind == yaml.ScalarNode { // the short form
			dnsUpstreamKeys["url"](d, at, e.value, &u)
		} else {
			entries := d.entries(at, e.value)
			d.require(at, e.value, entries, decode(d, at, entries, dnsUpstreamKeys, nil, &u), "url")
		}
		d.dnsUpstreamFits(at, &u)
		if u.detour.name != "" {
			u.Detour = u.detour.name
			c.dns.detours = append(c.dns.detours, detour{e.key, at, u.scheme, u.detour})
		}
		if u.CAFile != "" && !filepath.IsAbs(u.CAFile) {
			u.CAFile = filepath.Join(c.directory, u.CAFile)
		}
		c.DNS.Upstreams[e.key] = u.DNSUpstream
	}
}

var dnsUpstreamKeys = keys[dnsUpstreamDraft]{
	"url": func(d *decoder, at string, n *yaml.Node, u *dnsUpstreamDraft) {
		if value, ok := d.scalar(at, n); ok {
			d.dnsURL(at, n.Line, value, u)
		}
	},
	"addresses": func(d *decoder, at string, n *yaml.Node, u *dnsUpstreamDraft) {
		u.Addresses, u.addresses = d.addresses(at, n), n.Line
	},
	"bootstrap": func(d *decoder, at string, n *yaml.Node, u *dnsUpstreamDraft) {
		u.bootstrap = n.Line
		values, lines := d.texts(at, n)
		for i, value := range values {
			server, ok := plainServer(value)
			if !ok {
				d.errorf(lines[i], "%s: %s is not the address of a DNS server; write one like 192.168.0.1 or 192.168.0.1:53", at, quote(value))
				continue
			}
			u.Bootstrap = append(u.Bootstrap, server)
		}
	},
	"detour": func(d *decoder, at string, n *yaml.Node, u *dnsUpstreamDraft) {
		u.detour = d.reference(at, n)
	},
	"ca_file": func(d *decoder, at string, n *yaml.Node, u *dnsUpstreamDraft) {
		u.CAFile, _ = d.scalar(at, n)
		u.ca = n.Line
	},
	"server_name": func(d *decoder, at string, n *yaml.Node, u *dnsUpstreamDraft) {
		value, ok := d.scalar(at, n)
		if !ok {
			return
		}
		name, err := normalName(value)
		if err != nil {
			d.errorf(n.Line, "%s: %w", at, err)
		}
		u.ServerName, u.tlsName = name, n.Line
	},
}

// plainServer reads an address with or without a port; DNS has 53.
func plainServer(text string) (netip.AddrPort, bool) {
	if address, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPortFrom(address.Unmap(), 53), address.Zone() == "" && !address.IsUnspecified()
	}
	server, err := netip.ParseAddrPort(text)
	if err != nil || server.Port() == 0 || server.Addr().Zone() != "" || server.Addr().IsUnspecified() {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(server.Addr().Unmap(), server.Port()), true
}

// dnsURL checks what a file may say in a URL. Port and path are for the upstream that is made of it.
func (d *decoder) dnsURL(at string, line int, value string, u *dnsUpstreamDraft) {
	names := slices.Collect(maps.Keys(dnsSchemes))
	scheme, _, found := strings.Cut(value, "://")
	scheme = strings.ToLower(scheme)
	parsed, err := url.Parse(value)
	switch {
	case !found || strings.ContainsAny(scheme, ":@/ "):
		d.errorf(line, "%s: it has no scheme; write it like udp://192.168.0.1 or https://dns.example/dns-query", at)
	case dnsSchemes[scheme] == dnsScheme{} && scheme != "tcp":
		d.errorf(line, "%s: unknown scheme %s%s", at, quote(scheme), didYouMean(scheme, names))
	case strings.ContainsAny(value, "{}"):
		d.errorf(line, "%s: %s is a template (RFC 8484); leave out what is in braces", at, quote(value))
	case err != nil:
		d.errorf(line, "%s: it is not a URL; write it like %s://192.168.0.1:5353 (an IPv6 address in brackets)", at, scheme)
	case strings.Count(parsed.Host, ":") > 1 && !strings.HasPrefix(parsed.Host, "["): // where would its port begin?
		d.errorf(line, "%s: an IPv6 address stands in brackets; write it like %s://[2001:db8::53]:5353", at, scheme)
	case parsed.User != nil:
		d.errorf(line, "%s: it names a user, and DNS servers know none; remove what is before the @", at)
	case parsed.Hostname() == "":
		d.errorf(line, "%s: it has no host; write it like %s://192.168.0.1", at, scheme)
	default:
		u.URL, u.scheme, u.host = parsed.String(), scheme, parsed.Hostname()
	}
}

// dnsUpstreamFits reports keys that have no use with the URL.
func (d *decoder) dnsUpstreamFits(at string, u *dnsUpstreamDraft) {
	if u.URL == "" {
		return // reported
	}
	_, err := netip.ParseAddr(u.host)
	literal := err == nil
	for _, useless := range []struct {
		line     int
		key, why string
		is       bool
	}{
		{u.addresses, "addresses", "has no use: the url has an address; remove it", literal},
		{u.bootstrap, "bootstrap", "has no use: the url has an address; remove it", literal},
		{u.bootstrap, "bootstrap", "has no use beside addresses; remove it", !literal && u.addresses != 0},
		{u.ca, "ca_file", "has no use: " + u.scheme + ":// has no certificates; remove it, or write tls://, https://, h3:// or quic://", !dnsSchemes[u.scheme].tls},
		{u.tlsName, "server_name", "has no use: " + u.scheme + ":// has no certificates; remove it, or write tls://, https://, h3:// or quic://", !dnsSchemes[u.scheme].tls},
	} {
		if useless.line != 0 && useless.is {
			d.errorf(useless.line, "%s: %s %s", at, useless.key, useless.why)
		}
	}
}

// detourFits reports a detour that is unknown, or that cannot carry the upstream's protocol.
func (d *decoder) detourFits(detour detour, c *draft) {
	to := detour.to
	if to.name == policy.OutboundBlock {
		d.errorf(to.line, "%s: detour block would leave every question without an answer; write direct or an outbound", detour.at)
		return
	}
	if !d.known(detour.at+": detour", to, c) || to.name == policy.OutboundDirect {
		return
	}
	scheme, _, _ := strings.Cut(c.Outbounds[to.name].URL, "://")
	if dnsSchemes[detour.scheme].udp && scheme != "" && !schemes[scheme].udp {
		d.errorf(to.line, "%s: detour %s: an %s proxy carries no UDP, which %s:// is made of; write tcp://, tls:// or https://",
			detour.at, to.name, scheme, detour.scheme)
	}
}
