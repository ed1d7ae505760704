package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
)

// The generators of the field table: random makes a value as a user would write it, near moves a flow
// to a boundary of one, on either side.

var randomBases = []netip.Addr{
	netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("10.0.0.0"), netip.MustParseAddr("10.255.255.255"),
	netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.128"), netip.MustParseAddr("192.168.0.3"),
	netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("224.0.0.251"), netip.MustParseAddr("255.255.255.255"),
	netip.MustParseAddr("::"), netip.MustParseAddr("::1"), netip.MustParseAddr("2001:db8::"),
	netip.MustParseAddr("2001:db8::8000:0:0:1"), netip.MustParseAddr("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),
	netip.MustParseAddr("fd00::3"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("ff02::fb"),
	netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
}

// someAddr is one of the bases, or as near to one as a random number of leading bits.
func someAddr(r *rand.Rand, is4 bool) netip.Addr {
	for {
		base := pick(r, randomBases)
		if base.Is4() != is4 {
			continue
		}
		if oneIn(r, 4) {
			return base
		}
		bytes := base.AsSlice()
		for bit := r.IntN(len(bytes) * 8); bit < len(bytes)*8; bit++ {
			bytes[bit/8] ^= byte(r.IntN(2)) << (7 - bit%8)
		}
		addr, _ := netip.AddrFromSlice(bytes)
		return addr
	}
}

// randomPrefix is rarely a short one: those would decide nearly every flow.
func randomPrefix(r *rand.Rand) string {
	addr := someAddr(r, oneIn(r, 2))
	bits := addr.BitLen()
	switch r.IntN(12) {
	case 0:
		bits = pick(r, []int{0, 0, 1, 7})
	case 1, 2:
		return addr.String() // a bare address
	case 3, 4, 5, 6:
		bits = pick(r, []int{8, 9, 15, 16, 17, 23, 24, 25, 31, 32})
	default:
		bits -= r.IntN(bits)
	}
	return netip.PrefixFrom(addr, bits).Masked().String()
}

// nearPrefix is the first or last address of the prefix, a neighbour of these, or one inside.
func nearPrefix(r *rand.Rand, prefix netip.Prefix) netip.Addr {
	first := prefix.Masked().Addr()
	bytes := first.AsSlice()
	inside := first.AsSlice()
	for bit := prefix.Bits(); bit < len(bytes)*8; bit++ {
		bytes[bit/8] |= 1 << (7 - bit%8)
		inside[bit/8] |= byte(r.IntN(2)) << (7 - bit%8)
	}
	last, _ := netip.AddrFromSlice(bytes)
	within, _ := netip.AddrFromSlice(inside)
	addr := pick(r, []netip.Addr{first, first, last, last, within, within, first.Prev(), last.Next()})
	if !addr.IsValid() { // beyond the end of the address space
		return first
	}
	return addr
}

func nearDestination(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Destination = netip.AddrPortFrom(nearPrefix(r, v.(netip.Prefix)), f.Destination.Port())
}

func nearSource(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Source = netip.AddrPortFrom(nearPrefix(r, v.(netip.Prefix)), f.Source.Port())
}

func randomCountry(r *rand.Rand) string { return pick(r, randomCodes) }

func nearCountry(r *rand.Rand, v Value, f *Flow, geo GeoData) {
	if prefixes := countryPrefixes(geo, v.(country)); len(prefixes) > 0 {
		nearDestination(r, pick(r, prefixes), f, geo)
	}
}

func nearPrivate(r *rand.Rand, _ Value, f *Flow, geo GeoData) {
	nearDestination(r, pick(r, privatePrefixes), f, geo)
}

var randomPorts = []uint16{1, 2, 53, 80, 443, 1023, 1024, 8080, 32767, 32768, 65534, 65535}

func randomSpan(r *rand.Rand) string {
	s := Span{First: pick(r, randomPorts)}
	if oneIn(r, 2) {
		s.First = uint16(1 + r.IntN(1<<16-1))
	}
	s.Last = s.First
	switch r.IntN(4) {
	case 0:
		s.Last = uint16(min(1<<16-1, int(s.First)+r.IntN(20)))
	case 1:
		s.Last = pick(r, randomPorts)
	}
	if s.First > s.Last {
		s.First, s.Last = s.Last, s.First
	}
	return s.String()
}

// nearSpan is one of the ends, a port beside them, or one between. Port 0 is the unknown one.
func nearSpan(r *rand.Rand, s Span) uint16 {
	return pick(r, []uint16{
		s.First, s.First, s.Last, s.Last, s.First - 1, s.Last + 1,
		s.First + uint16(r.IntN(int(s.Last-s.First)+1)),
	})
}

func nearPort(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Destination = netip.AddrPortFrom(f.Destination.Addr(), nearSpan(r, v.(Span)))
}

func nearSourcePort(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Source = netip.AddrPortFrom(f.Source.Addr(), nearSpan(r, v.(Span)))
}

func randomNetwork(r *rand.Rand) string { return pick(r, []string{"tcp", "udp"}) }

func nearNetwork(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Network = pick(r, []Network{v.(Network), v.(Network), TCP, UDP, 0})
}

func randomVersion(r *rand.Rand) string { return pick(r, []string{"4", "6"}) }

func nearVersion(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	if is4 := v.(version) == 4; is4 != f.Destination.Addr().Is4() && !oneIn(r, 3) {
		f.Source = netip.AddrPortFrom(someAddr(r, is4), f.Source.Port())
		f.Destination = netip.AddrPortFrom(someAddr(r, is4), f.Destination.Port())
	}
}

func randomCodePoint(r *rand.Rand) string {
	return strconv.Itoa(pick(r, []int{0, 1, 46, 62, 63, r.IntN(64)}))
}

func nearCodePoint(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.DSCP = (uint8(v.(codePoint)) + pick(r, []uint8{0, 0, 0, 1, 63})) % 64
}

// nearbyMAC differs from the random MACs in a few bits only.
var nearbyMAC = MAC{2, 0, 0, 0, 0, 0x10}

func someMAC(r *rand.Rand) MAC {
	return MAC{2, byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())}
}

func flipBit(r *rand.Rand, mac MAC) MAC {
	bit := 8 + r.IntN(40) // the first byte says that it is a unicast address
	mac[bit/8] ^= 1 << (bit % 8)
	return mac
}

func randomMAC(r *rand.Rand) string {
	return pick(r, []MAC{nearbyMAC, flipBit(r, nearbyMAC), someMAC(r)}).String()
}

func nearMAC(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.SourceMAC = v.(MAC)
	if oneIn(r, 3) {
		f.SourceMAC = flipBit(r, f.SourceMAC)
	}
}

func randomInterface(r *rand.Rand) string {
	return pick(r, []string{"eth0", "eth1", "eth10", "br-lan"})
}

func nearInterface(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Interface = pick(r, []string{v.String(), v.String(), randomInterface(r)})
}

func randomProcess(r *rand.Rand) string {
	return pick(r, []string{"curl", "Curl", "curl2", "sshd"})
}

func nearProcess(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Process.Name = pick(r, []string{v.String(), v.String(), randomProcess(r)})
}

// The paths have their components in common, and one another's as their end.
func randomPath(r *rand.Rand) string {
	return pick(r, []string{"/usr/bin/curl", "/bin/curl", "/bin/usr/curl", "/usr/bin/curl2", "/usr/bin", "/curl"})
}

func nearPath(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Process.Path = pick(r, []string{v.String(), v.String(), randomPath(r)})
}

func randomUnit(r *rand.Rand) string {
	return pick(r, []string{"web.service", "web@1.service", "web.socket", "session-1.scope", "curl"})
}

func nearUnit(r *rand.Rand, v Value, f *Flow, _ GeoData) {
	f.Process.Unit = pick(r, []string{v.String(), v.String(), randomUnit(r)})
}

var (
	randomLabels = []string{"a", "b", "ab", "ads", "ads1", "www", "cdn-1", "xn--p1ai", "example"}
	randomZones  = []string{"com", "cn", "org", "example.com", "example.cn", "a"}
)

func randomDomain(r *rand.Rand) string {
	name := pick(r, randomZones)
	for range r.IntN(3) {
		name = pick(r, randomLabels) + "." + name
	}
	return name
}

func randomSuffix(r *rand.Rand) string {
	return pick(r, []string{"", "", "."}) + randomDomain(r)
}

func randomKeyword(r *rand.Rand) string {
	name := randomDomain(r)
	begin := r.IntN(len(name))
	return name[begin : begin+1+r.IntN(len(name)-begin)]
}

func randomRegex(r *rand.Rand) string {
	return pick(r, []string{
		`^a\.`, `\.cn$`, `^ads?[0-9]*\.`, `^(www|ab)\.example\.`, `xn--`, `^[^.]+$`, `EXAMPLE\.com$`, `^(?:a\.)+`, `b`,
	})
}

func randomSite(r *rand.Rand) string { return pick(r, randomCategories) }

// nearName sets or adds a name around the pattern: itself, a parent, a child, a sibling, other spellings.
func nearName(r *rand.Rand, v Value, f *Flow, geo GeoData) {
	if category, ok := v.(siteName); ok {
		patterns := sitePatterns(geo, category)
		if len(patterns) == 0 {
			return
		}
		v = pick(r, patterns)
	}
	name := strings.Trim(v.String(), ".")
	if _, ok := v.(regexName); ok || name == "" {
		name = randomDomain(r)
	}
	_, parent, _ := strings.Cut(name, ".")
	name = pick(r, []string{
		name, name, name, parent, "a." + name, "b.a." + name, "x" + name, name + "x", name[1:], name + ".com",
		strings.ToUpper(name), name + ".", fmt.Sprintf("a.%s.", strings.ToUpper(name)),
	})
	switch {
	case f.Names != nil && oneIn(r, 3):
		f.Names = append(f.Names, name)
	case f.Names != nil && oneIn(r, 3):
		f.Aliases = map[string][]string{f.Names[0]: {name}}
	default:
		f.Names = []string{name}
	}
}
