package endtoend

import (
	"context"
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// TestFailureDirect: where the owner chose so, new flows go direct while the daemon is dead, whole connections and
// not only their first packets.
func TestFailureDirect(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t, "on_failure: direct")
	if err := w.gateway.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		for _, network := range []string{"udp", "tcp"} {
			c, err := w.laptop().Dial(within(t, 5*time.Second), network, to.String())
			if err != nil {
				t.Fatalf("%s to %s: %v", network, to, err)
			}
			exchange(t, c, 1000)
		}
	}
}

// TestFailureReset: a proxied connection whose daemon died is reset when its client says something, and does not
// hang or leave direct.
func TestFailureReset(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t)
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		c, err := w.laptop().Dial(within(t, 5*time.Second), "tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, 1000)
		defer c.Close()
		defer func() {
			if err := tryExchange(c, 1000); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("to %s after the daemon's death: %v, want a reset", to, err)
			}
		}()
	}
	if err := w.gateway.Kill(); err != nil {
		t.Fatal(err)
	}
}

// TestFailureOfTheDefaultRoute: while a DHCP lease is renewed the default route may be away for a moment. Nothing
// of what is proxied gets out then, nor when it is back.
func TestFailureOfTheDefaultRoute(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t)
	atRouter, atGateway := captureOn(t, w.router(), "lan"), captureOn(t, w.sidegate(), w.sidegate().Interface().Name)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	talking := make(chan error, 1)
	go func() {
		for ctx.Err() == nil { // ever new flows
			if _, err := w.laptop().Flood(ctx, lab.Flood{To: []netip.AddrPort{echo.Addr4()}, Packets: 1}); err != nil {
				talking <- err
				return
			}
		}
		talking <- nil
	}()
	fromLaptop := lab.Between(w.laptop().Addr4(), w.server().Addr4())
	more := func(what string) {
		t.Helper()
		had := packets(t, atGateway, fromLaptop)
		err := lab.Wait(within(t, 20*time.Second), what, func() error {
			if n := packets(t, atGateway, fromLaptop); n < had+200 {
				return errors.New("too few packets yet")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	more("flows before")
	for _, args := range [][]string{{"route", "del", "default"}, {"-6", "route", "del", "default"}} {
		if _, err := w.sidegate().Exec(t.Context(), "ip", args...); err != nil {
			t.Fatal(err)
		}
	}
	more("flows without a default route")
	for _, i := range w.router().Interfaces() {
		if i.Name != "lan" {
			continue
		}
		if _, err := w.sidegate().Exec(t.Context(), "ip", "route", "add", "default", "via", i.Addr4.Addr().String(), "dev", w.sidegate().Interface().Name); err != nil {
			t.Fatal(err)
		}
	}
	more("flows when it is back")
	stop()
	if err := <-talking; err != nil {
		t.Fatal(err)
	}
	never(t, atRouter, "a packet of a proxied flow left the gateway", fromLaptop)
}

// TestFailureRefused: a rule with reject answers at once, TCP with a reset and UDP with an ICMP error.
func TestFailureRefused(t *testing.T) {
	w := newWorld(t, lab.Options{})
	w.start(t, "interfaces: { lan: auto }\nrules:\n  - { name: no, port: 80, outbound: block, reject: true }\ndefault: direct\n")
	for family, addr := range both(w.laptop(), w.server()) {
		to := netip.AddrPortFrom(addr[1], 80).String()
		if c, err := w.laptop().Dial(within(t, 5*time.Second), "tcp", to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s tcp: %v, want refused", family, err)
			if err == nil {
				c.Close()
			}
		}
		c, err := w.laptop().Dial(t.Context(), "udp", to)
		if err != nil {
			t.Fatal(err)
		}
		if err := tryExchange(c, 100); !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.EACCES) {
			t.Errorf("%s udp: %v, want prohibited", family, err)
		}
	}
}
