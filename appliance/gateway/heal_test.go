package gateway_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestForeignEdits removes what the gateway owns, one after the other, as a firewall script or a network
// manager may: each is back within five seconds, and told.
func TestForeignEdits(t *testing.T) {
	w := newWorld(t)
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	hk := w.dante(t)
	w.start(t, hk+"interfaces: { lan: [eth0] }\ndefault: hk\n")
	upstream := w.Host("upstream").Addr4().String()
	proxied := func() error {
		who, err := w.ask(t.Context(), files)
		if err == nil && who != upstream {
			t.Errorf("the server saw %s: a flow went direct that is to be proxied", who)
		}
		return err
	}
	need(t, proxied())
	intact, links := network(t, w.box()), w.pinnedLinks(t)

	for name, edit := range map[string]struct {
		remove func(t *testing.T)
		told   string
	}{
		"rule":        {func(t *testing.T) { w.ip(t, w.box(), "rule delete priority 500") }, "IPv4 rule of mark"},
		"rule v6":     {func(t *testing.T) { w.ip(t, w.box(), "-6 rule delete priority 500") }, "IPv6 rule of mark"},
		"reject rule": {func(t *testing.T) { w.ip(t, w.box(), "rule delete priority 501") }, "IPv4 rule of mark 0x8000000"},
		"all rules": {func(t *testing.T) {
			w.ip(t, w.box(), "rule flush")
			w.ip(t, w.box(), "rule add priority 32766 table main")
			w.ip(t, w.box(), "rule add priority 32767 table default")
		}, "IPv4 rule of mark"},
		"route":    {func(t *testing.T) { w.ip(t, w.box(), "route flush table 21319") }, "IPv4 route"},
		"route v6": {func(t *testing.T) { w.ip(t, w.box(), "-6 route flush table 21319") }, "IPv6 route"},
		"route of another kind": {func(t *testing.T) {
			w.ip(t, w.box(), "route flush table 21319")
			w.ip(t, w.box(), "route add blackhole default table 21319")
		}, "IPv4 route"},
		"pin of the LAN link": {func(t *testing.T) {
			need(t, os.Remove(filepath.Join(w.State, "links", "lan-eth0")))
		}, "lan-eth0"},
		"pin of the look-up": {func(t *testing.T) {
			need(t, os.Remove(filepath.Join(w.State, "links", "proxy-lookup")))
		}, "proxy-lookup"},
	} {
		t.Run(name, func(t *testing.T) {
			edit.remove(t)
			if network(t, w.box()) == intact && w.pinnedLinks(t) == links {
				t.Fatal("nothing was removed: this test proves nothing")
			}
			awaitWithin(t, 5*time.Second, "everything to be back", func() error {
				if got := w.pinnedLinks(t); got != links {
					return different("links", links, got)
				}
				if got := network(t, w.box()); got != intact {
					return different("network", intact, got)
				}
				return nil
			})
			if log := w.Tail(20); !strings.Contains(log, edit.told) {
				t.Errorf("the log does not tell of %q:\n%s", edit.told, log)
			}
			if err := proxied(); err != nil {
				t.Error(err)
			}
		})
	}
}

type differs struct{ what, want, got string }

func (d differs) Error() string { return d.what + " were\n" + d.want + "\nare\n" + d.got }

func different(what, want, got string) error { return differs{what, want, got} }
