package dns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// answer is what is believed of an upstream's message: the records of the question's own chain.
type answer struct {
	qtype     uint16
	rcode     int
	authentic bool
	names     []string // the question's name, then those of its aliases; lower case without the last dot
	records   []dns.RR // aliases first
	authority []dns.RR // what proves a negative answer, and DNSSEC's proofs
	ttl       time.Duration
	cut       bool // there were more records than are taken
}

// maxChain is how many aliases are followed. Resolvers give up between 8 and 17.
const maxChain = 16

// accept reads an upstream's message. Whatever it says about other names than the question's is dropped: an
// upstream may be asked by anybody for the name of an attacker's server.
func accept(a *ask, m *dns.Msg) (*answer, error) {
	switch {
	case m == nil || !m.Response || m.Opcode != dns.OpcodeQuery:
		return nil, errors.New("the message is no answer")
	case len(m.Question) != 1 || m.Question[0].Qtype != a.qtype || m.Question[0].Qclass != dns.ClassINET ||
		!strings.EqualFold(m.Question[0].Name, a.name):
		return nil, errors.New("the answer is to another question")
	case m.Truncated:
		return nil, errors.New("the answer is truncated")
	case m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError:
		return nil, fmt.Errorf("the answer is %s", rcodeText(m.Rcode))
	}
	got := &answer{qtype: a.qtype, rcode: m.Rcode, authentic: m.AuthenticatedData}
	sets, taken := recordSets(m.Answer), make(recordSet)
	owner, ended := a.name, false
	for {
		got.names = append(got.names, strings.TrimSuffix(owner, "."))
		var next string
		next, ended = got.follow(a, owner, sets, taken)
		if ended || next == "" {
			break
		}
		if len(got.names) > maxChain {
			return nil, fmt.Errorf("the answer has more than %d aliases, or they go in a circle", maxChain)
		}
		owner = next
	}
	if ended && m.Rcode == dns.RcodeNameError {
		return nil, errors.New("the answer says that the name does not exist, and what it has")
	}
	got.bound()
	got.takeAuthority(a, owner, ended, m.Ns)
	got.takeTTL(ended)
	return got, nil
}

func rcodeText(rcode int) string {
	if text, ok := dns.RcodeToString[rcode]; ok {
		return text
	}
	return fmt.Sprint("rcode ", rcode)
}

const (
	// maxRecords bounds the records of one owner and type, and the proofs, that are taken from a message. Each
	// costs every client memory and the kernel a name; real sets have a tenth of it.
	maxRecords = 128
	// maxAddresses bounds the addresses that one answer gives, and teaches: they are the same.
	maxAddresses = 128
)

// place is where records of one set are.
type place struct {
	owner string // in lower case
	rtype uint16
}

// recordSets sorts a message's records, so that a chain is followed without reading all of them for each
// alias. It looks at each record once.
func recordSets(records []dns.RR) map[place][]dns.RR {
	sets := make(map[place][]dns.RR)
	for _, record := range records {
		h := record.Header()
		if h.Class != dns.ClassINET {
			continue
		}
		p := place{strings.ToLower(h.Name), h.Rrtype}
		sets[p] = append(sets[p], record)
	}
	return sets
}

// follow takes the records of one owner. It returns the name that the owner is an alias of, or that the
// chain ended with records of the type that was asked for.
func (got *answer) follow(a *ask, owner string, sets map[place][]dns.RR, taken recordSet) (next string, ended bool) {
	ended = got.take(sets[place{owner, a.qtype}], taken) > 0
	above := parents(owner)
	for _, parent := range above {
		got.take(sets[place{parent, dns.TypeDNAME}], taken)
	}
	if aliases := sets[place{owner, dns.TypeCNAME}]; !ended && len(aliases) > 0 {
		if alias, ok := aliases[0].(*dns.CNAME); ok {
			got.take(aliases[:1], taken)
			next = strings.ToLower(alias.Target)
		}
	}
	if a.do {
		got.take(signatures(sets[place{owner, dns.TypeRRSIG}], got.qtype, dns.TypeCNAME), taken)
		for _, parent := range above {
			got.take(signatures(sets[place{parent, dns.TypeRRSIG}], dns.TypeDNAME), taken)
		}
	}
	return next, ended
}

// parents are a name and the zones that it may be in, but not the root.
func parents(name string) []string {
	var all []string
	for _, at := range dns.Split(name) {
		all = append(all, name[at:])
	}
	return all
}

// signatures are those of some types' records.
func signatures(records []dns.RR, covered ...uint16) []dns.RR {
	var some []dns.RR
	for _, record := range records {
		if s, ok := record.(*dns.RRSIG); ok && slices.Contains(covered, s.TypeCovered) {
			some = append(some, s)
		}
	}
	return some
}

// recordSet tells which records there are, by their wire form without the TTL.
type recordSet map[string]bool

// add reports whether a record is new. One that has no wire form always is: nobody will get it.
func (s recordSet) add(record dns.RR) bool {
	ttl := record.Header().Ttl
	record.Header().Ttl = 0
	wire := make([]byte, dns.Len(record)+1)
	n, err := dns.PackRR(record, wire, 0, nil, false)
	record.Header().Ttl = ttl
	if err != nil {
		return true
	}
	if s[string(wire[:n])] {
		return false
	}
	s[string(wire[:n])] = true
	return true
}

// take keeps copies, and says of how many records that are new: an upstream's message may be shared, and
// answers are changed. Owners are in lower case, so that all of them are one name when the message is
// compressed. A set that is cut is not the one that was signed.
func (got *answer) take(records []dns.RR, taken recordSet) (n int) {
	for _, record := range records {
		if n == maxRecords {
			got.authentic, got.cut = false, true
			break
		}
		record = dns.Copy(record)
		record.Header().Name = strings.ToLower(record.Header().Name)
		if alias, ok := record.(*dns.CNAME); ok {
			alias.Target = strings.ToLower(alias.Target)
		}
		if taken.add(record) {
			got.records = append(got.records, record)
			n++
		}
	}
	return n
}

// bound drops the addresses beyond those that an answer may have.
func (got *answer) bound() {
	n := 0
	got.filter(func(netip.Addr) bool { n++; return n > maxAddresses })
	if got.cut {
		got.unsign()
	}
}

// takeAuthority keeps the SOA record of a negative answer, if the zone has the name at all, and the proofs.
func (got *answer) takeAuthority(a *ask, last string, ended bool, records []dns.RR) {
	taken := make(recordSet)
	for _, record := range records {
		h := record.Header()
		if h.Class != dns.ClassINET {
			continue
		}
		wanted := false
		switch record := record.(type) {
		case *dns.SOA:
			wanted = !ended && isBelow(strings.TrimSuffix(last, "."), lowerName(h.Name)) || !ended && h.Name == "."
		case *dns.NSEC, *dns.NSEC3:
			wanted = a.do
		case *dns.RRSIG:
			covered := record.TypeCovered
			wanted = a.do && (covered == dns.TypeNSEC || covered == dns.TypeNSEC3 || covered == dns.TypeSOA && !ended)
		}
		if !wanted {
			continue
		}
		if len(got.authority) == maxRecords {
			return
		}
		record = dns.Copy(record)
		record.Header().Name = strings.ToLower(record.Header().Name)
		if taken.add(record) {
			got.authority = append(got.authority, record)
		}
	}
}

// maxNegative bounds the life of a negative answer (RFC 2308 section 5).
const maxNegative = 3 * time.Hour

// unknownNegative is the life of a negative answer whose zone does not say (RFC 2308 section 5 would not
// keep it at all; but clients ask again at once).
const unknownNegative = 5 * time.Second

// takeTTL finds the life of the answer: the shortest of its records.
func (got *answer) takeTTL(ended bool) {
	got.ttl = time.Duration(1<<31-1) * time.Second
	for _, record := range got.records {
		got.ttl = min(got.ttl, seconds(record.Header().Ttl))
	}
	if ended {
		return
	}
	negative := unknownNegative
	for _, record := range got.authority {
		if soa, ok := record.(*dns.SOA); ok {
			negative = min(seconds(soa.Hdr.Ttl), seconds(soa.Minttl), maxNegative)
		}
	}
	got.ttl = min(got.ttl, negative)
}

// seconds reads a TTL; the upper half of the range means 0 (RFC 2181 section 8).
func seconds(ttl uint32) time.Duration {
	if ttl > 1<<31-1 {
		return 0
	}
	return time.Duration(ttl) * time.Second
}

// hostAddresses are those of the name itself.
func (got *answer) hostAddresses() []netip.Addr {
	var all []netip.Addr
	for _, record := range got.records {
		if addr, ok := recordAddress(record); ok {
			all = append(all, addr)
		}
	}
	return all
}

// addresses are all that a client could use.
func (got *answer) addresses() []netip.Addr {
	all := got.hostAddresses()
	for _, record := range got.records {
		if s := service(record); s != nil {
			all = append(all, hints(s)...)
		}
	}
	return all
}

// recordAddress is the address in a record of one.
func recordAddress(record dns.RR) (netip.Addr, bool) {
	switch record := record.(type) {
	case *dns.A:
		return addrOf(record.A, true)
	case *dns.AAAA:
		return addrOf(record.AAAA, false)
	}
	return netip.Addr{}, false
}

// service is the part that HTTPS and SVCB records share; nil for others.
func service(record dns.RR) *dns.SVCB {
	switch record := record.(type) {
	case *dns.HTTPS:
		return &record.SVCB
	case *dns.SVCB:
		return record
	}
	return nil
}

// lessons are what has to be taught before a client gets the answer. Addresses that no gateway forwards to,
// such as 0.0.0.0 in a list of hosts, are nothing to learn.
func (got *answer) lessons() []lesson {
	var lessons []lesson
	add := func(names []string, addrs ...netip.Addr) {
		for i := range addrs {
			addrs[i] = addrs[i].Unmap()
		}
		addrs = slices.DeleteFunc(addrs, func(a netip.Addr) bool { return !a.IsGlobalUnicast() })
		if len(addrs) == 0 || len(names) == 0 {
			return
		}
		if n := len(lessons); n > 0 && slices.Equal(lessons[n-1].names, names) {
			lessons[n-1].addrs = append(lessons[n-1].addrs, addrs...)
			return
		}
		lessons = append(lessons, lesson{names, addrs})
	}
	for _, record := range got.records {
		if addr, ok := recordAddress(record); ok {
			add(got.names, addr)
		}
		if s := service(record); s != nil {
			add(serviceNames(got.names, s), hints(s)...)
		}
	}
	return lessons
}

func addrOf(ip net.IP, v4 bool) (netip.Addr, bool) {
	if v4 {
		ip = ip.To4()
	}
	addr, ok := netip.AddrFromSlice(ip)
	return addr, ok
}

// serviceNames are the names that a client connects to by a service's hints: port and protocol, which are
// labels of the owner (RFC 9460 section 9.1), are no part of a host's name.
func serviceNames(chain []string, record *dns.SVCB) []string {
	names := make([]string, 0, len(chain)+1)
	if target := lowerName(record.Target); target != "" {
		chain = append(slices.Clip(chain), target)
	}
	for _, name := range chain {
		for strings.HasPrefix(name, "_") {
			_, name, _ = strings.Cut(name, ".")
		}
		if name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func hints(record *dns.SVCB) []netip.Addr {
	var addrs []netip.Addr
	for _, value := range record.Value {
		var ips []net.IP
		v4 := false
		switch value := value.(type) {
		case *dns.SVCBIPv4Hint:
			ips, v4 = value.Hint, true
		case *dns.SVCBIPv6Hint:
			ips = value.Hint
		}
		for _, ip := range ips {
			if addr, ok := addrOf(ip, v4); ok {
				addrs = append(addrs, addr)
			}
		}
	}
	return addrs
}
