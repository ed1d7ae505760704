package endtoend

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"

	"sidegate/appliance/lab"
)

// lanAilments are of the LAN around the box.
var lanAilments = []ailment{
	{
		name: "the router is silent", works: pings((*lab.Host).Addr4), withIPv6: true,
		cause: func(t *testing.T, w world) {
			run(t, w.router(), "ip link set lan arp off; ip neigh flush dev lan")
			run(t, w.sidegate(), "ip neigh flush dev eth0")
		},
		finding: "router 192.168.0.1",
		cure:    func(t *testing.T, w world) { run(t, w.router(), "ip link set lan arp on") },
	},
	{
		name: "the address is leased", works: pings((*lab.Host).Addr4), byHand: true, cure: func(t *testing.T, w world) {
			run(t, w.sidegate(), "ip route add default via 192.168.0.1") // it went with the address
		},
		cause: func(t *testing.T, w world) {
			run(t, w.sidegate(), "ip address change 192.168.0.2/24 dev eth0 valid_lft 8 preferred_lft 8")
		},
		finding: "address-lease eth0",
	},
	{
		name: "the address is another's too", works: pings((*lab.Host).Addr4), cause: impostor(24, "192.168.0.2"),
		finding: "address-duplicate 192.168.0.2", cure: removeImpostor,
	},
	{
		name: "the IPv6 address is another's too", works: pings((*lab.Host).Addr6), cause: impostor(64, "fd00:c0a8::2"),
		finding: "address-duplicate fd00:c0a8::2", cure: removeImpostor,
	},
	{
		name: "DHCP gives another gateway", prepare: givesLeases("192.168.0.2", "192.168.0.2"), cause: givesLeases("192.168.0.1", "192.168.0.2"), works: leaseLeadsHere,
		finding: "dhcp eth0", cure: givesLeases("192.168.0.2", "192.168.0.2"),
	},
	{
		name: "DHCP gives a DNS server of the LAN", dns: true, prepare: givesLeases("192.168.0.2", "192.168.0.2"), cause: givesLeases("192.168.0.2", "192.168.0.1"), works: leaseAsksHere,
		finding: "dhcp eth0", cure: givesLeases("192.168.0.2", "192.168.0.2"),
	},
	{
		name: "the router advertises itself", prepare: takesAdvertisements, works: keepsIPv6, cause: advertises(1800), finding: "router-advertisement eth0", cure: advertises(0),
	},
}

// impostor makes another host that has an address of the box, and waits until the laptop takes it for the box.
func impostor(bits int, address string) func(*testing.T, world) {
	return func(t *testing.T, w world) {
		t.Helper()
		other, err := w.AddClient(t.Context(), "impostor")
		need(t, err)
		// IPv4 hosts believe who answers first; IPv6 hosts who says so last, which a host with a new MAC address does unasked.
		need(t, other.SetSysctl("net.ipv6.conf.eth0.ndisc_notify", "1"))
		run(t, other, fmt.Sprintf("ip address add %s/%d dev eth0", address, bits))
		tries := 0
		err = lab.Wait(within(t, 20*time.Second), "the laptop to mistake it", func() error {
			run(t, w.laptop(), "ip neigh flush dev eth0; ping -c1 -W1 "+address+" >&2 || true")
			if tries++; bits > 32 {
				run(t, other, fmt.Sprintf("ip link set eth0 address 02:00:00:66:00:%02d", tries%100))
			}
			out, err := w.laptop().Exec(t.Context(), "ip", "neigh", "show", address, "dev", "eth0")
			if err == nil && (!strings.Contains(out, "lladdr") || strings.Contains(out, w.sidegate().MAC().String())) {
				err = errors.New(out)
			}
			return err
		})
		need(t, err)
	}
}

func removeImpostor(t *testing.T, w world) {
	t.Helper()
	run(t, w.Host("impostor"), "ip link set eth0 down")
	run(t, w.laptop(), "ip neigh flush dev eth0")
}

// stop ends a program by its pid file.
func stop(t *testing.T, h *lab.Host, file string) {
	t.Helper()
	run(t, h, fmt.Sprintf(`[ -e %[1]s ] || exit 0; p=$(cat %[1]s); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.05; done; rm -f %[1]s`, file))
}

// givesLeases makes the router a DHCP server that names this gateway and DNS server.
func givesLeases(gateway, server string) func(*testing.T, world) {
	return func(t *testing.T, w world) {
		t.Helper()
		pid := filepath.Join(w.Dir(), "dnsmasq.pid")
		stop(t, w.router(), pid)
		startProgram(t, w.router(), "dnsmasq-base", "dnsmasq", "-k", "-C", "/dev/null", "-p", "0", "--user=root", "--no-ping",
			"--interface=lan", "--bind-interfaces", "--dhcp-range=192.168.0.150,192.168.0.200,1h", "--dhcp-authoritative",
			"--dhcp-option=3,"+gateway, "--dhcp-option=6,"+server, "--dhcp-leasefile="+filepath.Join(w.Dir(), "leases"), "--pid-file="+pid)
		need(t, lab.Wait(within(t, 10*time.Second), "the DHCP server", func() error {
			_, err := lease(t, w)
			return err
		}))
	}
}

// lease is what the laptop is given.
func lease(t *testing.T, w world) (*dhcpv4.DHCPv4, error) {
	var client *nclient4.Client
	err := w.laptop().Do(func() (err error) {
		client, err = nclient4.New("eth0", nclient4.WithTimeout(time.Second), nclient4.WithRetry(1))
		return err
	})
	need(t, err)
	defer client.Close()
	l, err := client.Request(t.Context())
	if err != nil {
		return nil, err
	}
	return l.ACK, nil
}

func leaseLeadsHere(t *testing.T, w world) error {
	given, err := lease(t, w)
	if err != nil {
		return err
	}
	run(t, w.laptop(), "ip route replace default via "+given.Router()[0].String())
	return passesHere(t, w, (*lab.Host).Addr4)
}

// passesHere works if what the laptop sends to the server passes the box.
func passesHere(t *testing.T, w world, of func(*lab.Host) netip.Addr) error {
	c := captureOn(t, w.sidegate(), "eth0")
	defer c.Close()
	if err := pings(of)(t, w); err != nil {
		return err
	}
	if packets(t, c, lab.To(of(w.server()))) == 0 {
		return errors.New("the laptop goes past the box")
	}
	return nil
}

func leaseAsksHere(t *testing.T, w world) error {
	given, err := lease(t, w)
	if err != nil {
		return err
	}
	here, there := captureOn(t, w.sidegate(), "eth0"), captureOn(t, w.router(), "lan")
	defer here.Close()
	defer there.Close()
	c, err := w.laptop().Dial(t.Context(), "udp", net.JoinHostPort(given.DNS()[0].String(), "53"))
	need(t, err)
	defer c.Close()
	_, err = c.Write([]byte("a question"))
	need(t, err)
	question := func(p lab.Packet) bool { return !p.Out && p.Dst.Port() == 53 }
	var past error
	need(t, lab.Wait(within(t, 5*time.Second), "the question", func() error {
		switch {
		case packets(t, here, question) > 0:
		case packets(t, there, question) > 0:
			past = errors.New("the laptop asks past the box")
		default:
			return errors.New("nobody has seen it")
		}
		return nil
	}))
	return past
}

func takesAdvertisements(t *testing.T, w world) {
	t.Helper()
	need(t, w.laptop().SetSysctl("net.ipv6.conf.eth0.accept_ra", "1"))
	run(t, w.laptop(), "ip -6 route del default; ip -6 route add default via fd00:c0a8::2 metric 2048")
}

func keepsIPv6(t *testing.T, w world) error { return passesHere(t, w, (*lab.Host).Addr6) }

// advertises makes the router announce itself for so many seconds; 0 takes it back.
func advertises(lifetime int) func(*testing.T, world) {
	return func(t *testing.T, w world) {
		t.Helper()
		config, pid := filepath.Join(w.Dir(), "radvd.conf"), filepath.Join(w.Dir(), "radvd.pid")
		stop(t, w.router(), pid)
		need(t, os.WriteFile(config, fmt.Appendf(nil,
			"interface lan { AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 4; AdvDefaultLifetime %d; };", lifetime), 0o644))
		startProgram(t, w.router(), "radvd", "radvd", "--nodaemon", "--config", config, "--pidfile", pid)
		routes := func() error {
			out, err := w.laptop().Exec(t.Context(), "ip", "-6", "route", "show", "default", "proto", "ra")
			if err == nil && (out != "") != (lifetime > 0) {
				err = fmt.Errorf("the laptop's routes are %q", out)
			}
			return err
		}
		need(t, lab.Wait(within(t, 20*time.Second), "the laptop to follow", routes))
	}
}
