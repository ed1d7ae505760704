package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sidegate/appliance/lab"
)

const ownSOCKS5 = "the client speaking SOCKS5 itself"

var (
	proxiedTCP  = Quantity{"proxied TCP throughput", "Gb/s", ownSOCKS5}
	roundTrips  = Quantity{"time from a small request to its answer", "µs", ownSOCKS5}
	connections = Quantity{"proxied connections opened, used and closed", "1/s", ownSOCKS5}
)

// proxying compares proxied TCP with a client that uses the same SOCKS5 server, dante, itself, through a box that only
// forwards.
func proxying(ctx context.Context, b *bench) ([]*Figure, error) {
	dante, err := b.upstream.StartDante(ctx, lab.DanteOptions{})
	if err != nil {
		return nil, err
	}
	bulk, err := b.abroad.StartBulk(ctx, 0)
	if err != nil {
		return nil, errors.Join(err, dante.Stop())
	}
	echo, err := b.abroad.StartEcho(ctx, 0)
	if err != nil {
		return nil, errors.Join(err, dante.Stop())
	}
	if err := b.start(ctx, b.proxied(dante.URL("socks5", lab.Credentials{}))); err != nil {
		return nil, errors.Join(err, dante.Stop())
	}

	// Either way of reaching a server.
	transparent := func(to netip.AddrPort) dialer {
		return func(ctx context.Context) (*net.TCPConn, error) { return dialTCP(ctx, b.laptop, to) }
	}
	itself := func(to netip.AddrPort) dialer {
		return func(ctx context.Context) (*net.TCPConn, error) { return dialSOCKS5(ctx, b.laptop, dante.Addr4, to) }
	}
	rows := []struct {
		*Figure
		to      netip.AddrPort
		measure func(dialer) measurement
	}{
		{&Figure{Name: "upload", Quantity: proxiedTCP}, bulk.Addr4(), func(d dialer) measurement { return b.throughput(d, lab.Upload) }},
		{&Figure{Name: "download", Quantity: proxiedTCP}, bulk.Addr4(), func(d dialer) measurement { return b.throughput(d, lab.Download) }},
		{&Figure{Name: "64 bytes each way", Quantity: roundTrips, Target: "≤ 1.3 ×", Most: 1.3}, echo.Addr4(), b.roundTrip},
		{&Figure{Name: "16 at a time", Quantity: connections}, echo.Addr4(), b.connectionRate},
	}
	var figures []*Figure
	for _, row := range rows {
		err := row.alternate(ctx, b.pairs,
			b.through(b.sidegate, row.measure(transparent(row.to))),
			b.through(b.plain, row.measure(itself(row.to))))
		if err != nil {
			return nil, errors.Join(err, dante.Stop())
		}
		figures = append(figures, row.Figure)
	}
	return figures, dante.Stop()
}

// roundTrip measures the median of small requests, each sent when the answer to the one before is there.
func (b *bench) roundTrip(dial dialer) measurement {
	const size, atOnce = 64, 200
	return func(ctx context.Context) (float64, error) {
		c, err := dial(ctx)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		var medians []float64
		for end := time.Now().Add(b.window); time.Now().Before(end); {
			took, err := lab.PingPong(ctx, c, size, atOnce)
			if err != nil {
				return 0, err
			}
			medians = append(medians, float64(took[len(took)/2].Nanoseconds())/1e3)
		}
		return median(medians), nil
	}
}

// connectionRate measures how many connections can be opened, used once and closed in a second.
func (b *bench) connectionRate(dial dialer) measurement {
	const workers = 16
	return func(ctx context.Context) (float64, error) {
		window, cancel := context.WithTimeout(ctx, b.window)
		defer cancel()
		var done atomic.Int64
		var tasks sync.WaitGroup
		failures := make(chan error, workers)
		start := time.Now()
		for range workers {
			tasks.Go(func() {
				for window.Err() == nil {
					if err := once(ctx, dial); err != nil {
						failures <- err
						return
					}
					done.Add(1)
				}
			})
		}
		tasks.Wait()
		select {
		case err := <-failures:
			return 0, err
		default:
			return float64(done.Load()) / time.Since(start).Seconds(), nil
		}
	}
}

func once(ctx context.Context, dial dialer) error {
	c, err := dial(ctx)
	if err != nil {
		return err
	}
	_, err = lab.PingPong(ctx, c, 1, 1)
	return errors.Join(err, c.Close())
}

// dialSOCKS5 connects through a SOCKS5 server that asks for no password (RFC 1928).
func dialSOCKS5(ctx context.Context, from *lab.Host, server, to netip.AddrPort) (*net.TCPConn, error) {
	c, err := dialTCP(ctx, from, server)
	if err != nil {
		return nil, err
	}
	const version, noAuthentication, connect, ipv4 = 5, 0, 1, 1
	hello := []byte{version, 1, noAuthentication}
	request := append([]byte{version, connect, 0, ipv4}, to.Addr().AsSlice()...)
	request = append(request, byte(to.Port()>>8), byte(to.Port()))
	if err := converse(c, hello, 2, noAuthentication); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if err := converse(c, request, 10, 0); err != nil { // of an IPv4 answer; 0: succeeded
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// converse sends a message and reads an answer of that many bytes, of which the second must be as given.
func converse(c net.Conn, message []byte, length int, second byte) error {
	if _, err := c.Write(message); err != nil {
		return err
	}
	answer := make([]byte, length)
	for n := 0; n < length; {
		got, err := c.Read(answer[n:])
		if err != nil {
			return fmt.Errorf("talking to the SOCKS5 server: %w", err)
		}
		n += got
	}
	if answer[1] != second {
		return fmt.Errorf("the SOCKS5 server answers %d", answer[1])
	}
	return nil
}
