package policy

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
)

// Random returns a valid policy for the proof that Match, Tables.Match and the BPF program agree. It
// is determined by r. Rule counts gather around the ends of the bit vectors' words; values come from
// small universes, so that they nest, repeat and contradict each other.
func Random(r *rand.Rand) *Policy {
	p := &Policy{Default: pick(r, randomOutbounds), Geo: randomGeo(r)}
	n := r.IntN(9)
	if oneIn(r, 8) {
		n = pick(r, []int{31, 62, 63, 64, 65, 66, 127, 128, 129, 500, 639, 640, 641, 900, 959, 960, 961, 1022, 1023, 1024})
	}
	for i := range n {
		p.Rules = append(p.Rules, randomRule(r, i, n))
	}
	return p
}

var randomOutbounds = []string{OutboundDirect, OutboundBlock, "hk", "us"}

func randomRule(r *rand.Rand, index, n int) Rule {
	rule := Rule{Outbound: pick(r, randomOutbounds)}
	if oneIn(r, 2) {
		rule.Name = fmt.Sprint("r", index)
	}
	switch rule.Outbound {
	case OutboundBlock:
		rule.Reject = oneIn(r, 2)
	case OutboundDirect:
		rule.Mark = pick(r, []uint32{0, 0, 1, 0xff})
		rule.SNAT = pick(r, []*bool{nil, nil, new(true), new(false)})
	}
	// In a long policy most rules match one flow in thousands: else none reached the last ones.
	if n > 16 && !oneIn(r, 4*n) {
		v := pick(r, narrowValues)
		rule.Is = append(rule.Is, mustParse(v.key, v.text(r)))
	}
	narrow, more := len(rule.Is) > 0, r.IntN(4)
	if narrow {
		more /= 2
	}
	for range more {
		c := randomCondition(r)
		if narrow && c.Field.Dimension == rule.Is[0].Field.Dimension {
			continue // an alternative would widen it
		}
		rule.Is = append(rule.Is, c)
	}
	for range max(0, r.IntN(4)-1) {
		rule.Not = append(rule.Not, randomCondition(r))
	}
	return rule
}

func randomCondition(r *rand.Rand) Condition {
	f := pick(r, fields)
	texts := make([]string, 1+r.IntN(3))
	for i := range texts {
		texts[i] = f.random(r)
	}
	return mustParse(f.Key, texts...)
}

// narrowValues are fields with values that hardly any flow has by chance.
var narrowValues = []struct {
	key  string
	text func(r *rand.Rand) string
}{
	{"ip_cidr", narrowPrefix},
	{"source_ip_cidr", narrowPrefix},
	{"port", func(r *rand.Rand) string { return strconv.Itoa(1 + r.IntN(1<<16-1)) }},
	{"source_port", func(r *rand.Rand) string { return strconv.Itoa(1 + r.IntN(1<<16-1)) }},
	{"domain", func(r *rand.Rand) string { return fmt.Sprintf("n%x.example.com", r.Uint32()) }},
	{"domain_suffix", func(r *rand.Rand) string { return fmt.Sprintf("n%x.cn", r.Uint32()) }},
	{"source_mac_address", func(r *rand.Rand) string { return someMAC(r).String() }},
}

func narrowPrefix(r *rand.Rand) string {
	var bytes [16]byte
	binary.BigEndian.PutUint64(bytes[:], r.Uint64()|1<<61)
	addr := netip.AddrFrom16(bytes)
	if oneIn(r, 2) {
		addr = netip.AddrFrom4([4]byte(bytes[:4]))
	}
	return netip.PrefixFrom(addr, addr.BitLen()-r.IntN(9)).Masked().String()
}

// mustParse is for texts of this file's generators, which have to be valid.
func mustParse(key string, texts ...string) Condition {
	f, ok := LookupField(key)
	if !ok {
		panic("policy: no field " + key)
	}
	c, err := f.Parse(texts...)
	if err != nil {
		panic("policy: " + err.Error())
	}
	return c
}

// lists is GeoData in memory.
type lists struct {
	sites map[string][]Value
	codes map[string][]netip.Prefix
}

func (l *lists) Site(category string) ([]Value, bool) {
	values, ok := l.sites[category]
	return values, ok
}

func (l *lists) IP(code string) ([]netip.Prefix, bool) {
	prefixes, ok := l.codes[code]
	return prefixes, ok
}

var (
	randomCategories = []string{"ads", "cn", "media"}
	randomCodes      = []string{"cn", "de", "us"}
)

// randomGeo has a list for each category and code; some are empty.
func randomGeo(r *rand.Rand) *lists {
	geo := &lists{map[string][]Value{}, map[string][]netip.Prefix{}}
	for _, category := range randomCategories {
		values := []Value{}
		for range r.IntN(5) {
			f, _ := LookupField(pick(r, []string{"domain", "domain_suffix", "domain_keyword", "domain_regex"}))
			values = append(values, mustParse(f.Key, f.random(r)).Values...)
		}
		geo.sites[category] = values
	}
	for _, code := range randomCodes {
		prefixes := []netip.Prefix{}
		for range r.IntN(6) {
			prefixes = append(prefixes, mustParse("ip_cidr", randomPrefix(r)).Values[0].(netip.Prefix))
		}
		geo.codes[code] = prefixes
	}
	return geo
}

// RandomFlow returns a flow near the boundaries of what the policy asks: the first and last address
// of a prefix and their neighbours, the ports around a range, parents and children of a name, MACs that
// differ in one bit, missing facts. It is a packet that can exist: its addresses are of one family.
func (p *Policy) RandomFlow(r *rand.Rand) Flow {
	f := someFlow(r)
	if len(p.Rules) > 0 {
		for range 1 + r.IntN(2) { // often two rules compete for the flow
			rule := &p.Rules[r.IntN(len(p.Rules))]
			conditions := slices.Concat(rule.Is, rule.Not)
			r.Shuffle(len(conditions), func(i, j int) { conditions[i], conditions[j] = conditions[j], conditions[i] })
			for _, c := range conditions {
				if !oneIn(r, 10) {
					c.Field.near(r, pick(r, c.Values), &f, p.Geo)
				}
			}
		}
	}
	if oneIn(r, 6) {
		forget := pick(r, []func(){
			func() { f.Names = nil },
			func() { f.SourceMAC = MAC{} },
			func() { f.Interface = "" },
			func() { f.Process = Process{} },
			func() { f.Process.Name = "" },
			func() { f.Process.Path = "" },
			func() { f.Process.Unit = "" },
			func() { f.Network = 0 },
		})
		forget()
	}
	if a, b := f.Source.Addr(), f.Destination.Addr(); a.Is4() != b.Is4() {
		if oneIn(r, 2) {
			f.Source = netip.AddrPortFrom(someAddr(r, b.Is4()), f.Source.Port())
		} else {
			f.Destination = netip.AddrPortFrom(someAddr(r, a.Is4()), f.Destination.Port())
		}
	}
	if f.Network == 0 {
		f.Source = netip.AddrPortFrom(f.Source.Addr(), 0)
		f.Destination = netip.AddrPortFrom(f.Destination.Addr(), 0)
	}
	return f
}

// someFlow is a flow with every fact known, most of them in the universes of the random values.
func someFlow(r *rand.Rand) Flow {
	is4 := oneIn(r, 2)
	f := Flow{
		Network:     pick(r, []Network{TCP, UDP}),
		Source:      netip.AddrPortFrom(someAddr(r, is4), uint16(1+r.IntN(1<<16-1))),
		Destination: netip.AddrPortFrom(someAddr(r, is4), uint16(1+r.IntN(1<<16-1))),
		DSCP:        pick(r, []uint8{0, 0, uint8(r.IntN(64))}),
		SourceMAC:   pick(r, []MAC{someMAC(r), nearbyMAC}),
		Interface:   randomInterface(r),
		Process:     Process{randomProcess(r), randomPath(r), randomUnit(r)},
	}
	for range pick(r, []int{0, 1, 1, 1, 2, 3}) {
		f.Names = append(f.Names, randomDomain(r))
	}
	if len(f.Names) > 0 && oneIn(r, 3) {
		f.Aliases = map[string][]string{f.Names[0]: {randomDomain(r), randomDomain(r)}}
	}
	return f
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func oneIn(r *rand.Rand, n int) bool { return r.IntN(n) == 0 }
