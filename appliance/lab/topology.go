package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// segment is one L2 network: a bridge in the namespace of the switch.
type segment struct {
	name, bridge string
	prefix4      string // first three bytes of the /24
	prefix6      string // the /64
}

var (
	lan      = segment{"LAN", "lan", "192.168.0.", "fd00:c0a8::"}
	internet = segment{"internet", "internet", "203.0.113.", "2001:db8:113::"}
)

// addresses returns host n of the segment. Both families end in the same digits, for people who read captures.
func (s *segment) addresses(n int) (v4, v6 netip.Prefix) {
	return netip.MustParsePrefix(fmt.Sprintf("%s%d/24", s.prefix4, n)),
		netip.MustParsePrefix(fmt.Sprintf("%s%d/64", s.prefix6, n))
}

// macOf derives a MAC address from an IPv4 address: 192.168.0.3 is 02:00:c0:a8:00:03.
func macOf(v4 netip.Addr) net.HardwareAddr {
	a := v4.As4()
	return net.HardwareAddr{0x02, 0, a[0], a[1], a[2], a[3]}
}

// linkLocal is the address that the kernel makes from a MAC address (RFC 4291 appendix A).
func linkLocal(m net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}

type attachment struct {
	name   string // of the interface
	on     *segment
	number int
}

// site says what a host is; gateway is the number of its default gateway on its first segment, 0 for none.
type site struct {
	name       string
	interfaces []attachment
	forwards   bool
	gateway    int
}

const switchName = "switch"

// hostSettings are made before a host has interfaces, so that these inherit them. IPv6 is to be deterministic: no
// duplicate address detection, which would delay the first packet by a second, and nothing learned from advertisements.
// IPv4 settings are inherited from the machine, therefore those that matter here are set back to the kernel's defaults:
// a client that ignored redirects would hide the fault of a gateway that sends them.
var hostSettings = []string{
	"net.ipv6.conf.default.dad_transmits=0",
	"net.ipv6.conf.default.accept_dad=0",
	"net.ipv6.conf.default.accept_ra=0",
	"net.ipv6.conf.default.autoconf=0",
	"net.ipv6.conf.default.router_solicitations=0",
	"net.ipv4.conf.all.rp_filter=0",
	"net.ipv4.conf.default.rp_filter=0",
	"net.ipv4.conf.all.accept_redirects=1",
	"net.ipv4.conf.default.accept_redirects=1",
	"net.ipv4.conf.all.secure_redirects=1",
	"net.ipv4.conf.default.secure_redirects=1",
}

// forwardSettings are made after the interfaces exist. ip_forward resets other settings, so it goes first.
// send_redirects must be 0 under "all" and the interface: the kernel sends if either says so.
var forwardSettings = []string{
	"net.ipv4.ip_forward=1",
	"net.ipv6.conf.all.forwarding=1",
	"net.ipv4.conf.all.send_redirects=0",
	"net.ipv4.conf.default.send_redirects=0",
}

func (l *Lab) buildSwitch() error {
	h, err := l.newHost(switchName)
	if err != nil {
		return err
	}
	defer l.publish(h)
	return h.Do(func() error {
		// The switch has no addresses: without IPv6 its ports stay silent.
		if err := h.setAll("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"); err != nil {
			return err
		}
		// Where the kernel has br_netfilter, bridged packets would be taken through the hooks of IP, for nothing.
		for _, family := range []string{"ip", "ip6", "arp"} {
			err := h.SetSysctl("net.bridge.bridge-nf-call-"+family+"tables", "0")
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		for s, mtu := range map[*segment]int{&lan: l.options.MTU, &internet: l.options.InternetMTU} {
			attributes := netlink.NewLinkAttrs()
			attributes.Name = s.bridge
			attributes.MTU = mtu
			// No querier runs here: snooping could only lose IPv6 neighbour discovery.
			snooping := false
			bridge := &netlink.Bridge{LinkAttrs: attributes, MulticastSnooping: &snooping}
			if err := netlink.LinkAdd(bridge); err != nil {
				return fmt.Errorf("creating the bridge of the %s: %w", s.name, missing(err, "CONFIG_BRIDGE"))
			}
			if err := netlink.LinkSetUp(bridge); err != nil {
				return fmt.Errorf("setting the bridge of the %s up: %w", s.name, err)
			}
		}
		return nil
	})
}

// missing says which kernel option is absent if err means that the kernel does not know a kind of link.
func missing(err error, option string) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("this kernel lacks it (%s): %w", option, err)
	}
	return err
}

// build makes a host, wires it to its segments and gives it addresses and routes.
func (l *Lab) build(s site) (*Host, error) {
	h, err := l.newHost(s.name)
	if err != nil {
		return nil, err
	}
	if err := h.setAll(hostSettings...); err != nil {
		return nil, err
	}
	if err := h.Do(func() error { return setUp("lo") }); err != nil {
		return nil, err
	}
	for _, a := range s.interfaces {
		if err := l.attach(h, a); err != nil {
			return nil, fmt.Errorf("attaching %s to the %s: %w", s.name, a.on.name, err)
		}
	}
	if s.forwards {
		settings := forwardSettings
		for _, a := range s.interfaces {
			settings = append(settings[:len(settings):len(settings)], "net.ipv4.conf."+a.name+".send_redirects=0")
		}
		if err := h.setAll(settings...); err != nil {
			return nil, err
		}
	}
	if s.gateway > 0 {
		if err := l.route(h, s); err != nil {
			return nil, err
		}
	}
	l.publish(h)
	return h, nil
}

func (l *Lab) route(h *Host, s site) error {
	v4, v6 := s.interfaces[0].on.addresses(s.gateway)
	gateways := []netip.Addr{v4.Addr(), v6.Addr()}
	if l.options.LinkLocalGateways {
		gateways[1] = linkLocal(macOf(v4.Addr()))
	}
	return h.Do(func() error {
		for _, gateway := range gateways {
			route := &netlink.Route{Gw: gateway.AsSlice(), LinkIndex: h.interfaces[0].Index}
			if err := netlink.RouteAdd(route); err != nil {
				return fmt.Errorf("setting the default gateway of %s to %s: %w", h.name, gateway, err)
			}
		}
		return nil
	})
}

// attach connects h to a segment by a veth pair and waits for nothing: a bridge port without STP forwards at once.
func (l *Lab) attach(h *Host, a attachment) error {
	v4, v6 := a.on.addresses(a.number)
	mtu := l.options.MTU
	if a.on == &internet {
		mtu = l.options.InternetMTU
	}
	port := h.name
	if len(h.interfaces) > 0 {
		port += "-" + a.name
	}
	err := l.Host(switchName).Do(func() error {
		bridge, err := netlink.LinkByName(a.on.bridge)
		if err != nil {
			return fmt.Errorf("looking up the bridge: %w", err)
		}
		attributes := netlink.NewLinkAttrs()
		attributes.Name = port
		attributes.MTU = mtu
		attributes.MasterIndex = bridge.Attrs().Index
		veth := &netlink.Veth{
			LinkAttrs:        attributes,
			PeerName:         a.name,
			PeerNamespace:    netlink.NsFd(h.ns.handle),
			PeerHardwareAddr: macOf(v4.Addr()),
			PeerMTU:          uint32(mtu),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("creating a veth pair: %w", missing(err, "CONFIG_VETH"))
		}
		return setUp(port)
	})
	if err != nil {
		return err
	}
	return h.Do(func() error {
		if err := setUp(a.name); err != nil {
			return err
		}
		link, err := netlink.LinkByName(a.name)
		if err != nil {
			return fmt.Errorf("looking up %s: %w", a.name, err)
		}
		for _, p := range []netip.Prefix{v4, v6} {
			address := &netlink.Addr{IPNet: &net.IPNet{
				IP:   p.Addr().AsSlice(),
				Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
			}}
			if p.Addr().Is6() {
				address.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, address); err != nil {
				return fmt.Errorf("adding address %s: %w", p, missing(err, "CONFIG_IPV6"))
			}
		}
		h.interfaces = append(h.interfaces, Interface{
			Name: a.name, Index: link.Attrs().Index, MAC: link.Attrs().HardwareAddr, MTU: mtu, Addr4: v4, Addr6: v6,
			segment: a.on, port: port,
		})
		return nil
	})
}

func setUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("looking up %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", name, err)
	}
	return nil
}

// Describe draws the network with its addresses.
func (l *Lab) Describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "lab %s: look into a host with: ip netns exec sg-%s-%s ip address\n", l.ID(), l.ID(), Laptop)
	for _, s := range []*segment{&lan, &internet} {
		fmt.Fprintf(&b, "\n  %s (%s0/24, %s/64)\n", s.name, s.prefix4, s.prefix6)
		var rows [][2]string
		for _, h := range l.Hosts() {
			for _, i := range h.interfaces {
				if i.segment == s {
					rows = append(rows, [2]string{h.name, fmt.Sprintf("%-14s %-19s %s", i.Addr4.Addr(), i.Addr6.Addr(), h.remark(i))})
				}
			}
		}
		for n, row := range rows {
			stem := "├──"
			switch {
			case len(rows) == 1:
				stem = "───"
			case n == 0:
				stem = "┌──"
			case n == len(rows)-1:
				stem = "└──"
			}
			fmt.Fprintf(&b, "  %s %-9s %s\n", stem, row[0], strings.TrimRight(row[1], " "))
		}
	}
	return b.String()
}

// remark says what the reader should know about a host beside its addresses.
func (h *Host) remark(i Interface) string {
	switch {
	case h.name == Sidegate:
		return "the side router; gateway: router"
	case h.name == Router:
		return "forwards to and from the " + map[*segment]string{&lan: "internet", &internet: "LAN"}[i.segment] + ", translates nothing"
	case i.segment == &lan:
		return "gateway: sidegate"
	}
	return ""
}
