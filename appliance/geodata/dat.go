package geodata

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"sidegate/appliance/policy"
)

// The .dat files are protocol buffers:
//
//	file    { repeated list = 1 }
//	list    { string code = 1; repeated domain or cidr = 2; bool inverse_match = 3 (geoip) }
//	domain  { enum type = 1; string value = 2; repeated attribute = 3 }
//	attribute { string key = 1; … }
//	cidr    { bytes ip = 1, of 4 or 16 bytes; uint32 prefix = 2 }
//
// Fields that are not in this list are of newer files, and say nothing about what a list matches.

// field is one of a message.
type field struct {
	number protowire.Number
	bytes  []byte // of strings and messages
	value  uint64 // of numbers
	kind   protowire.Type
}

var errDamaged = errors.New("it is damaged, or no .dat file: fetch it again")

// each calls f with every field of a message.
func each(message []byte, f func(field) error) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return errDamaged
		}
		message = message[n:]
		it := field{number: number, kind: kind}
		switch kind {
		case protowire.BytesType:
			it.bytes, n = protowire.ConsumeBytes(message)
		case protowire.VarintType:
			it.value, n = protowire.ConsumeVarint(message)
		case protowire.Fixed32Type, protowire.Fixed64Type:
			n = protowire.ConsumeFieldValue(number, kind, message)
		default: // groups: nobody writes them any more
			return errDamaged
		}
		if n < 0 {
			return errDamaged
		}
		message = message[n:]
		if err := f(it); err != nil {
			return err
		}
	}
	return nil
}

// entriesOf finds the lists' parts by code; one code may have several. A file without lists is none.
func entriesOf(data []byte) (parts map[string][][]byte, all []string, err error) {
	parts = map[string][][]byte{}
	err = each(data, func(f field) error {
		if f.number != 1 || f.kind != protowire.BytesType {
			return errDamaged
		}
		var code string
		err := each(f.bytes, func(f field) error {
			if f.number == 1 {
				if f.kind != protowire.BytesType {
					return errDamaged
				}
				code = strings.ToLower(string(f.bytes))
			}
			return nil
		})
		if err != nil {
			return err
		}
		if code == "" {
			return errDamaged
		}
		if parts[code] == nil {
			all = append(all, code)
		}
		parts[code] = append(parts[code], f.bytes)
		return nil
	})
	if err == nil && len(all) == 0 {
		err = errDamaged
	}
	return parts, all, err
}

func readSiteDat(data []byte, wanted []string) (map[string]*one, []string, error) {
	parts, all, err := entriesOf(data)
	if err != nil {
		return nil, nil, err
	}
	found := map[string]*one{}
	for _, name := range wanted {
		entries, attributes := parts[name], []string(nil)
		if entries == nil { // a list may have the @ in its own name
			words := strings.Split(name, "@")
			entries, attributes = parts[words[0]], words[1:]
		}
		if entries == nil {
			continue
		}
		c := new(one)
		c.err = c.addSites(entries, attributes)
		found[name] = c
	}
	return found, all, nil
}

// addSites adds the domains that have all of the attributes.
func (c *content) addSites(entries [][]byte, attributes []string) error {
	seen := map[string]bool{}
	for _, entry := range entries {
		err := each(entry, func(f field) error {
			if f.number != 2 {
				return nil
			}
			if f.kind != protowire.BytesType {
				return errDamaged
			}
			return c.addSite(f.bytes, attributes, seen)
		})
		if err != nil {
			return err
		}
	}
	for _, attribute := range attributes {
		if !seen[attribute] {
			var have []string
			for a := range seen {
				have = append(have, a)
			}
			return fmt.Errorf("none of its entries has the attribute %q%s", attribute, didYouMean(attribute, have))
		}
	}
	return nil
}

func (c *content) addSite(domain []byte, attributes []string, seen map[string]bool) error {
	var kind uint64
	var value string
	var has []string
	err := each(domain, func(f field) error {
		switch {
		case f.number == 1 && f.kind == protowire.VarintType:
			kind = f.value
		case f.number == 2 && f.kind == protowire.BytesType:
			value = string(f.bytes)
		case f.number == 3 && f.kind == protowire.BytesType:
			if len(attributes) == 0 {
				return nil
			}
			return each(f.bytes, func(f field) error {
				if f.number == 1 && f.kind == protowire.BytesType {
					attribute := strings.ToLower(string(f.bytes))
					seen[attribute] = true
					has = append(has, attribute)
				}
				return nil
			})
		case f.number <= 2:
			return errors.New("its entries are no domains: is it a geoip file?")
		}
		return nil
	})
	for _, attribute := range attributes {
		if !slices.Contains(has, attribute) {
			return err
		}
	}
	if err != nil {
		return err
	}
	if kind >= uint64(len(domainTypes)) {
		return fmt.Errorf("%q is of type %d, which this version does not know", value, kind)
	}
	return c.addForeignName(domainTypes[kind], value)
}

// domainTypes are what the numbers of the file stand for: plain, regex, root domain, full.
var domainTypes = [...]*policy.Field{keyword, regex, suffix, exact}

func readIPDat(data []byte, wanted []string) (map[string]*one, []string, error) {
	parts, all, err := entriesOf(data)
	if err != nil {
		return nil, nil, err
	}
	found := map[string]*one{}
	for _, code := range wanted {
		if parts[code] == nil {
			continue
		}
		c := new(one)
		for _, entry := range parts[code] {
			if c.err = c.addCIDRs(entry); c.err != nil {
				break
			}
		}
		found[code] = c
	}
	return found, all, nil
}

func (c *content) addCIDRs(entry []byte) error {
	return each(entry, func(f field) error {
		switch f.number {
		case 2:
			if f.kind != protowire.BytesType {
				return errDamaged
			}
			prefix, err := cidrOf(f.bytes)
			if err != nil {
				return err
			}
			return c.addPrefix(prefix)
		case 3:
			if f.kind == protowire.VarintType && f.value != 0 {
				return errors.New("it stands for every address that it does not list, which is not read: use its opposite under not")
			}
		}
		return nil
	})
}

func cidrOf(cidr []byte) (netip.Prefix, error) {
	var ip []byte
	var bits uint64
	err := each(cidr, func(f field) error {
		switch {
		case f.number == 1 && f.kind == protowire.BytesType:
			ip = f.bytes
		case f.number == 2 && f.kind == protowire.VarintType:
			bits = f.value
		case f.number <= 2:
			return errors.New("its entries are no addresses: is it a geosite file?")
		}
		return nil
	})
	if err != nil {
		return netip.Prefix{}, err
	}
	addr, ok := netip.AddrFromSlice(ip)
	if !ok || bits > uint64(addr.BitLen()) {
		return netip.Prefix{}, fmt.Errorf("an address of %d bytes with a prefix length of %d is none", len(ip), bits)
	}
	return netip.PrefixFrom(addr, int(bits)), nil
}
