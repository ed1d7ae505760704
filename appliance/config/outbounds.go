package config

import (
	"maps"
	"net/url"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// Outbound describes an upstream proxy.
type Outbound struct {
	URL      string // scheme://host:port as outbound.New takes it, without the user
	Username string
	Password Secret
	Position Position
}

// scheme is a protocol of upstream proxies.
type scheme struct{ udp bool } // it carries UDP

// schemes are the protocols of this version.
var schemes = map[string]scheme{"socks5": {udp: true}, "http": {}, "https": {}}

// laterSchemes are what users of other gateways bring along.
var laterSchemes = map[string]bool{"ss": true, "vmess": true, "vless": true, "trojan": true, "hysteria2": true, "tuic": true}

const maxNameLength = 64 // bytes

// outboundDraft is an Outbound whose password is still in its file.
type outboundDraft struct {
	Outbound
	passwordFile string
	passwordLine int
}

func (d *decoder) outbounds(at string, n *yaml.Node, c *draft) {
	entries := d.entries(at, n)
	c.Outbounds = make(map[string]Outbound, len(entries))
	ids := map[uint32]string{}
	for _, name := range []string{policy.OutboundDirect, policy.OutboundBlock} {
		ids[policy.OutboundID(name)] = name
	}
	for _, e := range entries {
		at := "outbound " + quote(e.key)
		switch other, taken := ids[policy.OutboundID(e.key)]; {
		case e.key == policy.OutboundDirect || e.key == policy.OutboundBlock:
			d.errorf(e.line, "%s: the name is built in; choose another", at)
		case !validName(e.key):
			d.errorf(e.line, "%s: a name is 1 to %d of a-z, 0-9, - and _; choose another", at, maxNameLength)
		case taken:
			d.errorf(e.line, "%s: the kernel cannot tell the name from %s (their hashes are equal); choose another", at, quote(other))
		}
		ids[policy.OutboundID(e.key)] = e.key
		c.Outbounds[e.key] = d.outbound(at, e, c.directory)
	}
}

func validName(name string) bool {
	return name != "" && len(name) <= maxNameLength && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-_") == ""
}

func (d *decoder) outbound(at string, e entry, directory string) Outbound {
	o := outboundDraft{Outbound: Outbound{Position: Position{d.file, e.line}}}
	entries := d.entries(at, e.value)
	d.require(at, e.value, entries, decode(d, at, entries, outboundKeys, inline, &o), "url")
	if o.passwordFile == "" {
		return o.Outbound
	}
	if o.Username == "" && o.URL != "" {
		d.errorf(o.passwordLine, "%s: password_file without a username; add username", at)
	}
	secret, warning, err := readSecret(o.passwordFile, directory)
	switch {
	case err != nil:
		d.errorf(o.passwordLine, "%s: password_file: %w", at, err)
	case warning != "":
		d.warnf(o.passwordLine, "%s: password_file: %s", at, warning)
	}
	o.Password = secret
	return o.Outbound
}

var outboundKeys = keys[outboundDraft]{
	"url": func(d *decoder, at string, n *yaml.Node, o *outboundDraft) {
		if value, ok := d.scalar(at, n); ok {
			d.upstream(at, n.Line, value, o)
		}
	},
	"username": func(d *decoder, at string, n *yaml.Node, o *outboundDraft) {
		name, ok := d.scalar(at, n)
		if ok && o.Username != "" && o.Username != name {
			d.errorf(n.Line, "%s: the url names another user; remove one of them", at)
		}
		o.Username = name
	},
	"password_file": func(d *decoder, at string, n *yaml.Node, o *outboundDraft) {
		o.passwordFile, _ = d.scalar(at, n)
		o.passwordLine = n.Line
	},
}

// inline are the places where other gateways keep a password.
var inline = refusals{
	"password": "does not belong in the config; put it in a file, and name that in password_file",
	"secret":   "does not belong in the config; put it in a file, and name that in password_file",
}

// upstream checks what a file may say in a URL, and takes the user out of it. Host, port and
// parameters are for the outbound that is made of it. No message quotes the URL: a password may be in
// it, where it was not expected either.
func (d *decoder) upstream(at string, line int, value string, o *outboundDraft) {
	have := func() string { return have(slices.Collect(maps.Keys(schemes))) }
	scheme, _, found := strings.Cut(value, "://")
	scheme = strings.ToLower(scheme)
	_, known := schemes[scheme]
	u, err := url.Parse(value)
	switch {
	case !found || strings.ContainsAny(scheme, ":@/ "):
		d.errorf(line, "%s: it has no scheme; write it like socks5://10.0.0.7:1080", at)
	case laterSchemes[scheme]:
		d.errorf(line, "%s: %s is not in this version yet %s", at, scheme, have())
	case !known:
		d.errorf(line, "%s: unknown scheme %s%s", at, quote(scheme), didYouMean(scheme, slices.Collect(maps.Keys(schemes))))
	case err != nil:
		d.errorf(line, "%s: it is not a URL; write it like %s://10.0.0.7:1080 (an IPv6 address in brackets)", at, scheme)
	case hasPassword(u):
		d.errorf(line, "%s: it holds a password; put it in password_file and leave only the user in the url", at)
	case u.Hostname() == "":
		d.errorf(line, "%s: it has no host; write it like %s://10.0.0.7:1080", at, scheme)
	default:
		name := u.User.Username()
		if name != "" && o.Username != "" && o.Username != name {
			d.errorf(line, "%s: it names another user than username does; remove one of them", at)
		}
		if name != "" {
			o.Username = name
		}
		u.User = nil
		o.URL = u.String()
	}
}

func hasPassword(u *url.URL) bool {
	_, ok := u.User.Password()
	return ok
}
