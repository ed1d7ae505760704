package geodata

import (
	"bytes"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// A mihomo rule set is zstd data:
//
//	"MRS", version 1
//	what it lists        1 byte: 0 names, 1 addresses
//	how many             8 bytes, for people
//	extra                8 bytes of length, and as many bytes: nobody uses it
//	version 1            1 byte
//	names: a trie        leaves, bitmap (words) and labels (bytes), each after its length in 8 bytes
//	addresses: ranges    how many, in 8 bytes; the first and the last address of each, 16 bytes, IPv4 mapped
const (
	magicZstd = "\x28\xb5\x2f\xfd"
	magicMRS  = "MRS\x01"
)

func readMRS(data []byte, c *content) []error {
	if err := addMRS(data, c); err != nil {
		return []error{err}
	}
	return nil
}

func addMRS(data []byte, c *content) error {
	// With one decoder there is no goroutine behind it.
	stream, err := zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxUnpacked))
	if err != nil {
		return fmt.Errorf("it is damaged: fetch it again (%w)", err)
	}
	defer stream.Close()
	data, err = unpack(stream)
	if err != nil {
		return err
	}
	return addMRSUnpacked(data, c)
}

func addMRSUnpacked(data []byte, c *content) error {
	if !bytes.HasPrefix(data, []byte(magicMRS)) {
		return fmt.Errorf("it is zstd data, but no mihomo rule set of version 1")
	}
	in := cursor{rest: data[len(magicMRS):]}
	behavior := in.byte()
	in.uint64()
	in.take(in.uint64())
	if version := in.byte(); version != 1 && in.err == nil {
		return fmt.Errorf("its list has version %d, and only 1 can be read", version)
	}
	if in.err != nil {
		return in.err
	}
	switch behavior {
	case 0:
		return c.addMRSNames(&in)
	case 1:
		return c.addMRSRanges(&in)
	}
	return fmt.Errorf("it lists neither names nor addresses (behavior %d)", behavior)
}

func (c *content) addMRSNames(in *cursor) error {
	var t trie
	t.leaves = in.words(in.uint64())
	t.bitmap = in.words(in.uint64())
	t.labels = in.take(in.uint64())
	if err := in.end(); err != nil {
		return err
	}
	return t.each(func(name []byte) error { return c.addMRSName(string(name)) })
}

// addMRSName adds a pattern of mihomo's. A suffix that includes the name itself is in the set twice, once as that.
func (c *content) addMRSName(name string) error {
	if below, ok := strings.CutPrefix(name, "+."); ok && !strings.ContainsAny(below, "*+") {
		return c.addForeignName(suffix, "."+below)
	}
	if !strings.ContainsAny(name, "*+") {
		return c.addForeignName(exact, name)
	}
	return c.addWildcards(name)
}

// addWildcards adds a name in which `*` stands for a label, and `+` at the beginning for any number of them.
func (c *content) addWildcards(name string) error {
	expression := "^"
	for i, label := range strings.Split(name, ".") {
		if i > 0 {
			expression += `\.`
		}
		switch {
		case label == "*":
			expression += `[^.]+`
		case label == "+" && i == 0:
			expression += `.+`
		case strings.ContainsAny(label, "*+"):
			return fmt.Errorf("%q: a wildcard stands for whole labels only", name)
		default:
			if _, err := exact.Parse(label); err != nil {
				return fmt.Errorf("%q: %w", name, err)
			}
			expression += regexp.QuoteMeta(strings.ToLower(label))
		}
	}
	return c.addName(regex, expression+"$")
}

func (c *content) addMRSRanges(in *cursor) error {
	for range in.uint64() {
		first, last := in.take(16), in.take(16)
		if in.err != nil {
			return in.err
		}
		if err := c.addRange(netip.AddrFrom16([16]byte(first)).Unmap(), netip.AddrFrom16([16]byte(last)).Unmap()); err != nil {
			return err
		}
	}
	return in.end()
}
