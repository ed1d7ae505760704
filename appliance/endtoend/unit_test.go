package endtoend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// unitBox is a golden system under systemd with all that it needs around it. Of its settings only the proxy's address is another.
type unitBox struct {
	world
	systemdBox
	services
	t *testing.T
}

func newUnitBox(t *testing.T, system string) *unitBox {
	t.Helper()
	w := newWorld(t, lab.Options{})
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{Credentials: lab.Credentials{User: "me", Password: secret}})
	need(t, err)
	settings := strings.ReplaceAll(golden(t, system, "sidegate.json"), "socks5://10.0.0.7:1080", dante.URL("socks5", lab.Credentials{}))
	return &unitBox{w, startSystemd(t, w, system, settings), w.serve(t), t}
}

// sh runs a script that must succeed, and returns its output without the line's end.
func (b *unitBox) sh(t *testing.T, script string, args ...any) string {
	t.Helper()
	out, err := b.try(t, fmt.Sprintf(script, args...))
	need(t, err)
	return strings.TrimSpace(out)
}

// decides fails the test unless direct, proxied and blocked flows are. That what is proxied is shows that the proxy's password is there.
func (b *unitBox) decides(t *testing.T) {
	t.Helper()
	need(t, lab.Wait(within(t, 5*time.Second), "a status without problems", func() error {
		if status := b.sh(t, "sidegate status"); strings.Contains(status, "Problems") {
			return errors.New(status)
		}
		return nil
	}))
	b.plays(t, place{client: lab.Laptop, lan: "auto", oneArmed: true}, b.services)
}

// TestUnit: the module's unit, with the firewall and all else that the module sets, does its work; then what people do to a unit is done to
// it. The router's firewall drops what is forwarded unless the gateway has decided it, so that direct flows too show that it is there. Without
// the module's rules in them the firewalls drop what is proxied, and this one what is direct; without its parameters nothing is forwarded.
func TestUnit(t *testing.T) {
	t.Parallel()
	b := newUnitBox(t, "router")
	for _, c := range []struct {
		name string
		do   func(*unitBox, *testing.T)
	}{
		{"decides", (*unitBox).decides},
		{"is not root", (*unitBox).isNotRoot},
		{"is confined", (*unitBox).isConfined},
		{"refuses a reload", (*unitBox).refusesReload},
		{"is restarted", (*unitBox).isRestarted},
		{"is killed", (*unitBox).isKilled},
		{"hangs", (*unitBox).hangs},
		{"is stopped", (*unitBox).isStopped},
		{"goes down", (*unitBox).goesDown},
	} {
		ok := t.Run(c.name, func(t *testing.T) {
			begun := time.Now()
			c.do(b, t)
			t.Logf("done in %.1f s", time.Since(begun).Seconds())
		})
		if !ok && c.name == "decides" {
			break // nothing works
		}
	}
}

// TestUnitOfABox: the same with the firewall that looks only at what is for the box, so that it forwards what the gateway does not stop.
// While the box starts, nothing leaves it that is to be proxied or blocked.
func TestUnitOfABox(t *testing.T) {
	t.Parallel()
	b := newUnitBox(t, "box")
	b.decides(t)
	need(t, b.System.Kill())
	atRouter := captureOn(t, b.router(), "lan")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	failed := make(chan error, 1)
	go func() { failed <- b.flows(ctx, b.others()) }()
	need(t, b.Start())
	need(t, b.Booted(within(t, time.Minute)))
	b.decides(t)
	stop()
	need(t, <-failed)
	never(t, atRouter, "what is proxied or blocked left the box", b.ofOthers)
}

// others are whom no packet of the laptop's may reach by itself.
func (b *unitBox) others() []netip.AddrPort {
	return []netip.AddrPort{b.proxied.Addr4(), b.blocked.Addr4()}
}

func (b *unitBox) ofOthers(p lab.Packet) bool {
	return p.Src.Addr() == b.laptop().Addr4() && slices.Contains(b.others(), p.Dst)
}

// process is the number of the unit's main process, in the system.
func (b *unitBox) process(t *testing.T) string {
	t.Helper()
	return b.sh(t, "systemctl show -P MainPID sidegate")
}

// isNotRoot: the process is the unit's user with the capabilities of appliance.json, and can never have others.
func (b *unitBox) isNotRoot(t *testing.T) {
	var want uint64
	for _, name := range applianceCapabilities(t) {
		number, ok := capabilityNumbers[name]
		if !ok {
			t.Fatalf("the number of %s is not known to this test", name)
		}
		want |= 1 << number
	}
	status := b.sh(t, "cat /proc/%s/status", b.process(t))
	for key, value := range map[string]string{
		"Uid": strings.Repeat(fmt.Sprintf("\t%d", unitUser), 4), "Gid": strings.Repeat(fmt.Sprintf("\t%d", unitUser), 4), "Groups": "\t.*",
		"CapEff": fmt.Sprintf("\t%016x", want), "CapPrm": fmt.Sprintf("\t%016x", want), "CapInh": fmt.Sprintf("\t%016x", want),
		"CapBnd": fmt.Sprintf("\t%016x", want), "CapAmb": fmt.Sprintf("\t%016x", want), "NoNewPrivs": "\t1", "Seccomp": "\t2",
	} {
		if !regexp.MustCompile(`(?m)^` + key + `:` + value + ` *$`).MatchString(status) {
			t.Errorf("%s is not %q:\n%s", key, value, status)
		}
	}
}

// capabilityNumbers are of linux/capability.h; those that a gateway may need.
var capabilityNumbers = map[string]int{
	"CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_NET_RAW": unix.CAP_NET_RAW,
	"CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_BPF": unix.CAP_BPF, "CAP_PERFMON": unix.CAP_PERFMON,
}

// refusesReload: settings that are refused fail the reload, the journal says why, and what was in force stays.
func (b *unitBox) refusesReload(t *testing.T) {
	good := b.sh(t, "cat %s", b.config)
	bad := strings.Replace(good, `"default":"direct"`, `"default":"tokyo"`, 1)
	if bad == good {
		t.Fatalf("the settings have no default to break:\n%s", good)
	}
	b.sh(t, "%s", b.writes(bad))
	before := b.process(t)
	if out, err := b.try(t, "systemctl reload sidegate"); err == nil {
		t.Errorf("systemd says that bad settings were loaded:\n%s", out)
	}
	if log := b.sh(t, "journalctl -b -u sidegate -o cat"); !strings.Contains(log, `default: unknown outbound "tokyo"`) {
		t.Errorf("the journal does not say why:\n%s", log)
	}
	if state := b.sh(t, "systemctl is-active sidegate"); state != "active" || b.process(t) != before {
		t.Errorf("after it the unit is %s, process %s, which was %s", state, b.process(t), before)
	}
	b.decides(t)

	b.sh(t, "%s", b.writes(strings.Replace(good, `"port":8`, `"port":7`, 1))+"systemctl reload sidegate")
	if _, err := spoken(t, b.laptop(), "tcp", b.direct.Addr4(), forAnswer); err != nil || last(b.direct) != b.upstream().Addr4() {
		t.Errorf("after a good one port 7 is not proxied: %v, %s", err, last(b.direct))
	}
	b.sh(t, "%s", b.writes(good)+"systemctl reload sidegate")
	b.decides(t)
}

// without does something that ends the daemon, and waits until the next one serves. Meanwhile of one direct flow no packet is lost,
// and of new flows that are to be proxied or blocked no packet leaves the box otherwise.
func (b *unitBox) without(t *testing.T, end func()) {
	t.Helper()
	before := b.process(t)
	atBox, atRouter := captureOn(t, b.sidegate(), "eth0"), captureOn(t, b.router(), "lan")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	failed := make(chan error, 2)
	go func() { failed <- b.flows(ctx, b.others()) }()
	go func() { failed <- b.sequence(ctx, b.direct.Addr4()) }()
	begun := time.Now()
	end()
	need(t, lab.Wait(within(t, time.Minute), "the next one to serve", func() error {
		if now := b.process(t); now == before || now == "0" {
			return fmt.Errorf("the process is %s, as before", now)
		}
		_, err := b.try(t, "sidegate status >/dev/null")
		return err
	}))
	t.Logf("the next one serves after %.2f s", time.Since(begun).Seconds())
	stop()
	need(t, errors.Join(<-failed, <-failed))
	if packets(t, atBox, b.ofOthers) < 10 {
		t.Error("there were hardly any new flows, so this proves nothing")
	}
	never(t, atRouter, "what is proxied or blocked left the box", b.ofOthers)
	b.decides(t)
}

// flows sends the first packets of ever new flows, also while there is no box.
func (b *unitBox) flows(ctx context.Context, to []netip.AddrPort) error {
	for ctx.Err() == nil {
		if _, err := b.laptop().Flood(ctx, lab.Flood{To: to, Packets: len(to), Burst: 1}); err != nil && !errors.Is(err, unix.EHOSTUNREACH) {
			return err
		}
		pause(ctx, 5*time.Millisecond)
	}
	return nil
}

// sequence sends numbered datagrams of one flow, and returns an error if one is not answered.
func (b *unitBox) sequence(ctx context.Context, to netip.AddrPort) error {
	c, err := b.laptop().Dial(ctx, "udp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	answered := make(map[string]bool)
	received := make(chan error, 1)
	var sent []string
	go func() {
		text := make([]byte, 100)
		for {
			n, err := c.Read(text)
			if err != nil {
				if e := net.Error(nil); errors.As(err, &e) && e.Timeout() {
					err = nil
				}
				received <- err
				return
			}
			answered[string(text[:n])] = true
		}
	}()
	for n := 0; ctx.Err() == nil; n++ {
		sent = append(sent, strconv.Itoa(n))
		if _, err := c.Write([]byte(sent[n])); err != nil {
			return err
		}
		pause(ctx, 5*time.Millisecond)
	}
	if err := errors.Join(c.SetReadDeadline(time.Now().Add(time.Second)), <-received); err != nil {
		return err
	}
	lost := slices.DeleteFunc(slices.Clone(sent), func(n string) bool { return answered[n] })
	if len(lost) > 0 || len(sent) < 10 {
		return fmt.Errorf("of %d datagrams of a direct flow, one each 5 ms, %d were lost: %v", len(sent), len(lost), lost)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// isRestarted: systemd says that it is restarted when the next one serves, to which it leaves the kernel's part.
func (b *unitBox) isRestarted(t *testing.T) {
	b.without(t, func() {
		b.sh(t, "systemctl restart sidegate; sidegate status")
	})
}

// isKilled: systemd starts it again.
func (b *unitBox) isKilled(t *testing.T) {
	b.without(t, func() { b.sh(t, "systemctl kill --kill-whom=main --signal=KILL sidegate") })
}

// hangs: systemd notices that it says nothing, and starts it again. The unit's minute is too long for a test.
func (b *unitBox) hangs(t *testing.T) {
	unit := b.sh(t, "systemctl show -P WatchdogUSec sidegate")
	if unit != "1min" {
		t.Errorf("the unit's watchdog waits %q", unit)
	}
	b.sh(t, "mkdir -p /run/systemd/system/sidegate.service.d; printf '[Service]\\nWatchdogSec=2\\n' >/run/systemd/system/sidegate.service.d/soon.conf; "+
		"systemctl daemon-reload; systemctl restart sidegate")
	b.without(t, func() { b.sh(t, "kill -STOP %s", b.process(t)) })
	if log := b.sh(t, "journalctl -b -u sidegate -o cat"); !strings.Contains(log, "Watchdog timeout") {
		t.Errorf("the journal does not speak of the watchdog:\n%s", log)
	}
}

// isStopped: nothing of it is left: no program, rule, table, route, pin or file of a running gateway. Then it can be started again.
func (b *unitBox) isStopped(t *testing.T) {
	left := func(want bool) {
		t.Helper()
		state := b.kernelState(t)
		for _, trace := range unitTraces {
			if strings.Contains(state, trace) != want {
				t.Errorf("%q must be found: %t", trace, want)
			}
		}
		if t.Failed() {
			t.Log(state)
		}
	}
	left(true)
	b.sh(t, "systemctl stop sidegate")
	left(false)
	if state := b.sh(t, "systemctl show -P ActiveState -P Result sidegate"); state != "success\ninactive" && state != "inactive\nsuccess" {
		t.Errorf("the unit is %q", state)
	}
	b.sh(t, "systemctl start sidegate; sidegate status")
	b.decides(t)
}

// goesDown: when the box is shut down, what is proxied or blocked does not leave it while it still forwards. A unit that stops after the
// gateway's holds that moment.
func (b *unitBox) goesDown(t *testing.T) {
	b.sh(t, `cat >/run/systemd/system/hold.service <<'END'
[Unit]
Before=sidegate.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c 'touch /run/held; while [ ! -e /run/released ]; do sleep 0.1; done'
END
systemctl daemon-reload; systemctl start hold`)
	atRouter := captureOn(t, b.router(), "lan")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	failed := make(chan error, 1)
	go func() { failed <- b.flows(ctx, b.others()) }()
	b.sh(t, "systemctl --no-block poweroff")
	need(t, lab.Wait(within(t, time.Minute), "the gateway to be stopped", func() error {
		_, err := b.try(t, "test -e /run/held")
		return err
	}))
	if _, err := b.try(t, "pidof sidegate"); err == nil {
		t.Error("the daemon lives, so this proves nothing")
	}
	if _, err := spoken(t, b.laptop(), "tcp", b.direct.Addr4(), forAnswer); err != nil {
		t.Errorf("a direct connection, meanwhile: %v", err)
	}
	stop()
	need(t, <-failed)
	never(t, atRouter, "what is proxied or blocked left the box", b.ofOthers)
	b.sh(t, "touch /run/released")
}

// unitTraces are what a gateway that runs has in the kernel and in the file system.
var unitTraces = []string{
	"eth0: program", "lo: program", "cgroup: program", "pin: links", "pin: maps", "lookup 21319", "table 21319",
	"table inet sidegate", "/run/sidegate",
}

// kernelState lists all that a gateway may leave.
func (b *unitBox) kernelState(t *testing.T) string {
	t.Helper()
	text := b.sh(t, "for f in -4 -6; do ip $f rule; ip $f route show table all; done; nft list tables; find /run/sidegate 2>/dev/null || true; "+
		"cd /sys/fs/bpf/sidegate && find . -mindepth 1 | sed 's|^./|pin: |'") + "\n"
	note := func(where string, o link.QueryOptions) {
		result, err := link.QueryPrograms(o)
		need(t, err)
		for range result.Programs {
			text += where + ": program\n"
		}
	}
	need(t, b.Network().Do(func() error {
		for _, name := range []string{"eth0", "lo"} {
			i, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			note(name, link.QueryOptions{Target: i.Index, Attach: ebpf.AttachTCXIngress})
		}
		return nil
	}))
	dir, err := os.Open(b.Cgroup())
	need(t, err)
	defer dir.Close()
	for _, at := range []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg} {
		note("cgroup", link.QueryOptions{Target: int(dir.Fd()), Attach: at})
	}
	return text
}
