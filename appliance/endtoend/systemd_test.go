package endtoend

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// The unit of the NixOS module, and what else the module makes of a system, run for real: by the machine's own systemd, in namespaces.

// store is where the program is in that system, as in a store of Nix.
const store = "/nix/store/sidegate"

// secret is the proxy's password, in a file that only root can read.
const secret = "of the unit"

// unitUser is the number of the unit's user.
const unitUser = 990

// systemdBox is systemd in the place of the lab's side router.
type systemdBox struct {
	shellBox
	*lab.System
	first string // the configuration that it begins with
}

func (b systemdBox) restart(t *testing.T) {
	t.Helper()
	_, err := b.try(t, b.writes(b.first))
	need(t, err)
	need(t, b.Reboot(within(t, time.Minute)))
	need(t, b.Booted(within(t, time.Minute)))
}

// unitFiles are what the module makes of a system, as files, with a configuration in the place of the golden one. The box has the lab's
// address, and its IPv6 router where the golden one has none and would wait for advertisements.
func unitFiles(t *testing.T, w world, system, text string) (files []lab.SystemFile, config string) {
	t.Helper()
	config = "/etc/sidegate/sidegate.json"
	unit := strings.ReplaceAll(golden(t, system, "sidegate.service"), "/bin/sidegate", store+"/bin/sidegate")
	if !json.Valid([]byte(text)) {
		const other = "/etc/sidegate/sidegate.yaml"
		unit, config = strings.ReplaceAll(unit, config, other), other
	}
	network := strings.NewReplacer("fd00::2/64", w.sidegate().Interface().Addr6.String(), "IPv6AcceptRA=true", "IPv6AcceptRA=false").
		Replace(golden(t, system, "10-sidegate-lan.network")) + "[Network]\nGateway=" + w.router().Addr6().String() + "\n"
	var directories map[string]struct {
		D struct{ Mode, User, Group, Age string }
	}
	need(t, json.Unmarshal([]byte(golden(t, system, "tmpfiles.conf")), &directories))
	var tmpfiles string
	for path, of := range directories {
		tmpfiles += fmt.Sprintf("d %s %s %s %s %s\n", path, of.D.Mode, of.D.User, of.D.Group, of.D.Age)
	}
	return []lab.SystemFile{
		{Path: config, Text: text},
		{Path: "/etc/systemd/system/sidegate.service", Text: unit},
		{Path: "/etc/systemd/network/10-sidegate-lan.network", Text: network},
		{Path: "/etc/sysctl.d/60-nixos.conf", Text: golden(t, system, "sysctl.conf")},
		{Path: "/etc/nftables.conf", Text: golden(t, system, "ruleset.nft")},
		{Path: "/etc/tmpfiles.d/10-sidegate.conf", Text: tmpfiles},
		{Path: "/run/keys/hk", Text: secret + "\n", Mode: 0o400},
	}, config
}

// startSystemd starts a system of the goldens, and returns when all of its units are started, among which is the gateway's.
func startSystemd(t *testing.T, w world, system, first string) systemdBox {
	t.Helper()
	files, config := unitFiles(t, w, system, first)
	self, err := os.Executable()
	need(t, err)
	begun := time.Now()
	s, err := w.sidegate().StartSystem(context.WithoutCancel(t.Context()), lab.SystemOptions{
		Cgroup: newCgroup(t),
		Users:  map[string]int{"sidegate": unitUser},
		Files: append(files,
			lab.SystemFile{Path: store + "/bin/sidegate", From: binary}, lab.SystemFile{Path: store + "/bin/probe", From: self}),
		Enabled: map[string][]string{
			"sysinit.target":    {"nftables.service"},
			"multi-user.target": {"sidegate.service", "systemd-networkd.service", "systemd-networkd-wait-online.service"},
		},
	})
	need(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			log, err := s.Run(context.Background(), "journalctl --no-pager -b -o short-monotonic | tail -n 100")
			t.Logf("the system's last words (%v):\n%s", err, log)
		}
		if err := s.Kill(); err != nil {
			t.Error(err)
		}
	})
	need(t, s.Booted(within(t, time.Minute)))
	if out, err := s.Run(t.Context(), "systemctl is-active sidegate"); err != nil {
		t.Fatalf("the gateway's unit is %s", out)
	}
	t.Logf("started in %.1f s", time.Since(begun).Seconds())
	return systemdBox{shellBox{func(ctx context.Context, script string) (string, error) {
		return s.Run(ctx, "PATH="+store+"/bin:$PATH\n"+script)
	}, config}, s, first}
}

// TestSystemd plays with the program as the NixOS module's unit.
func TestSystemd(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.sideRouter = startSystemd(t, s.world, "box", s.first())
	s.playsAll(t, true)
}
