package endtoend

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sidegate/appliance/lab"
)

// What the NixOS module makes of a system is evaluated, and committed as text. These tests run it: kernel parameters, firewall,
// settings, and the unit's user and capabilities, as they are in the golden files.
const goldens = "../../nixos-module/goldens"

func golden(t *testing.T, system, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(goldens, system, name))
	need(t, err)
	return string(text)
}

// unitCapabilities are those of the unit: what it may have, all of which it is given.
func unitCapabilities(t *testing.T, system string) []string {
	t.Helper()
	unit := golden(t, system, "sidegate.service")
	of := func(key string) (all []string) {
		for _, m := range regexp.MustCompile("(?m)^"+key+"=(.*)$").FindAllStringSubmatch(unit, -1) {
			all = append(all, strings.Fields(m[1])...)
		}
		return all
	}
	bounding := of("CapabilityBoundingSet")
	if len(bounding) == 0 || !slices.Equal(bounding, of("AmbientCapabilities")) || !slices.Equal(of("User"), []string{"sidegate"}) {
		t.Fatalf("the unit is root, or has capabilities that it is not given:\n%s", unit)
	}
	return bounding
}

// nixosWorld is a world whose box is what the module makes of a system, without the gateway.
func nixosWorld(t *testing.T, system string) world {
	t.Helper()
	w := newWorld(t, lab.Options{})
	parameters, ruleset := filepath.Join(w.Dir(), "sysctl.conf"), filepath.Join(w.Dir(), "ruleset.nft")
	need(t, os.WriteFile(parameters, []byte(golden(t, system, "sysctl.conf")), 0o644))
	need(t, os.WriteFile(ruleset, []byte(golden(t, system, "ruleset.nft")), 0o644))
	// A box that has just been switched on, which the lab's is not.
	run(t, w.sidegate(), "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0; sysctl -qw net.ipv4.conf.all.send_redirects=1 net.ipv4.conf.eth0.send_redirects=1")
	_, err := w.sidegate().Exec(t.Context(), "sysctl", "-q", "-p", parameters)
	need(t, err)
	_, err = w.sidegate().Exec(t.Context(), "nft", "-f", ruleset)
	need(t, err)
	return w
}

// startUnit runs the gateway as the unit does. Of its settings only the proxy's address is another: that of the lab's.
func (w *world) startUnit(t *testing.T, system string, dante *lab.Daemon, capabilities []string) error {
	t.Helper()
	credentials := filepath.Join(w.Dir(), "credentials")
	need(t, os.MkdirAll(credentials, 0o755))
	need(t, os.WriteFile(filepath.Join(credentials, "hk"), []byte("of the unit\n"), 0o600))
	need(t, errors.Join(os.Chown(credentials, lab.Nobody, 0), os.Chown(filepath.Join(credentials, "hk"), lab.Nobody, 0)))
	settings := strings.ReplaceAll(golden(t, system, "sidegate.json"), "socks5://10.0.0.7:1080", dante.URL("socks5", lab.Credentials{}))
	g, err := w.sidegate().StartGateway(t.Context(), lab.GatewayOptions{
		Binary: binary, Config: settings, Capabilities: capabilities, Credentials: credentials,
	})
	if err != nil {
		return err
	}
	w.gateway = g
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the gateway's last words:\n%s", g.Tail(20))
		}
	})
	return nil
}

func unitDante(t *testing.T, w world) *lab.Daemon {
	t.Helper()
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{Credentials: lab.Credentials{User: "me", Password: "of the unit"}})
	need(t, err)
	return dante
}

// TestNixOSGoldens: on what the module sets, direct, proxied and blocked flows are, through the NixOS firewall, whether it filters
// what is forwarded or not, and the gateway is not root. Without the module's rules in them the firewalls drop what is proxied, and
// the second one what is direct; without its parameters nothing is forwarded.
func TestNixOSGoldens(t *testing.T) {
	for _, system := range []string{"box", "router"} {
		t.Run(system, func(t *testing.T) {
			t.Parallel()
			w := nixosWorld(t, system)
			s := w.serve(t)
			need(t, w.startUnit(t, system, unitDante(t, w), unitCapabilities(t, system)))
			if status := w.cli(t, "status"); strings.Contains(status, "Problems") {
				t.Errorf("the status has problems:\n%s", status)
			}
			w.plays(t, place{client: lab.Laptop, lan: "auto", oneArmed: true}, s)
		})
	}
}
