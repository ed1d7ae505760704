package endtoend

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// firewallAilments are of the box's own firewall.
var firewallAilments = []ailment{
	{
		name: "Docker's policy", direct: true, works: pings((*lab.Host).Addr4), finding: "firewall-forward eth0",
		cause: func(t *testing.T, w world) {
			run(t, w.sidegate(), "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -j RETURN")
		},
	},
	{
		name: "a firewall that forwards established connections only", direct: true, prepare: startEcho, works: echoes, finding: "firewall-forward eth0",
		cause: filters("chain forward { type filter hook forward priority 0; ct state { new, established, related } accept; meta l4proto icmp accept; drop; }"),
	},
	{
		name: "a firewall that forwards no IPv6", direct: true, works: pings((*lab.Host).Addr6), finding: "firewall-forward eth0",
		cause: filters("chain forward { type filter hook forward priority 0; policy accept; meta nfproto ipv6 reject; }"),
	},
	{
		name: "a firewall that takes ssh only", gateway: true, prepare: startEcho, works: proxies, finding: "firewall-input eth0",
		cause: filters("chain input { type filter hook input priority 0; policy drop; ct state established accept; tcp dport 22 accept; meta l4proto { icmp, ipv6-icmp } accept; iifname lo accept; udp dport 68 accept; }"),
	},
	{
		name: "NixOS's reverse path filter", gateway: true, prepare: startEcho, works: proxies, finding: "firewall-input eth0",
		cause: filters("chain rpfilter { type filter hook prerouting priority mangle + 10; policy drop; udp sport 67 udp dport 68 accept; fib saddr . mark . iif oif exists accept; }"),
	},
	{
		name: "a firewall that sends from the box's own address only", gateway: true, prepare: startEcho, works: proxies, finding: "firewall-output eth0",
		cause: filters("chain output { type filter hook output priority 0; meta nfproto ipv4 ip saddr != 192.168.0.2 meta l4proto tcp drop; }"),
		cure:  func(t *testing.T, w world) { run(t, w.sidegate(), "nft delete table inet mine") },
	},
	{
		name: "rules of the old iptables", direct: true, works: pings((*lab.Host).Addr4), finding: "firewall-forward eth0",
		cause: func(t *testing.T, w world) { run(t, w.sidegate(), "iptables-legacy -P FORWARD DROP") },
	},
	{
		name: "rules of the old iptables, on a box without the newer", direct: true, works: pings((*lab.Host).Addr4),
		only: []string{"iptables-legacy-save"}, finding: "firewall-legacy iptables-legacy (1 rules and policies)",
		cause: func(t *testing.T, w world) { run(t, w.sidegate(), "iptables-legacy -P FORWARD DROP") },
		cure:  func(t *testing.T, w world) { run(t, w.sidegate(), "iptables-legacy -P FORWARD ACCEPT") },
	},
	{
		name: "a masquerade of what is direct", direct: true, works: seenByServer, finding: "masquerade eth0",
		cause: filters(`chain postrouting { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }`),
		cure:  func(t *testing.T, w world) { run(t, w.sidegate(), "nft delete table inet mine") },
	},
}

// filters loads a chain.
func filters(chain string) func(*testing.T, world) {
	return func(t *testing.T, w world) {
		t.Helper()
		_, err := w.sidegate().Exec(t.Context(), "nft", "table inet mine { "+chain+"; }")
		need(t, err)
	}
}

// echoes works if a direct connection is answered.
func echoes(t *testing.T, w world) error {
	return converse(within(t, 2*time.Second), w.laptop(), "tcp", netip.AddrPortFrom(w.server().Addr4(), 7))
}

// seenByServer works if the server sees the laptop's own address.
func seenByServer(t *testing.T, w world) error {
	service, err := w.server().ListenUDP(t.Context(), "udp4", "0.0.0.0:9")
	need(t, err)
	defer service.Close()
	c, err := w.laptop().Dial(t.Context(), "udp4", netip.AddrPortFrom(w.server().Addr4(), 9).String())
	need(t, err)
	defer c.Close()
	_, err = c.Write([]byte("x"))
	need(t, err)
	need(t, service.SetReadDeadline(time.Now().Add(5*time.Second)))
	_, from, err := service.ReadFromUDPAddrPort(make([]byte, 10))
	need(t, err)
	if from.Addr() != w.laptop().Addr4() {
		return fmt.Errorf("the server sees %s", from)
	}
	return nil
}
