package endtoend

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"sidegate/appliance/lab"
)

// parameterAilments are the kernel parameters: each line of the list breaks something that people see.
var parameterAilments = []ailment{
	{
		name: "ip_forward", cause: sets("net.ipv4.ip_forward", "0"),
		finding: "kernel-parameter net.ipv4.ip_forward", works: pings((*lab.Host).Addr4),
	},
	{
		name: "IPv4 forwarding of the interface", cause: sets("net.ipv4.conf.eth0.forwarding", "0"),
		finding: "kernel-parameter net.ipv4.conf.eth0.forwarding", works: pings((*lab.Host).Addr4),
	},
	{
		name: "IPv6 forwarding", cause: sets("net.ipv6.conf.all.forwarding", "0"),
		finding: "kernel-parameter net.ipv6.conf.all.forwarding", works: pings((*lab.Host).Addr6),
	},
	{
		name: "send_redirects of all", cause: sets("net.ipv4.conf.all.send_redirects", "1"),
		finding: "kernel-parameter net.ipv4.conf.all.send_redirects", works: sendsNoRedirect,
	},
	{
		name: "send_redirects of the interface", cause: sets("net.ipv4.conf.eth0.send_redirects", "1"),
		finding: "kernel-parameter net.ipv4.conf.eth0.send_redirects", works: sendsNoRedirect,
	},
	{
		name: "src_valid_mark of all", gateway: true, prepare: startEcho, cause: sets("net.ipv4.conf.all.src_valid_mark", "1"),
		finding: "kernel-parameter net.ipv4.conf.all.src_valid_mark", works: proxies,
	},
	{
		name: "src_valid_mark of the interface", gateway: true, prepare: startEcho, cause: sets("net.ipv4.conf.eth0.src_valid_mark", "1"),
		finding: "kernel-parameter net.ipv4.conf.eth0.src_valid_mark", works: proxies,
	},
	{
		name: "route_localnet of all", prepare: reachForLoopback, cause: sets("net.ipv4.conf.all.route_localnet", "1"),
		finding: "kernel-parameter net.ipv4.conf.all.route_localnet", works: loopbackIsClosed,
	},
	{
		name: "route_localnet of the interface", prepare: reachForLoopback, cause: sets("net.ipv4.conf.eth0.route_localnet", "1"),
		finding: "kernel-parameter net.ipv4.conf.eth0.route_localnet", works: loopbackIsClosed,
	},
	{
		name: "bridge-nf-call-iptables", lan: "br0", prepare: bridgeNeighbours, cause: sets("net.bridge.bridge-nf-call-iptables", "1"),
		finding: "kernel-parameter net.bridge.bridge-nf-call-iptables", works: neighboursMeet("10.9.0.1"),
	},
	{
		name: "bridge-nf-call-ip6tables", lan: "br0", prepare: bridgeNeighbours, cause: sets("net.bridge.bridge-nf-call-ip6tables", "1"),
		finding: "kernel-parameter net.bridge.bridge-nf-call-ip6tables", works: neighboursMeet("fd09::1"),
	},
}

// sendsNoRedirect works if the kernel does not tell the laptop of the shorter way.
func sendsNoRedirect(t *testing.T, w world) error {
	before, err := w.sidegate().Counter("Icmp", "OutRedirects")
	need(t, err)
	run(t, w.laptop(), "ip route flush cache") // it would not come by again
	if err := pings((*lab.Host).Addr4)(t, w); err != nil {
		return err
	}
	after, err := w.sidegate().Counter("Icmp", "OutRedirects")
	need(t, err)
	if after != before {
		return fmt.Errorf("%d redirects were sent", after-before)
	}
	return nil
}

// reachForLoopback makes the laptop one that sends to loopback addresses of the box.
func reachForLoopback(t *testing.T, w world) {
	t.Helper()
	run(t, w.laptop(), `
		ip route del local 127.0.0.0/8 dev lo table local
		ip route del local 127.0.0.1 dev lo table local
		ip route add 127.0.0.1 via 192.168.0.2 src 192.168.0.3
		echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet`)
}

// loopbackIsClosed works if nothing reaches a service that listens on loopback only: it sends a datagram.
func loopbackIsClosed(t *testing.T, w world) error {
	service, err := w.sidegate().ListenUDP(t.Context(), "udp4", "127.0.0.1:631")
	need(t, err)
	defer service.Close()
	c, err := w.laptop().Dial(t.Context(), "udp4", "127.0.0.1:631")
	need(t, err)
	defer c.Close()
	before, err := w.sidegate().Counter("Ip", "InReceives")
	need(t, err)
	_, err = c.Write([]byte("x"))
	need(t, err)
	err = lab.Wait(within(t, 5*time.Second), "the datagram", func() error {
		if n, err := w.sidegate().Counter("Ip", "InReceives"); err != nil || n == before {
			return fmt.Errorf("nothing was received: %v", err)
		}
		return nil
	})
	need(t, err)
	need(t, service.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	if _, from, err := service.ReadFrom(make([]byte, 10)); err == nil {
		return fmt.Errorf("%s reaches what listens on the box's 127.0.0.1", from)
	}
	return nil
}

// bridgeNeighbours makes the box a bridge between the laptop and the router, with a firewall for what it forwards.
func bridgeNeighbours(t *testing.T, w world) {
	t.Helper()
	box := w.sidegate()
	for _, family := range []string{"ip", "ip6"} {
		need(t, box.SetSysctl("net.bridge.bridge-nf-call-"+family+"tables", "0"))
	}
	run(t, box, fmt.Sprintf(`
		ip link add br0 type bridge mcast_snooping 0
		ip link add p1 type veth peer name eth9 netns %s
		ip link add p2 type veth peer name eth9 netns %s
		ip link set p1 master br0 up
		ip link set p2 master br0 up
		ip link set br0 up
		ip address add 10.9.0.2/24 dev br0
		echo 0 >/proc/sys/net/ipv4/conf/br0/send_redirects
		nft 'table inet filter { chain forward { type filter hook forward priority 0; iifname br0 oifname br0 drop; }; }'
		`, w.laptop().Namespace(), w.router().Namespace()))
	run(t, w.laptop(), "ip link set eth9 up; ip address add 10.9.0.3/24 dev eth9; ip address add fd09::3/64 dev eth9 nodad")
	run(t, w.router(), "ip link set eth9 up; ip address add 10.9.0.1/24 dev eth9; ip address add fd09::1/64 dev eth9 nodad")
}

func neighboursMeet(address string) func(*testing.T, world) error {
	return func(t *testing.T, w world) error {
		_, err := w.laptop().Exec(within(t, 5*time.Second), "ping", "-c1", "-W1", address)
		return err
	}
}

// boxAilments are of the box itself, apart from its parameters.
var boxAilments = []ailment{
	{
		name: "clients at an interface that auto leaves out", gateway: true, prepare: startEcho, cause: secondArm("eth1", true),
		finding: "interface eth1", works: guestIsProxied,
		cure: func(t *testing.T, w world) {
			run(t, w.sidegate(), "sed -i 's/lan: auto/lan: [eth0, eth1]/' "+w.gateway.Config)
			w.cli(t, "reload")
		},
	},
	{
		name: "an IPv6 route that was advertised", prepare: advertisedUplink, cause: sets("net.ipv6.conf.up0.accept_ra", "1"),
		finding: "kernel-parameter net.ipv6.conf.up0.accept_ra", works: pings((*lab.Host).Addr6), byHand: true,
	},
	{
		name: "no default route", lan: "eth0", works: pings((*lab.Host).Addr4),
		cause:   func(t *testing.T, w world) { run(t, w.sidegate(), "ip route del default") },
		finding: "default-route IPv4",
		cure:    func(t *testing.T, w world) { run(t, w.sidegate(), "ip route add default via 192.168.0.1") },
	},
	{
		name: "an interface that is down", lan: "eth0", works: pings((*lab.Host).Addr4),
		cause:   func(t *testing.T, w world) { run(t, w.sidegate(), "ip link set eth0 down") },
		finding: "interface eth0",
		cure: func(t *testing.T, w world) {
			run(t, w.sidegate(), "ip link set eth0 up; ip route add default via 192.168.0.1")
		},
	},
	{
		name: "an interface that is missing", lan: "eth0, lan1", prepare: secondLAN, works: secondLANWorks,
		cause:   func(t *testing.T, w world) { run(t, w.sidegate(), "ip link del lan1") },
		finding: "interface lan1", cure: secondLAN,
	},
	{
		name: "rp_filter with two ways", lan: "eth0", prepare: twoWays, cause: sets("net.ipv4.conf.eth0.rp_filter", "1"),
		finding: "rp-filter eth0", works: pings((*lab.Host).Addr4),
	},
	{
		name: "rp_filter of all with two ways", lan: "eth0", prepare: twoWays, cause: sets("net.ipv4.conf.all.rp_filter", "1"),
		finding: "rp-filter eth0", works: pings((*lab.Host).Addr4),
	},
	{
		name: "a small MTU", works: carriesFullSize, byHand: true,
		cause:   func(t *testing.T, w world) { run(t, w.sidegate(), "ip link set eth0 mtu 1400") },
		finding: "mtu eth0",
	},
	{
		name: "a large MTU", works: relaysLargeDatagrams, gateway: true, prepare: startEcho, byHand: true,
		cause:   func(t *testing.T, w world) { run(t, w.sidegate(), "ip link set eth0 mtu 9000") },
		finding: "mtu eth0",
	},
	{
		name: "another program first", gateway: true, prepare: startEcho, works: laptopIsNotSeen,
		cause: attachFirst, finding: "programs eth0", cure: detachFirst,
	},
	{
		name: "the gateway has a problem", gateway: true, prepare: startEcho, works: proxies,
		cause: reconfigure("socks5://nowhere.invalid:1080"), finding: "gateway sidegate", cure: reconfigure("socks5://203.0.113.20:1080"),
	},
}

// reconfigure gives the running gateway another upstream.
func reconfigure(url string) func(*testing.T, world) {
	return func(t *testing.T, w world) {
		t.Helper()
		config := fmt.Sprintf("interfaces: { lan: auto }\noutbounds:\n  hk: { url: %q }\ndefault: hk\n", url)
		need(t, os.WriteFile(w.gateway.Config, []byte(config), 0o644))
		w.cli(t, "reload")
	}
}

// TestDoctorOnAnOldKernel: the version is what says that sidegate would not start.
func TestDoctorOnAnOldKernel(t *testing.T) {
	w := newWorld(t, lab.Options{})
	out, err := w.sidegate().Exec(t.Context(), "setarch", "--uname-2.6", binary, "doctor")
	if exited := (*exec.ExitError)(nil); !errors.As(err, &exited) || exited.ExitCode() != 3 || !strings.HasPrefix(out, "failure kernel: Linux 2.6.") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestDoctorWithoutBTF: doctor says why run does not start.
func TestDoctorWithoutBTF(t *testing.T) {
	w := newWorld(t, lab.Options{})
	state, err := w.sidegate().MountBPF()
	need(t, err)
	empty := t.TempDir()
	without := func(args ...string) (string, error) {
		script := "mount --bind " + empty + ` /sys/kernel/btf && exec "$0" "$@"`
		return w.sidegate().Exec(within(t, 20*time.Second), "unshare", append([]string{"-m", "sh", "-c", script, binary}, args...)...)
	}
	out, err := without("doctor")
	if err == nil || !strings.HasPrefix(out, "failure kernel: BTF\n") || strings.Count(out, "why") != 1 {
		t.Errorf("%v\n%s", err, out)
	}
	_, err = without("run", "--state-dir", filepath.Join(state, "sidegate"), "--socket", filepath.Join(w.Dir(), "none.sock"))
	if err == nil || !strings.Contains(err.Error(), "BTF") {
		t.Errorf("run without BTF: %v", err)
	}
}

// TestDoctorPrints: what people see.
func TestDoctorPrints(t *testing.T) {
	w := newWorld(t, lab.Options{})
	sets("net.ipv4.ip_forward", "0")(t, w)
	out, _ := w.sidegate().Exec(t.Context(), binary, "doctor", "--fix", "--yes")
	want := `failure kernel-parameter: net.ipv4.ip_forward
  seen  it is 0
  why   direct IPv4 traffic is not forwarded
  fix   sysctl -w net.ipv4.ip_forward=1
done: sysctl -w net.ipv4.ip_forward=1

Looking again:
no finding: `
	if !strings.HasPrefix(out, want) {
		t.Errorf("got  %s\nwant %s", out, want)
	}
	out, err := w.sidegate().Exec(t.Context(), binary, "sysctls")
	if err != nil || !strings.Contains(out, "net.ipv4.conf.eth0.send_redirects") {
		t.Errorf("%v\n%s", err, out)
	}
}

// advertisedUplink gives the box another interface to the router, by which it learns its IPv6 route.
func advertisedUplink(t *testing.T, w world) {
	t.Helper()
	config := filepath.Join(w.Dir(), "radvd.conf")
	need(t, os.WriteFile(config, []byte(`interface down0 {
		AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 4; AdvDefaultLifetime 4;
	};`), 0o644))
	run(t, w.sidegate(), fmt.Sprintf(`
		ip -6 route del default
		ip link add up0 type veth peer name down0 netns %s
		echo 2 >/proc/sys/net/ipv6/conf/up0/accept_ra
		ip link set up0 up`, w.router().Namespace()))
	run(t, w.router(), "ip link set down0 up")
	startProgram(t, w.router(), "radvd", "radvd", "--nodaemon", "--config", config, "--pidfile", filepath.Join(w.Dir(), "radvd.pid"))
	need(t, lab.Wait(within(t, 20*time.Second), "the advertised route", func() error { return pings((*lab.Host).Addr6)(t, w) }))
}

// startProgram starts one that runs until the lab is closed.
func startProgram(t *testing.T, h *lab.Host, pkg, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("needs %s: install the package %s", name, pkg)
	}
	p, err := h.Command(t.Context(), path, args...).Start()
	need(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s: %s", name, p.Tail(10))
		}
	})
}

// secondLAN gives the box another interface, with a client behind it: the laptop's other one.
func secondLAN(t *testing.T, w world) {
	t.Helper()
	run(t, w.sidegate(), fmt.Sprintf(`
		ip link add lan1 type veth peer name lan1 netns %s
		ip link set lan1 up
		ip address add 10.9.0.2/24 dev lan1
		echo 0 >/proc/sys/net/ipv4/conf/lan1/send_redirects`, w.laptop().Namespace()))
	run(t, w.laptop(), "ip link set lan1 up; ip address add 10.9.0.3/24 dev lan1")
}

func secondLANWorks(t *testing.T, w world) error {
	_, err := w.laptop().Exec(within(t, 5*time.Second), "ping", "-c1", "-W1", "10.9.0.2")
	return err
}

// twoWays gives the box a second interface on the LAN, through which its route to the clients is.
func twoWays(t *testing.T, w world) {
	t.Helper()
	run(t, w.Host("switch"), fmt.Sprintf(`
		ip link add second type veth peer name eth1 netns %s
		ip link set second master lan up`, w.sidegate().Namespace()))
	run(t, w.sidegate(), `
		ip link set eth1 up
		ip address add 192.168.0.22/24 dev eth1
		echo 0 >/proc/sys/net/ipv4/conf/eth1/rp_filter
		ip route del 192.168.0.0/24 dev eth0
		ip route replace default via 192.168.0.1 dev eth1
		`)
}

func carriesFullSize(t *testing.T, w world) error {
	_, err := w.laptop().Exec(within(t, 5*time.Second), "ping", "-c1", "-W1", "-M", "do", "-s", "1472", w.server().Addr4().String())
	return err
}

// relaysLargeDatagrams works if a datagram of two fragments comes back through the upstream.
func relaysLargeDatagrams(t *testing.T, w world) error {
	c, err := w.laptop().Dial(t.Context(), "udp", netip.AddrPortFrom(w.server().Addr4(), 7).String())
	need(t, err)
	defer c.Close()
	want := make([]byte, 3000)
	need(t, c.SetDeadline(time.Now().Add(2*time.Second)))
	if _, err := c.Write(want); err != nil {
		return err
	}
	_, err = c.Read(want)
	return err
}

// laptopIsNotSeen works if what is proxied does not leave as the laptop's own.
func laptopIsNotSeen(t *testing.T, w world) error {
	c := captureOn(t, w.router(), "wan")
	defer c.Close()
	if err := proxies(t, w); err != nil {
		return err
	}
	if n := packets(t, c, lab.From(w.laptop().Addr4())); n > 0 {
		return fmt.Errorf("%d packets went direct", n)
	}
	return nil
}

// attachFirst attaches a program that passes everything before the gateway's.
func attachFirst(t *testing.T, w world) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "greedy", Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, // TCX_PASS
	})
	need(t, err)
	defer p.Close()
	need(t, w.sidegate().Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{
			Interface: w.sidegate().Interface().Index, Program: p, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
		})
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		return l.Pin(filepath.Join(filepath.Dir(w.gateway.State), "greedy"))
	}))
}

func detachFirst(t *testing.T, w world) {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(filepath.Dir(w.gateway.State), "greedy"), nil)
	need(t, err)
	defer l.Close()
	need(t, l.(interface{ Detach() error }).Detach())
	need(t, l.Unpin())
}

// guestIsProxied works if the server does not see the guest itself.
func guestIsProxied(t *testing.T, w world) error {
	if !slices.ContainsFunc(w.Hosts(), func(h *lab.Host) bool { return h.Name() == "guest" }) {
		return proxies(t, w)
	}
	seen := captureOn(t, w.server(), w.server().Interface().Name)
	if _, err := spoken(t, w.Host("guest"), "tcp", netip.AddrPortFrom(w.server().Addr4(), 7), forNone); err != nil {
		return err
	}
	if n := packets(t, seen, lab.From(netip.MustParseAddr(behind4+"3"))); n > 0 {
		return fmt.Errorf("%d packets of the guest came to the server", n)
	}
	return nil
}
