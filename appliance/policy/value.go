package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Span is a range of ports, both ends included, at least 1.
type Span struct{ First, Last uint16 }

func (s Span) String() string {
	if s.First == s.Last {
		return strconv.Itoa(int(s.First))
	}
	return fmt.Sprintf("%d-%d", s.First, s.Last)
}

// The values of the other fields. Prefixes are netip.Prefix, masked.
type (
	country   string // a code of the geoip data, lower case
	private   struct{}
	version   uint8 // 4 or 6; 0: unknown
	codePoint uint8
	text      string // compared whole
)

func (c country) String() string   { return string(c) }
func (private) String() string     { return "true" }
func (v version) String() string   { return strconv.Itoa(int(v)) }
func (c codePoint) String() string { return strconv.Itoa(int(c)) }
func (t text) String() string      { return string(t) }

// The predicates. Each is asked only where the fact is known.

func matchDestination(v Value, f *facts, _ GeoData) bool {
	return v.(netip.Prefix).Contains(f.Destination.Addr())
}

func matchSource(v Value, f *facts, _ GeoData) bool {
	return v.(netip.Prefix).Contains(f.Source.Addr())
}

func matchCountry(v Value, f *facts, geo GeoData) bool {
	prefixes := countryPrefixes(geo, v.(country))
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(f.Destination.Addr()) })
}

func matchPrivate(_ Value, f *facts, _ GeoData) bool {
	a := f.Destination.Addr()
	return a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified()
}

func matchPort(v Value, f *facts, _ GeoData) bool {
	s, port := v.(Span), f.Destination.Port()
	return s.First <= port && port <= s.Last
}

func matchSourcePort(v Value, f *facts, _ GeoData) bool {
	s, port := v.(Span), f.Source.Port()
	return s.First <= port && port <= s.Last
}

func matchNetwork(v Value, f *facts, _ GeoData) bool   { return v.(Network) == f.Network }
func matchVersion(v Value, f *facts, _ GeoData) bool   { return v.(version) == f.version() }
func matchCodePoint(v Value, f *facts, _ GeoData) bool { return uint8(v.(codePoint)) == f.DSCP }
func matchMAC(v Value, f *facts, _ GeoData) bool       { return v.(MAC) == f.SourceMAC }
func matchInterface(v Value, f *facts, _ GeoData) bool { return string(v.(text)) == f.Interface }
func matchProcess(v Value, f *facts, _ GeoData) bool   { return string(v.(text)) == f.Process.Name }
func matchPath(v Value, f *facts, _ GeoData) bool      { return string(v.(text)) == f.Process.Path }
func matchUnit(v Value, f *facts, _ GeoData) bool      { return string(v.(text)) == f.Process.Unit }

// privatePrefixes are the destinations that ip_is_private matches, as in sing-box: private and shared
// use (RFC 1918, RFC 4193), loopback, link-local, multicast and unspecified.
var privatePrefixes = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/32"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("::/128"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

func privateText() string {
	texts := make([]string, len(privatePrefixes))
	for i, p := range privatePrefixes {
		texts[i] = "`" + p.String() + "`"
	}
	return strings.Join(texts, ", ")
}

// countryPrefixes returns nothing for an unknown code: Validate has refused it.
func countryPrefixes(geo GeoData, code country) []netip.Prefix {
	if geo == nil {
		return nil
	}
	prefixes, _ := geo.IP(string(code))
	return prefixes
}

// parsePrefix reads an address or a prefix. IPv4-mapped IPv6 is taken as the IPv4 that it stands for,
// as everywhere in this package.
func parsePrefix(text string) (Value, error) {
	if strings.Contains(text, "%") {
		return nil, errors.New("a zone cannot be matched: use inbound_interface beside the bare address")
	}
	if !strings.Contains(text, "/") {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil, errors.New("not an address or prefix: write 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")
		}
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		if addr, bits, _ := strings.Cut(text, "/"); isAddr(addr) {
			if strings.Contains(bits, ".") {
				return nil, fmt.Errorf("netmasks are not read: write the prefix length, such as %s/24", addr)
			}
			return nil, fmt.Errorf("the prefix length is not between 0 and %d", netip.MustParseAddr(addr).BitLen())
		}
		return nil, errors.New("not an address or prefix: write 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")
	}
	if addr := prefix.Addr(); addr.Is4In6() && prefix.Bits() >= 96 {
		prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
	}
	// sing-box would widen it silently; a typing error in an address book deserves to be seen.
	if masked := prefix.Masked(); masked != prefix {
		return nil, fmt.Errorf("bits are set after the prefix length: write %s for the network or %s for the address", masked, prefix.Addr())
	}
	return prefix, nil
}

func isAddr(text string) bool {
	_, err := netip.ParseAddr(text)
	return err == nil
}

func parseSpan(text string) (Value, error) {
	first, last, isRange := strings.Cut(text, "-")
	if !isRange {
		last = first
	}
	a, err := parsePort(first)
	b, errLast := parsePort(last)
	if err == nil {
		err = errLast
	}
	if err != nil {
		if strings.ContainsAny(text, ", ") {
			return nil, errors.New("not one port or range: write a list, [80, 443]")
		}
		if lo, hi, ok := strings.Cut(text, ":"); ok {
			return nil, fmt.Errorf("ranges are written with a hyphen: %s-%s", lo, hi)
		}
		return nil, err
	}
	if a > b {
		return nil, fmt.Errorf("the range ends before it begins: write %d-%d", b, a)
	}
	return Span{a, b}, nil
}

func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if errors.Is(err, strconv.ErrRange) || err == nil && n == 0 {
		return 0, errors.New("ports are 1 to 65535")
	}
	if err != nil {
		return 0, errors.New("not a port: write 443 or 1000-2000")
	}
	return uint16(n), nil
}

func parseCountry(text string) (Value, error) {
	code, err := parseCategory(text)
	return country(code), err
}

// parseCategory reads the name of a list in the geo data: those are compared in lower case.
func parseCategory(text string) (string, error) {
	if text == "" || strings.ContainsAny(text, " \t\r\n,:/") {
		return "", errors.New("not the name of a list: write one name per list entry, such as cn")
	}
	return strings.ToLower(text), nil
}

func parsePrivate(text string) (Value, error) {
	switch text {
	case "true":
		return private{}, nil
	case "false":
		return nil, errors.New("only true can be asked: write not: {ip_is_private: true}")
	}
	return nil, errors.New("write true")
}

func parseNetwork(text string) (Value, error) {
	switch text {
	case "tcp":
		return TCP, nil
	case "udp":
		return UDP, nil
	case "icmp", "icmpv6", "other":
		return nil, errors.New("write tcp or udp; all other protocols are not: {network: [tcp, udp]}")
	}
	return nil, errors.New("write tcp or udp")
}

func parseVersion(text string) (Value, error) {
	switch text {
	case "4":
		return version(4), nil
	case "6":
		return version(6), nil
	}
	return nil, errors.New("write 4 or 6")
}

func parseCodePoint(text string) (Value, error) {
	n, err := strconv.ParseUint(text, 10, 8)
	if err != nil || n > 63 {
		return nil, errors.New("code points are numbers from 0 to 63 (46 is EF, 8 is CS1)")
	}
	return codePoint(n), nil
}

func parseMAC(text string) (Value, error) {
	mac, err := ParseMAC(text)
	if err != nil {
		return nil, err
	}
	switch {
	case mac == MAC{}:
		return nil, errors.New("the zero address stands for an unknown one")
	case mac[0]&1 != 0:
		return nil, errors.New("a group address is never a source: write the address of the client's own interface")
	}
	return mac, nil
}

// ParseMAC reads six hexadecimal pairs with colons or hyphens between.
func ParseMAC(text string) (MAC, error) {
	var mac MAC
	bad := errors.New("not a MAC address: write six hexadecimal pairs, 02:00:00:00:00:10")
	if len(text) != 17 || text[2] != ':' && text[2] != '-' {
		return mac, bad
	}
	for i := range mac {
		if i > 0 && text[3*i-1] != text[2] {
			return MAC{}, bad
		}
		n, err := strconv.ParseUint(text[3*i:3*i+2], 16, 8)
		if err != nil {
			return MAC{}, bad
		}
		mac[i] = byte(n)
	}
	return mac, nil
}

// parseInterface follows the kernel's dev_valid_name (net/core/dev.c): at most 15 bytes, IFNAMSIZ - 1.
func parseInterface(name string) (Value, error) {
	if strings.ContainsAny(name, "*+") {
		return nil, errors.New("interface names are compared whole: list each interface")
	}
	if name == "" || len(name) > 15 || name == "." || name == ".." || strings.ContainsAny(name, "/: \t\n\v\f\r") {
		return nil, errors.New("not an interface name: they have 1 to 15 bytes without spaces, slashes and colons (see ip link)")
	}
	return text(name), nil
}

func parseProcess(name string) (Value, error) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 && i+1 < len(name) {
		return nil, fmt.Errorf("processes are compared by base name: write %s, or process_path: %s", name[i+1:], name)
	}
	if !isFileName(name) {
		return nil, errors.New("not the base name of a program: they have 1 to 255 bytes without slashes")
	}
	return text(name), nil
}

// isFileName reports whether a file or directory can have the name, in any of Linux's usual file systems (NAME_MAX).
func isFileName(name string) bool {
	return name != "" && len(name) <= 255 && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00")
}

// parsePath takes paths as the kernel tells them, so that spellings of one path need not be compared.
func parsePath(p string) (Value, error) {
	switch {
	case !path.IsAbs(p):
		return nil, errors.New("not an absolute path: write one like /usr/bin/curl, or process_name for the base name alone")
	case path.Clean(p) != p:
		return nil, fmt.Errorf("paths are compared whole: write %s", path.Clean(p))
	case p == "/" || len(p) > maxPath || slices.ContainsFunc(strings.Split(p[1:], "/"), func(name string) bool { return !isFileName(name) }):
		return nil, fmt.Errorf("not the path of a program: they have at most %d bytes, and each name in it at most 255", maxPath)
	}
	return text(p), nil
}

// maxPath is the kernel's PATH_MAX without the final zero, in bytes.
const maxPath = 4095

func parseUnit(name string) (Value, error) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 && i+1 < len(name) {
		return nil, fmt.Errorf("units are compared by name, without the slices around them: write %s", name[i+1:])
	}
	if !isFileName(name) {
		return nil, errors.New("not the name of a unit: they have 1 to 255 bytes without slashes, such as transmission.service")
	}
	return text(name), nil
}
