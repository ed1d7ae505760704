package geodata

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
)

// encodeMMDB writes a database of IPv6, with records of 32 bits.
func encodeMMDB(networks map[string]any) []byte { return encodeMMDBAs(6, 32, networks) }

// encodeMMDBAs follows MaxMind's specification. The record of a prefix is a string, a list of strings, or a map; that of
// "2002::/16" may be nil, and then is IPv4's part of the tree.
func encodeMMDBAs(version, bits int, networks map[string]any) []byte {
	const empty = -1
	type node [2]int // a child node, or -2 - the index of a record
	nodes := []node{{empty, empty}}
	var section []byte
	var offsets []int
	for _, text := range slices.Sorted(maps.Keys(networks)) {
		offsets = append(offsets, len(section))
		section = append(section, mmdbValue(networks[text])...)
		p := netip.MustParsePrefix(text)
		bytes, length := p.Addr().As16(), p.Bits()
		switch {
		case version == 4:
			bytes = [16]byte(append(p.Addr().AsSlice(), make([]byte, 12)...))
		case p.Addr().Is4():
			bytes[10], bytes[11] = 0, 0 // not mapped: IPv4 is at ::/96
			length += 96
		}
		at := 0
		for bit := range length {
			side := bytes[bit/8] >> (7 - bit%8) & 1
			if bit == length-1 {
				nodes[at][side] = -2 - (len(offsets) - 1)
				if networks[text] == nil {
					ipv4 := 0
					for range 96 {
						ipv4 = nodes[ipv4][0]
					}
					nodes[at][side] = ipv4
				}
				break
			}
			if nodes[at][side] < 0 {
				nodes = append(nodes, node{empty, empty})
				nodes[at][side] = len(nodes) - 1
			}
			at = nodes[at][side]
		}
	}
	var file []byte
	for _, n := range nodes {
		var records [2]uint32
		for side, to := range n {
			switch {
			case to == empty:
				to = len(nodes)
			case to < empty:
				to = len(nodes) + 16 + offsets[-2-to]
			}
			records[side] = uint32(to)
		}
		l, r := binary.BigEndian.AppendUint32(nil, records[0]), binary.BigEndian.AppendUint32(nil, records[1])
		switch bits {
		case 24:
			file = slices.Concat(file, l[1:], r[1:])
		case 28:
			file = slices.Concat(file, l[1:], []byte{l[0]<<4 | r[0]}, r[1:])
		default:
			file = slices.Concat(file, l, r)
		}
	}
	file = append(file, make([]byte, 16)...)
	file = append(file, section...)
	file = append(file, "\xab\xcd\xefMaxMind.com"...)
	return append(file, mmdbValue(map[string]any{
		"binary_format_major_version": uint16(2), "binary_format_minor_version": uint16(0), "build_epoch": uint64(1),
		"database_type": "test", "description": map[string]any{"en": "test"}, "ip_version": uint16(version), "languages": []string{"en"},
		"node_count": uint32(len(nodes)), "record_size": uint16(bits),
	})...)
}

// mmdbValue writes a control byte, type and length, and the value. Texts here are shorter than 29 bytes.
func mmdbValue(v any) []byte {
	switch v := v.(type) {
	case string:
		return append([]byte{2<<5 | byte(len(v))}, v...)
	case uint16:
		return binary.BigEndian.AppendUint16([]byte{5<<5 | 2}, v)
	case uint32:
		return binary.BigEndian.AppendUint32([]byte{6<<5 | 4}, v)
	case uint64:
		return binary.BigEndian.AppendUint64([]byte{8, 9 - 7}, v)
	case map[string]any:
		out := []byte{7<<5 | byte(len(v))}
		for _, key := range slices.Sorted(maps.Keys(v)) {
			out = append(append(out, mmdbValue(key)...), mmdbValue(v[key])...)
		}
		return out
	case nil:
		return nil
	case []string:
		out := []byte{byte(len(v)), 11 - 7}
		for _, s := range v {
			out = append(out, mmdbValue(s)...)
		}
		return out
	}
	panic("geodata: no such value")
}

// Every size of records, IPv4 alone, and a tree in which 6to4 leads to IPv4's part.
func TestMMDBTrees(t *testing.T) {
	for _, bits := range []int{24, 28, 32} {
		for version, networks := range map[int]map[string]any{
			4: {"0.0.0.0/1": "cn", "128.0.0.0/9": "de", "255.255.255.255/32": "cn", "198.51.100.0/24": "us"},
			6: {"0.0.0.0/1": "cn", "255.255.255.255/32": "cn", "2002::/16": nil, "2003::/16": "cn", "ffff::1/128": "cn", "::1:0:0/96": "us"},
		} {
			path := file(t, "x.mmdb", encodeMMDBAs(version, bits, networks))
			d := load(t, Sources{Geoip: path}, Wanted{Codes: []string{"cn"}})
			got, _ := d.IP("cn")
			var want []string
			for text, code := range networks {
				if code == "cn" {
					want = append(want, text)
				}
			}
			slices.Sort(want)
			equal(t, fmt.Sprintf("IPv%d, %d bits", version, bits), prefixTexts(got), want)
		}
	}
}

// Both records of a node, in each size, with a digit in every place.
func TestMMDBRecords(t *testing.T) {
	for bits, want := range map[uint][2]uint{24: {0x123456, 0x789abc}, 28: {0x7123456, 0x89abcde}, 32: {0x12345678, 0x9abcdef0}} {
		tree := mmdbTree{bits: bits, data: append(make([]byte, bits/4), 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0)}
		if left, right := tree.records(1); [2]uint{left, right} != want {
			t.Errorf("%d bits: %#x, %#x", bits, left, right)
		}
	}
}
