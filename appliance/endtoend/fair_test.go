package endtoend

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sidegate/appliance/lab"
)

// TestFloodCostsNobodyElse: one host opens 300,000 UDP flows; no connection of another host, old or new,
// direct or proxied, fails.
func TestFloodCostsNobodyElse(t *testing.T) {
	w := newWorld(t, lab.Options{})
	heavy, err := w.AddClient(t.Context(), "heavy")
	if err != nil {
		t.Fatal(err)
	}
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	second, err := w.AddServer(t.Context(), "second")
	if err != nil {
		t.Fatal(err)
	}
	direct, err := second.StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t, "rules:\n  - { name: second, ip_cidr: ["+second.Addr4().String()+", 198.18.0.0/16], outbound: direct }")

	old := map[string]net.Conn{}
	for what, to := range map[string]netip.AddrPort{"direct": direct.Addr4(), "proxied": echo.Addr4()} {
		for _, network := range []string{"tcp", "udp"} {
			c, err := w.laptop().Dial(within(t, 10*time.Second), network, to.String())
			if err != nil {
				t.Fatal(err)
			}
			exchange(t, c, 100)
			old[what+" "+network] = c
		}
	}

	// 300 sources × 1,000 addresses: 150 for the direct verdict, 150 for the proxied one.
	var flood errgroup.Group
	for _, prefix := range []string{"198.18.0.0", "198.51.100.0"} {
		base := netip.MustParseAddr(prefix).As4()
		var to []netip.AddrPort
		for i := range 1000 {
			to = append(to, netip.AddrPortFrom(netip.AddrFrom4([4]byte{base[0], base[1], base[2], byte(i)}), uint16(1000+i)))
		}
		flood.Go(func() error {
			_, err := heavy.Flood(t.Context(), lab.Flood{To: to, Sources: 150, Size: 16, Packets: 150_000})
			return err
		})
	}
	flooded := make(chan error, 1)
	go func() { flooded <- flood.Wait() }()
	opened := 0
	for done := false; !done; {
		select {
		case err := <-flooded:
			if err != nil {
				t.Fatal(err)
			}
			done = true // and one more round after it
		default:
		}
		for what, to := range map[string]netip.AddrPort{"direct": direct.Addr4(), "proxied": echo.Addr4()} {
			for _, network := range []string{"tcp", "udp"} {
				if err := tryExchange(old[what+" "+network], 100); err != nil {
					t.Fatalf("the old %s %s connection: %v", what, network, err)
				}
				c, err := w.laptop().Dial(within(t, 10*time.Second), network, to.String())
				if err != nil {
					t.Fatalf("a new %s %s connection: %v", what, network, err)
				}
				if err := tryExchange(c, 100); err != nil {
					t.Fatalf("a new %s %s connection: %v", what, network, err)
				}
				c.Close()
				opened++
			}
		}
	}
	t.Logf("%d connections of the other host were opened during the flood", opened)
	t.Log(w.cli(t, "status"))
}
