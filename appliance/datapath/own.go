package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Own says how the box's own sockets are treated. They are asked about where they connect, or send without being connected, by
// programs on a cgroup; what is to be proxied is steered into lo, where another program meets it.
type Own struct {
	Cgroup  string     // a directory of cgroup v2: the processes in and below it are meant; empty: the root of the hierarchy
	Source4 netip.Addr // the addresses by which the box is known; invalid: none
	Source6 netip.Addr
	DNS     bool // their questions are answered by the DNS server
}

// What a flow of the box itself comes in by, as the policy sees it: LOOPBACK_INDEX of bpf/types.h.
const (
	loopbackIndex = 1
	loopback      = "lo"
)

// OwnSource is the source of what is steered, unless the program has chosen one.
func OwnSource(ipv6 bool) netip.Addr {
	if ipv6 {
		return netip.IPv6Loopback()
	}
	return ownSource4()
}

func ownSource4() netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(gatewayOwnAddressOWN_SOURCE4))
	return netip.AddrFrom4(b)
}

// ownPrefixes are the source addresses of what is steered, by family.
func ownPrefixes(family int) []net.IPNet {
	if family == unix.AF_INET {
		var b [4]byte
		binary.BigEndian.PutUint16(b[:], uint16(gatewayOwnAddressOWN_PREFIX4))
		return []net.IPNet{{IP: b[:], Mask: net.CIDRMask(16, 32)}}
	}
	numbers := make(net.IP, net.IPv6len)
	binary.BigEndian.PutUint32(numbers, uint32(gatewayOwnAddressOWN_PREFIX6))
	return []net.IPNet{
		{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)},
		{IP: numbers, Mask: net.CIDRMask(112, 128)},
	}
}

// boxKey is the client that the box itself is, by whatever address it speaks (client_box).
func boxKey() gatewayClientKey { return gatewayClientKey{W: addressOf(ownSource4()).W} }

func isOwn(v gatewayFlow) bool { return v.Interface == 0 }

// netnsCookie identifies the calling thread's network namespace, as the programs see it.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("identifying the network namespace: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("identifying the network namespace: %w", err)
	}
	return cookie, nil
}

// cgroupRoot finds where the hierarchy of cgroup v2 is mounted.
func cgroupRoot() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("looking for cgroup v2: %w", err)
	}
	for line := range strings.Lines(string(mounts)) {
		place, kind, ok := strings.Cut(line, " - ") // proc_pid_mountinfo(5)
		if fields := strings.Fields(place); ok && len(fields) > 4 && strings.HasPrefix(kind, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted (mount -t cgroup2 none /sys/fs/cgroup, or gateway.cgroup: DIRECTORY)")
}

// directory is the cgroup that the hooks are on.
func (o *Own) directory() (string, error) {
	path := o.Cgroup
	if path == "" {
		var err error
		if path, err = cgroupRoot(); err != nil {
			return "", err
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return "", fmt.Errorf("the cgroup %s: %w", path, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return "", fmt.Errorf("%s is no directory of cgroup v2 (gateway.cgroup: DIRECTORY)", path)
	}
	return path, nil
}

// ownPin is how the names of their pins begin.
const ownPin = "own-"

// places are where the programs for the box's own sockets are: first lo, that nothing is steered there before.
func (o *Own) places() ([]place, error) {
	path, err := o.directory()
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, fmt.Errorf("the cgroup %s: %w", path, err)
	}
	all := []place{{
		pin:     ownPin + "loopback",
		program: func(g *generation) *ebpf.Program { return g.objects.OwnLoopback },
		attach: func(p *ebpf.Program) (link.Link, error) {
			return link.AttachTCX(link.TCXOptions{Interface: loopbackIndex, Program: p, Attach: ebpf.AttachTCXIngress})
		},
		ifindex: loopbackIndex,
	}}
	for _, hook := range []struct {
		name    string
		kind    ebpf.AttachType
		program func(*gatewayPrograms) *ebpf.Program
	}{
		{"getsockname4", ebpf.AttachCgroupInet4GetSockname, func(p *gatewayPrograms) *ebpf.Program { return p.OwnGetsockname4 }},
		{"getsockname6", ebpf.AttachCgroupInet6GetSockname, func(p *gatewayPrograms) *ebpf.Program { return p.OwnGetsockname6 }},
		{"connect4", ebpf.AttachCGroupInet4Connect, func(p *gatewayPrograms) *ebpf.Program { return p.OwnConnect4 }},
		{"connect6", ebpf.AttachCGroupInet6Connect, func(p *gatewayPrograms) *ebpf.Program { return p.OwnConnect6 }},
		{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, func(p *gatewayPrograms) *ebpf.Program { return p.OwnSendmsg4 }},
		{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, func(p *gatewayPrograms) *ebpf.Program { return p.OwnSendmsg6 }},
	} {
		all = append(all, place{
			pin:     ownPin + hook.name,
			program: func(g *generation) *ebpf.Program { return hook.program(&g.objects.gatewayPrograms) },
			attach: func(p *ebpf.Program) (link.Link, error) {
				l, err := link.AttachCgroup(link.CgroupOptions{Path: path, Attach: hook.kind, Program: p})
				if errors.Is(err, unix.EPERM) {
					err = fmt.Errorf("the cgroup %s: %w: somebody's program on it or above admits no other (bpftool cgroup tree), or CAP_NET_ADMIN is missing", path, err)
				}
				return l, err
			},
			cgroup: st.Ino,
			kind:   hook.kind,
		})
	}
	return all, nil
}

// Try reports why the programs for the box's own sockets cannot be in their places; nil if they can. It attaches others there,
// for a moment, which let everything pass.
func (o *Own) Try() error {
	all, err := o.places()
	if err != nil {
		return err
	}
	for _, p := range all {
		if p.kind == ebpf.AttachNone {
			continue
		}
		if err := p.try(); err != nil {
			return fmt.Errorf("attaching %s: %w", p.pin, err)
		}
	}
	return nil
}

func (p *place) try() error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: p.kind, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}, // go on
	})
	if err != nil {
		return err
	}
	defer program.Close()
	l, err := p.attach(program)
	if err != nil {
		return err
	}
	return l.Close()
}

// attachOwn puts the programs for the box's own sockets in place, or none of them: then the LAN is served all the same.
func (d *Datapath) attachOwn(next *generation, unchanged bool, own *Own) (all []place, added []string, err error) {
	if own == nil {
		return nil, nil, nil
	}
	if all, err = own.places(); err == nil {
		added, err = d.links.apply(next, unchanged, all)
	}
	if err != nil {
		return nil, nil, err
	}
	return all, added, nil
}

// OwnProblem is why the box's own connections are not decided although Desired.Own says so; nil if they are.
func (d *Datapath) OwnProblem() error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.ownProblem
}

// describeOwn adds to a flow's facts what its packets do not show: who on this box opened it.
func (d *Datapath) describeOwn(a *Assignment) {
	a.Facts.Interface = loopback
	var o gatewayOrigin
	if g := d.generation; g != nil && d.state.maps.Origins.Lookup(a.key, &o) == nil {
		a.Facts.Process = g.processAt(o)
	}
	if a.Facts.Source.Addr() != netip.IPv6Loopback() && a.Facts.Source.Addr() != ownSource4() {
		return
	}
	slot := gatewayOwnNumberOWN_NUMBER_SOURCE4
	if a.Facts.Source.Addr().Is6() {
		slot = gatewayOwnNumberOWN_NUMBER_SOURCE6
	}
	var known gatewayAddress
	if d.state.maps.OwnNumbers.Lookup(uint32(slot), &known) == nil {
		a.Facts.Source = netip.AddrPortFrom(known.addr(), a.Facts.Source.Port())
	}
}

// originOf is who opened a flow of the box itself; nil if that is not known any more.
func (s *state) originOf(k gatewayFlowKey) *Process {
	var o gatewayOrigin
	if s.maps.Origins.Lookup(k, &o) != nil {
		return nil
	}
	return o.process()
}

// cString is a text that ends with a zero.
func cString(b []uint8) string {
	text, _, _ := strings.Cut(string(b), "\x00")
	return text
}

// setSources tells the programs by which addresses the box is known: by none where its own connections are left alone, for such an
// address may be another's the next time.
func (s *state) setSources(own *Own) error {
	if own == nil {
		own = &Own{}
	}
	for slot, a := range map[gatewayOwnNumber]netip.Addr{
		gatewayOwnNumberOWN_NUMBER_SOURCE4: own.Source4, gatewayOwnNumberOWN_NUMBER_SOURCE6: own.Source6,
	} {
		if !a.IsValid() {
			a = netip.IPv6Unspecified()
		}
		if err := s.maps.OwnNumbers.Put(uint32(slot), addressOf(a)); err != nil {
			return fmt.Errorf("writing the box's own address %s: %w", a, err)
		}
	}
	return nil
}

// numberOwn gives each own address a number, by which a datagram's source can stand for it: the one that it has, or a free one.
func (s *state) numberOwn(addrs []netip.Addr) (map[gatewayAddress]uint32, error) {
	numbers := make(map[gatewayAddress]uint32, len(addrs))
	taken := map[uint32]bool{}
	for _, a := range addrs {
		var number uint32
		if s.maps.OwnAddresses.Lookup(addressOf(a), &number) == nil {
			numbers[addressOf(a)] = number
			taken[number] = true
		}
	}
	free := uint32(gatewayOwnNumberOWN_NUMBER_FIRST)
	for _, a := range addrs {
		if numbers[addressOf(a)] != 0 {
			continue
		}
		for taken[free] {
			free++
		}
		if free >= s.maps.OwnNumbers.MaxEntries() {
			return nil, fmt.Errorf("the box has more than %d addresses", s.maps.OwnNumbers.MaxEntries()-uint32(gatewayOwnNumberOWN_NUMBER_FIRST))
		}
		taken[free] = true
		numbers[addressOf(a)] = free
		if err := s.maps.OwnNumbers.Put(free, addressOf(a)); err != nil {
			return nil, fmt.Errorf("numbering the own address %s: %w", a, err)
		}
	}
	return numbers, nil
}
