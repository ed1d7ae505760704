package geodata

import (
	"bytes"
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
	lists, records := map[string]*one{}, mmdbRecords{}
	var leaves uint
	for network := range db.Networks(maxminddb.IncludeNetworksWithoutData()) {
		// A tree has a leaf more than nodes. What has more is no tree, and may go on for ever.
		if leaves++; leaves > db.Metadata.NodeCount+1 {
			return nil, nil, damaged(errors.New("its networks overlap"))
		}
		if err := network.Err(); err != nil {
			return nil, nil, damaged(err)
		}
		if !network.Found() {
			continue
		}
		codes, err := records.codes(network)
		if err != nil {
			return nil, nil, damaged(err)
		}
		for _, code := range codes {
			if lists[code] == nil {
				lists[code] = new(one)
			}
			if slices.Contains(wanted, code) {
				if err := lists[code].addNetwork(network.Prefix()); err != nil {
					return nil, nil, err
				}
			}
		}
	}
	if len(lists) == 0 {
		return nil, nil, errors.New("its records have no country: is it a database of something else?")
	}
	return lists, slices.Collect(maps.Keys(lists)), nil
}

// addNetwork adds a prefix of the database, in which the first 96 bits of IPv4 addresses are zero.
func (c *content) addNetwork(p netip.Prefix) error {
	if p.Bits() < 96 && p.Addr() == netip.IPv6Unspecified() {
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
