package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"sidegate/appliance/lab"
)

const noGateway = "no gateway on the box"

var (
	ownTCP         = Quantity{"the box's own direct TCP throughput", "Gb/s", noGateway}
	ownConnections = Quantity{"the box's own direct connections opened, used and closed", "1/s", noGateway}
)

// own compares direct connections of the box itself, by a policy that asks for processes, with those of the same box where no gateway
// runs. The bound is wider than the target, for a machine with others on it disperses by several percent. The gateway is started and stopped for each pair: on another box the sockets would meet the same hooks.
func own(ctx context.Context, b *bench) ([]*Figure, error) {
	bulk, err := b.server.StartBulk(ctx, 0)
	if err != nil {
		return nil, err
	}
	echo, err := b.server.StartEcho(ctx, 0)
	if err != nil {
		return nil, err
	}
	dial := func(to netip.AddrPort) dialer {
		return func(ctx context.Context) (*net.TCPConn, error) { return dialTCP(ctx, b.sidegate, to) }
	}
	var figures []*Figure
	for _, row := range []struct {
		*Figure
		measure measurement
	}{
		{&Figure{Name: "upload", Quantity: ownTCP, Target: "≥ 0.98 ×", Least: 0.9}, b.throughput(dial(bulk.Addr4()), lab.Upload)},
		{&Figure{Name: "download", Quantity: ownTCP, Target: "≥ 0.98 ×", Least: 0.9}, b.throughput(dial(bulk.Addr4()), lab.Download)},
		{&Figure{Name: "16 at a time", Quantity: ownConnections, Target: "≥ 0.98 ×", Least: 0.9}, b.connectionRate(dial(echo.Addr4()))},
	} {
		with := func(ctx context.Context) (float64, error) {
			return second(ctx, row.measure, b.startOwn)
		}
		without := func(ctx context.Context) (float64, error) {
			return second(ctx, row.measure, func(context.Context) error { return b.stop() })
		}
		if err := row.alternate(ctx, b.pairs, with, without); err != nil {
			return nil, err
		}
		figures = append(figures, row.Figure)
	}
	return figures, nil
}

// second measures twice after a change and takes the second result: at first the kernel is still busy with what came or went.
func second(ctx context.Context, m measurement, change func(context.Context) error) (float64, error) {
	if err := change(ctx); err != nil {
		return 0, err
	}
	if _, err := m(ctx); err != nil {
		return 0, err
	}
	return m(ctx)
}

// startOwn runs a gateway that decides for the box's own sockets, this process's among them.
func (b *bench) startOwn(ctx context.Context) error {
	err := b.start(ctx, `interfaces: { lan: eth0 }
gateway: { local: true }
rules:
  - { name: web, process_name: [nginx, curl], outbound: block }
  - { name: unit, unit: [transmission.service], outbound: block }
default: direct
`)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(b.gateway.State, "links", "own-connect4")); err != nil {
		return fmt.Errorf("the box's own connections are not decided: %s", b.gateway.Tail(1))
	}
	return nil
}
