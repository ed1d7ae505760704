package endtoend

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// TestUnitCapabilitiesAreMinimal: as a user without rights but those of the unit the gateway lives its whole life: it starts, answers
// DNS, advertises, decides for clients and for the box's own programs, reloads, is killed, taken over, replaced and stopped. Without any
// single one of them it does not, and says which one it lacks.
func TestUnitCapabilitiesAreMinimal(t *testing.T) {
	all := unitCapabilities(t, "box")
	t.Run("all", func(t *testing.T) {
		t.Parallel()
		if stage, err := newUnitLife(t, all).live(t); err != nil {
			t.Errorf("%s: %v", stage, err)
		}
	})
	for i, lacks := range all {
		t.Run("without "+lacks, func(t *testing.T) {
			t.Parallel()
			stage, err := newUnitLife(t, slices.Delete(slices.Clone(all), i, i+1)).live(t)
			if err == nil {
				t.Fatalf("it is not needed")
			}
			t.Logf("%s: %v", stage, err)
			if !strings.Contains(err.Error(), lacks) {
				t.Errorf("%s: the error does not name %s: %v", stage, lacks, err)
			}
		})
	}
}

// unitLife is a box on which the gateway lives with capabilities.
type unitLife struct {
	*box
	capabilities []string
	services     services
	witness      *witness
	clean        string            // its traces before the first start
	programs     map[string]*agent // by the outbound that they are led to
	sockets      int               // that the programs have opened
}

const unitSite = "site.test"

func newUnitLife(t *testing.T, capabilities []string) *unitLife {
	t.Helper()
	cgroup := newCgroup(t)
	b := &box{world: newWorld(t, lab.Options{LinkLocalGateways: true})}
	b.cgroup = cgroup
	var err error
	b.dante, err = b.upstream().StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	advertisedRouter(t, b.world)
	answer, err := lab.Zone(unitSite + ". 300 A " + farAddress(1).String()) // where nobody connects: dante does not know the name
	need(t, err)
	_, err = b.server().StartNameserver(t.Context(), 53, answer)
	need(t, err)
	l := &unitLife{box: b, capabilities: capabilities, services: b.serve(t), witness: startWitness(t, b.server(), 10), programs: map[string]*agent{}}
	for outbound, unit := range map[string]string{"direct": "red.service", "hk": "blue.service"} {
		l.programs[outbound] = b.agent(t, "/proc/self/exe", b.unit(t, unit))
	}
	l.clean = b.traces(t)
	return l
}

// config shuts one of the services; the other ones are open. What is reached says which policy is in force.
func (l *unitLife) config(shut *lab.Echo) string {
	return l.box.config("ipv6: advertise", "return_path: symmetric",
		fmt.Sprintf("dns: { upstreams: { isp: \"udp://%s\" }, default: isp }", l.server().Addr4()),
		unitRules+fmt.Sprintf("  - { name: shut, port: %d, outbound: block }", shut.Addr4().Port()), "  - { name: proxied, port: 8, outbound: hk }", "default: direct")
}

// live is the life, up to the first thing that goes wrong.
func (l *unitLife) live(t *testing.T) (stage string, err error) {
	t.Helper()
	first, second := l.services.blocked, l.services.direct
	for _, s := range []struct {
		stage string
		do    func() error
	}{
		{"the start", func() error { return l.begin(t, first) }},
		{"after the start", func() error { return l.works(t, first, second) }},
		{"the reload", func() error { return l.change(t, second) }},
		{"after the reload", func() error { return l.works(t, second, first) }},
		{"the start after a kill", func() error { return errors.Join(l.gateway.Kill(), l.begin(t, first)) }},
		{"after the kill", func() error { return l.works(t, first, second) }},
		{"the replacement", func() error {
			return errors.Join(l.gateway.Signal(syscall.SIGUSR2), l.gateway.Wait(), l.begin(t, second))
		}},
		{"after the replacement", func() error { return l.works(t, second, first) }},
		{"the stop", func() error { return l.end(t) }},
	} {
		if err := s.do(); err != nil {
			return s.stage, err
		}
	}
	return "", nil
}

// begin starts the gateway, which takes over what one before it left.
func (l *unitLife) begin(t *testing.T, shut *lab.Echo) error {
	t.Helper()
	left := l.traces(t)
	g, err := l.sidegate().StartGateway(t.Context(), lab.GatewayOptions{
		Binary: binary, Capabilities: l.capabilities, Config: l.config(shut), Cgroup: l.unit(t, "sidegate.service"),
	})
	if err != nil {
		return err
	}
	before := l.gateway
	l.gateway = g
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the gateway's last words:\n%s", g.Tail(20))
		}
	})
	if now := l.traces(t); (before == nil) != (now != left) || left == l.clean != (before == nil) {
		return fmt.Errorf("there was\n%s\nand is\n%s", left, now)
	}
	return nil
}

func (l *unitLife) command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), binary, append(args, "--socket", l.gateway.Socket)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("sidegate %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

func (l *unitLife) change(t *testing.T, shut *lab.Echo) error {
	t.Helper()
	if err := os.WriteFile(l.gateway.Config, []byte(l.config(shut)), 0o644); err != nil {
		return err
	}
	_, err := l.command(t, "reload")
	return err
}

// works reports what of the gateway's work is not done.
func (l *unitLife) works(t *testing.T, shut, open *lab.Echo) error {
	t.Helper()
	err := lab.Wait(within(t, 10*time.Second), "a status without problems", func() error {
		out, err := l.command(t, "status", "--json")
		var status admin.Status
		if err = errors.Join(err, json.Unmarshal([]byte(out), &status)); err != nil || len(status.Problems) > 0 {
			return errors.Join(err, fmt.Errorf("problems: %v", status.Problems))
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := l.becomesRouter(t, l.sidegate()); err != nil {
		return err
	}
	if err := lookUp(t.Context(), l.laptop(), unitSite, farAddress(1)); err != nil {
		return err
	}
	if names, err := l.command(t, "names"); err != nil || !strings.Contains(names, unitSite) {
		return errors.Join(err, fmt.Errorf("the name %s is not known:\n%s", unitSite, names))
	}
	for _, at := range []func(*lab.Echo) netip.AddrPort{(*lab.Echo).Addr4, (*lab.Echo).Addr6} {
		for _, network := range []string{"tcp", "udp"} {
			for to, by := range map[*lab.Echo]*lab.Host{open: l.sidegate(), l.services.proxied: l.upstream()} { // symmetric: translated
				if _, err := spoken(t, l.laptop(), network, at(to), forAnswer); err != nil {
					return fmt.Errorf("a client's %s to %s: %w", network, at(to), err)
				}
				if from := last(to); !is(by, from) {
					return fmt.Errorf("a client's %s to %s: the server saw %s, which is not %s", network, at(to), from, by.Name())
				}
			}
		}
		if _, err := spoken(t, l.laptop(), "tcp", at(shut), forNone); err == nil {
			return fmt.Errorf("a client reaches %s, which is blocked", at(shut))
		}
	}
	return l.decidesOwn(t)
}

// decidesOwn reports what of the box's own programs is not decided.
func (l *unitLife) decidesOwn(t *testing.T) error {
	t.Helper()
	for outbound, by := range map[string]*lab.Host{"direct": l.sidegate(), "hk": l.upstream()} {
		program := l.programs[outbound]
		for _, to := range l.witness.addrs() {
			l.sockets += 3
			loose := program.tell(t, order{Do: "open", Conn: l.sockets, Network: "udp"})
			if loose.Error == "" {
				loose = program.tell(t, order{Do: "say", Conn: l.sockets, To: to})
			}
			for what, s := range map[string]sight{
				"tcp":                program.visit(t, l.sockets+1, "tcp", to),
				"udp":                program.visit(t, l.sockets+2, "udp", to),
				"udp, not connected": loose,
			} {
				if s.Error != "" || !is(by, s.Seen.Addr()) {
					return fmt.Errorf("a program's %s to %s by %s: %+v", what, to, outbound, s)
				}
			}
		}
	}
	out, err := l.command(t, "flows", "--json")
	var flows []admin.Flow
	if err = errors.Join(err, json.Unmarshal([]byte(out), &flows)); err != nil {
		return err
	}
	for _, unit := range []string{"red.service", "blue.service"} {
		if !slices.ContainsFunc(flows, func(f admin.Flow) bool { return f.Process != nil && f.Process.Unit == unit }) {
			return fmt.Errorf("no flow is one of %s:\n%s", unit, out)
		}
	}
	return nil
}

// end stops the gateway and reports what is left of it.
func (l *unitLife) end(t *testing.T) error {
	t.Helper()
	if err := errors.Join(l.gateway.Signal(syscall.SIGTERM), l.gateway.Wait()); err != nil {
		return err
	}
	if err := l.becomesRouter(t, l.router()); err != nil {
		return err
	}
	if now := l.traces(t); now != l.clean {
		return fmt.Errorf("there was\n%s\nand is left\n%s", l.clean, now)
	}
	if pins, err := filepath.Glob(filepath.Join(l.gateway.State, "*")); err != nil || len(pins) > 0 {
		return errors.Join(err, fmt.Errorf("these are left: %q", pins))
	}
	return nil
}
