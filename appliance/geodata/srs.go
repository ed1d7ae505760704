package geodata

import (
	"bytes"
	"compress/zlib"
	"fmt"
	"net/netip"
)

// A sing-box rule set: "SRS", a version, and zlib data: the number of rules, and the rules. A rule is
//
//	0, items, each with its number first, 255, inverted       all conditions, of which names and addresses are one
//	1, mode (0 and, 1 or), number of rules, rules, inverted
//
// Numbers are varints, but versions, item numbers and flags are bytes; strings are lists of a length and bytes each.
const (
	magicSRS   = "SRS"
	newestSRS  = 5
	deepestSRS = 16 // rules within rules
)

// The items that a list of names and addresses may have.
const (
	srsDomain        = 2
	srsDomainKeyword = 3
	srsDomainRegex   = 4
	srsIPCIDR        = 6
	srsEnd           = 255
)

// srsItems are the keys of what else a rule may ask, for messages.
var srsItems = map[byte]string{
	0: "query_type", 1: "network", 5: "source_ip_cidr", 7: "source_port", 8: "source_port_range", 9: "port", 10: "port_range",
	11: "process_name", 12: "process_path", 13: "package_name", 14: "wifi_ssid", 15: "wifi_bssid", 16: "adguard_domain",
	17: "process_path_regex", 18: "network_type", 19: "network_is_expensive", 20: "network_is_constrained",
	21: "network_interface_address", 22: "default_interface_address", 23: "package_name_regex",
}

func readSRS(data []byte, c *content) []error {
	if err := addSRS(data, c); err != nil {
		return []error{err}
	}
	return nil
}

func addSRS(data []byte, c *content) error {
	header := cursor{rest: data[len(magicSRS):]}
	if version := header.byte(); header.err != nil || version == 0 || version > newestSRS {
		return fmt.Errorf("its version is %d, and 1 to %d can be read: compile it for an older sing-box", version, newestSRS)
	}
	zipped := bytes.NewReader(header.rest)
	unzipped, err := zlib.NewReader(zipped)
	if err != nil {
		return fmt.Errorf("it is damaged: fetch it again (%w)", err)
	}
	data, err = unpack(unzipped)
	if err != nil {
		return err
	}
	if zipped.Len() > 0 {
		return errTrailing
	}
	in := srsReader{cursor: cursor{rest: data}, content: c}
	in.rules(0)
	return in.end()
}

// srsReader adds what it reads to content.
type srsReader struct {
	cursor
	*content
	rule int // counted from 1 for messages, those within others too
}

// refuse says what a list cannot express.
func (r *srsReader) refuse(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("rule %d: "+format+": a set is a list of names and addresses; write the rest in the rule that names it",
			append([]any{r.rule}, args...)...)
	}
}

// rules reads alternatives.
func (r *srsReader) rules(depth int) {
	for range r.uvarint() {
		if r.err != nil {
			return
		}
		r.rule++
		switch kind := r.byte(); {
		case r.err != nil:
		case kind == 0:
			r.items()
		case kind == 1 && depth < deepestSRS:
			r.logical(depth)
		case kind == 1:
			r.err = fmt.Errorf("rule %d: more than %d rules within each other", r.rule, deepestSRS)
		default:
			r.err = fmt.Errorf("rule %d is of kind %d, which this version does not know", r.rule, kind)
		}
	}
}

func (r *srsReader) logical(depth int) {
	begin := r.rule
	and := r.byte() == 0
	if n := (&cursor{rest: r.rest}).uvarint(); and && n != 1 && r.err == nil {
		r.refuse("its %d rules must all hold", n)
		return
	}
	r.rules(depth + 1)
	r.noInverse(begin)
}

func (r *srsReader) noInverse(rule int) {
	if inverted := r.byte() != 0; inverted && r.err == nil {
		r.rule = rule
		r.refuse("it is inverted")
	}
}

func (r *srsReader) items() {
	count := 0
	for ; r.err == nil; count++ {
		switch item := r.byte(); item {
		case srsDomain:
			r.fail(r.domains())
		case srsDomainKeyword:
			r.eachString(func(text string) error { return r.addName(keyword, text) })
		case srsDomainRegex:
			r.eachString(func(text string) error { return r.addName(regex, text) })
		case srsIPCIDR:
			r.ranges()
		case srsEnd:
			if count == 0 {
				r.refuse("it has no condition, so it matches everything")
			}
			r.noInverse(r.rule)
			return
		default:
			if r.err != nil {
				return
			}
			key, known := srsItems[item]
			if !known {
				r.err = fmt.Errorf("rule %d: item %d is one that this version does not know", r.rule, item)
				return
			}
			r.refuse("it asks for %s", key)
		}
	}
}

// fail keeps the first error.
func (r *srsReader) fail(err error) {
	if r.err == nil && err != nil {
		r.err = fmt.Errorf("rule %d: %w", r.rule, err)
	}
}

func (r *srsReader) eachString(f func(text string) error) {
	for range r.uvarint() {
		text := string(r.take(r.uvarint()))
		if r.err != nil {
			return
		}
		r.fail(f(text))
	}
}

// domains reads a reserved byte and a trie. Behind a name's reversal, a carriage return stands for what is below it, and
// a line feed, since version 2, for it and what is below.
func (r *srsReader) domains() error {
	r.byte()
	var t trie
	t.leaves = r.words(r.uvarint())
	t.bitmap = r.words(r.uvarint())
	t.labels = r.take(r.uvarint())
	if r.err != nil {
		return r.err
	}
	return t.each(func(name []byte) error {
		switch {
		case len(name) > 0 && name[0] == '\n':
			return r.addForeignName(suffix, string(name[1:]))
		case len(name) > 1 && name[0] == '\r' && name[1] == '.':
			return r.addForeignName(suffix, string(name[1:]))
		}
		return r.addForeignName(exact, string(name))
	})
}

// ranges reads a version, a number of ranges in 8 bytes, and of each the first and last address, with their lengths.
func (r *srsReader) ranges() {
	if version := r.byte(); version != 1 && r.err == nil {
		r.err = fmt.Errorf("rule %d: its addresses are in version %d, and only 1 can be read", r.rule, version)
	}
	for range r.uint64() {
		first, ok := netip.AddrFromSlice(r.take(r.uvarint()))
		last, alsoOK := netip.AddrFromSlice(r.take(r.uvarint()))
		if r.err == nil && (!ok || !alsoOK) {
			r.fail(fmt.Errorf("it is damaged: an address has neither 4 nor 16 bytes; fetch it again"))
		}
		if r.err != nil {
			return
		}
		r.fail(r.addRange(first, last))
	}
}
