package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"

	"sidegate/appliance/lab"
)

var (
	noGateway      = fmt.Sprintf("the same on a box where no gateway runs, in %d times the pairs of 1/%[1]d of the time", parts)
	ownTCP         = Quantity{"the box's own direct TCP throughput", "Gb/s", noGateway}
	ownConnections = Quantity{"the box's own direct connections opened, used and closed", "1/s", noGateway}
	// As soon as there is a routing rule, whosever and whatever it says, the kernel looks each route up by rules: this much is not ours.
	ownConnectionsOfRuled = Quantity{ownConnections.What, ownConnections.Unit, noGateway + "; that box has one routing rule"}
)

// parts is into how many parts a measurement is cut, with its neighbour in between: few percent are looked for, and a machine with others
// on it changes by more within a second.
const parts = 10

// own compares direct connections of the box itself, by a policy that asks for processes, with those of the box beside it. This process is
// a program of the one and then of the other: what the gateway decides for is a unit that it enters and leaves.
func own(ctx context.Context, b *bench) (_ []*Figure, err error) {
	bulk, err := b.server.StartBulk(ctx, 0)
	if err != nil {
		return nil, err
	}
	echo, err := b.server.StartEcho(ctx, 0)
	if err != nil {
		return nil, err
	}
	unit, err := lab.NewCgroup("sidegate-bench-*.service")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unit.Close()) }()
	if err := b.startOwn(ctx, unit); err != nil {
		return nil, err
	}
	ruled, err := b.addRuled(ctx)
	if err != nil {
		return nil, err
	}
	s := &bench{stage: b.stage, pairs: b.pairs * parts, window: b.window / parts}
	from := func(box *lab.Host, to netip.AddrPort) dialer {
		return func(ctx context.Context) (*net.TCPConn, error) { return dialTCP(ctx, box, to) }
	}
	var figures []*Figure
	for _, row := range []struct {
		*Figure
		to      netip.AddrPort
		measure func(dialer) measurement
		beside  *lab.Host
	}{
		{&Figure{Name: "upload", Quantity: ownTCP, Target: "≥ 0.98 ×", Least: 0.9}, bulk.Addr4(), func(d dialer) measurement { return s.throughput(d, lab.Upload) }, b.plain},
		{&Figure{Name: "download", Quantity: ownTCP, Target: "≥ 0.98 ×", Least: 0.9}, bulk.Addr4(), func(d dialer) measurement { return s.throughput(d, lab.Download) }, b.plain},
		{&Figure{Name: "16 at a time", Quantity: ownConnections, Target: "≥ 0.98 ×", Least: 0.9}, echo.Addr4(), s.connectionRate, b.plain},
		{&Figure{Name: "16 at a time", Quantity: ownConnectionsOfRuled, Target: "≥ 0.98 ×", Least: 0.9}, echo.Addr4(), s.connectionRate, ruled},
	} {
		err := row.alternate(ctx, s.pairs,
			within(unit, row.measure(from(b.sidegate, row.to))),
			row.measure(from(row.beside, row.to)))
		if err != nil {
			return nil, err
		}
		figures = append(figures, row.Figure)
	}
	return figures, nil
}

// addRuled adds another box like plain, with a routing rule that nothing follows.
func (b *bench) addRuled(ctx context.Context) (*lab.Host, error) {
	h, err := b.AddClient(ctx, "ruled")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(via(h, b.router), manyPorts(h)); err != nil {
		return nil, err
	}
	return h, h.Do(func() error {
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Mark, rule.Table = netlink.FAMILY_V4, 500, 1, 500
		return netlink.RuleAdd(rule)
	})
}

// within is a measurement by a process that is in a cgroup.
func within(c lab.Cgroup, m measurement) measurement {
	return func(ctx context.Context) (value float64, err error) {
		leave, err := c.Enter()
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, leave()) }()
		return m(ctx)
	}
}

// startOwn runs a gateway that decides for the box's own sockets of a cgroup.
func (b *bench) startOwn(ctx context.Context, c lab.Cgroup) error {
	err := b.start(ctx, fmt.Sprintf(`interfaces: { lan: eth0 }
gateway: { local: true, cgroup: %q }
rules:
  - { name: web, process_name: [nginx, curl], outbound: block }
  - { name: unit, unit: [transmission.service], outbound: block }
default: direct
`, c))
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(b.gateway.State, "links", "own-connect4")); err != nil {
		return fmt.Errorf("the box's own connections are not decided: %s", b.gateway.Tail(1))
	}
	return nil
}
