package geodata

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/encoding/protowire"
)

// The encoders of the tests follow what the formats' own programs write, and share nothing with the readers.

// domain of a geosite list.
type domain struct {
	kind       uint64 // 0 plain, 1 regex, 2 root domain, 3 full
	value      string
	attributes []string
}

func message(number protowire.Number, content []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), content)
}

func varint(number protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), v)
}

func encodeSite(code string, domains ...domain) []byte {
	list := message(1, []byte(code))
	for _, d := range domains {
		var m []byte
		if d.kind != 0 { // proto3 leaves zeros out
			m = append(m, varint(1, d.kind)...)
		}
		m = append(m, message(2, []byte(d.value))...)
		for _, a := range d.attributes {
			m = append(m, message(3, append(message(1, []byte(a)), varint(2, 1)...))...)
		}
		list = append(list, message(2, m)...)
	}
	list = append(list, message(3, []byte("a hash"))...)
	return message(1, append(list, message(4, []byte(code))...))
}

func encodeIP(code string, prefixes ...string) []byte {
	list := message(1, []byte(code))
	for _, text := range prefixes {
		p := netip.MustParsePrefix(text)
		m := message(1, p.Addr().AsSlice())
		if p.Bits() > 0 {
			m = append(m, varint(2, uint64(p.Bits()))...)
		}
		list = append(list, message(2, m)...)
	}
	return message(1, list)
}

func reversed(s string) string {
	b := []byte(s)
	slices.Reverse(b)
	return string(b)
}

// encodedTrie is the set of keys as openacid's succinct set has it: breadth first, a queue of ranges of the sorted keys.
type encodedTrie struct {
	leaves, bitmap []uint64
	labels         []byte
}

func encodeTrie(keys []string) (t encodedTrie) {
	keys = slices.Clone(keys)
	slices.Sort(keys)
	keys = slices.Compact(keys)
	put := func(words *[]uint64, i int, bit uint64) {
		for i/64 >= len(*words) {
			*words = append(*words, 0)
		}
		(*words)[i/64] |= bit << (i % 64)
	}
	type span struct{ from, to, depth int }
	bit := 0
	for queue, at := []span{{0, len(keys), 0}}, 0; at < len(queue); at++ {
		s := queue[at]
		if s.from < s.to && s.depth == len(keys[s.from]) {
			s.from++
			put(&t.leaves, at, 1)
		}
		for s.from < s.to {
			begin := s.from
			for s.from < s.to && keys[s.from][s.depth] == keys[begin][s.depth] {
				s.from++
			}
			queue = append(queue, span{begin, s.from, s.depth + 1})
			t.labels = append(t.labels, keys[begin][s.depth])
			put(&t.bitmap, bit, 0)
			bit++
		}
		put(&t.bitmap, bit, 1)
		bit++
	}
	return t
}

// encoder writes big-endian numbers and varints.
type encoder struct{ bytes.Buffer }

func (e *encoder) number(v any)        { binary.Write(e, binary.BigEndian, v) }
func (e *encoder) uvarint(n int)       { e.Write(binary.AppendUvarint(nil, uint64(n))) }
func (e *encoder) text(s string)       { e.uvarint(len(s)); e.WriteString(s) }
func (e *encoder) bytes(b ...byte)     { e.Write(b) }
func (e *encoder) texts(all ...string) { e.uvarint(len(all)); eachText(all, e.text) }
func eachText(all []string, f func(string)) {
	for _, s := range all {
		f(s)
	}
}

// srs is a rule set with these rules in it.
func encodeSRS(version byte, rules ...[]byte) []byte {
	var e encoder
	e.uvarint(len(rules))
	for _, r := range rules {
		e.Write(r)
	}
	var file bytes.Buffer
	file.WriteString("SRS")
	file.WriteByte(version)
	z := zlib.NewWriter(&file)
	z.Write(e.Bytes())
	z.Close()
	return file.Bytes()
}

func rule(inverted byte, items ...[]byte) []byte {
	return slices.Concat([]byte{0}, slices.Concat(items...), []byte{255, inverted})
}

func logical(mode, inverted byte, rules ...[]byte) []byte {
	var e encoder
	e.bytes(1, mode)
	e.uvarint(len(rules))
	return slices.Concat(e.Bytes(), slices.Concat(rules...), []byte{inverted})
}

func stringsItem(number byte, texts ...string) []byte {
	var e encoder
	e.bytes(number)
	e.texts(texts...)
	return e.Bytes()
}

func portsItem(number byte, ports ...uint16) []byte {
	var e encoder
	e.bytes(number)
	e.uvarint(len(ports))
	e.number(ports)
	return e.Bytes()
}

func domainItem(legacy bool, domains, suffixes []string) []byte {
	var keys []string
	for _, d := range domains {
		keys = append(keys, reversed(d))
	}
	for _, s := range suffixes {
		switch {
		case strings.HasPrefix(s, "."):
			keys = append(keys, reversed(s)+"\r")
		case legacy:
			keys = append(keys, reversed(s), reversed("."+s)+"\r")
		default:
			keys = append(keys, reversed(s)+"\n")
		}
	}
	t := encodeTrie(keys)
	var e encoder
	e.bytes(2, 1)
	e.uvarint(len(t.leaves))
	e.number(t.leaves)
	e.uvarint(len(t.bitmap))
	e.number(t.bitmap)
	e.uvarint(len(t.labels))
	e.Write(t.labels)
	return e.Bytes()
}

func rangesItem(number byte, ranges ...string) []byte {
	var e encoder
	e.bytes(number, 1)
	e.number(uint64(len(ranges)))
	for _, r := range ranges {
		first, last, _ := strings.Cut(r, "-")
		e.text(string(netip.MustParseAddr(first).AsSlice()))
		e.text(string(netip.MustParseAddr(last).AsSlice()))
	}
	return e.Bytes()
}

func encodeMRS(behavior byte, count int, payload []byte) []byte {
	var e encoder
	e.WriteString("MRS\x01")
	e.bytes(behavior)
	e.number(int64(count))
	e.number(int64(0))
	e.Write(payload)
	return zstdOf(e.Bytes())
}

func zstdOf(data []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil)
}

func unzstd(tb testing.TB, data []byte) []byte {
	tb.Helper()
	r, err := zstd.NewReader(nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer r.Close()
	unpacked, err := r.DecodeAll(data, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return unpacked
}

// mrsDomains takes names as mihomo's trie has them: a suffix is put in as itself and below `+`.
func mrsDomains(names ...string) []byte {
	var keys []string
	for _, n := range names {
		if below, ok := strings.CutPrefix(n, "+."); ok {
			keys = append(keys, reversed(below))
		}
		if strings.HasPrefix(n, ".") {
			n = "+" + n
		}
		keys = append(keys, reversed(n))
	}
	t := encodeTrie(keys)
	var e encoder
	e.bytes(1)
	e.number(int64(len(t.leaves)))
	e.number(t.leaves)
	e.number(int64(len(t.bitmap)))
	e.number(t.bitmap)
	e.number(int64(len(t.labels)))
	e.Write(t.labels)
	return encodeMRS(0, len(names), e.Bytes())
}

func mrsRanges(ranges ...string) []byte {
	var e encoder
	e.bytes(1)
	e.number(int64(len(ranges)))
	for _, r := range ranges {
		first, last, _ := strings.Cut(r, "-")
		e.number(netip.MustParseAddr(first).As16())
		e.number(netip.MustParseAddr(last).As16())
	}
	return encodeMRS(1, len(ranges), e.Bytes())
}

// file puts data into a file of the test and returns its path.
func file(tb testing.TB, name string, data []byte) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), name)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		tb.Fatal(err)
	}
	return path
}
