package endtoend

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// place is where a box stands. Build changes the lab's one-armed box into it; the client is then behind it.
type place struct {
	name   string
	lan    string // interfaces.lan of the configuration
	config string // more of it
	client string
	lab    lab.Options
	build  func(*testing.T, world)
	// oneArmed: replies of direct flows go past the box. nat: the box translates what leaves it, by rules of its own.
	oneArmed, nat bool
	advertised    bool   // the client has its IPv6 router from advertisements: while the gateway runs the box, else the router
	shows         string // in the status
}

var places = []place{
	{name: "one arm", lan: "auto", client: lab.Laptop, oneArmed: true},
	{name: "a bridge", lan: "[br0]", client: lab.Laptop, oneArmed: true, build: bridgeBox},
	{name: "a bridge, found", lan: "auto", client: lab.Laptop, oneArmed: true, build: bridgeBox, shows: "br0"},
	{name: "a port of a bridge", lan: "[eth0]", client: lab.Laptop, oneArmed: true, build: bridgeBox, shows: "br0 (eth0 is its port)"},
	{name: "a port of a bond in a bridge", lan: "[eth0]", client: lab.Laptop, oneArmed: true, build: bondedBox, shows: "br0 (eth0 is its port)"},
	{name: "two LANs, the first", lan: "[eth0, eth1]", client: lab.Laptop, oneArmed: true, build: secondArm("eth1", true)},
	{name: "two LANs, the second", lan: "[eth0, eth1]", client: "guest", build: secondArm("eth1", true)},
	{name: "an ordinary router", lan: "[eth1]", client: "guest", build: secondArm("eth1", true)},
	{name: "an ordinary router with NAT", lan: "[eth1]", client: "guest", nat: true, build: func(t *testing.T, w world) {
		secondArm("eth1", false)(t, w)
		run(t, w.sidegate(), `nft 'table inet own { chain out { type nat hook postrouting priority srcnat; iifname eth1 oifname eth0 masquerade; }; chain forward { type filter hook forward priority 0; ct state invalid drop; }; }'`)
	}},
	{name: "a name with a dot", lan: "[eth1.2]", client: "guest", build: secondArm("eth1.2", true)},
	{name: "a tunnel without a link layer", lan: "[tun0]", client: "guest", build: tunnel},
	{name: "WireGuard", lan: "[wg0]", client: "guest", build: wireguard},
	{name: "a VLAN", lan: "[eth0.7]", client: "guest", build: vlan},
	{
		name: "IPv6 by advertisements", lan: "auto", config: "ipv6: advertise\n", client: lab.Laptop, oneArmed: true, shows: "advertise, on eth0",
		lab: lab.Options{LinkLocalGateways: true}, build: advertisedRouter, advertised: true,
	},
}

// advertisedRouter makes the laptop have its IPv6 address and routers from advertisements, the main router's first.
func advertisedRouter(t *testing.T, w world) {
	t.Helper()
	_, err := w.router().StartRadvd(t.Context(), lab.RadvdOptions{})
	need(t, err)
	need(t, w.laptop().Autoconfigure(t.Context()))
	w.routedBy(t, w.router())
}

// routedBy waits until the laptop's kernel sends IPv6 by way of a host.
func (w world) routedBy(t *testing.T, h *lab.Host) {
	t.Helper()
	need(t, w.becomesRouter(t, h))
}

func (w world) becomesRouter(t *testing.T, h *lab.Host) error {
	t.Helper()
	return lab.Wait(within(t, 10*time.Second), "the laptop to take "+h.Name()+" as its IPv6 router", func() error {
		via, err := w.laptop().RouteTo(t.Context(), w.server().Addr6())
		if err == nil && via != h.Interface().LinkLocal() {
			err = fmt.Errorf("it goes by %s", via)
		}
		return err
	})
}

// bridgeBox makes the box's interface a port of a bridge, which has its addresses.
func bridgeBox(t *testing.T, w world) {
	t.Helper()
	bridgeOver(t, w, "eth0")
}

// bondedBox is bridgeBox with a bond in between.
func bondedBox(t *testing.T, w world) {
	t.Helper()
	if _, err := w.sidegate().Exec(t.Context(), "ip", "link", "add", "bond0", "type", "bond", "mode", "active-backup", "miimon", "100"); err != nil {
		t.Skipf("this kernel has no bonds (CONFIG_BONDING): %v", err)
	}
	run(t, w.sidegate(), "ip link set eth0 down; ip link set eth0 master bond0; ip link set bond0 up; ip link set eth0 up")
	bridgeOver(t, w, "bond0")
}

func bridgeOver(t *testing.T, w world, port string) {
	t.Helper()
	i := w.sidegate().Interface()
	run(t, w.sidegate(), fmt.Sprintf(`
		ip link add br0 address %s type bridge mcast_snooping 0
		ip link set %s master br0
		ip link set br0 up
		ip address flush dev eth0 scope global
		ip address add %s dev br0
		ip -6 address add %s dev br0 nodad
		ip route replace default via %s
		ip -6 route replace default via %s
		echo 0 >/proc/sys/net/ipv4/conf/br0/send_redirects
		for f in /proc/sys/net/bridge/bridge-nf-call-ip*tables; do [ ! -e $f ] || echo 0 >$f; done`,
		i.MAC, port, i.Addr4, i.Addr6, w.router().Addr4(), w.router().Addr6()))
}

// The addresses behind a box of two arms.
const (
	behind4, behind6 = "192.168.9.", "fd00:c0a8:9::"
	behind           = "echo 0 >/proc/sys/net/ipv4/conf/%[1]s/send_redirects; ip link set %[1]s up; ip address add " + behind4 + "2/24 dev %[1]s; ip -6 address add " + behind6 + "2/64 dev %[1]s nodad\n"
	guest            = "ip address flush dev %[1]s scope global; ip link set %[1]s up; ip address add " + behind4 + "3/24 dev %[1]s; ip -6 address add " + behind6 + "3/64 dev %[1]s nodad; " +
		"ip route replace default via " + behind4 + "2; ip -6 route replace default via " + behind6 + "2\n"
)

func addGuest(t *testing.T, w world) *lab.Host {
	t.Helper()
	h, err := w.AddClient(t.Context(), "guest")
	need(t, err)
	return h
}

// routeBack tells the router whom the guest is behind.
func routeBack(t *testing.T, w world) {
	t.Helper()
	run(t, w.router(), fmt.Sprintf("ip route add %s0/24 via %s; ip -6 route add %s/64 via %s", behind4, w.sidegate().Addr4(), behind6, w.sidegate().Addr6()))
}

// secondArm gives the box another LAN, with a client; the router may know of it.
func secondArm(device string, known bool) func(*testing.T, world) {
	return func(t *testing.T, w world) {
		t.Helper()
		h := addGuest(t, w)
		run(t, w.Host("switch"), "ip link set guest nomaster; ip link set guest netns "+w.sidegate().Namespace()+" name "+device)
		run(t, w.sidegate(), fmt.Sprintf(behind, device))
		run(t, h, fmt.Sprintf(guest, "eth0"))
		if known {
			routeBack(t, w)
		}
	}
}

// vlan gives the box a LAN inside of the segment, tagged.
func vlan(t *testing.T, w world) {
	t.Helper()
	h := addGuest(t, w)
	if _, err := w.sidegate().Exec(t.Context(), "ip", "link", "add", "link", "eth0", "name", "eth0.7", "type", "vlan", "id", "7"); err != nil {
		t.Skipf("this kernel has no VLANs (CONFIG_VLAN_8021Q): %v", err)
	}
	run(t, h, "ip link add link eth0 name eth0.7 type vlan id 7; ip address flush dev eth0 scope global")
	run(t, w.sidegate(), fmt.Sprintf(behind, "eth0.7"))
	run(t, h, fmt.Sprintf(guest, "eth0.7"))
	routeBack(t, w)
}

// wireguard gives the box a LAN of its own kind: the guest, whose packets come encrypted through the segment.
func wireguard(t *testing.T, w world) {
	t.Helper()
	h := addGuest(t, w)
	if _, err := w.sidegate().Exec(t.Context(), "ip", "link", "add", "wg0", "type", "wireguard"); err != nil {
		t.Skipf("this kernel has no WireGuard (CONFIG_WIREGUARD): %v", err)
	}
	_, err := h.Exec(t.Context(), "wg", "--version")
	need(t, err)
	run(t, h, "ip link add wg0 type wireguard")
	box, boxPublic := wireguardKey(t)
	client, clientPublic := wireguardKey(t)
	const set = "echo %s | wg set wg0 private-key /dev/stdin listen-port 51820 peer %s allowed-ips "
	run(t, w.sidegate(), fmt.Sprintf(set+"%s3,%s3", box, clientPublic, behind4, behind6))
	run(t, h, fmt.Sprintf(set+"0.0.0.0/0,::/0 endpoint %s:51820", client, boxPublic, w.sidegate().Addr4()))
	run(t, w.sidegate(), fmt.Sprintf(behind, "wg0"))
	run(t, h, fmt.Sprintf(guest, "wg0"))
	routeBack(t, w)
}

// wireguardKey makes a pair of keys as wg(8) writes them.
func wireguardKey(t *testing.T) (private, public string) {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	need(t, err)
	return base64.StdEncoding.EncodeToString(key.Bytes()), base64.StdEncoding.EncodeToString(key.PublicKey().Bytes())
}

// tunnel connects the guest by packets without a link-layer header, as WireGuard and PPP do.
func tunnel(t *testing.T, w world) {
	t.Helper()
	h := addGuest(t, w)
	ends := [2]*os.File{openTun(t, w.sidegate()), openTun(t, h)}
	var carrying sync.WaitGroup
	for i := range ends {
		carrying.Go(func() {
			packet := make([]byte, 1<<16)
			for {
				n, err := ends[i].Read(packet)
				if err != nil {
					return
				}
				ends[1-i].Write(packet[:n]) // a tunnel may lose a packet
			}
		})
	}
	t.Cleanup(func() {
		ends[0].Close()
		ends[1].Close()
		carrying.Wait()
	})
	run(t, w.sidegate(), fmt.Sprintf(behind, "tun0"))
	run(t, h, "ip link set eth0 down")
	run(t, h, fmt.Sprintf(guest, "tun0"))
	routeBack(t, w)
}

// openTun makes a tun device on a host.
func openTun(t *testing.T, h *lab.Host) (f *os.File) {
	t.Helper()
	need(t, h.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening /dev/net/tun: %w", err)
		}
		request := struct {
			name  [unix.IFNAMSIZ]byte
			flags uint16
			_     [22]byte
		}{flags: unix.IFF_TUN | unix.IFF_NO_PI}
		copy(request.name[:], "tun0")
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&request))); errno != 0 {
			unix.Close(fd)
			return fmt.Errorf("making a tun device: %w", errno)
		}
		f = os.NewFile(uintptr(fd), "tun0")
		return nil
	}))
	return f
}

// services are those of the scenario, told by their ports.
type services struct{ direct, proxied, blocked *lab.Echo }

const scenario = `rules:
  - { name: proxied, port: 8, outbound: hk }
  - { name: blocked, port: 9, outbound: block }
default: direct
`

// TestPlaces: wherever the box stands, direct, proxied and blocked flows are, by TCP and UDP, IPv4 and IPv6; and without the gateway
// the box forwards plainly.
func TestPlaces(t *testing.T) {
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel() // it waits for what is blocked
			w := newWorld(t, p.lab)
			if p.build != nil {
				p.build(t, w)
			}
			s := w.serve(t)
			w.startScenario(t, p.lan, p.config)
			if p.advertised {
				w.routedBy(t, w.sidegate())
			}
			if status := w.cli(t, "status"); !strings.Contains(status, p.shows) || strings.Contains(status, "Problems") {
				t.Errorf("the status does not say %q, or has problems:\n%s", p.shows, status)
			}
			w.plays(t, p, s)

			need(t, w.gateway.Stop())
			if p.advertised {
				w.routedBy(t, w.router())
			}
			for _, to := range []netip.AddrPort{s.direct.Addr4(), s.direct.Addr6(), s.blocked.Addr4(), s.blocked.Addr6()} {
				if err := converse(within(t, forAnswer), w.Host(p.client), "tcp", to); err != nil {
					t.Errorf("after the stop: %v", err)
				}
			}
		})
	}
}

func (w world) serve(t *testing.T) (s services) {
	t.Helper()
	for port, echo := range map[uint16]**lab.Echo{7: &s.direct, 8: &s.proxied, 9: &s.blocked} {
		var err error
		*echo, err = w.server().StartEcho(t.Context(), port)
		need(t, err)
	}
	return s
}

func (w *world) startScenario(t *testing.T, lan, more string) {
	t.Helper()
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	w.start(t, fmt.Sprintf("interfaces: { lan: %s }\n%soutbounds: { hk: { url: %q } }\n%s", lan, more, dante.URL("socks5", lab.Credentials{}), scenario))
}

// plays is the scenario.
func (w world) plays(t *testing.T, p place, s services) {
	t.Helper()
	client := w.Host(p.client)
	device := "eth0"
	if strings.HasPrefix(p.shows, "br0") || p.lan == "[br0]" {
		device = "br0"
	}
	atBox := captureOn(t, w.sidegate(), device)
	for _, at := range []func(*lab.Echo) netip.AddrPort{(*lab.Echo).Addr4, (*lab.Echo).Addr6} {
		for _, network := range []string{"tcp", "udp"} {
			own, err := spoken(t, client, network, at(s.direct), forAnswer)
			if err != nil {
				t.Errorf("direct %s: %v", network, err)
			} else if from := last(s.direct); p.nat == (from == own.Addr()) {
				t.Errorf("direct %s: the server saw %s, and the client is %s", network, from, own)
			}
			if _, err = spoken(t, client, network, at(s.proxied), forAnswer); err != nil {
				t.Errorf("proxied %s: %v", network, err)
			} else if from := last(s.proxied); from != w.upstream().Addr4() && from != w.upstream().Addr6() {
				t.Errorf("proxied %s: the server saw %s, which is not the upstream", network, from)
			}
			if _, err = spoken(t, client, network, at(s.blocked), forNone); err == nil {
				t.Errorf("blocked %s: it is answered", network)
			}
		}
		server := at(s.direct)
		replies := packets(t, atBox, func(p lab.Packet) bool { return p.Src == server })
		if p.oneArmed != (replies == 0) {
			t.Errorf("%d replies of direct flows cross the box", replies)
		}
	}
	if seen := s.blocked.Senders(); len(seen) > 0 {
		t.Errorf("the blocked service was reached by %v", seen)
	}
}

// What a client waits for is there at once, or on an emulated machine much later; what must not come is not waited for long.
const (
	forAnswer = 20 * time.Second
	forNone   = time.Second
)

func patience(answered bool) time.Duration {
	if answered {
		return forAnswer
	}
	return forNone
}

// spoken exchanges a few bytes, and returns the client's own address.
func spoken(t *testing.T, client *lab.Host, network string, to netip.AddrPort, patience time.Duration) (own netip.AddrPort, err error) {
	t.Helper()
	return spokenBy(t, client, net.Dialer{}, network, to, patience)
}

// spokenBy is spoken with a dialer, which may name one of the host's addresses.
func spokenBy(t *testing.T, client *lab.Host, d net.Dialer, network string, to netip.AddrPort, patience time.Duration) (own netip.AddrPort, err error) {
	t.Helper()
	c, err := client.DialWith(within(t, patience), d, network, to.String())
	if err != nil {
		return own, err
	}
	defer c.Close()
	own = netip.MustParseAddrPort(c.LocalAddr().String())
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return own, err
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		return own, err
	}
	_, err = io.ReadFull(c, make([]byte, 5))
	if e := net.Error(nil); errors.As(err, &e) && e.Timeout() {
		err = fmt.Errorf("no answer from %s", to)
	}
	return own, err
}

// last is whom a service saw last that it had not seen.
func last(e *lab.Echo) netip.Addr {
	seen := e.Senders()
	return seen[len(seen)-1].Addr()
}

// TestPlacesRulesByInterface: of two LANs each has its rules, and what goes from one to the other is decided too.
func TestPlacesRulesByInterface(t *testing.T) {
	w := newWorld(t, lab.Options{})
	secondArm("eth1", true)(t, w)
	w.serve(t)
	_, err := w.laptop().StartEcho(t.Context(), 7)
	need(t, err)
	_, err = w.laptop().StartEcho(t.Context(), 9)
	need(t, err)
	w.start(t, "interfaces: { lan: [eth0, eth1] }\nrules: [ { name: guests, inbound_interface: eth1, port: 9, outbound: block } ]\ndefault: direct\n")
	guest, laptop := w.Host("guest"), w.laptop()
	for _, c := range []struct {
		from *lab.Host
		to   netip.AddrPort
		open bool
	}{
		{laptop, netip.AddrPortFrom(w.server().Addr4(), 9), true},
		{guest, netip.AddrPortFrom(w.server().Addr4(), 9), false},
		{guest, netip.AddrPortFrom(w.server().Addr6(), 9), false},
		{guest, netip.AddrPortFrom(w.server().Addr4(), 7), true},
		{guest, netip.AddrPortFrom(laptop.Addr4(), 7), true},
		{guest, netip.AddrPortFrom(laptop.Addr4(), 9), false},
		{guest, netip.AddrPortFrom(laptop.Addr6(), 9), false},
	} {
		if _, err := spoken(t, c.from, "tcp", c.to, patience(c.open)); (err == nil) != c.open {
			t.Errorf("%s to %s: %v, open must be %v", c.from.Name(), c.to, err, c.open)
		}
	}
}

// TestReloadOfAPlace: a LAN interface comes and goes by a reload, together with its outbound and rules; a reload that is
// refused changes neither.
func TestReloadOfAPlace(t *testing.T) {
	w := newWorld(t, lab.Options{})
	secondArm("eth1", true)(t, w)
	s := w.serve(t)
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	const one = "interfaces: { lan: [eth0] }\ndefault: direct\n"
	both := fmt.Sprintf("interfaces: { lan: [eth0, eth1] }\noutbounds: { hk: { url: %q } }\n%s", dante.URL("socks5", lab.Credentials{}), scenario)
	w.start(t, one)
	decided := func(want bool) {
		t.Helper()
		for _, host := range []string{"guest", lab.Laptop} {
			if _, err := spoken(t, w.Host(host), "tcp", s.blocked.Addr4(), patience(!want)); (err != nil) != want {
				t.Errorf("%s to what is to be blocked: %v", host, err)
			}
			if _, err := spoken(t, w.Host(host), "udp", s.proxied.Addr6(), forAnswer); err != nil {
				t.Errorf("%s to what is to be proxied: %v", host, err)
			} else if from := last(s.proxied); (from == w.upstream().Addr4() || from == w.upstream().Addr6()) != want {
				t.Errorf("%s to what is to be proxied: the server saw %s", host, from)
			}
		}
	}
	reload := func(config string) (string, error) {
		t.Helper()
		need(t, os.WriteFile(w.gateway.Config, []byte(config), 0o600))
		out, err := exec.CommandContext(t.Context(), binary, "reload", "--socket", w.gateway.Socket).CombinedOutput()
		return string(out), err
	}
	decided(false)
	if out, err := reload(both); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	decided(true)
	if out, err := reload(strings.ReplaceAll(one, "direct", "tokyo")); err == nil || !strings.Contains(out, `:2: default: unknown outbound "tokyo"`) {
		t.Errorf("a default that does not exist: %v\n%s", err, out)
	}
	decided(true)
	if out, err := reload(one); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	decided(false)
	if status := w.cli(t, "status"); strings.Contains(status, "eth1") {
		t.Errorf("the interface is still there:\n%s", status)
	}
}

// TestPortIsEnslavedWhileItRuns: the policy follows to the bridge within the 3 s in which all is reconciled.
func TestPortIsEnslavedWhileItRuns(t *testing.T) {
	w := newWorld(t, lab.Options{})
	s := w.serve(t)
	w.startScenario(t, "[eth0]", "")
	bridgeBox(t, w)
	need(t, lab.Wait(within(t, 3*time.Second), "the policy to follow", func() error {
		if status := w.cli(t, "status"); !strings.Contains(status, "br0 (eth0 is its port)") {
			return errors.New(status)
		}
		return nil
	}))
	w.plays(t, place{client: lab.Laptop, lan: "[br0]", oneArmed: true}, s)
}

// TestClientsOfATunnel: behind an interface without MAC addresses two clients are told by their addresses. Each has its
// own rules, and its own share of the state.
func TestClientsOfATunnel(t *testing.T) {
	w := newWorld(t, lab.Options{})
	tunnel(t, w)
	one, other := netip.MustParseAddr(behind4+"3"), netip.MustParseAddr(behind4+"4")
	run(t, w.Host("guest"), fmt.Sprintf("ip address add %s/24 dev tun0", other))
	s := w.serve(t)
	w.start(t, fmt.Sprintf("interfaces: { lan: [tun0] }\nrules: [ { name: other, source_ip_cidr: [%s/32], port: 9, outbound: block } ]\ndefault: direct\n", other))
	for _, c := range []struct {
		from    netip.Addr
		to      netip.AddrPort
		open    bool
		clients uint32 // that the gateway knows by then
	}{
		{one, s.direct.Addr4(), true, 1},
		{one, s.blocked.Addr4(), true, 1},
		{other, s.blocked.Addr4(), false, 2},
		{other, s.direct.Addr4(), true, 2},
	} {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.from, 0))}
		if _, err := spokenBy(t, w.Host("guest"), d, "tcp", c.to, patience(c.open)); (err == nil) != c.open {
			t.Errorf("%s to %s: %v, open must be %v", c.from, c.to, err, c.open)
		}
		var status admin.Status
		need(t, json.Unmarshal([]byte(w.cli(t, "status", "--json")), &status))
		if known := status.Tables["clients"].Entries; known != c.clients {
			t.Errorf("after %s to %s the gateway knows %d clients, want %d", c.from, c.to, known, c.clients)
		}
	}
}
