package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// meter reads what the gateway's program costs in the path of packets, by the kernel's own statistics, and what an empty
// program costs in its place: as the first of the hook, where what every program pays for is paid.
type meter struct {
	host           *lab.Host
	gateway, empty *ebpf.Program
	statistics     io.Closer // the kernel counts as long as this is open, whatever kernel.bpf_stats_enabled says
}

// newMeter needs a running gateway.
func newMeter(h *lab.Host) (_ *meter, err error) {
	m := &meter{host: h}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("measuring the programs on %s: %w", h.Name(), err), m.Close())
		}
	}()
	const tcxNext = -1
	m.empty, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "empty", Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXIngress, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, tcxNext), asm.Return()},
	})
	if err != nil {
		return nil, err
	}
	if m.statistics, err = ebpf.EnableStats(unix.BPF_STATS_RUN_TIME); err != nil {
		return nil, err
	}
	err = h.Do(func() error {
		attached, err := link.QueryPrograms(link.QueryOptions{Target: h.Interface().Index, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return err
		}
		if len(attached.Programs) != 1 {
			return fmt.Errorf("%d programs are attached to %s, not one", len(attached.Programs), h.Interface().Name)
		}
		m.gateway, err = ebpf.NewProgramFromID(attached.Programs[0].ID)
		return err
	})
	return m, err
}

// Close stops the kernel's counting.
func (m *meter) Close() error {
	var errs []error
	if m.statistics != nil {
		errs = append(errs, m.statistics.Close())
	}
	for _, p := range []*ebpf.Program{m.empty, m.gateway} {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	return errors.Join(errs...)
}

// traffic makes packets that the program on the side router meets.
type traffic func(context.Context) error

// gatewayCost is the mean time of the gateway's program for each packet, in ns.
func (m *meter) gatewayCost(t traffic) measurement {
	return func(ctx context.Context) (float64, error) { return cost(ctx, m.gateway, t) }
}

// emptyCost is the same of an empty program, which stands before the gateway's meanwhile.
func (m *meter) emptyCost(t traffic) measurement {
	return func(ctx context.Context) (_ float64, err error) {
		var first link.Link
		err = m.host.Do(func() (err error) {
			first, err = link.AttachTCX(link.TCXOptions{
				Interface: m.host.Interface().Index, Program: m.empty, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
			})
			return err
		})
		if err != nil {
			return 0, fmt.Errorf("attaching the empty program: %w", err)
		}
		defer func() { err = errors.Join(err, first.Close()) }()
		return cost(ctx, m.empty, t)
	}
}

func cost(ctx context.Context, p *ebpf.Program, t traffic) (float64, error) {
	const least = 1000 // packets that make a mean
	before, err := p.Stats()
	if err != nil {
		return 0, fmt.Errorf("reading a program's statistics: %w", err)
	}
	if err := t(ctx); err != nil {
		return 0, err
	}
	after, err := p.Stats()
	if err != nil {
		return 0, fmt.Errorf("reading a program's statistics: %w", err)
	}
	runs := after.RunCount - before.RunCount
	if runs < least {
		return 0, fmt.Errorf("%d packets met the program, expected at least %d", runs, least)
	}
	return float64(after.Runtime-before.Runtime) / float64(runs), nil
}

var (
	inPath        = Quantity{"time in the path of a packet", "ns", "an empty program"}
	againstFew    = Quantity{"time in the path of a packet", "ns", "10 rules"}
	startOfDaemon = Quantity{"time from the daemon's start until it is ready", "s", "10 rules"}
	peakOfDaemon  = Quantity{"peak memory of the daemon", "MiB", "10 rules"}
)

// established measures packets of flows that the gateway knows.
func established(ctx context.Context, b *bench) (_ []*Figure, err error) {
	if err := b.start(ctx, policyConfig(policySize{10, 10})); err != nil {
		return nil, err
	}
	if err := via(b.laptop, b.sidegate); err != nil {
		return nil, err
	}
	m, err := newMeter(b.sidegate)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	var figures []*Figure
	for _, row := range []struct {
		*Figure
		flood lab.Flood
	}{
		{
			&Figure{Name: "established direct, 1 flow", Quantity: inPath, Target: "< 200 where empty takes 70", Most: 200. / 70},
			lab.Flood{To: destinations(1), Port: 10000},
		},
		{
			&Figure{Name: "established direct, 1,024 flows", Quantity: inPath},
			lab.Flood{To: destinations(32), Sources: 32, Port: 10000},
		},
	} {
		t := func(ctx context.Context) error {
			window, cancel := context.WithTimeout(ctx, b.window)
			defer cancel()
			_, err := b.laptop.Flood(window, row.flood)
			return err
		}
		if err := t(ctx); err != nil { // the flows are known
			return nil, err
		}
		if err := row.alternate(ctx, b.pairs, m.gatewayCost(t), m.emptyCost(t)); err != nil {
			return nil, err
		}
		figures = append(figures, row.Figure)
	}
	return figures, nil
}

// policies measures what policies of different sizes cost when they are loaded and when they decide a new flow.
func policies(ctx context.Context, b *bench) ([]*Figure, error) {
	sizes := []policySize{{10, 10}, {900, 10}, {10, 10_000}, {900, 100_000}}
	decisions := make([]*Figure, len(sizes))
	for i, size := range sizes {
		decisions[i] = &Figure{Name: "new flow, " + size.String(), Quantity: inPath}
	}
	largest := len(sizes) - 1
	decisions[largest].Target, decisions[largest].Most = "< 2,500 where empty takes 70", 2500./70
	starts := &Figure{Name: sizes[largest].String(), Quantity: startOfDaemon, Target: "< 2"}
	memory := &Figure{Name: sizes[largest].String(), Quantity: peakOfDaemon, Target: "< 120"}
	for range b.pairs {
		took, peak := make([]float64, len(sizes)), make([]float64, len(sizes))
		for i, size := range sizes {
			if err := newFlows(ctx, b, size, decisions[i]); err != nil {
				return nil, err
			}
			took[i] = b.gateway.Took.Seconds()
			var err error
			if peak[i], err = peakMemory(b.gateway.Pid()); err != nil {
				return nil, err
			}
		}
		starts.add(Sample{took[largest], took[0]})
		memory.add(Sample{peak[largest], peak[0]})
	}
	figures := decisions
	for _, i := range []int{1, 2} {
		f := &Figure{Name: decisions[i].Name, Quantity: againstFew, Target: "≤ 1.2 ×", Most: 1.2}
		for n, s := range decisions[i].Samples {
			f.add(Sample{s.Value, decisions[0].Samples[n].Value})
		}
		figures = append(figures, f)
	}
	return append(figures, starts, memory), nil
}

// Every packet of a burst begins a flow: so many sources, each with its own port, send once to so many destinations.
const (
	newDestinations = 1000
	newSources      = 8
	bursts          = 4
)

// newFlows starts a gateway with the policy and sends it bursts of packets that each begin a flow.
func newFlows(ctx context.Context, b *bench, size policySize, f *Figure) (err error) {
	if err := b.start(ctx, policyConfig(size)); err != nil {
		return err
	}
	if err := via(b.laptop, b.sidegate); err != nil {
		return err
	}
	m, err := newMeter(b.sidegate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	flood := lab.Flood{
		To: destinations(newDestinations), Sources: newSources, Packets: newDestinations * newSources, Port: 10000,
	}
	burst := func(ctx context.Context) error {
		_, err := b.laptop.Flood(ctx, flood)
		flood.Port += newSources
		return err
	}
	return f.alternate(ctx, bursts, m.gatewayCost(burst), m.emptyCost(burst))
}
