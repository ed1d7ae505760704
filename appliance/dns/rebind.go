package dns

import (
	"net/netip"
	"strings"
)

// private are the addresses that a public name must not lead to: a web page could otherwise make its own
// name mean the router, and talk to it as to itself. Beside what netip calls private, loopback, link-local,
// multicast and unspecified.
var private = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),      // this network (RFC 1122): Linux takes 0.0.0.0 for the host itself
	netip.MustParsePrefix("100.64.0.0/10"),  // shared address space (RFC 6598)
	netip.MustParsePrefix("192.0.0.0/24"),   // IETF protocol assignments (RFC 6890)
	netip.MustParsePrefix("240.0.0.0/4"),    // reserved, and broadcast
	netip.MustParsePrefix("::ffff:0:0/96"),  // IPv4-mapped: never a destination on the wire (RFC 4291)
	netip.MustParsePrefix("::/96"),          // IPv4-compatible
	netip.MustParsePrefix("fec0::/10"),      // site-local (RFC 3879)
	netip.MustParsePrefix("64:ff9b:1::/48"), // local-use translation (RFC 8215)
}

// embedding are the prefixes behind which an IPv4 address follows.
var embedding = []netip.Prefix{
	netip.MustParsePrefix("64:ff9b::/96"), // RFC 6052
	netip.MustParsePrefix("2002::/16"),    // 6to4, RFC 3056
}

// isPrivate reports whether an address is one that only its own network knows.
func isPrivate(a netip.Addr) bool {
	if a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() {
		return true
	}
	for _, p := range private {
		if p.Contains(a) {
			return true
		}
	}
	for _, p := range embedding {
		if p.Contains(a) {
			b, at := a.As16(), p.Bits()/8
			return isPrivate(netip.AddrFrom4([4]byte(b[at : at+4])))
		}
	}
	return false
}

// rebinding says which names may have private addresses.
type rebinding struct {
	allowed map[string]bool // suffixes; with a leading dot they are not names themselves
	own     func(netip.Addr) bool
}

// localSuffixes are for names that exist in one network only: RFC 6762, RFC 8375, RFC 6761, and "internal",
// which ICANN reserved for private use in 2024. "lan" is what many routers make up.
var localSuffixes = []string{"lan", "local", "home.arpa", "internal", "localhost"}

// discovery is the name by which hosts find the prefix of the network's translator (RFC 7050): its addresses are special,
// and IANA's own, so that no page can have it for its origin (RFC 8880).
const discovery = "ipv4only.arpa"

func newRebinding(allow []string, own func(netip.Addr) bool) rebinding {
	r := rebinding{allowed: make(map[string]bool), own: own}
	for _, list := range [][]string{localSuffixes, allow} {
		for _, suffix := range list {
			r.allowed[lowerName(suffix)] = true
		}
	}
	return r
}

// exempt reports whether a name may lead to any address. It is the name that the client asked for, not what
// an answer says it is an alias of: that is what a page's origin is compared with.
func (r *rebinding) exempt(name string) bool {
	if !strings.Contains(name, ".") || name == discovery || r.allowed[name] {
		return true
	}
	for {
		_, parent, ok := strings.Cut(name, ".")
		if !ok {
			return false
		}
		if r.allowed[parent] || r.allowed["."+parent] {
			return true
		}
		name = parent
	}
}

// forbidden reports whether an address must be kept from a client that asked for a public name.
func (r *rebinding) forbidden(a netip.Addr) bool {
	return isPrivate(a) || r.own != nil && r.own(a)
}

// lowerName is a name in the form that rules and the Learner take.
func lowerName(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }
