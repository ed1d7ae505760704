package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Host is a machine of the lab: a network namespace with its interfaces.
type Host struct {
	lab        *Lab
	name       string
	ns         *namespace
	interfaces []Interface
	replaced   bool // by a machine: it has no addresses and routes
}

// Interface is a host's connection to a segment. Addr4 and Addr6 carry the segment's prefix length.
type Interface struct {
	Name         string
	Index        int
	MAC          net.HardwareAddr
	MTU          int
	Addr4, Addr6 netip.Prefix

	segment *segment
	port    string // name of the other end at the switch
}

// newHost makes the namespace; the host is found by others when it is complete, see publish.
func (l *Lab) newHost(name string) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errClosed
	}
	ns, err := newNamespace("sg-" + l.claim.id + "-" + name)
	if errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("there is already a host %q", name)
	}
	if err != nil {
		return nil, err
	}
	l.namespaces = append(l.namespaces, ns)
	return &Host{lab: l, name: name, ns: ns}, nil
}

func (l *Lab) publish(h *Host) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hosts[h.name] = h
	l.order = append(l.order, h.name)
}

// Name is the host's name in the lab, such as "laptop".
func (h *Host) Name() string { return h.name }

// Namespace is the name that `ip netns exec` takes.
func (h *Host) Namespace() string { return h.ns.name }

// Interfaces returns the host's interfaces; the router's first is its LAN side.
func (h *Host) Interfaces() []Interface { return h.interfaces }

// Interface returns the first one.
func (h *Host) Interface() Interface { return h.interfaces[0] }

// Addr4 is the host's IPv4 address on its first interface.
func (h *Host) Addr4() netip.Addr { return h.interfaces[0].Addr4.Addr() }

// Addr6 is the host's global IPv6 address on its first interface.
func (h *Host) Addr6() netip.Addr { return h.interfaces[0].Addr6.Addr() }

// MAC is that of the host's first interface.
func (h *Host) MAC() net.HardwareAddr { return h.interfaces[0].MAC }

// Do runs f on this goroutine with its thread in the host's network. Sockets opened by f stay in the host's network for
// good; goroutines started by f do not enter it. Use it for netlink calls and whatever else has no method here.
func (h *Host) Do(f func() error) error { return h.ns.do(f) }

// Dial opens a connection from this host, without multipath TCP, which Go and the lab's servers would else agree on.
// The address is a literal: nothing resolves names here.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return h.DialWith(ctx, net.Dialer{}, network, address)
}

// DialWith is Dial with the options of d, such as a local address or a Control function.
func (h *Host) DialWith(ctx context.Context, d net.Dialer, network, address string) (c net.Conn, err error) {
	if err := literal(address); err != nil {
		return nil, fmt.Errorf("dialing %s from %s: %w", address, h.name, err)
	}
	d.SetMultipathTCP(false)
	err = h.Do(func() (err error) {
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// literal refuses names: resolving one would start goroutines, which are not in the host's network.
func literal(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if _, err := netip.ParseAddr(host); host != "" && err != nil {
		return fmt.Errorf("%q is not an IP address, and the lab resolves no names", host)
	}
	return nil
}

// Listen opens a TCP listener on this host. The caller closes it.
func (h *Host) Listen(ctx context.Context, network, address string) (*net.TCPListener, error) {
	var c net.ListenConfig
	c.SetMultipathTCP(false)
	l, err := h.ListenWith(ctx, c, network, address)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// ListenWith is Listen with the options of c.
func (h *Host) ListenWith(ctx context.Context, c net.ListenConfig, network, address string) (l net.Listener, err error) {
	if err := literal(address); err != nil {
		return nil, fmt.Errorf("listening on %s at %s: %w", address, h.name, err)
	}
	err = h.Do(func() (err error) {
		l, err = c.Listen(ctx, network, address)
		return err
	})
	return l, err
}

// ListenUDP opens an unconnected UDP socket on this host. The caller closes it.
func (h *Host) ListenUDP(ctx context.Context, network, address string) (*net.UDPConn, error) {
	return h.ListenPacket(ctx, net.ListenConfig{}, network, address)
}

// ListenPacket is ListenUDP with the options of c.
func (h *Host) ListenPacket(ctx context.Context, c net.ListenConfig, network, address string) (*net.UDPConn, error) {
	if err := literal(address); err != nil {
		return nil, fmt.Errorf("listening on %s at %s: %w", address, h.name, err)
	}
	var conn net.PacketConn
	err := h.Do(func() (err error) {
		conn, err = c.ListenPacket(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

// HTTP returns a client that connects from this host, with a new connection for each request.
func (h *Host) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: h.Dial, DisableKeepAlives: true}}
}

// Sysctl reads a network parameter of the host, such as "net.ipv4.ip_forward".
func (h *Host) Sysctl(name string) (value string, err error) {
	err = h.Do(func() error {
		b, err := os.ReadFile(sysctlPath(name))
		value = strings.TrimSpace(string(b))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("reading %s of %s: %w", name, h.name, err)
	}
	return value, nil
}

// SetSysctl changes a network parameter of the host.
func (h *Host) SetSysctl(name, value string) error {
	err := h.Do(func() error { return os.WriteFile(sysctlPath(name), []byte(value), 0o644) })
	if err != nil {
		return fmt.Errorf("setting %s of %s to %s: %w", name, h.name, value, err)
	}
	return nil
}

func sysctlPath(name string) string {
	return "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
}

func (h *Host) setAll(settings ...string) error {
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		if err := h.SetSysctl(name, value); err != nil {
			if errors.Is(err, os.ErrNotExist) && strings.HasPrefix(name, "net.ipv6") {
				err = fmt.Errorf("this kernel lacks IPv6, or it is switched off: %w", err)
			}
			return err
		}
	}
	return nil
}

// Counter reads one of the kernel's protocol counters, such as "Icmp", "OutRedirects" or, for IPv6, "Icmp6OutRedirects"
// with an empty section (proc(5), /proc/net/snmp and snmp6).
func (h *Host) Counter(section, name string) (value uint64, err error) {
	file := "/proc/thread-self/net/snmp"
	if section == "" {
		file += "6"
	}
	err = h.Do(func() error {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		value, err = counter(string(text), section, name)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("reading counter %s %s of %s: %w", section, name, h.name, err)
	}
	return value, nil
}

// counter finds a value in snmp's pairs of lines (names, then values), or among snmp6's lines of name and value.
func counter(text, section, name string) (value uint64, err error) {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case section == "" && len(f) == 2 && f[0] == name:
			_, err = fmt.Sscan(f[1], &value)
			return value, err
		case section == "" || len(f) == 0 || f[0] != section+":":
		case names == nil:
			names = f
		default:
			for i, n := range names {
				if n == name && i < len(f) {
					_, err = fmt.Sscan(f[i], &value)
					return value, err
				}
			}
		}
	}
	return 0, errors.New("the kernel has no such counter")
}

// MountBPF mounts a BPF file system of the host's own and returns its directory: machines need not have one, and
// gateways on several hosts must not meet in it. Close unmounts it, which releases everything pinned there.
func (h *Host) MountBPF() (string, error) {
	dir := filepath.Join(h.lab.Dir(), "bpf-"+h.name)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("mounting a BPF file system for %s: %w", h.name, err)
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && st.Type == unix.BPF_FS_MAGIC {
		return dir, nil
	}
	err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700")
	if errors.Is(err, unix.ENODEV) {
		err = fmt.Errorf("this kernel lacks it (CONFIG_BPF_SYSCALL): %w", err)
	}
	if err != nil {
		return "", fmt.Errorf("mounting a BPF file system for %s: %w", h.name, err)
	}
	return dir, nil
}
