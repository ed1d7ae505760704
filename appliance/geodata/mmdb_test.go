package geodata

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
)

// encodeMMDB writes a database of IP version 6, with records of 32 bits, after MaxMind's specification. The record of a prefix is a
// string, a list of strings, or a map.
func encodeMMDB(networks map[string]any) []byte {
	const empty = -1
	type node [2]int // a child node, or -2 - the index of a record
	nodes := []node{{empty, empty}}
	var section []byte
	var offsets []int
	for _, text := range slices.Sorted(maps.Keys(networks)) {
		offsets = append(offsets, len(section))
		section = append(section, mmdbValue(networks[text])...)
		p := netip.MustParsePrefix(text)
		bytes, bits := p.Addr().As16(), p.Bits()
		if p.Addr().Is4() {
			bytes[10], bytes[11] = 0, 0 // not mapped: IPv4 is at ::/96
			bits += 96
		}
		at := 0
		for bit := range bits {
			side := bytes[bit/8] >> (7 - bit%8) & 1
			if bit == bits-1 {
				nodes[at][side] = -2 - (len(offsets) - 1)
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
		for _, to := range n {
			switch {
			case to == empty:
				to = len(nodes)
			case to < empty:
				to = len(nodes) + 16 + offsets[-2-to]
			}
			file = binary.BigEndian.AppendUint32(file, uint32(to))
		}
	}
	file = append(file, make([]byte, 16)...)
	file = append(file, section...)
	file = append(file, "\xab\xcd\xefMaxMind.com"...)
	return append(file, mmdbValue(map[string]any{
		"binary_format_major_version": uint16(2), "binary_format_minor_version": uint16(0), "build_epoch": uint64(1),
		"database_type": "test", "description": map[string]any{"en": "test"}, "ip_version": uint16(6), "languages": []string{"en"},
		"node_count": uint32(len(nodes)), "record_size": uint16(32),
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
	case []string:
		out := []byte{byte(len(v)), 11 - 7}
		for _, s := range v {
			out = append(out, mmdbValue(s)...)
		}
		return out
	}
	panic("geodata: no such value")
}
