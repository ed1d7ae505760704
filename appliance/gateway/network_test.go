package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// blockOutside blocks everything beyond the box, at once and audibly, so that a test sees whether the policy is
// in force: then the outside refuses, and the box itself answers.
const blockOutside = "interfaces: { lan: [eth0] }\nrules: [ { name: outside, ip_cidr: 0.0.0.0/0, outbound: block, reject: true } ]\ndefault: block\n"

// inForce reports whether the policy decides the laptop's flows.
func (w *world) inForce(ctx context.Context, files *lab.FileServer) error {
	_, err := w.ask(ctx, files)
	switch {
	case err == nil:
		return errors.New("the policy is not in force: the outside is reachable")
	case !strings.Contains(err.Error(), "connection refused"):
		return fmt.Errorf("the box does not refuse: %w", err)
	}
	return nil
}

// TestInterfaceRecreated deletes the LAN interface and makes it anew, with another index, as a USB adapter
// or a driver reset does: the policy is in force on the new one.
func TestInterfaceRecreated(t *testing.T) {
	w := newWorld(t)
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	w.start(t, blockOutside)
	need(t, w.inForce(t.Context(), files))
	before := w.status(t).Interfaces

	w.ip(t, w.box(), "link delete eth0")
	awaitWithin(t, 3*time.Second, "the gateway to notice that the interface is gone", func() error {
		s := w.status(t)
		if len(s.Interfaces) != 1 || s.Interfaces[0].Index != 0 || s.Interfaces[0].Attached {
			return fmt.Errorf("it has %+v", s.Interfaces)
		}
		if !strings.Contains(strings.Join(s.Problems, "\n"), "there is no interface eth0") {
			return fmt.Errorf("it does not say so: %q", s.Problems)
		}
		return nil
	})

	w.plug(t)
	awaitWithin(t, 3*time.Second, "the policy to be in force again", func() error { return w.inForce(t.Context(), files) })
	after := w.status(t)
	if len(after.Interfaces) != 1 || after.Interfaces[0].Index == before[0].Index || !after.Interfaces[0].Attached {
		t.Errorf("the interface was %+v, is %+v", before, after.Interfaces)
	}
	if len(after.Problems) != 0 {
		t.Errorf("problems that are over: %q", after.Problems)
	}
	w.stop(t)
	if who, err := w.ask(t.Context(), files); err != nil || who != w.laptop().Addr4().String() {
		t.Errorf("the box does not forward after the stop: %q, %v", who, err)
	}
}

// plug makes the box's LAN interface anew, as it was.
func (w *world) plug(t *testing.T) {
	t.Helper()
	old := w.box().Interface()
	w.ip(t, w.Host("switch"), "link add sidegate type veth peer name eth0 address %s netns %s", old.MAC, w.box().Namespace())
	w.ip(t, w.Host("switch"), "link set sidegate master lan up")
	w.ip(t, w.box(), "link set eth0 up")
	w.ip(t, w.box(), "address add %s dev eth0", old.Addr4)
	w.ip(t, w.box(), "-6 address add %s dev eth0 nodad", old.Addr6)
	w.ip(t, w.box(), "route add default via %s", w.router().Addr4())
	need(t, w.box().SetSysctl("net.ipv4.conf.eth0.send_redirects", "0"))
}

func (w *world) ip(t *testing.T, h *lab.Host, format string, args ...any) {
	t.Helper()
	if _, err := h.Exec(t.Context(), "ip", strings.Fields(fmt.Sprintf(format, args...))...); err != nil {
		t.Fatal(err)
	}
}

// TestAddressChanged: an address that the box gets while the gateway runs is its own at once, and stays
// reachable though the policy blocks everything; one that it loses is not its own any more.
func TestAddressChanged(t *testing.T) {
	w := newWorld(t)
	outside, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	service, err := w.box().StartEcho(t.Context(), 22)
	need(t, err)
	w.start(t, blockOutside)
	need(t, w.inForce(t.Context(), outside))
	greet := func(address string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		c, err := w.laptop().Dial(ctx, "tcp", address+":22")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = lab.PingPong(ctx, c, 10, 1)
		return err
	}
	if err := greet(service.Addr4().Addr().String()); err != nil {
		t.Fatalf("the box is not reachable under the policy: %v", err)
	}

	w.ip(t, w.box(), "address add 192.168.0.22/24 dev eth0")
	awaitWithin(t, 3*time.Second, "the new address to be reachable", func() error { return greet("192.168.0.22") })
	w.ip(t, w.box(), "address delete 192.168.0.22/24 dev eth0")
	awaitWithin(t, 3*time.Second, "the gateway to forget the address", func() error {
		if own := fmt.Sprint(w.status(t).OwnAddresses); strings.Contains(own, "192.168.0.22") {
			return errors.New(own)
		}
		return nil
	})
}

// TestDefaultRouteMoves: with lan: auto the LAN is where the default route is, also when that comes later
// or goes elsewhere.
func TestDefaultRouteMoves(t *testing.T) {
	w := newWorld(t)
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	w.ip(t, w.box(), "route delete default")
	w.ip(t, w.box(), "-6 route delete default")
	w.start(t, strings.Replace(blockOutside, "[eth0]", "auto", 1))
	if s := w.status(t); len(s.Interfaces) != 1 || s.Interfaces[0].Index != 0 || !strings.Contains(strings.Join(s.Problems, "\n"), "no default route") {
		t.Fatalf("without a default route: %+v, %q", s.Interfaces, s.Problems)
	}
	w.ip(t, w.box(), "route add default via %s", w.router().Addr4())
	awaitWithin(t, 3*time.Second, "the policy to be in force", func() error { return w.inForce(t.Context(), files) })

	w.ip(t, w.box(), "link add side type bridge")
	w.ip(t, w.box(), "link set side up")
	w.ip(t, w.box(), "route replace default dev side")
	awaitWithin(t, 3*time.Second, "the gateway to follow", func() error {
		if s := w.status(t); s.Interfaces[0].Name != "side" || !s.Interfaces[0].Attached {
			return fmt.Errorf("it is attached to %+v", s.Interfaces)
		}
		return nil
	})
	if links := w.pinnedLinks(t); strings.Contains(links, "lan-eth0") {
		t.Errorf("it is still attached where it was: %s", links)
	}
}
