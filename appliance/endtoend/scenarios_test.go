package endtoend

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// sideRouter is a box that is played with, whatever it is: the program in a namespace or a container (namespaceBox), the image in a virtual
// machine (machineBox), the NixOS module's unit under systemd (systemdBox), or any box that has a shell and a cable (elsewhere).
type sideRouter interface {
	configure(t *testing.T, config string) error     // has it taken, by a start or a reload
	try(t *testing.T, script string) (string, error) // runs it in a shell on the box, where sidegate is the program
	crash(t *testing.T)                              // kills the daemon
	revive(t *testing.T)                             // starts it again, unless the box does that by itself
	restart(t *testing.T)                            // the whole box: it begins anew, with the configuration of the stage
}

// stage is where scenarios are played, one after the other.
type stage struct {
	*namesWorld
	sideRouter
	services
	outbounds string // section of every configuration
}

// scenarios are what people who have a side router want to be true, whatever the box is. They are played in this order, each with a
// configuration of its own; what one adds to the network stays.
var scenarios = []struct {
	name string
	play func(*stage, *testing.T)
	dies bool // the daemon, or the box: who looks after them must be there
}{
	{"direct, proxied and blocked", (*stage).playsPaths, false},
	{"names", (*stage).playsNames, false},
	{"own connections", (*stage).playsOwn, false},
	{"reload", (*stage).playsReload, false},
	{"crash", (*stage).playsCrash, true},
	{"restart", (*stage).playsRestart, true},
	{"IPv6 by advertisements", (*stage).playsAdvertised, false},
	{"a firewall that sees one half", (*stage).playsFirewall, false},
}

// newStage builds the network around a box that is not there yet.
func newStage(t *testing.T) *stage {
	t.Helper()
	s := &stage{namesWorld: &namesWorld{world: newWorld(t, lab.Options{})}}
	var err error
	s.resolver, err = s.AddServer(t.Context(), "resolver")
	need(t, err)
	s.services = s.serve(t)
	var records []string
	for i, domain := range []string{"direct", "proxied", "blocked"} {
		records = append(records, fmt.Sprintf("www.%s.test. 300 A %s", domain, farAddress(i)))
	}
	s.serveNames(t, false, records...)
	_, err = s.server().StartNginx(t.Context(), lab.NginxOptions{HTTP: 80, Sites: []lab.Site{{Name: "www.direct.test"}, {Name: "www.proxied.test"}}})
	need(t, err)
	need(t, s.server().OwnPrefix(far))
	dante, err := s.upstream().StartDante(t.Context(), lab.DanteOptions{Resolver: s.resolver.Addr4()})
	need(t, err)
	s.outbounds = fmt.Sprintf("interfaces: { lan: auto }\noutbounds: { hk: { url: %q } }\n", dante.URL("socks5", lab.Credentials{}))
	return s
}

// first is the configuration that the box begins with.
func (s *stage) first() string { return s.outbounds + scenario }

func (s *stage) takes(t *testing.T, config string) {
	t.Helper()
	need(t, s.configure(t, s.outbounds+config))
}

// shell runs a script on the box that must succeed.
func (s *stage) shell(t *testing.T, script string) string {
	t.Helper()
	out, err := s.try(t, script)
	need(t, err)
	return out
}

// process is the number of the daemon's, as the status has it.
func (s *stage) process(t *testing.T) string {
	t.Helper()
	return regexp.MustCompile(`\(process \d+\)`).FindString(s.shell(t, "sidegate status"))
}

// playsAll plays them, or those in which nothing dies.
func (s *stage) playsAll(t *testing.T, dying bool) {
	for _, scenario := range scenarios {
		if scenario.dies && !dying {
			continue
		}
		t.Run(scenario.name, func(t *testing.T) {
			begun := time.Now()
			scenario.play(s, t)
			t.Logf("played in %.1f s", time.Since(begun).Seconds())
		})
	}
}

func (s *stage) playsPaths(t *testing.T) {
	if status := s.shell(t, "sidegate status"); !strings.Contains(status, "2 rules") || strings.Contains(status, "Problems") {
		t.Errorf("the status:\n%s", status)
	}
	s.plays(t, place{client: lab.Laptop, lan: "auto", oneArmed: true}, s.services)
}

// playsNames: what a client asks by DNS decides where its connections go.
func (s *stage) playsNames(t *testing.T) {
	s.takes(t, fmt.Sprintf("dns: { upstreams: { up: \"udp://%s\" }, default: up }\n%sdefault: block\n", s.resolver.Addr4(), nameRules))
	for _, name := range []string{"www.direct.test", "www.proxied.test", "www.blocked.test"} {
		if got := s.outcome(s.visit(t, s.laptop(), "http://"+name+"/whoami")); got != domainOf(name) {
			t.Errorf("%s is %s", name, got)
		}
	}
	if known := s.shell(t, "sidegate names"); !strings.Contains(known, "www.proxied.test") {
		t.Errorf("the names that are known:\n%s", known)
	}
}

// playsOwn: a program of the box is told by its name. Busybox is one on every box.
func (s *stage) playsOwn(t *testing.T) {
	if _, err := s.try(t, "command -v busybox"); err != nil {
		t.Skip("the box needs busybox: install the package busybox-static")
	}
	s.takes(t, `gateway: { local: true }
rules:
  - { name: proxied, process_name: [busybox], port: 8, outbound: hk }
  - { name: blocked, process_name: [busybox], port: 9, outbound: block }
default: direct
`)
	const say = "echo hello | busybox nc -w 20 %s %d"
	for _, c := range []struct {
		of   *lab.Echo
		port int
		want []netip.Addr
	}{
		{s.direct, 7, []netip.Addr{s.sidegate().Addr4()}},
		{s.proxied, 8, []netip.Addr{s.upstream().Addr4(), s.upstream().Addr6()}},
	} {
		if out := s.shell(t, fmt.Sprintf(say, s.server().Addr4(), c.port)); !strings.Contains(out, "hello") {
			t.Errorf("port %d answers %q", c.port, out)
		} else if from := last(c.of); from != c.want[0] && from != c.want[len(c.want)-1] {
			t.Errorf("port %d was spoken to by %s, and not by one of %v", c.port, from, c.want)
		}
	}
	if out, err := s.try(t, fmt.Sprintf(say, s.server().Addr4(), 9)); err == nil && strings.Contains(out, "hello") {
		t.Error("port 9 is answered")
	}
	if flows := s.shell(t, "sidegate flows"); !strings.Contains(flows, "busybox") {
		t.Errorf("the flows have no process:\n%s", flows)
	}
}

// playsReload: a configuration comes into force at once; one that is refused changes nothing, and says where its error is.
func (s *stage) playsReload(t *testing.T) {
	open := func(want bool) {
		t.Helper()
		if _, err := spoken(t, s.laptop(), "tcp", s.direct.Addr4(), patience(want)); (err == nil) != want {
			t.Errorf("port 7: %v; it must be open: %t", err, want)
		}
	}
	s.takes(t, "default: direct\n")
	open(true)
	s.takes(t, "rules: [ { name: closed, port: 7, outbound: block } ]\ndefault: direct\n")
	open(false)
	if err := s.configure(t, s.outbounds+"default: tokyo\n"); err == nil || !strings.Contains(err.Error(), `:3: default: unknown outbound "tokyo"`) {
		t.Errorf("an outbound that does not exist: %v", err)
	}
	open(false)
}

// playsCrash: while the daemon is dead direct connections go on and proxied ones wait; nothing of these leaves by another way.
func (s *stage) playsCrash(t *testing.T) {
	s.takes(t, scenario)
	direct, err := s.laptop().Dial(within(t, forAnswer), "tcp", s.direct.Addr4().String())
	need(t, err)
	defer direct.Close()
	exchange(t, direct, 1000)
	atRouter := captureOn(t, s.router(), "lan")
	running := s.process(t)
	s.crash(t)
	exchange(t, direct, 1000)
	if _, err := spoken(t, s.laptop(), "tcp", s.direct.Addr4(), forAnswer); err != nil {
		t.Errorf("a new direct connection: %v", err)
	}
	s.revive(t)
	need(t, lab.Wait(within(t, time.Minute), "a daemon that serves", func() error {
		_, err := s.try(t, "sidegate status >/dev/null")
		if err == nil && s.process(t) == running {
			err = errors.New("the old one lives")
		}
		return err
	}))
	exchange(t, direct, 1000)
	if _, err := spoken(t, s.laptop(), "tcp", s.proxied.Addr4(), forAnswer); err != nil {
		t.Errorf("proxied, afterwards: %v", err)
	} else if from := last(s.proxied); from != s.upstream().Addr4() {
		t.Errorf("proxied, afterwards: the server saw %s", from)
	}
	never(t, atRouter, "a packet of a proxied flow left directly", func(p lab.Packet) bool {
		return p.Src.Addr() == s.laptop().Addr4() && p.Dst == s.proxied.Addr4()
	})
}

// playsRestart: the box begins again with what it was given first.
func (s *stage) playsRestart(t *testing.T) {
	s.takes(t, "default: block\n")
	s.restart(t)
	s.plays(t, place{client: lab.Laptop, lan: "auto", oneArmed: true}, s.services)
}

// playsAdvertised: a client has its IPv6 router by advertisements, of which the box's are better.
func (s *stage) playsAdvertised(t *testing.T) {
	advertisedRouter(t, s.world)
	s.takes(t, "ipv6: advertise\n"+scenario)
	s.routedBy(t, s.sidegate())
	s.plays(t, place{client: lab.Laptop, lan: "auto", oneArmed: true}, s.services)
}

// playsFirewall: behind a firewall that drops what it has seen one half of, the return path has to be symmetric.
func (s *stage) playsFirewall(t *testing.T) {
	s.takes(t, "default: direct\n")
	_, err := s.AddFirewall(t.Context())
	need(t, err)
	s.shell(t, "ip route replace default via "+s.Host(lab.Firewall).Addr4().String())
	if err := converse(within(t, 2*time.Second), s.laptop(), "tcp", s.direct.Addr4()); err == nil {
		t.Error("asymmetric: a connection works, so nothing hinders it, and this proves nothing")
	}
	s.takes(t, "default: direct\nreturn_path: symmetric\n")
	if err := converse(within(t, forAnswer), s.laptop(), "tcp", s.direct.Addr4()); err != nil {
		t.Errorf("symmetric: %v", err)
	} else if from := last(s.direct); from != s.sidegate().Addr4() {
		t.Errorf("symmetric: the server saw %s", from)
	}
}

// namespaceBox is the program in the lab's own side router.
type namespaceBox struct {
	*stage
	t *testing.T // of all scenarios: the daemon outlives each
}

func (b *namespaceBox) configure(t *testing.T, config string) error {
	t.Helper()
	need(t, os.WriteFile(b.gateway.Config, []byte(config), 0o600))
	_, err := b.try(t, "sidegate reload")
	return err
}

func (b *namespaceBox) try(t *testing.T, script string) (string, error) {
	t.Helper()
	c := b.sidegate().Command(t.Context(), "sh", "-ec", "exec 2>&1\n"+script)
	c.Env = []string{"PATH=" + filepath.Dir(binary) + ":" + os.Getenv("PATH"), "SIDEGATE_SOCKET=" + b.gateway.Socket}
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, out)
	}
	return out, err
}

func (b *namespaceBox) crash(t *testing.T) { need(t, b.gateway.Kill()) }

func (b *namespaceBox) revive(t *testing.T) {
	t.Helper()
	config, err := os.ReadFile(b.gateway.Config)
	need(t, err)
	b.start(b.t, string(config))
}

func (b *namespaceBox) restart(t *testing.T) {
	t.Helper()
	need(t, b.gateway.Stop())
	b.start(b.t, b.first())
}

// TestScenarios plays with the program in a namespace.
func TestScenarios(t *testing.T) {
	s := newStage(t)
	b := &namespaceBox{s, t}
	s.sideRouter = b
	s.start(t, s.first())
	s.playsAll(t, true)
}
