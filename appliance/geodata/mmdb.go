package geodata

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/oschwald/maxminddb-golang/v2"
)

// An .mmdb database (https://maxmind.github.io/MaxMind-DB/) leads from each network to a record. The records are
//
//	{"country": {"iso_code": "CN", …}, …}   MaxMind's, by country and by city
//	"cn"                                    of sing-box
//	"CN" or ["CN", "CLOUDFLARE"]            of mihomo

// markMMDB begins the metadata, within the last 128 KiB.
const markMMDB = "\xab\xcd\xefMaxMind.com"

func isMMDB(data []byte) bool {
	return bytes.Contains(data[max(0, len(data)-128<<10):], []byte(markMMDB))
}

// mmdbRecords are the codes of each record that was met: hundreds of thousands of networks share some hundred.
type mmdbRecords map[uintptr][]string

func readMMDB(data []byte, wanted []string) (map[string]*one, []string, error) {
	damaged := func(err error) error { return fmt.Errorf("it is damaged: fetch it again (%w)", err) }
	db, err := maxminddb.OpenBytes(data)
	if err != nil {
		return nil, nil, damaged(err)
	}
	defer db.Close()
	tree := mmdbTree{data: data, nodes: db.Metadata.NodeCount, bits: db.Metadata.RecordSize, depth: 128}
	if db.Metadata.IPVersion == 4 {
		tree.depth = 32
	}
	lists, records := map[string]*one{}, mmdbRecords{}
	err = tree.each(func(network netip.Prefix, offset uint) error {
		codes, err := records.codes(db.LookupOffset(uintptr(offset)))
		if err != nil {
			return damaged(err)
		}
		for _, code := range codes {
			if lists[code] == nil {
				lists[code] = new(one)
			}
			if slices.Contains(wanted, code) {
				if err := lists[code].addNetwork(network); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	if len(lists) == 0 {
		return nil, nil, errors.New("its records have no country: is it a database of something else?")
	}
	return lists, slices.Collect(maps.Keys(lists)), nil
}

// addNetwork adds a prefix of the database, in which the first 96 bits of IPv4 addresses are zero.
func (c *content) addNetwork(p netip.Prefix) error {
	if p.Addr() == netip.IPv6Unspecified() && p.Bits() < 96 {
		if err := c.addPrefix(netip.PrefixFrom(netip.IPv4Unspecified(), 0)); err != nil {
			return err
		}
	}
	return c.addPrefix(p)
}

func (r mmdbRecords) codes(network maxminddb.Result) ([]string, error) {
	codes, known := r[network.Offset()]
	if known {
		return codes, nil
	}
	var record any
	if err := network.Decode(&record); err != nil {
		return nil, err
	}
	switch record := record.(type) {
	case string:
		codes = append(codes, record)
	case []any:
		for _, item := range record {
			if code, ok := item.(string); ok {
				codes = append(codes, code)
			}
		}
	case map[string]any:
		if country, ok := record["country"].(map[string]any); ok {
			if code, ok := country["iso_code"].(string); ok {
				codes = append(codes, code)
			}
		}
	}
	for i := range codes {
		codes[i] = strings.ToLower(codes[i])
	}
	r[network.Offset()] = codes
	return codes, nil
}

// mmdbTree is the search tree at the beginning of the database: nodes of two records each, one for a network's next bit being 0
// and one for 1. A record is a node, or as much as there are nodes for nothing, or beyond that where the data are.
type mmdbTree struct {
	data  []byte
	nodes uint
	bits  uint // of a record: 24, 28 or 32
	depth int  // bits of addresses
	ipv4  uint // the node of IPv4 in a tree of IPv6
	seen  []bool
}

var errNoTree = errors.New("it is damaged: its networks are no tree; fetch it again")

// each calls f with each network and where its data are. The library's own walk does not end where nodes lead to the
// same ones again and again.
func (t *mmdbTree) each(f func(network netip.Prefix, offset uint) error) error {
	if t.nodes == 0 || t.nodes > uint(len(t.data)) || t.nodes*t.bits/4 > uint(len(t.data)) || !slices.Contains([]uint{24, 28, 32}, t.bits) {
		return errNoTree
	}
	t.seen = make([]bool, t.nodes)
	return t.walk(0, [16]byte{}, 0, f)
}

func (t *mmdbTree) walk(record uint, addr [16]byte, depth int, f func(netip.Prefix, uint) error) error {
	const separator = 16 // zero bytes between tree and data
	switch {
	case record == t.nodes:
		return nil
	case record > t.nodes:
		if record < t.nodes+separator {
			return errNoTree
		}
		return f(t.prefix(addr, depth), record-t.nodes-separator)
	case t.seen[record] && record == t.ipv4 && record > 0:
		return nil // IPv4 once more, mapped into IPv6 or tunnelled: the policy takes addresses for what they are
	case t.seen[record] || depth == t.depth:
		return errNoTree
	}
	t.seen[record] = true
	if t.depth == 128 && depth == 96 && addr == [16]byte{} {
		t.ipv4 = record // the zeros come first, so the other ways to it come later
	}
	left, right := t.records(record)
	if err := t.walk(left, addr, depth+1, f); err != nil {
		return err
	}
	addr[depth/8] |= 1 << (7 - depth%8)
	return t.walk(right, addr, depth+1, f)
}

func (t *mmdbTree) records(node uint) (left, right uint) {
	b := t.data[node*t.bits/4:]
	switch t.bits {
	case 24:
		return uint(b[0])<<16 | uint(b[1])<<8 | uint(b[2]), uint(b[3])<<16 | uint(b[4])<<8 | uint(b[5])
	case 28: // the byte in the middle has the highest four bits of both
		return uint(b[3]>>4)<<24 | uint(b[0])<<16 | uint(b[1])<<8 | uint(b[2]), uint(b[3]&15)<<24 | uint(b[4])<<16 | uint(b[5])<<8 | uint(b[6])
	}
	return uint(binary.BigEndian.Uint32(b)), uint(binary.BigEndian.Uint32(b[4:]))
}

// prefix is the network at a depth. The first 96 bits of IPv4 addresses are zero in a tree of IPv6.
func (t *mmdbTree) prefix(addr [16]byte, depth int) netip.Prefix {
	if t.depth == 32 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(addr[:4])), depth)
	}
	if depth >= 96 && [12]byte(addr[:12]) == [12]byte{} {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(addr[12:])), depth-96)
	}
	return netip.PrefixFrom(netip.AddrFrom16(addr), depth)
}
