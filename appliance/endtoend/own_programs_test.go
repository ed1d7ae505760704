package endtoend

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// ownClient is a program that people run. run has it speak to the server, and says what it was told and what the server saw.
type ownClient struct {
	name    string
	pkg     string // what to install
	network string
	run     func(ctx context.Context, c *lab.Command, at ownServices, to netip.Addr) (sight, error)
	args    func(at ownServices, to netip.Addr) []string
}

// ownServices are those of the server that the clients speak to.
type ownServices struct {
	web, iperf uint16
	witness    *witness
	names      *lab.Nameserver
	iperf3     *lab.Daemon
}

const ownName = "who.test."

func startOwnServices(t *testing.T, w world) ownServices {
	t.Helper()
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	// Its one name stands for whoever asks.
	names, err := w.server().StartNameserver(t.Context(), 53, func(q *dns.Msg, asked lab.Question) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.Answer = []dns.RR{&dns.TXT{
			Hdr: dns.RR_Header{Name: asked.Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET},
			Txt: []string{asked.From.String()},
		}}
		return m
	})
	need(t, err)
	iperf, err := w.server().StartIperf3(t.Context(), 5201)
	need(t, err)
	return ownServices{web: files.Addr4().Port(), iperf: 5201, witness: startWitness(t, w.server(), 7), names: names, iperf3: iperf}
}

// ownPython speaks as ownGo does.
const ownPython = `
import json, socket, sys
network, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM if network == "tcp" else socket.SOCK_DGRAM)
s.settimeout(20)
s.connect((host, port))
s.sendall(b"who?\n")
text = lambda a: ("[%s]:%d" if ":" in a[0] else "%s:%d") % a[:2]
print(json.dumps({"Seen": s.recv(100).decode().strip(), "Local": text(s.getsockname()), "Peer": text(s.getpeername())}))
`

func hostURL(at netip.Addr, port uint16) string {
	return "http://" + netip.AddrPortFrom(at, port).String() + "/whoami"
}

func parseSight(seen, local, peer string) (s sight, err error) {
	for _, f := range []struct {
		text string // empty: the program does not tell
		into *netip.AddrPort
	}{{seen, &s.Seen}, {local, &s.Local}, {peer, &s.Peer}} {
		if f.text == "" {
			continue
		}
		if *f.into, err = netip.ParseAddrPort(strings.TrimSpace(f.text)); err != nil {
			return s, err
		}
	}
	return s, nil
}

func ownClients(python pythonHome) []ownClient {
	family := func(to netip.Addr) string {
		if to.Is6() {
			return "-6"
		}
		return "-4"
	}
	clients := []ownClient{
		{
			name: "curl", pkg: "curl", network: "tcp",
			args: func(at ownServices, to netip.Addr) []string {
				return []string{"-sS", "--max-time", "20", "-w", "%{local_ip} %{local_port} %{remote_ip} %{remote_port}", hostURL(to, at.web)}
			},
			run: func(_ context.Context, c *lab.Command, _ ownServices, _ netip.Addr) (sight, error) {
				out, err := c.Output()
				f := strings.Fields(out)
				if err != nil || len(f) != 5 {
					return sight{}, fmt.Errorf("%q: %w", out, err)
				}
				join := func(host, port string) string {
					if strings.Contains(host, ":") {
						host = "[" + host + "]"
					}
					return host + ":" + port
				}
				return parseSight(f[0], join(f[1], f[2]), join(f[3], f[4]))
			},
		},
		{
			name: "wget", pkg: "wget", network: "tcp",
			args: func(at ownServices, to netip.Addr) []string {
				return []string{"-q", "-O", "-", "--tries=1", "--timeout=20", hostURL(to, at.web)}
			},
			run: func(_ context.Context, c *lab.Command, _ ownServices, _ netip.Addr) (sight, error) {
				out, err := c.Output()
				if err != nil {
					return sight{}, err
				}
				return parseSight(out, "", "")
			},
		},
	}
	for _, network := range []string{"tcp", "udp"} {
		clients = append(clients,
			ownClient{
				name: "python3", pkg: "python3", network: network,
				args: func(at ownServices, to netip.Addr) []string {
					return []string{"-c", ownPython, network, to.String(), strconv.Itoa(int(at.witness.addr4.Port()))}
				},
				run: func(_ context.Context, c *lab.Command, _ ownServices, _ netip.Addr) (s sight, err error) {
					c.Env = []string{"PYTHONHOME=" + python.prefix}
					out, err := c.Output()
					if err == nil {
						err = json.Unmarshal([]byte(out), &s)
					}
					return s, err
				},
			},
			ownClient{
				name: "dig", pkg: "bind9-dnsutils", network: network,
				args: func(at ownServices, to netip.Addr) []string {
					args := []string{"@" + to.String(), ownName, "TXT", "+short", "+tries=1", "+timeout=20", "+nocookie"}
					if network == "tcp" {
						args = append(args, "+tcp")
					}
					return args
				},
				run: func(_ context.Context, c *lab.Command, _ ownServices, _ netip.Addr) (sight, error) {
					out, err := c.Output()
					if err != nil {
						return sight{}, fmt.Errorf("%s: %w", out, err)
					}
					return parseSight(strings.Trim(strings.TrimSpace(out), `"`), "", "")
				},
			},
			ownClient{
				name: "iperf3", pkg: "iperf3", network: network,
				args: func(at ownServices, to netip.Addr) []string {
					args := []string{"-c", to.String(), family(to), "-p", strconv.Itoa(int(at.iperf)), "-J", "-n", "200K", "--connect-timeout", "20000"}
					if network == "udp" {
						args = append(args, "-u", "-b", "20M", "-l", "1000")
					}
					return args
				},
				run: func(ctx context.Context, c *lab.Command, at ownServices, to netip.Addr) (s sight, err error) {
					before := len(iperfPeers(at.iperf3))
					out, err := c.Output()
					if err != nil {
						return s, fmt.Errorf("%s: %w", out, err)
					}
					var report struct {
						Start struct {
							Connected []struct {
								LocalHost  string `json:"local_host"`
								LocalPort  uint16 `json:"local_port"`
								RemoteHost string `json:"remote_host"`
								RemotePort uint16 `json:"remote_port"`
							} `json:"connected"`
						} `json:"start"`
						End struct {
							Sum struct {
								Bytes float64 `json:"bytes"`
							} `json:"sum_received"`
						} `json:"end"`
					}
					if err := json.Unmarshal([]byte(out), &report); err != nil || len(report.Start.Connected) != 1 {
						return s, fmt.Errorf("%s: %w", out, err)
					}
					i := report.Start.Connected[0]
					s.Local = netip.AddrPortFrom(netip.MustParseAddr(i.LocalHost), i.LocalPort)
					s.Peer = netip.AddrPortFrom(netip.MustParseAddr(i.RemoteHost), i.RemotePort)
					err = lab.Wait(ctx, "the server's log", func() error {
						peers := iperfPeers(at.iperf3)
						if len(peers) <= before {
							return fmt.Errorf("%d connections", len(peers)-before)
						}
						s.Seen = peers[len(peers)-1]
						return nil
					})
					return s, err
				},
			})
	}
	return clients
}

var iperfPeer = regexp.MustCompile(`connected to (\S+) port (\d+)`)

// iperfPeers are those that an iperf3 server exchanged data with.
func iperfPeers(d *lab.Daemon) (peers []netip.AddrPort) {
	for _, m := range iperfPeer.FindAllStringSubmatch(d.Tail(1<<20), -1) {
		port, _ := strconv.Atoi(m[2])
		if a, err := netip.ParseAddr(m[1]); err == nil {
			peers = append(peers, netip.AddrPortFrom(a, uint16(port)))
		}
	}
	return peers
}

// pythonHome is where Python is: a copy of the program does not find its library.
type pythonHome struct{ executable, prefix string }

func findPython(t *testing.T) (p pythonHome) {
	t.Helper()
	out, err := exec.Command("python3", "-c", "import os, sys; print(os.path.realpath(sys.executable)); print(sys.base_prefix)").Output()
	if err != nil {
		t.Skip("needs python3: install the package python3")
	}
	lines := strings.Fields(string(out))
	return pythonHome{lines[0], lines[1]}
}

// ownVerdicts are what may become of a flow, by the word in the names of programs and units.
var ownVerdicts = []struct {
	word, outbound, verdict string
}{
	{"red", "direct", "direct"},
	{"blue", "hk", "proxy"},
	{"shut", "block, reject: true", "block"},
}

// TestOwnPrograms runs programs of other people under names, at paths and in units with opposite rules: each flow of each follows its
// own rule, TCP and UDP, IPv4 and IPv6. The server sees the box, or the upstream, or nobody; the program is told the true addresses of
// both ends; `flows` names it and its unit, and `explain` says the same of it as the kernel. All else is blocked, so that what is not
// recognized fails too.
func TestOwnPrograms(t *testing.T) {
	b := newBox(t)
	at := startOwnServices(t, b.world)
	python := findPython(t)
	clients := ownClients(python)
	dir := t.TempDir()

	// By name: the same unit, one directory. By path: the same names. By unit: the same files.
	type actor struct {
		field, word string
		unit        string
		path        func(client string) string
	}
	var actors []actor
	var rules []string
	for _, v := range ownVerdicts {
		named := actor{"process_name", v.word, "any.service", func(c string) string { return filepath.Join(dir, "names", v.word+"-"+c) }}
		placed := actor{"process_path", v.word, "any.service", func(c string) string { return filepath.Join(dir, v.word, c) }}
		grouped := actor{"unit", v.word, v.word + ".service", func(c string) string { return filepath.Join(dir, "units", c) }}
		actors = append(actors, named, placed, grouped)
		var names, paths []string
		for _, c := range []string{"curl", "wget", "python3", "dig", "iperf3"} {
			names, paths = append(names, filepath.Base(named.path(c))), append(paths, placed.path(c))
		}
		for field, values := range map[string][]string{"process_name": names, "process_path": paths, "unit": {grouped.unit}} {
			rules = append(rules, fmt.Sprintf("  - { name: %s %s, %s: [%s], outbound: %s }", field, v.word, field, strings.Join(values, ", "), v.outbound))
		}
	}
	for _, c := range clients {
		binary, err := exec.LookPath(c.name)
		if err != nil {
			t.Skipf("needs %s: install the package %s", c.name, c.pkg)
		}
		if c.name == "python3" {
			binary = python.executable
		}
		for _, a := range actors {
			if _, err := os.Stat(a.path(c.name)); err != nil { // units share their files
				program(t, binary, a.path(c.name))
			}
		}
	}
	b.start(t, b.config("rules:\n"+strings.Join(rules, "\n"), "default: block"))

	for _, a := range actors {
		for _, c := range clients {
			for family, addr := range both(b.sidegate(), b.server()) {
				t.Run(strings.Join([]string{a.field, a.word, c.name, c.network, family}, " "), func(t *testing.T) {
					begun := time.Now()
					to := addr[1]
					command := b.sidegate().Command(within(t, forAnswer), a.path(c.name), c.args(at, to)...)
					command.Cgroup = b.unit(t, a.unit)
					met, peers := at.witness.met(), len(iperfPeers(at.iperf3))
					s, err := c.run(within(t, forAnswer), command, at, to)
					b.judge(t, a.word, s, err, addr[0], to)
					if a.word == "shut" && (at.witness.met() != met || len(iperfPeers(at.iperf3)) != peers) {
						t.Error("the server was reached")
					}
					process := admin.Process{Name: filepath.Base(a.path(c.name)), Unit: a.unit}
					b.explained(t, a.word, a.field+" "+a.word, process, a.path(c.name), c.network, to)
					if a.word == "blue" {
						b.listed(t, a.field+" "+a.word, process, c.network, to, time.Since(begun))
					}
				})
			}
		}
	}
}

// judge says whether what a program and the server saw of a flow is what is right for the verdict.
func (b *box) judge(t *testing.T, word string, s sight, err error, own, to netip.Addr) {
	t.Helper()
	if word == "shut" {
		if err == nil {
			t.Errorf("it got through, and the server saw %s", s.Seen)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	s = s.plain()
	if word == "red" && s.Seen.Addr() != own {
		t.Errorf("direct: the server saw %s, not the box's %s", s.Seen, own)
	}
	if word == "blue" && !is(b.upstream(), s.Seen.Addr()) {
		t.Errorf("proxied: the server saw %s, which is not the upstream", s.Seen)
	}
	if s.Local.IsValid() && s.Local.Addr() != own {
		t.Errorf("getsockname says %s, and the box is %s", s.Local, own)
	}
	if word == "red" && s.Local.IsValid() && s.Local != s.Seen {
		t.Errorf("getsockname says %s, and the server saw %s", s.Local, s.Seen)
	}
	if s.Peer.IsValid() && s.Peer.Addr() != to {
		t.Errorf("getpeername says %s, and the server is %s", s.Peer, to)
	}
}

// explained wants `explain` to decide as the verdict's word and rule say; that the kernel answers otherwise makes it fail.
func (b *box) explained(t *testing.T, word, rule string, p admin.Process, path, network string, to netip.Addr) {
	t.Helper()
	out := b.cli(t, "explain", "-c", b.gateway.Config, "--json", "process="+p.Name, "process_path="+path, "unit="+p.Unit,
		"interface=lo", "network="+network, "ip="+to.String(), "port=7")
	var e struct {
		Verdict, Rule string
		Kernel        *struct{ Verdict, Rule string }
	}
	need(t, json.Unmarshal([]byte(out), &e))
	i := slices.IndexFunc(ownVerdicts, func(v struct{ word, outbound, verdict string }) bool { return v.word == word })
	if want := ownVerdicts[i].verdict; e.Verdict != want || e.Rule != rule || e.Kernel == nil || e.Kernel.Verdict != want {
		t.Errorf("explain says otherwise than %s by the rule %q:\n%s", want, rule, out)
	}
}

// listed wants a flow that began within the time to be among the flows, with its process.
func (b *box) listed(t *testing.T, rule string, p admin.Process, network string, to netip.Addr, age time.Duration) {
	t.Helper()
	flows := b.flows(t)
	found := slices.ContainsFunc(flows, func(f admin.Flow) bool {
		return f.Process != nil && f.Process.Name == p.Name && f.Process.Unit == p.Unit && f.Process.PID != 0 &&
			f.Rule == rule && f.Network == network && f.Destination.Addr() == to && f.Interface == "lo" && f.Age <= age.Seconds()+1
	})
	if !found {
		t.Errorf("no flow of %+v to %s by %q among\n%+v", p, to, rule, flows)
	}
}

// TestOwnSocketsStay: a Go program's open connections, and its sockets of UDP that are not connected and speak to many, are listed with
// what was decided, direct ones too, and are told the truth.
func TestOwnSocketsStay(t *testing.T) {
	b := newBox(t)
	near := startWitness(t, b.server(), 7)
	dir := t.TempDir()
	b.start(t, b.config(`rules:
  - { name: by name, process_name: [red-go], outbound: direct }
  - { name: by unit, unit: [blue.service], outbound: hk }
  - { name: shut, process_name: [shut-go], outbound: block }
default: hk`))
	for _, c := range []struct{ word, name, unit, rule, verdict string }{
		{"red", "red-go", "any.service", "by name", "direct"},
		{"blue", "blue-go", "blue.service", "by unit", "proxy"},
		{"shut", "shut-go", "any.service", "shut", "block"},
	} {
		a := b.agent(t, program(t, "/proc/self/exe", filepath.Join(dir, c.name)), b.unit(t, c.unit))
		for i, network := range []string{"tcp", "udp"} {
			for j, to := range near.addrs() {
				own := b.sidegate().Addr4()
				if to.Addr().Is6() {
					own = b.sidegate().Addr6()
				}
				seen := func(s sight) {
					t.Helper()
					var err error
					if s.Error != "" {
						err = fmt.Errorf("%s", s.Error)
					}
					b.judge(t, c.word, s, err, own, to.Addr())
				}
				s := a.visit(t, 2*i+j, network, to)
				seen(s)
				find := func(f admin.Flow) bool {
					return f.Network == network && f.Source.Port() == s.Local.Port() && f.Destination == to && f.Verdict == c.verdict && f.Rule == c.rule &&
						f.Process != nil && *f.Process == admin.Process{Name: c.name, Unit: c.unit, PID: uint32(a.Pid())}
				}
				if c.word == "shut" {
					continue // there is no socket
				}
				if flows := b.flows(t); !slices.ContainsFunc(flows, find) {
					t.Errorf("%s %s to %s is not listed:\n%+v", c.name, network, to, flows)
				}
			}
		}
	}
}
