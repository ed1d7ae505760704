package gateway_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"sidegate/appliance/admin"
	"sidegate/appliance/gateway"
	"sidegate/appliance/lab"
)

// TestExplainIsWhatTheKernelDoes asks the running gateway about flows of every kind: its kernel, its policy
// and the file say the same, also about what only the gateway adds; and the traffic itself is decided so.
func TestExplainIsWhatTheKernelDoes(t *testing.T) {
	w := newWorld(t)
	hk := w.dante(t)
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	w.start(t, hk+`
interfaces: { lan: [eth0] }
rules:
  - { ip_is_private: true, outbound: direct }
  - { name: by-client, source_mac_address: ["02:00:00:00:00:10"], not: { port: [443] }, outbound: block }
  - { name: by-name, domain_suffix: [example.com], outbound: direct }
  - { port: [1000-2000], network: [udp], outbound: block }
  - { name: by-interface, inbound_interface: [eth0], dscp: [46], outbound: direct }
  - { name: by-process, process_name: [curl], outbound: block }
  - { name: by-path, process_path: [/usr/bin/wget], not: { unit: [cron.service] }, outbound: direct }
  - { name: v6, ip_version: [6], source_port: [53], outbound: direct }
default: hk
`)
	plan, err := gateway.Load(w.Config)
	need(t, err)

	outcomes := map[string]bool{}
	for _, source := range []string{"192.168.0.3", "203.0.113.20", "fd00::3", ""} {
		for _, ip := range []string{"192.168.0.9", "203.0.113.10", "203.0.113.20", "2001:db8::1", "fd00::9"} {
			if source != "" && strings.Contains(source, ":") != strings.Contains(ip, ":") {
				continue
			}
			for _, more := range []string{
				"", "port=443 network=tcp", "port=1080 network=tcp", "port=1500 network=udp", "port=1500 network=tcp",
				"port=80 network=tcp source_mac=02:00:00:00:00:10", "port=443 network=tcp source_mac=02:00:00:00:00:10",
				"domain=www.example.com port=80 network=tcp", "domain=example.org port=80 network=tcp",
				"dscp=46 interface=eth0", "dscp=46 interface=eth9", "dscp=46", "process=curl", "process=wget",
				"process_path=/usr/bin/wget unit=cron.service", "process_path=/usr/bin/wget unit=ssh.service", "process_path=/usr/bin/wget",
				"source_port=53 port=1 network=udp",
			} {
				args := strings.Fields("ip=" + ip + " " + more)
				if source != "" {
					args = append(args, "source_ip="+source)
				}
				facts := map[string][]string{}
				for _, a := range args {
					key, value, _ := strings.Cut(a, "=")
					facts[key] = append(facts[key], value)
				}
				live, err := w.api.Explain(t.Context(), facts)
				if err != nil {
					t.Fatalf("%q: %v", args, err)
				}
				flow, err := gateway.ParseFlow(facts)
				need(t, err)
				file := plan.Explain(flow)
				if live.Kernel == nil || !live.Kernel.Same(live.Policy.Answer) || !live.Kernel.Same(file.Answer) {
					t.Errorf("%q: the kernel says %s, the policy in force %s, the file %s", args, say(live.Kernel), say(&live.Policy.Answer), say(&file.Answer))
				}
				outcomes[say(live.Kernel)] = true
			}
		}
	}
	for _, want := range []string{
		"direct direct #1 0", "block block by-client 1", "direct direct by-name 2", "block block #4 3", "direct direct by-interface 4",
		"block block by-process 5", "direct direct by-path 6", "direct direct v6 7", "proxy hk default -1", "direct direct upstream hk -1 implicit", "direct direct from upstreams -1 implicit",
	} {
		if !outcomes[want] {
			t.Errorf("no flow had the outcome %q: this test proves less than it says", want)
		}
	}

	// The command line says so too, and traffic is decided so.
	out, err := exec.CommandContext(t.Context(), binary, "explain", "-c", w.Config, "--socket", w.Socket, "ip=203.0.113.10", "port=7", "network=tcp").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "The kernel says the same") {
		t.Errorf("sidegate explain: %v\n%s", err, out)
	}
	for _, to := range []string{echo.Addr4().String(), w.Host(lab.Upstream).Addr4().String() + ":1080"} {
		c, err := w.laptop().Dial(t.Context(), "tcp", to)
		need(t, err)
		defer c.Close()
	}
	flows, err := w.api.Flows(t.Context())
	need(t, err)
	decided := map[string]string{}
	for _, f := range flows {
		decided[f.Destination.String()] = f.Verdict + " by " + f.Rule
	}
	if got := decided[echo.Addr4().String()]; got != "proxy by default" {
		t.Errorf("the flow to the server is %q", got)
	}
	if got := decided[w.Host(lab.Upstream).Addr4().String()+":1080"]; got != "direct by upstream hk" {
		t.Errorf("the flow to the upstream itself is %q", got)
	}
}

func say(a *admin.Answer) string {
	if a == nil {
		return "nothing"
	}
	rule, implicit := "default", ""
	if a.Rule != nil {
		rule = *a.Rule
	}
	if a.Implicit {
		implicit = " implicit"
	}
	return fmt.Sprintf("%s %s %s %d%s", a.Verdict, a.Outbound, rule, a.Index, implicit)
}
