package geodata

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/net/idna"

	"sidegate/appliance/policy"
)

// fieldOf is a field of the policy: what its values mean is defined there.
func fieldOf(key string) *policy.Field {
	f, ok := policy.LookupField(key)
	if !ok {
		panic("geodata: the policy has no field " + key)
	}
	return f
}

var (
	exact   = fieldOf("domain")
	suffix  = fieldOf("domain_suffix") // with a leading dot: only what is below
	keyword = fieldOf("domain_keyword")
	regex   = fieldOf("domain_regex")
	address = fieldOf("ip_cidr")
)

// addName adds a name, or a pattern of names. Names in another script are taken in their ASCII form, as DNS has them.
func (c *content) addName(f *policy.Field, text string) error {
	if (f == exact || f == suffix) && !isASCII(text) {
		ascii, err := idna.Lookup.ToASCII(text)
		if err != nil {
			return fmt.Errorf("%.60q has no ASCII form: write it as DNS has it (xn--…)", text) // the cause would quote all of it
		}
		text = ascii
	}
	condition, err := f.Parse(text)
	if err != nil && len(text) > 100 { // the policy quotes all of it
		if cause := errors.Unwrap(err); cause != nil && len(cause.Error()) <= 200 {
			return fmt.Errorf("%s %.60q…: %w", f.Key, text, cause)
		}
		return fmt.Errorf("%s %.60q…: it cannot be read", f.Key, text)
	}
	if err != nil {
		return err
	}
	if len(c.names) == maxEntries {
		return errTooMany
	}
	c.names = append(c.names, condition.Values[0])
	return nil
}

// addForeignName is addName for lists that machines make of other lists: an address among the names is no mistake of
// their user's, and matches nothing.
func (c *content) addForeignName(f *policy.Field, text string) error {
	if f == exact || f == suffix {
		if last := len(text) - 1; last < 0 || isDigit(text[last]) || text[last] == ']' || text[0] == ':' { // cheaper than to parse all
			if _, err := netip.ParseAddr(text); err == nil {
				return nil
			}
		}
	}
	return c.addName(f, text)
}

// maxEntries bounds a list, of names and of prefixes: a small file can unfold to very much.
const maxEntries = 2_000_000

var errTooMany = fmt.Errorf("it has more than %d entries", maxEntries)

// addPrefix adds a prefix as the policy has them: masked, and IPv4 as itself where it is mapped into IPv6.
func (c *content) addPrefix(p netip.Prefix) error {
	if len(c.prefixes) == maxEntries {
		return errTooMany
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	c.prefixes = append(c.prefixes, p.Masked())
	return nil
}

// addRange adds the fewest prefixes that cover the addresses from first to last, which are of one family.
func (c *content) addRange(first, last netip.Addr) error {
	if first.BitLen() != last.BitLen() || last.Less(first) {
		return fmt.Errorf("the range from %s to %s is none", first, last)
	}
	for {
		// The largest block that begins here and does not go beyond the end.
		block := netip.PrefixFrom(first, first.BitLen())
		for block.Bits() > 0 {
			wider := netip.PrefixFrom(first, block.Bits()-1)
			if wider.Masked().Addr() != first || last.Less(lastOf(wider)) {
				break
			}
			block = wider
		}
		if err := c.addPrefix(block); err != nil {
			return err
		}
		end := lastOf(block)
		if end == last {
			return nil
		}
		first = end.Next()
	}
}

// lastOf is the last address of a masked prefix.
func lastOf(p netip.Prefix) netip.Addr {
	bytes := p.Addr().As16()
	for bit := 128 - p.Addr().BitLen() + p.Bits(); bit < 128; {
		if bit%8 == 0 {
			bytes[bit/8] = 0xff
			bit += 8
			continue
		}
		bytes[bit/8] |= 1 << (7 - bit%8)
		bit++
	}
	addr := netip.AddrFrom16(bytes)
	if p.Addr().Is4() {
		addr = addr.Unmap()
	}
	return addr
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
