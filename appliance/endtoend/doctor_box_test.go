package endtoend

import (
	"fmt"
	"testing"
	"time"

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
var boxAilments = []ailment{}

var lanAilments = []ailment{}
