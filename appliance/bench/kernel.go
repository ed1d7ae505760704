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

// meter reads what the gateway's program costs in the path of packets, by the kernel's own statistics, and what an
// empty program costs on the very same packets: it stands before the gateway's on the same hook.
type meter struct {
	gateway, empty *ebpf.Program
	attached       link.Link
	statistics     io.Closer // the kernel counts as long as this is open, whatever kernel.bpf_stats_enabled says
}

// newMeter needs a running gateway.
func newMeter(h *lab.Host) (_ *meter, err error) {
	m := &meter{}
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
		return m, err
	}
	if m.statistics, err = ebpf.EnableStats(unix.BPF_STATS_RUN_TIME); err != nil {
		return m, err
	}
	index := h.Interface().Index
	return m, h.Do(func() error {
		there, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return err
		}
		if len(there.Programs) != 1 {
			return fmt.Errorf("%d programs are attached to %s, not one", len(there.Programs), h.Interface().Name)
		}
		if m.gateway, err = ebpf.NewProgramFromID(there.Programs[0].ID); err != nil {
			return err
		}
		m.attached, err = link.AttachTCX(link.TCXOptions{
			Interface: index, Program: m.empty, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
		})
		return err
	})
}

// Close detaches the empty program and stops the kernel's counting.
func (m *meter) Close() error {
	var errs []error
	if m.attached != nil {
		errs = append(errs, m.attached.Close())
	}
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

// cost is the mean time of both programs in ns for each run while f makes packets, at least packets of them.
func (m *meter) cost(packets uint64, f func() error) (Sample, error) {
	programs := []*ebpf.Program{m.gateway, m.empty}
	var mean [2]float64
	var before [2]*ebpf.ProgramStats
	var err error
	for i, p := range programs {
		if before[i], err = p.Stats(); err != nil {
			return Sample{}, fmt.Errorf("reading a program's statistics: %w", err)
		}
	}
	if err := f(); err != nil {
		return Sample{}, err
	}
	for i, p := range programs {
		after, err := p.Stats()
		if err != nil {
			return Sample{}, fmt.Errorf("reading a program's statistics: %w", err)
		}
		runs := after.RunCount - before[i].RunCount
		if runs < packets {
			return Sample{}, fmt.Errorf("%d packets met the program, expected at least %d", runs, packets)
		}
		mean[i] = float64(after.Runtime-before[i].Runtime) / float64(runs)
	}
	return Sample{Value: mean[0], Beside: mean[1]}, nil
}

const emptyProgram = "an empty program on the same packets"

// established measures packets of flows that the gateway knows.
func established(ctx context.Context, b *bench) ([]*Figure, error) {
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
	one := &Figure{
		Name: "established direct packet, 1 flow", Unit: "ns", Beside: emptyProgram,
		Target: "< 200 where an empty program takes 70", Most: 200. / 70,
	}
	many := &Figure{Name: "established direct packet, 1,024 flows", Unit: "ns", Beside: emptyProgram}
	for figure, flood := range map[*Figure]lab.Flood{
		one:  {To: destinations(1)},
		many: {To: destinations(32), Sources: 32},
	} {
		for range b.pairs {
			window, cancel := context.WithTimeout(ctx, b.window)
			s, err := m.cost(1000, func() error {
				_, err := b.laptop.Flood(window, flood)
				return err
			})
			cancel()
			if err != nil {
				return nil, errors.Join(err, m.Close())
			}
			figure.add(s)
		}
	}
	return []*Figure{one, many}, m.Close()
}

// policies measures what policies of different sizes cost when they are loaded and when they decide a new flow.
func policies(ctx context.Context, b *bench) ([]*Figure, error) {
	sizes := []policySize{{10, 10}, {900, 10}, {10, 10_000}, {900, 100_000}}
	decisions := make([]*Figure, len(sizes))
	for i, size := range sizes {
		decisions[i] = &Figure{Name: "new flow, " + size.String(), Unit: "ns", Beside: emptyProgram}
	}
	largest := len(sizes) - 1
	decisions[largest].Target, decisions[largest].Most = "< 2,500 where an empty program takes 70", 2500./70
	starts := &Figure{
		Name: "start of the daemon until ready, " + sizes[largest].String(), Unit: "s", Beside: sizes[0].String(),
		Target: "< 2",
	}
	memory := &Figure{
		Name: "peak memory of the daemon, " + sizes[largest].String(), Unit: "MiB", Beside: sizes[0].String(),
		Target: "< 120",
	}
	for range b.pairs {
		took, peak := make([]float64, len(sizes)), make([]float64, len(sizes))
		for i, size := range sizes {
			s, err := newFlows(ctx, b, size)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", decisions[i].Name, err)
			}
			decisions[i].add(s...)
			took[i] = b.gateway.Took.Seconds()
			if peak[i], err = peakMemory(b.gateway.Pid()); err != nil {
				return nil, err
			}
		}
		starts.add(Sample{took[largest], took[0]})
		memory.add(Sample{peak[largest], peak[0]})
	}
	figures := append(decisions, starts, memory)
	for _, i := range []int{1, 2} {
		ratio := &Figure{
			Name: "the same against 10 rules: " + sizes[i].String(), Unit: "ns", Beside: sizes[0].String(),
			Target: "≤ 1.2×", Most: 1.2,
		}
		for n, s := range decisions[i].Samples {
			ratio.add(Sample{s.Value, decisions[0].Samples[n].Value})
		}
		figures = append(figures, ratio)
	}
	return figures, nil
}

// Every new flow of a burst has its own pair of ports and one of so many destinations.
const (
	newDestinations = 1000
	newSources      = 8
	bursts          = 4
)

// newFlows starts a gateway with the policy and sends it bursts of packets that each begin a flow.
func newFlows(ctx context.Context, b *bench, size policySize) (samples []Sample, err error) {
	if err := b.start(ctx, policyConfig(size)); err != nil {
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
	for range bursts {
		flood := lab.Flood{To: destinations(newDestinations), Sources: newSources, Packets: newDestinations * newSources}
		s, err := m.cost(uint64(flood.Packets), func() error {
			_, err := b.laptop.Flood(ctx, flood)
			return err
		})
		if err != nil {
			return nil, err
		}
		samples = append(samples, s)
	}
	return samples, nil
}
