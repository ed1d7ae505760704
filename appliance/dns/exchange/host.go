package exchange

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

func parsePort(where *url.URL, s scheme) (uint16, error) {
	text := where.Port()
	if text == "" {
		return s.port, nil
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("bad port %q (want 1-65535)", text)
	}
	return uint16(port), nil
}

// parseHost checks a host; the address is valid where it is one.
func parseHost(host string) (netip.Addr, error) {
	if host == "" {
		return netip.Addr{}, errors.New("the url has no host")
	}
	if address, err := netip.ParseAddr(host); err == nil {
		if address.IsUnspecified() || address.IsMulticast() {
			return netip.Addr{}, fmt.Errorf("%s is not the address of a server", address)
		}
		return address.Unmap(), nil
	}
	if !validName(host) {
		return netip.Addr{}, fmt.Errorf("%q is neither an address nor a host name", host)
	}
	return netip.Addr{}, nil
}

// lacksZone says that an address begins on whichever link one looks (RFC 4007 section 6): without a zone
// the kernel refuses to send there.
func lacksZone(a netip.Addr) bool {
	a = a.Unmap()
	return a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == ""
}

// validName takes names of hosts. One with a number at its end is read as an address by some and not
// by others (2130706433, 0x7f.1), so that is none.
func validName(name string) bool {
	name = strings.TrimSuffix(name, ".")
	if len(name) > 253 {
		return false
	}
	last := ""
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, notInName) {
			return false
		}
		last = label
	}
	_, err := strconv.ParseUint(last, 0, 64)
	return err != nil && strings.Trim(last, "0123456789") != ""
}

func notInName(c rune) bool {
	return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_')
}
