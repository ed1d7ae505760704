package exchange

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"sidegate/appliance/outbound"
)

// detour is a Dialer through an outbound, as the gateway makes it.
type detour struct{ outbound.Outbound }

func (d detour) Stream(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return d.DialTCP(ctx, outbound.Destination{Addr: to})
}

func (d detour) Packets(ctx context.Context, to netip.AddrPort) (net.PacketConn, error) {
	a, err := d.AssociateUDP(ctx)
	if err != nil {
		return nil, err
	}
	return outbound.PacketConn(a)
}

// TestDetour asks each kind of server through dante.
func TestDetour(t *testing.T) {
	port := freePort(t)
	config := filepath.Join(t.TempDir(), "danted.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
logoutput: stderr
internal: 127.0.0.1 port = %d
external: lo
socksmethod: none
clientmethod: none
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
`, port), 0o644); err != nil {
		t.Fatal(err)
	}
	proxy := loopback(port).String()
	program(t, proxy, "danted", "-f", config, "-p", filepath.Join(t.TempDir(), "pid"))
	o, err := outbound.New("hk", "socks5://"+proxy, outbound.Credentials{}, outbound.Options{})
	if err != nil {
		t.Fatal(err)
	}

	a := newAuthority(t)
	for _, scheme := range append([]string{"udp"}, sessions...) {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			var url string
			if scheme == "udp" {
				url = "udp://" + serveUDP(t, "127.0.0.1:0", func(d datagram) { d.reply(pack(honest(d.Msg))) }).String()
			} else {
				url = serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { return tell }).url
			}
			options := options(scheme, a, 0)
			options.Dialer = detour{o}
			u := upstream(t, url, options)
			for range 3 {
				wantA(t, u, "www.example.")
			}
		})
	}
}
