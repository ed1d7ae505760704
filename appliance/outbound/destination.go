package outbound

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Destination is where a flow wants to go.
type Destination struct {
	Addr netip.AddrPort
	// Name, when set, is what a proxy upstream is told instead of the address: a DNS name of 1 to 255
	// bytes. The port is always Addr's. Direct ignores it: the flow goes to the address.
	Name string
	// Mark is OR-ed to the firewall mark that Options.Control gave the socket, which then goes the way of
	// the flow's other packets. Only direct heeds it: what goes to a proxy is not to be routed as the flow.
	Mark uint32
}

// String is the name, or the address, with the port. A name that is none, which a client may have
// made up, is quoted.
func (d Destination) String() string {
	switch {
	case d.Name == "":
		return d.Addr.String()
	case validName(d.Name) != nil:
		return fmt.Sprintf("%q:%d", d.Name, d.Addr.Port())
	}
	return hostPort(d.Name, d.Addr.Port())
}

// wire is the destination as it goes into a handshake: checked, IPv4 in its 4-byte form, without a
// zone, which means something on this box only. The name may come from a client's first bytes, so that
// nothing but letters, digits, '-', '_' and '.' reaches an upstream: no line break, no blank, and no
// address posing as a name.
func (d Destination) wire() (Destination, error) {
	if d.Addr.Port() == 0 {
		return d, errors.New("the destination has no port")
	}
	address := d.Addr.Addr()
	if d.Name != "" {
		if err := validName(d.Name); err != nil {
			return d, err
		}
	} else if !address.IsValid() {
		return d, errors.New("the destination has neither an address nor a name")
	}
	d.Addr = netip.AddrPortFrom(address.Unmap().WithZone(""), d.Addr.Port())
	return d, nil
}

func hostPort(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// validName takes names as DNS and SNI carry them. Servers read one with a number at its end as an
// address, in many spellings (2130706433, 0x7f.1), so that is none.
func validName(name string) error {
	if len(name) > 255 {
		return fmt.Errorf("the name is %d bytes long: at most 255 are allowed", len(name))
	}
	last := strings.TrimSuffix(name, ".")
	last = last[strings.LastIndexByte(last, '.')+1:]
	_, err := strconv.ParseUint(last, 0, 64)
	if err == nil || strings.Trim(last, "0123456789") == "" || strings.ContainsFunc(name, notInName) {
		return fmt.Errorf("%q is not a DNS name", name)
	}
	return nil
}

func notInName(c rune) bool {
	return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.')
}

// unmap gives IPv4 its 4-byte form.
func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
