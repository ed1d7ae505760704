package endtoend

import (
	"net/netip"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// TestBoxIsReachable: whatever the policy says, the gateway's own services answer.
func TestBoxIsReachable(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.sidegate().StartEcho(t.Context(), 22)
	if err != nil {
		t.Fatal(err)
	}
	outside, err := w.server().StartEcho(t.Context(), 22)
	if err != nil {
		t.Fatal(err)
	}
	w.start(t, "interfaces: { lan: auto }\ndefault: block\n")
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		for _, network := range []string{"tcp", "udp"} {
			c, err := w.laptop().Dial(within(t, 5*time.Second), network, to.String())
			if err != nil {
				t.Fatal(err)
			}
			exchange(t, c, 100)
		}
	}
	if c, err := w.laptop().Dial(within(t, time.Second), "tcp", outside.Addr4().String()); err == nil {
		c.Close()
		t.Error("the outside is reachable: the policy is not in force, and this test proves nothing")
	}
}

// TestPublishedServices: a client's service that is reached through the main router answers from its own
// address, TCP always and UDP where it is published, though the policy proxies everything.
func TestPublishedServices(t *testing.T) {
	w := newWorld(t, lab.Options{})
	service, err := w.laptop().StartEcho(t.Context(), 51820)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t, "published:\n  - { address: "+w.laptop().Addr4().String()+", port: 51820, network: udp }")
	for _, network := range []string{"tcp", "udp"} {
		c, err := w.server().Dial(within(t, 5*time.Second), network, service.Addr4().String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, 100)
	}
}
