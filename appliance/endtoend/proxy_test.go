package endtoend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// TestProxiedArrivesThroughTheUpstream: the server sees the upstream, the router sees only the gateway, and
// the client's own packets never get further than the gateway.
func TestProxiedArrivesThroughTheUpstream(t *testing.T) {
	w := newWorld(t, lab.Options{})
	files, err := w.server().StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t)
	atRouter := captureOn(t, w.router(), "lan")
	for family, addr := range both(w.laptop(), w.server()) {
		before := len(files.Requests())
		if err := download(t, w.laptop().HTTP(), netip.AddrPortFrom(addr[1], files.Addr4().Port()), 4<<20); err != nil {
			t.Fatalf("%s: %v", family, err)
		}
		if from := requestAfter(t, files, before).From.Addr(); from != w.upstream().Addr4() && from != w.upstream().Addr6() {
			t.Errorf("%s: the server saw %s, want the upstream", family, from)
		}
		c, err := w.laptop().Dial(t.Context(), "udp", netip.AddrPortFrom(addr[1], echo.Addr4().Port()).String())
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{1, 64, 1400, 3000, 9000} {
			exchange(t, c, size)
		}
		never(t, atRouter, family+": a packet of a proxied flow left the gateway", lab.Between(addr[0], addr[1]))
	}
	if packets(t, atRouter, lab.From(w.sidegate().Addr4())) == 0 {
		t.Error("the capture saw nothing of the gateway: it proves nothing")
	}
	flows := w.cli(t, "flows")
	for _, want := range []string{"proxy", "hk"} {
		if !strings.Contains(flows, want) {
			t.Errorf("`sidegate flows` does not say %q:\n%s", want, flows)
		}
	}
}

// TestProxiedThroughHTTPConnect: TCP goes through a real squid; UDP, which CONNECT cannot carry, is refused
// and never sent direct.
func TestProxiedThroughHTTPConnect(t *testing.T) {
	w := newWorld(t, lab.Options{})
	files, err := w.server().StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	squid, err := w.upstream().StartSquid(t.Context(), lab.SquidOptions{})
	need(t, err)
	w.start(t, fmt.Sprintf("interfaces: { lan: auto }\noutbounds:\n  hk: { url: %q }\ndefault: hk\n",
		squid.URL("http", lab.Credentials{})))
	atRouter := captureOn(t, w.router(), "lan")
	for family, addr := range both(w.laptop(), w.server()) {
		if err := download(t, w.laptop().HTTP(), netip.AddrPortFrom(addr[1], files.Addr4().Port()), 1<<20); err != nil {
			t.Errorf("%s: %v", family, err)
		}
		c, err := w.laptop().Dial(t.Context(), "udp", netip.AddrPortFrom(addr[1], echo.Addr4().Port()).String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("nowhere")); err != nil {
			t.Fatal(err)
		}
	}
	err = lab.Wait(within(t, 10*time.Second), "UDP to be refused", func() error {
		if status := w.cli(t, "status", "--json"); !strings.Contains(status, "no_udp") {
			return fmt.Errorf("status does not count it: %s", status)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if n := echo.Datagrams(); n != 0 {
		t.Errorf("%d datagrams reached the server", n)
	}
	never(t, atRouter, "a packet of a proxied flow left the gateway", func(p lab.Packet) bool {
		a := p.Src.Addr()
		return a == w.laptop().Addr4() || a == w.laptop().Addr6()
	})
}

// TestRemoteThatSpeaksFirst: somebody answers a client through the upstream before the client has written to him, as peers do that
// learn of each other from a third, and by the rules he is reached directly. Both hear each other all the same. What breaks it is the
// proxy's socket for what he said: the kernel takes the client's packets for it, and does not forward them.
func TestRemoteThatSpeaksFirst(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	need(t, err)
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{AnyPeer: true})
	need(t, err)
	w.start(t, fmt.Sprintf("interfaces: { lan: auto }\noutbounds: { hk: { url: %q } }\ndefault: hk\nrules: [{ name: peers, port: 9000, outbound: direct }]\n",
		dante.URL("socks5", lab.Credentials{})))
	for family, addr := range both(w.laptop(), w.server()) {
		peer, err := w.server().ListenUDP(t.Context(), "udp", netip.AddrPortFrom(addr[1], 9000).String())
		need(t, err)
		t.Cleanup(func() { peer.Close() })
		c, err := w.laptop().ListenUDP(t.Context(), "udp", netip.AddrPortFrom(addr[0], 0).String())
		need(t, err)
		t.Cleanup(func() { c.Close() })
		say := func(from *net.UDPConn, what string, to netip.AddrPort, hears *net.UDPConn) (sender netip.AddrPort) {
			t.Helper()
			_, err := from.WriteToUDPAddrPort([]byte(what), to)
			need(t, err)
			need(t, hears.SetReadDeadline(time.Now().Add(5*time.Second)))
			b := make([]byte, 100)
			n, sender, err := hears.ReadFromUDPAddrPort(b)
			if err != nil || string(b[:n]) != what {
				t.Fatalf("%s: %q was heard as %q from %s: %v", family, what, b[:n], sender, err)
			}
			return netip.AddrPortFrom(sender.Addr().Unmap(), sender.Port())
		}
		at := netip.AddrPortFrom(addr[1], 9000)
		say(c, "where am I?", netip.AddrPortFrom(addr[1], 7), c)
		senders := echo.Senders()
		if from := say(peer, "here", senders[len(senders)-1], c); from != at {
			t.Fatalf("%s: heard %s, want %s", family, from, at)
		}
		client := netip.AddrPortFrom(addr[0], uint16(c.LocalAddr().(*net.UDPAddr).Port))
		for _, what := range []string{"directly", "and again"} {
			if from := say(c, what, at, peer); from != client {
				t.Errorf("%s: the peer heard %s, want %s", family, from, client)
			}
		}
		say(peer, "directly too", client, c)

		// What he still says through the upstream goes nowhere, and takes nothing from those who speak directly.
		refused := refusals(t, w, "not_proxied")
		_, err = peer.WriteToUDPAddrPort([]byte("too late"), senders[len(senders)-1])
		need(t, err)
		need(t, lab.Wait(within(t, 10*time.Second), "it to be refused", func() error {
			if refusals(t, w, "not_proxied") == refused {
				return errors.New("status counts nothing")
			}
			return nil
		}))
		say(c, "still directly", at, peer)
	}
}

// refusals is how often the proxy has refused something for a reason.
func refusals(t *testing.T, w world, reason string) uint64 {
	t.Helper()
	var status admin.Status
	need(t, json.Unmarshal([]byte(w.cli(t, "status", "--json")), &status))
	return status.Proxy.Refused[reason]
}

// TestProxiedThousandConnections: 1,000 at once, 200 MB each way, unchanged.
func TestProxiedThousandConnections(t *testing.T) {
	w := newWorld(t, lab.Options{})
	files, err := w.server().StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t)
	const connections, size = 1000, 200_000
	body, err := io.ReadAll(lab.Random(size))
	if err != nil {
		t.Fatal(err)
	}
	// Each has its own connection; all are open before any byte moves.
	conns := make([]net.Conn, connections)
	var dial errgroup.Group
	dial.SetLimit(64)
	for i := range conns {
		dial.Go(func() (err error) {
			conns[i], err = w.laptop().Dial(within(t, time.Minute), "tcp", files.Addr4().String())
			return err
		})
	}
	if err := dial.Wait(); err != nil {
		t.Fatal(err)
	}
	var transfer errgroup.Group
	for i, conn := range conns {
		transfer.Go(func() error {
			defer conn.Close()
			return transferOver(conn, files.Addr4(), body, size, i)
		})
	}
	if err := transfer.Wait(); err != nil {
		t.Fatal(err)
	}
}

// transferOver uploads body and downloads as much over one connection, comparing digests.
func transferOver(conn net.Conn, to netip.AddrPort, body []byte, size int64, i int) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		MaxConnsPerHost:   1,
		DisableKeepAlives: false,
	}}
	defer client.CloseIdleConnections()
	resp, err := client.Post(fmt.Sprintf("http://%s/upload", to), "application/octet-stream", bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("connection %d: %w", i, err)
	}
	digest, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || strings.TrimSpace(string(digest)) != lab.Digest(size) {
		return fmt.Errorf("connection %d: what was uploaded arrived changed (%v)", i, err)
	}
	resp, err = client.Get(fmt.Sprintf("http://%s/bytes/%d", to, size))
	if err != nil {
		return fmt.Errorf("connection %d: %w", i, err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Equal(got, body) {
		return fmt.Errorf("connection %d: what was downloaded arrived changed (%v)", i, err)
	}
	return nil
}

// TestProxiedWithSYNCookies: a gateway that keeps nothing of a connection until its handshake is done, as under a
// SYN flood, still proxies it.
func TestProxiedWithSYNCookies(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.sidegate().SetSysctl("net.ipv4.tcp_syncookies", "2"); err != nil { // for every connection
		t.Fatal(err)
	}
	w.startProxied(t)
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		c, err := w.laptop().Dial(within(t, 10*time.Second), "tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, 1000)
		c.Close()
	}
	if seen := echo.Senders(); len(seen) == 0 || seen[0].Addr() != w.upstream().Addr4() && seen[0].Addr() != w.upstream().Addr6() {
		t.Errorf("the server saw %v, want the upstream", seen)
	}
}

// TestProxiedHalfClose: a client that has said all it has to say still gets the whole answer.
func TestProxiedHalfClose(t *testing.T) {
	w := newWorld(t, lab.Options{})
	l, err := w.server().Listen(t.Context(), "tcp", ":4000")
	if err != nil {
		t.Fatal(err)
	}
	const answer = 1 << 20
	var served errgroup.Group
	served.Go(func() error {
		for range 2 {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			question, err := io.ReadAll(c) // to the client's end
			if err == nil && string(question) != "question" {
				err = fmt.Errorf("the server got %q", question)
			}
			if err == nil {
				_, err = io.Copy(c, lab.Random(answer))
			}
			if err = errors.Join(err, c.Close()); err != nil {
				return err
			}
		}
		return nil
	})
	w.startProxied(t)
	for family, addr := range both(w.laptop(), w.server()) {
		c, err := w.laptop().Dial(within(t, 10*time.Second), "tcp", netip.AddrPortFrom(addr[1], 4000).String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, c)
		if err != nil || n != answer {
			t.Errorf("%s: %d of %d bytes of the answer, %v", family, n, answer, err)
		}
		c.Close()
	}
	if err := served.Wait(); err != nil {
		t.Error(err)
	}
}

// TestProxiedNoFragmentLeaves: not one fragment of a proxied datagram is forwarded.
func TestProxiedNoFragmentLeaves(t *testing.T) {
	w := newWorld(t, lab.Options{})
	echo, err := w.server().StartEcho(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	w.startProxied(t)
	atRouter := captureOn(t, w.router(), "lan")
	for _, to := range []netip.AddrPort{echo.Addr4(), echo.Addr6()} {
		for range 20 { // new flows: the first datagram of a flow is the hard one
			c, err := w.laptop().Dial(t.Context(), "udp", to.String())
			if err != nil {
				t.Fatal(err)
			}
			exchange(t, c, 3000)
			c.Close()
		}
	}
	never(t, atRouter, "a packet of a proxied flow left the gateway", func(p lab.Packet) bool {
		a := p.Src.Addr()
		return a == w.laptop().Addr4() || a == w.laptop().Addr6()
	})
}

// TestProxyIsNotOpen: from the router's side, and from the LAN to the gateway's own address, no port of the
// gateway answers.
func TestProxyIsNotOpen(t *testing.T) {
	w := newWorld(t, lab.Options{})
	w.startProxied(t)
	for _, from := range []*lab.Host{w.router(), w.laptop()} {
		var scan errgroup.Group
		scan.SetLimit(200)
		for port := 1; port <= 65535; port++ {
			to := netip.AddrPortFrom(w.sidegate().Addr4(), uint16(port)).String()
			scan.Go(func() error {
				c, err := from.Dial(t.Context(), "tcp", to)
				if err == nil {
					c.Close()
					return fmt.Errorf("%s is open to %s", to, from.Name())
				}
				if !strings.Contains(err.Error(), "refused") {
					return fmt.Errorf("%s: %w", to, err)
				}
				return nil
			})
		}
		if err := scan.Wait(); err != nil {
			t.Error(err)
		}
	}
}
