package config

import (
	"net/netip"
	"time"

	"go.yaml.in/yaml/v3"
)

// DNS is how the questions of the LAN are answered. Every question to port 53 is, whichever server the
// client meant.
type DNS struct {
	Upstreams   map[string]DNSUpstream
	Default     string // the upstream of questions that no rule takes
	Hosts       map[string][]netip.Addr
	Rules       []DNSRule
	Responses   []DNSResponse
	IPVersion   Preference     // where no rule says another
	StripECH    bool           // where no rule says otherwise
	RebindAllow []string       // suffixes whose names may have private addresses; with a leading dot, only what is below
	Allow       []netip.Prefix // who may ask besides the LAN's own subnets and private addresses
	Cache       DNSCache
	Position    Position
}

// DNSCache bounds what is remembered of answers.
type DNSCache struct {
	Entries        uint32
	MinTTL, MaxTTL time.Duration // what an answer's own is brought within
	Stale          time.Duration // for which an answer may be used beyond its TTL while the upstreams fail (RFC 8767)
	FailureTTL     time.Duration // for which a failure is not tried again
	Prefetch       bool          // ask again for what is asked for often, before it ends
}

// Preference is which addresses of a name its clients are told.
type Preference string

// The values of Preference.
const (
	AnyVersion Preference = "any"
	Prefer4    Preference = "prefer_4" // no IPv6 addresses where there are IPv4 ones
	Prefer6    Preference = "prefer_6"
	Only4      Preference = "only_4"
	Only6      Preference = "only_6"
)

// dnsDraft is what of a DNS waits for the rest of the file.
type dnsDraft struct {
	fallback  reference // default:
	detours   []detour
	rules     []dnsRule
	responses []dnsResponse
}

// detour is the outbound of an upstream.
type detour struct {
	upstream string
	at       string // what messages call it
	scheme   string // its protocol
	to       reference
}

func (d *decoder) dns(at string, n *yaml.Node, c *draft) {
	c.DNS = &DNS{
		Upstreams: map[string]DNSUpstream{},
		IPVersion: AnyVersion,
		Cache:     DNSCache{Entries: 1 << 16, MaxTTL: 24 * time.Hour, Stale: time.Hour, FailureTTL: 5 * time.Second, Prefetch: true},
		Position:  Position{d.file, n.Line},
	}
	entries := d.entries(at, n)
	d.require(at, n, entries, decode(d, at, entries, dnsKeys, nil, c), "upstreams", "default")
}

// dnsKeys are the keys of the section.
var dnsKeys = keys[draft]{
	"upstreams": (*decoder).dnsUpstreams,
	"default": func(d *decoder, at string, n *yaml.Node, c *draft) {
		c.dns.fallback = d.reference(at, n)
	},
	"hosts":     (*decoder).dnsHosts,
	"rules":     (*decoder).dnsRules,
	"responses": (*decoder).dnsResponses,
	"ip_version": func(d *decoder, at string, n *yaml.Node, c *draft) {
		d.preference(at, n, &c.DNS.IPVersion)
	},
	"strip_ech": func(d *decoder, at string, n *yaml.Node, c *draft) {
		d.boolean(at, n, &c.DNS.StripECH)
	},
	"rebind_allow": func(d *decoder, at string, n *yaml.Node, c *draft) {
		for _, v := range d.values(at, "domain_suffix", n) {
			c.DNS.RebindAllow = append(c.DNS.RebindAllow, v.String())
		}
	},
	"allow": func(d *decoder, at string, n *yaml.Node, c *draft) {
		for _, v := range d.values(at, "ip_cidr", n) {
			prefix := v.(netip.Prefix)
			if prefix.Bits() == 0 { // half of the internet's floods are amplified by such resolvers
				d.errorf(n.Line, "%s: %s is everybody, and makes an open resolver; name your own prefixes", at, prefix)
			}
			c.DNS.Allow = append(c.DNS.Allow, prefix)
		}
	},
	"cache": func(d *decoder, at string, n *yaml.Node, c *draft) {
		cache := &c.DNS.Cache
		decode(d, at, d.entries(at, n), dnsCacheKeys, nil, cache)
		if cache.MinTTL > cache.MaxTTL {
			d.errorf(n.Line, "%s: min_ttl %s is longer than max_ttl %s; make it shorter", at, short(cache.MinTTL), short(cache.MaxTTL))
		}
	},
}

const day = 24 * time.Hour

var dnsCacheKeys = keys[DNSCache]{
	"entries":     share(func(c *DNSCache) *uint32 { return &c.Entries }),
	"min_ttl":     wait(0, day, func(c *DNSCache) *time.Duration { return &c.MinTTL }),
	"max_ttl":     wait(time.Second, 7*day, func(c *DNSCache) *time.Duration { return &c.MaxTTL }), // RFC 8767 section 4
	"stale":       wait(0, 7*day, func(c *DNSCache) *time.Duration { return &c.Stale }),
	"failure_ttl": wait(time.Second, 5*time.Minute, func(c *DNSCache) *time.Duration { return &c.FailureTTL }), // RFC 9520 section 3.2
	"prefetch": func(d *decoder, at string, n *yaml.Node, c *DNSCache) {
		d.boolean(at, n, &c.Prefetch)
	},
}

func (d *decoder) preference(at string, n *yaml.Node, into *Preference) {
	if word, ok := d.choice(at, n, string(AnyVersion), string(Prefer4), string(Prefer6), string(Only4), string(Only6)); ok {
		*into = Preference(word)
	}
}

// dnsHosts reads names and their addresses.
func (d *decoder) dnsHosts(at string, n *yaml.Node, c *draft) {
	c.DNS.Hosts = map[string][]netip.Addr{}
	for _, e := range d.entries(at, n) {
		name, err := normalName(e.key)
		if err != nil {
			d.errorf(e.line, "%s: %w", at, err)
			continue
		}
		if _, taken := c.DNS.Hosts[name]; taken {
			d.errorf(e.line, "%s: %s stands here twice; join the addresses in one list", at, quote(name))
		}
		c.DNS.Hosts[name] = d.addresses(join(at, e.key), e.value)
	}
}

// addresses is a list of addresses, IPv4 in its 4-byte form.
func (d *decoder) addresses(at string, n *yaml.Node) []netip.Addr {
	values, lines := d.texts(at, n)
	list := make([]netip.Addr, 0, len(values))
	for i, value := range values {
		address, err := netip.ParseAddr(value)
		if err != nil || address.Zone() != "" {
			d.errorf(lines[i], "%s: %s is not an address; write one like 192.0.2.1 or 2001:db8::1", at, quote(value))
			continue
		}
		list = append(list, address.Unmap())
	}
	return list
}
