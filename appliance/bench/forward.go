package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"sidegate/appliance/lab"
)

var (
	directTCP = Quantity{"direct TCP throughput", "Gb/s", "plain forwarding"}
	directUDP = Quantity{"direct UDP packets of 64 bytes that arrive", "1,000/s", "plain forwarding"}
)

// forwarding compares direct traffic with a box that only forwards.
func forwarding(ctx context.Context, b *bench) ([]*Figure, error) {
	bulk, err := b.server.StartBulk(ctx, 0)
	if err != nil {
		return nil, err
	}
	sink, err := b.server.StartSink(ctx, 0)
	if err != nil {
		return nil, err
	}
	if err := b.start(ctx, policyConfig(policySize{10, 10})); err != nil {
		return nil, err
	}
	direct := func(ctx context.Context) (*net.TCPConn, error) { return dialTCP(ctx, b.laptop, bulk.Addr4()) }
	rows := []struct {
		*Figure
		measure measurement
	}{
		{&Figure{Name: "upload, which crosses the side router", Quantity: directTCP, Least: 0.8}, b.throughput(direct, lab.Upload)},
		{&Figure{Name: "download, which bypasses it", Quantity: directTCP, Least: 0.8}, b.throughput(direct, lab.Download)},
		{&Figure{Name: "upload, 1 flow", Quantity: directUDP, Least: 0.8}, func(ctx context.Context) (float64, error) {
			f := lab.Flood{To: []netip.AddrPort{sink.Addr4()}}
			arrived, took, err := b.flood(ctx, f, sink, func() error { return nil })
			return float64(arrived) / took.Seconds() / 1e3, err
		}},
	}
	var figures []*Figure
	for _, row := range rows {
		err := row.alternate(ctx, b.pairs, b.through(b.sidegate, row.measure), b.through(b.plain, row.measure))
		if err != nil {
			return nil, err
		}
		figures = append(figures, row.Figure)
	}
	return figures, nil
}

type dialer func(context.Context) (*net.TCPConn, error)

func dialTCP(ctx context.Context, from *lab.Host, to netip.AddrPort) (*net.TCPConn, error) {
	c, err := from.Dial(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// throughput measures a transfer in Gb/s.
func (b *bench) throughput(dial dialer, transfer func(context.Context, *net.TCPConn) (int64, error)) measurement {
	return func(ctx context.Context) (float64, error) {
		c, err := dial(ctx)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		window, cancel := context.WithTimeout(ctx, b.window)
		defer cancel()
		start := time.Now()
		bytes, err := transfer(window, c)
		return float64(bytes) * 8 / 1e9 / time.Since(start).Seconds(), err
	}
}

// flood sends to a sink in the background. When packets arrive steadily it lets one window pass, and returns how many
// came in it and how long it was. What begins a flow, such as a session at the upstream proxy, is over by then.
func (b *bench) flood(ctx context.Context, f lab.Flood, sink *lab.Sink, begin func() error) (arrived uint64, took time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx)
	sending := make(chan error, 1)
	go func() {
		_, err := b.laptop.Flood(ctx, f)
		sending <- err
	}()
	defer func() {
		cancel()
		err = errors.Join(err, <-sending)
	}()
	before, _ := sink.Received()
	steady := before + 16*uint64(max(f.Sources, 1))
	err = lab.Wait(ctx, fmt.Sprintf("packets to arrive at %s", sink.Addr4()), func() error {
		if now, _ := sink.Received(); now < steady {
			return fmt.Errorf("%d arrived", now-before)
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	if err := begin(); err != nil {
		return 0, 0, err
	}
	before, _ = sink.Received()
	start := time.Now()
	select {
	case <-time.After(b.window):
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	}
	after, _ := sink.Received()
	return after - before, time.Since(start), nil
}
