package outbound

import (
	"bytes"
	"errors"
	"io"
	"math/rand"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

func packets(t *testing.T, o Outbound) net.PacketConn {
	t.Helper()
	a, err := o.AssociateUDP(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c, err := PacketConn(a)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestPacketConn wants datagrams of all sizes to come back unchanged from where they went.
func TestPacketConn(t *testing.T) {
	startDante(t, 1080, "none")
	set, err := NewSet(Options{}, mustNew(t, "socks5://"+proxy4, Credentials{}, Options{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"direct", "hk"} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			o, _ := set.Outbound(name)
			c := packets(t, o)
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			for _, address := range []string{server4, server6} {
				echo := serveEchoUDP(t, hostPort(address, 0))
				for _, size := range []int{0, 1, 1472, 60000} {
					sent := make([]byte, size)
					rand.New(rand.NewSource(int64(size))).Read(sent)
					if n, err := c.WriteTo(sent, net.UDPAddrFromAddrPort(echo)); n != size || err != nil {
						t.Fatalf("sending %d bytes to %v: %d, %v", size, echo, n, err)
					}
					got := make([]byte, 60001)
					n, from, err := c.ReadFrom(got)
					if err != nil {
						t.Fatalf("%d bytes to %v: %v", size, echo, err)
					}
					if from.(*net.UDPAddr).AddrPort() != echo || !bytes.Equal(got[:n], sent) {
						t.Errorf("%d bytes to %v came back as %d from %v", size, echo, n, from)
					}
				}
			}
			for _, to := range []net.Addr{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}, &net.UDPAddr{Port: 1}, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}} {
				if _, err := c.WriteTo([]byte("x"), to); err == nil {
					t.Errorf("sent to %T %v", to, to)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			if err := c.Close(); err != nil {
				t.Error("the second close:", err)
			}
		})
	}
}

// TestPacketConnEnds wants a reader to be released by a deadline, by Close, and by the end of the
// association, each in its own way.
func TestPacketConnEnds(t *testing.T) {
	ways := []struct {
		name string
		end  func(c net.PacketConn, server *net.TCPConn)
		want error
	}{
		{"deadline", func(c net.PacketConn, _ *net.TCPConn) { c.SetReadDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
		{"close", func(c net.PacketConn, _ *net.TCPConn) { c.Close() }, net.ErrClosed},
		{"server", func(_ net.PacketConn, server *net.TCPConn) { server.Close() }, net.ErrClosed},
	}
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			noLeaks(t)
			control := make(chan *net.TCPConn, 1)
			server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
				c.Write([]byte(socksConnected))
				control <- c
				io.Copy(io.Discard, c)
			})
			c := packets(t, mustNew(t, "socks5://"+server.String(), Credentials{}, Options{}))
			defer c.Close()
			read := make(chan error)
			go func() {
				_, _, err := c.ReadFrom(make([]byte, 16))
				read <- err
			}()
			way.end(c, <-control)
			select {
			case err := <-read:
				if !errors.Is(err, way.want) {
					t.Errorf("reading ended with %v; want %v", err, way.want)
				}
			case <-time.After(10 * time.Second):
				t.Error("reading did not end")
			}
		})
	}
}

// TestPacketConnHeader has a relay that sends what is no datagram of the protocol before one that is,
// and a buffer that is smaller than that.
func TestPacketConnHeader(t *testing.T) {
	noLeaks(t)
	relay, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	address := relay.LocalAddr().(*net.UDPAddr).AddrPort()
	server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
		c.Write(appendAddress([]byte("\x05\x00\x05\x00\x00"), address))
		io.Copy(io.Discard, c)
	})
	c := packets(t, mustNew(t, "socks5://"+server.String(), Credentials{}, Options{}))
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))

	to := netip.MustParseAddrPort("192.0.2.1:53")
	if _, err := c.WriteTo([]byte("question"), net.UDPAddrFromAddrPort(to)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1024)
	n, client, err := relay.ReadFrom(b)
	if want := append(appendUDPHeader(nil, to), "question"...); err != nil || !bytes.Equal(b[:n], want) {
		t.Fatalf("the relay received %q, %v; want %q", b[:n], err, want)
	}
	for _, packet := range [][]byte{{}, []byte("short"), append([]byte{0, 0, 1}, relayed(to, "fragment")[3:]...), relayed(to, "answer")} {
		relay.WriteTo(packet, client)
	}
	small := make([]byte, 4)
	n, from, err := c.ReadFrom(small)
	if err != nil || string(small[:n]) != "answ" || from.(*net.UDPAddr).AddrPort() != to {
		t.Errorf("received %q from %v, %v", small[:n], from, err)
	}
}

func relayed(from netip.AddrPort, payload string) []byte {
	return append(appendUDPHeader(nil, from), payload...)
}
