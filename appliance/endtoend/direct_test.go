package endtoend

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

const everythingDirect = "interfaces: { lan: auto }\ndefault: direct\n"

// download gets n bytes from the file server and checks them.
func download(t *testing.T, client *http.Client, from netip.AddrPort, n int64) error {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://%s/bytes/%d", from, n), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	h := sha256.New()
	if _, err := io.Copy(h, resp.Body); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != lab.Digest(n) {
		return fmt.Errorf("%d bytes from %s arrived changed", n, from)
	}
	return nil
}

// requestAfter is the one that the server answers after so many: it notes it when it is done, which may be after the
// client is.
func requestAfter(t *testing.T, files *lab.FileServer, before int) lab.Request {
	t.Helper()
	err := lab.Wait(within(t, 10*time.Second), "the server to note the request", func() error {
		if n := len(files.Requests()); n <= before {
			return fmt.Errorf("%d requests", n)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files.Requests()[before]
}

// TestDirectBypassesTheGatewayOnItsWayBack: the laptop's own address and port reach the server, replies go
// from the router straight to the laptop, the TTL falls by one, and no redirect is sent.
func TestDirectBypassesTheGatewayOnItsWayBack(t *testing.T) {
	w := newWorld(t, lab.Options{})
	files, err := w.server().StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.start(t, everythingDirect)
	atGateway, atRouter := captureOn(t, w.sidegate(), w.sidegate().Interface().Name), captureOn(t, w.router(), "lan")
	for family, addr := range both(w.laptop(), w.server()) {
		client, server := addr[0], addr[1]
		before := len(files.Requests())
		if err := download(t, w.laptop().HTTP(), netip.AddrPortFrom(server, files.Addr4().Port()), 4<<20); err != nil {
			t.Fatal(err)
		}
		if from := requestAfter(t, files, before).From; from.Addr() != client {
			t.Errorf("%s: the server saw %s, want the laptop's %s", family, from, client)
		}
		c, err := w.laptop().Dial(within(t, 5*time.Second), "udp", netip.AddrPortFrom(server, echo.Addr4().Port()).String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, 100)
		if seen := echo.Senders(); seen[len(seen)-1] != c.LocalAddr().(*net.UDPAddr).AddrPort() {
			t.Errorf("%s: the server saw %s, the laptop sent from %s", family, seen[len(seen)-1], c.LocalAddr())
		}
		never(t, atGateway, family+": a reply crossed the gateway", lab.From(server))
		toServer := func(p lab.Packet) bool { return !p.Out && p.Src.Addr() == client && p.Dst.Addr() == server }
		if packets(t, atRouter, toServer) == 0 || packets(t, atGateway, toServer) == 0 {
			t.Errorf("%s: the captures saw no request: they prove nothing", family)
		}
		never(t, atRouter, family+": not one hop fewer", func(p lab.Packet) bool { return toServer(p) && p.TTL != 63 })
	}
	for _, name := range [][2]string{{"Icmp", "OutRedirects"}, {"", "Icmp6OutRedirects"}} {
		n, err := w.sidegate().Counter(name[0], name[1])
		if err != nil || n != 0 {
			t.Errorf("%s: %d, %v", name[1], n, err)
		}
	}
}

// TestDirectSendsNoIPv6Redirects: where routers are known by their link-local addresses, as after an
// advertisement, the kernel would tell the laptop to bypass the gateway, and no parameter forbids it.
func TestDirectSendsNoIPv6Redirects(t *testing.T) {
	w := newWorld(t, lab.Options{LinkLocalGateways: true})
	w.start(t, everythingDirect)
	// A host that is new, for the lab has tried all others when nobody kept the kernel from redirecting.
	fresh, err := w.AddServer(t.Context(), "fresh")
	if err != nil {
		t.Fatal(err)
	}
	redirects := captureOn(t, w.sidegate(), w.sidegate().Interface().Name)
	for range 2 {
		before := packets(t, redirects, lab.To(fresh.Addr6()))
		if _, err := w.laptop().Ping(within(t, 10*time.Second), fresh.Addr6()); err != nil {
			t.Fatal(err)
		}
		if packets(t, redirects, lab.To(fresh.Addr6())) == before {
			t.Fatal("the laptop went around the gateway")
		}
	}
	never(t, redirects, "a redirect left the gateway", func(p lab.Packet) bool {
		return p.Out && p.Protocol == lab.ICMPv6 && p.ICMPType == 137
	})
	if status := w.cli(t, "status"); !strings.Contains(status, "redirect") {
		t.Errorf("`sidegate status` does not count it; did the kernel want to send one?\n%s", status)
	}
}

// exchange sends a datagram and wants it back.
func exchange(t *testing.T, c net.Conn, size int) {
	t.Helper()
	if err := tryExchange(c, size); err != nil {
		t.Fatalf("%s → %s: %v", c.LocalAddr(), c.RemoteAddr(), err)
	}
}

func tryExchange(c net.Conn, size int) error {
	want := make([]byte, size)
	if _, err := io.ReadFull(lab.Random(int64(size)), want); err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(want); err != nil {
		return err
	}
	got := make([]byte, 1<<16)
	n, err := c.Read(got)
	if err != nil {
		return err
	}
	if string(got[:n]) != string(want) {
		return fmt.Errorf("%d bytes came back changed, as %d", size, n)
	}
	return nil
}

// TestDirectPathMTU: a datagram that may not be fragmented and is too large for the path yields the ICMP
// error, and TCP finds its way.
func TestDirectPathMTU(t *testing.T) {
	w := newWorld(t, lab.Options{MTU: 1500, InternetMTU: 1400})
	files, err := w.server().StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	w.start(t, everythingDirect)
	for family, addr := range both(w.laptop(), w.server()) {
		pathMTU(t, w.laptop(), family, addr[1])
		if err := download(t, w.laptop().HTTP(), netip.AddrPortFrom(addr[1], files.Addr4().Port()), 1<<20); err != nil {
			t.Errorf("%s: %v", family, err)
		}
	}
}

// pathMTU sends what may not be fragmented and is too large for the way, until an ICMP error says so.
func pathMTU(t *testing.T, from *lab.Host, family string, server netip.Addr) {
	t.Helper()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) {
			set = errors.Join(
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO),
			)
			if server.Is6() {
				set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
			}
		})
		return errors.Join(err, set)
	}}
	c, err := from.DialWith(t.Context(), d, "udp", netip.AddrPortFrom(server, 9).String())
	if err != nil {
		t.Fatal(err)
	}
	err = lab.Wait(within(t, 10*time.Second), family+": the path MTU error", func() error {
		if _, err := c.Write(make([]byte, 1440)); !errors.Is(err, unix.EMSGSIZE) {
			return fmt.Errorf("writing 1440 bytes: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestDirectFragments: a datagram larger than the MTU arrives whole, both ways.
func TestDirectFragments(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.start(t, everythingDirect)
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		c, err := w.laptop().Dial(t.Context(), "udp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, 3000)
		exchange(t, c, 60_000)
	}
}

// TestDirectConnectionsThatBeganBefore: packets in mid-connection are left alone, whatever the policy says of
// new ones.
func TestDirectConnectionsThatBeganBefore(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	var before []net.Conn
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		c, err := w.laptop().Dial(t.Context(), "tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, 1000)
		before = append(before, c)
	}
	w.start(t, "interfaces: { lan: auto }\ndefault: block\n")
	for _, c := range before {
		exchange(t, c, 1000)
	}
	if c, err := w.laptop().Dial(within(t, time.Second), "tcp", echo.Addr4().String()); err == nil {
		c.Close()
		t.Error("a new connection got through: the policy is not in force, and this test proves nothing")
	}
}
