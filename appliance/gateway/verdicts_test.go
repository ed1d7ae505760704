package gateway

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/policy"
)

func named(dial config.Dial, trust bool) *config.Config {
	return &config.Config{Dial: dial, TrustSniffed: trust}
}

// TestTellsNames: only a proxy is told a name, of a connection, and if it is wanted.
func TestTellsNames(t *testing.T) {
	v := &verdicts{}
	for _, c := range []struct {
		dial     config.Dial
		network  policy.Network
		outbound string
		want     bool
	}{
		{config.DialDomain, policy.TCP, "hk", true},
		{config.DialIP, policy.TCP, "hk", false},
		{config.DialDomain, policy.UDP, "hk", false},
		{config.DialDomain, policy.TCP, policy.OutboundDirect, false},
		{config.DialDomain, policy.TCP, policy.OutboundBlock, false},
	} {
		v.use(named(c.dial, false))
		if got := v.tellsNames(c.network, c.outbound); got != c.want {
			t.Errorf("%v, %v to %s: %v, want %v", c.dial, c.network, c.outbound, got, c.want)
		}
	}
}

// TestBelieves: a name that first bytes told stands for the address if the client has it from us, DNS says so, or the
// configuration trusts it; and DNS is asked only where that matters.
func TestBelieves(t *testing.T) {
	here, there := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("203.0.113.11")
	for what, c := range map[string]struct {
		trust   bool
		learned []string
		address netip.Addr
		says    []netip.Addr // DNS
		fails   error
		want    bool
		asked   bool
	}{
		"what DNS says":                {address: here, says: []netip.Addr{there, here}, want: true, asked: true},
		"mapped, as the kernel has it": {address: netip.AddrFrom16(here.As16()), says: []netip.Addr{here}, want: true, asked: true},
		"another address":              {address: here, says: []netip.Addr{there}, asked: true},
		"no address":                   {address: here, asked: true},
		"no answer":                    {address: here, says: []netip.Addr{here}, fails: errors.New("SERVFAIL"), asked: true},
		"learned from us":              {address: here, learned: []string{"other.test", "site.test"}, want: true},
		"another name from us":         {address: here, learned: []string{"other.test"}, asked: true},
		"trusted":                      {trust: true, address: here, want: true},
	} {
		asked := ""
		v := &verdicts{lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
			if _, bounded := ctx.Deadline(); !bounded {
				t.Errorf("%s: a look-up without an end", what)
			}
			asked = host
			return c.says, c.fails
		}}
		v.use(named(config.DialDomain, c.trust))
		if got := v.believes(t.Context(), datapath.Assignment{Names: c.learned}, c.address, "site.test"); got != c.want {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
		if (asked == "site.test") != c.asked {
			t.Errorf("%s: asked for %q", what, asked)
		}
	}
}

// TestOurNames: a name that only our DNS knows is told nobody, whatever speaks for it.
func TestOurNames(t *testing.T) {
	here := netip.MustParseAddr("203.0.113.10")
	given := &config.DNS{
		Hosts:       map[string][]netip.Addr{"nas.example": {here}},
		RebindAllow: []string{"corp.example", ".home.example"},
		Rules:       []config.DNSRule{{Answer: []netip.Addr{netip.MustParseAddr("203.0.113.66")}}},
	}
	for _, c := range []struct {
		name, address string
		dns           *config.DNS
		want          bool // the upstream is told
	}{
		{"site.test", "203.0.113.10", nil, true},
		{"site.test", "203.0.113.10", given, true},
		{"nas.example", "203.0.113.10", nil, true},
		{"nas.example", "203.0.113.10", given, false},
		{"www.nas.example", "203.0.113.10", given, true},
		{"corp.example", "203.0.113.10", given, false},
		{"www.corp.example", "203.0.113.10", given, false},
		{"incorp.example", "203.0.113.10", given, true},
		{"www.home.example", "203.0.113.10", given, false},
		{"site.test", "203.0.113.66", given, false},
		{"site.test", "192.168.0.9", nil, false},
		{"site.test", "::ffff:192.168.0.9", nil, false},
		{"site.test", "fd00::9", nil, false},
		{"site.test", "fe80::9", nil, false},
		{"printer", "203.0.113.10", nil, false},
	} {
		v := &verdicts{lookup: func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr(c.address)}, nil
		}}
		settings := named(config.DialDomain, true)
		settings.DNS = c.dns
		v.use(settings)
		if got := v.believes(t.Context(), datapath.Assignment{Names: []string{c.name}}, netip.MustParseAddr(c.address), c.name); got != c.want {
			t.Errorf("%s at %s, DNS %v: told: %v, want %v", c.name, c.address, c.dns != nil, got, c.want)
		}
	}
}
