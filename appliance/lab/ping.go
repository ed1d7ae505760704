package lab

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// Ping sends one ICMP echo request and returns the time until its answer, at most a second.
func (h *Host) Ping(ctx context.Context, to netip.Addr) (time.Duration, error) {
	d, err := h.ping(ctx, to)
	if err != nil {
		return 0, fmt.Errorf("pinging %s from %s: %w", to, h.name, err)
	}
	return d, nil
}

func (h *Host) ping(ctx context.Context, to netip.Addr) (time.Duration, error) {
	network, protocol, local := "ip4:icmp", 1, "0.0.0.0"
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if to.Is6() {
		network, protocol, local = "ip6:ipv6-icmp", 58, "::"
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	var c *icmp.PacketConn
	err := h.Do(func() (err error) {
		c, err = icmp.ListenPacket(network, local)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	start := time.Now()
	if err := c.SetReadDeadline(start.Add(time.Second)); err != nil {
		return 0, err
	}
	id := rand.IntN(1 << 16) // tells our answers from those of others who ping at the same time
	b, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: 1, Data: []byte("sidegate")}}).Marshal(nil)
	if err != nil {
		return 0, err
	}
	if _, err := c.WriteTo(b, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return 0, err
	}
	buffer := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, errors.New("no answer")
		}
		if err != nil {
			return 0, err
		}
		m, err := icmp.ParseMessage(protocol, buffer[:n])
		if err != nil {
			continue
		}
		e, ok := m.Body.(*icmp.Echo)
		if ok && m.Type == reply && e.ID == id && from.(*net.IPAddr).IP.Equal(to.AsSlice()) {
			return time.Since(start), nil
		}
	}
}
