package outbound

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// destinations are the three ways to name the TCP echo server, which listens on all addresses.
func destinations(t *testing.T) []Destination {
	t.Helper()
	port := serve(t, ":0", echoTCP).Port()
	four := netip.AddrPortFrom(netip.MustParseAddr(server4), port)
	return []Destination{
		{Addr: four},
		{Addr: netip.AddrPortFrom(netip.MustParseAddr(server6), port)},
		// The address leads nowhere: only the name can have been used.
		{Addr: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port), Name: "server.example"},
	}
}

// exchange sends a megabyte through an echo server, closes its own half, and wants all of it back
// followed by the end.
func exchange(t *testing.T, c net.Conn) {
	t.Helper()
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	sent := make([]byte, 1<<20)
	rand.New(rand.NewSource(1)).Read(sent)
	written := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		written <- err
	}()
	received := make([]byte, len(sent))
	if _, err := io.ReadFull(c, received); err != nil {
		t.Errorf("reading the echo: %v", err)
	}
	if err := <-written; err != nil {
		t.Errorf("writing: %v", err)
	}
	if !bytes.Equal(sent, received) {
		t.Error("the echo differs from what was sent")
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Errorf("closing the write half: %v", err)
	}
	if n, err := c.Read(received); n != 0 || err != io.EOF {
		t.Errorf("after the write half was closed: read %d bytes, %v; want the end", n, err)
	}
}

// throughTCP is what every TCP outbound must do through a real server.
func throughTCP(t *testing.T, o Outbound, wantTLS bool) {
	t.Helper()
	noLeaks(t)
	for _, to := range destinations(t) {
		t.Run(to.String(), func(t *testing.T) {
			c, err := o.DialTCP(t.Context(), to)
			if err != nil {
				t.Fatal(err)
			}
			switch c.(type) {
			case *net.TCPConn:
				if wantTLS {
					t.Error("the connection to an https proxy is not encrypted")
				}
			case *tls.Conn:
				if !wantTLS {
					t.Error("the connection is not a plain one that can be spliced")
				}
			default:
				t.Errorf("the connection is a %T", c)
			}
			exchange(t, c)
		})
	}
}

// refusedTCP wants a destination refused by the server, in a given way.
func refusedTCP(t *testing.T, o Outbound, to string, cause error, texts ...string) {
	t.Helper()
	c, err := o.DialTCP(t.Context(), Destination{Addr: netip.MustParseAddrPort(to)})
	if err == nil {
		c.Close()
		t.Fatalf("dialing %s succeeded", to)
	}
	if !errors.Is(err, ErrRefused) || cause != nil && !errors.Is(err, cause) {
		t.Errorf("%v: is not ErrRefused or not %v", err, cause)
	}
	for _, text := range append(texts, to, `through "hk"`, "refused: ") {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
	noSecret(t, err)
}

func TestDanteTCP(t *testing.T) {
	startDante(t, 1080, "none")
	for _, address := range []string{proxy4, proxy6, "proxy.example"} {
		t.Run(address, func(t *testing.T) {
			throughTCP(t, mustNew(t, "socks5://"+hostPort(address, 1080), Credentials{}, Options{}), false)
		})
	}
	t.Run("refused", func(t *testing.T) {
		noLeaks(t)
		o := mustNew(t, "socks5://"+proxy4, Credentials{}, Options{})
		refusedTCP(t, o, server4+":9", nil, "not allowed by ruleset (2)", "socks5 server "+proxy4+":1080")
		refusedTCP(t, o, server4+":10", syscall.ECONNREFUSED, "connection refused by the destination (5)")
		refusedTCP(t, o, "["+server6+"]:10", syscall.ECONNREFUSED)
	})
}

func TestDantePassword(t *testing.T) {
	startDante(t, 1080, "username")
	url := "socks5://" + hostPort(proxy4, 1080)
	t.Run("tcp", func(t *testing.T) {
		throughTCP(t, mustNew(t, url, Credentials{user, password}, Options{}), false)
	})
	t.Run("udp", func(t *testing.T) {
		throughUDP(t, mustNew(t, url, Credentials{user, password}, Options{}))
	})
	t.Run("wrong password", func(t *testing.T) {
		refusedTCP(t, mustNew(t, url, Credentials{user, "wrong-" + password}, Options{}), server4+":10", nil,
			"did not accept the username and password")
	})
	t.Run("no password", func(t *testing.T) {
		refusedTCP(t, mustNew(t, url, Credentials{}, Options{}), server4+":10", nil, "wants credentials")
	})
}

func TestMicrosocks(t *testing.T) {
	startMicrosocks(t, 1081)
	o := mustNew(t, "socks5://"+hostPort(proxy4, 1081), Credentials{}, Options{})
	throughTCP(t, o, false)
	refusedTCP(t, o, server4+":10", syscall.ECONNREFUSED)
	t.Run("udp", func(t *testing.T) {
		noLeaks(t)
		if _, err := o.AssociateUDP(t.Context()); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "command not supported (7)") {
			t.Errorf("a server without udp answered: %v", err)
		}
	})
}

func TestMicrosocksPassword(t *testing.T) {
	startMicrosocks(t, 1082, "-u", user, "-P", password)
	url := "socks5://" + hostPort(proxy4, 1082)
	throughTCP(t, mustNew(t, url, Credentials{user, password}, Options{}), false)
	refusedTCP(t, mustNew(t, url, Credentials{user, "wrong"}, Options{}), server4+":10", nil, "did not accept the username and password")
	refusedTCP(t, mustNew(t, url, Credentials{}, Options{}), server4+":10", nil, "wants credentials")
}

func TestSquid(t *testing.T) {
	startSquid(t, 3128, "http_port "+hostPort(proxy4, 3128), false)
	o := mustNew(t, "http://"+hostPort(proxy4, 3128), Credentials{}, Options{})
	throughTCP(t, o, false)
	refusedTCP(t, o, server4+":9", nil, "403 Forbidden", "http proxy "+proxy4+":3128")
	refusedTCP(t, o, server4+":10", nil, "503 Service Unavailable")
	if _, err := o.AssociateUDP(t.Context()); !errors.Is(err, ErrNoUDP) {
		t.Errorf("udp through an http proxy: %v", err)
	}
}

func TestSquidPassword(t *testing.T) {
	startSquid(t, 3129, "http_port "+hostPort(proxy4, 3129), true)
	url := "http://" + hostPort(proxy4, 3129)
	throughTCP(t, mustNew(t, url, Credentials{user, password}, Options{}), false)
	refusedTCP(t, mustNew(t, url, Credentials{user, "wrong"}, Options{}), server4+":10", nil, "407", "did not accept")
	refusedTCP(t, mustNew(t, url, Credentials{}, Options{}), server4+":10", nil, "407", "none is configured")
}

func TestSquidTLS(t *testing.T) {
	authority, key := certificate(t)
	startSquid(t, 3130, fmt.Sprintf("https_port %s tls-cert=%s tls-key=%s", hostPort(proxy4, 3130), authority, key), true)
	secret := Credentials{user, password}
	t.Run("by name", func(t *testing.T) {
		throughTCP(t, mustNew(t, "https://proxy.example:3130?ca_file="+authority, secret, Options{}), true)
	})
	t.Run("by address", func(t *testing.T) {
		url := "https://" + hostPort(proxy4, 3130) + "?server_name=proxy.example&ca_file=" + authority
		throughTCP(t, mustNew(t, url, secret, Options{}), true)
	})
	for name, row := range map[string]struct{ url, want string }{
		"unknown authority": {"https://proxy.example:3130", "certificate signed by unknown authority"},
		"other name":        {"https://" + hostPort(proxy4, 3130) + "?ca_file=" + authority, "certificate"},
		"plain http":        {"http://" + hostPort(proxy4, 3130), ""},
	} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			o := mustNew(t, row.url, secret, Options{Timeout: time.Second})
			c, err := o.DialTCP(t.Context(), Destination{Addr: netip.MustParseAddrPort(server4 + ":10")})
			if err == nil {
				c.Close()
				t.Fatal("dialing succeeded")
			}
			if errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%v: want %q", err, row.want)
			}
			noSecret(t, err)
		})
	}
}

func TestDanteUDP(t *testing.T) {
	startDante(t, 1080, "none")
	for _, address := range []string{proxy4, proxy6, "proxy.example"} {
		t.Run(address, func(t *testing.T) {
			throughUDP(t, mustNew(t, "socks5://"+hostPort(address, 1080), Credentials{}, Options{}))
		})
	}
}

// TestDanteDies wants an association to end with its server, and only then.
func TestDanteDies(t *testing.T) {
	noLeaks(t)
	var a *Association
	t.Run("alive", func(t *testing.T) {
		startDante(t, 1080, "none")
		var err error
		if a, err = mustNew(t, "socks5://"+proxy4, Credentials{}, Options{}).AssociateUDP(t.Context()); err != nil {
			t.Fatal(err)
		}
		converse(t, a, serveEchoUDP(t, hostPort(server4, 0)), 100)
		select {
		case <-a.Done():
			t.Error("the association ended while the server lived")
		default:
		}
	})
	if a == nil {
		t.Skip("needs a running dante")
	}
	select {
	case <-a.Done():
	case <-time.After(10 * time.Second):
		t.Error("the association did not end with its server")
	}
	a.Close()
}

// throughUDP is what every UDP outbound must do: one mapping, several destinations in both families,
// datagrams up to the largest that the header leaves room for.
func throughUDP(t *testing.T, o Outbound) {
	t.Helper()
	noLeaks(t)
	a, err := o.AssociateUDP(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for _, address := range []string{server4, server4, server6} {
		echo := serveEchoUDP(t, hostPort(address, 0))
		for _, size := range []int{1, 64, 1472, 3000, 60000} {
			converse(t, a, echo, size)
		}
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Error("the second close:", err)
	}
	select {
	case <-a.Done():
	default:
		t.Error("closed, but not done")
	}
}

// converse sends one datagram through the association and wants it back from where it went.
func converse(t *testing.T, a *Association, to netip.AddrPort, size int) {
	t.Helper()
	payload := make([]byte, size)
	rand.New(rand.NewSource(int64(size))).Read(payload)
	send(t, a, to, payload)
	from, got := receive(t, a)
	if from != to {
		t.Errorf("%d bytes to %v came back from %v", size, to, from)
	}
	if !bytes.Equal(got, payload) {
		t.Errorf("%d bytes to %v came back as %d others", size, to, len(got))
	}
}

func send(t *testing.T, a *Association, to netip.AddrPort, payload []byte) {
	t.Helper()
	packet := append(a.Header(to), payload...)
	if len(packet)-len(payload) > a.HeaderRoom {
		t.Errorf("a header of %d bytes, more than HeaderRoom", len(packet)-len(payload))
	}
	var err error
	if a.Connected {
		_, err = unix.Write(a.FD, packet)
	} else {
		var name unix.RawSockaddrInet6
		err = sendMessage(a.FD, packet, &name, a.PutName(&name, to))
	}
	if err != nil {
		t.Fatalf("sending %d bytes to %v: %v", len(payload), to, err)
	}
}

func receive(t *testing.T, a *Association) (from netip.AddrPort, payload []byte) {
	t.Helper()
	ready := []unix.PollFd{{Fd: int32(a.FD), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(ready, 10_000)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			t.Fatalf("no datagram came back: %d, %v", n, err)
		}
		break
	}
	packet := make([]byte, 1<<16)
	var name unix.RawSockaddrInet6
	n, err := receiveMessage(a.FD, packet, &name)
	if err != nil {
		t.Fatal(err)
	}
	if !a.Connected {
		return a.GetName(&name), packet[:n]
	}
	from, offset, err := a.Parse(packet[:n])
	if err != nil {
		t.Fatal(err)
	}
	return from, packet[offset:n]
}

func TestDirect(t *testing.T) {
	needNamespaces(t)
	set, err := NewSet(Options{})
	if err != nil {
		t.Fatal(err)
	}
	o, _ := set.Outbound("direct")
	t.Run("tcp", func(t *testing.T) {
		noLeaks(t)
		for _, to := range destinations(t)[:2] {
			to.Name = "the.name.is.ignored.example"
			c, err := o.DialTCP(t.Context(), to)
			if err != nil {
				t.Fatal(err)
			}
			exchange(t, c)
		}
	})
	t.Run("udp", func(t *testing.T) { throughUDP(t, o) })
	t.Run("refused", func(t *testing.T) {
		noLeaks(t)
		_, err := o.DialTCP(t.Context(), Destination{Addr: netip.MustParseAddrPort(server4 + ":10")})
		if !errors.Is(err, syscall.ECONNREFUSED) || err.Error() != "dialing "+server4+":10 directly: connect: connection refused" {
			t.Error(err)
		}
	})
}

// TestTwin has an upstream name with two addresses of which the first is dead.
func TestTwin(t *testing.T) {
	startMicrosocks(t, 1081)
	throughTCP(t, mustNew(t, "socks5://twin.example:1081", Credentials{}, Options{}), false)
}
