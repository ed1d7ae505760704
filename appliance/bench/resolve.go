package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"sidegate/appliance/lab"
)

const unbound = "unbound, with a thread for each processor"

var (
	cachedAnswers = Quantity{"DNS answers from the cache, to dnsperf", "1/s", unbound}
	slowAnswers   = Quantity{"time to an answer from the cache, 99th percentile at 5,000 questions a second", "µs", unbound}
)

// resolving compares answers from the gateway's cache with unbound's, on a box of the same make. The gateway answers in
// the place of a resolver that does not exist, and what it does besides is in the figure: it makes sure that the kernel
// knows each name for the client.
func resolving(ctx context.Context, b *bench) (_ []*Figure, err error) {
	const sites = 5000
	var names, records []string
	for i := range sites {
		names = append(names, fmt.Sprintf("host-%d.example.com", i))
		records = append(records, fmt.Sprintf("%s. 86400 A %s", names[i], b.server.Addr4()))
	}
	answer, err := lab.Zone(records...)
	if err != nil {
		return nil, err
	}
	authority, err := b.server.StartNameserver(ctx, 53, answer)
	if err != nil {
		return nil, err
	}
	daemon, err := b.plain.StartUnbound(ctx, lab.UnboundOptions{Forward: authority.Addr4, Threads: runtime.NumCPU()})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, daemon.Stop()) }()
	config := fmt.Sprintf("interfaces: { lan: eth0 }\ndns: { upstreams: { up: \"udp://%s\" }, default: up }\ndefault: direct\n", authority.Addr4)
	if err := b.start(ctx, config); err != nil {
		return nil, err
	}
	somewhere := netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, 8, 8, 8}), 53)
	if err := via(b.laptop, b.sidegate); err != nil {
		return nil, err
	}
	for _, server := range []netip.AddrPort{somewhere, daemon.Addr4} { // fill the caches
		r, err := b.laptop.Dnsperf(ctx, lab.DnsperfOptions{Server: server, Names: names, Once: true, Outstanding: 50})
		if err != nil {
			return nil, err
		}
		if r.Completed < sites*99/100 {
			return nil, fmt.Errorf("%d of %d questions were answered by %s", r.Completed, sites, server)
		}
	}
	rate := func(server netip.AddrPort) measurement {
		return func(ctx context.Context) (float64, error) {
			r, err := b.laptop.Dnsperf(ctx, lab.DnsperfOptions{Server: server, Names: names, For: b.window})
			return r.PerSecond, err
		}
	}
	slow := func(server netip.AddrPort) measurement {
		return func(ctx context.Context) (float64, error) {
			r, err := b.laptop.Dnsperf(ctx, lab.DnsperfOptions{Server: server, Names: names, For: b.window, Rate: 5000, Latencies: true})
			if err != nil || len(r.Latencies) == 0 {
				return 0, errors.Join(err, errors.New("dnsperf had no answers"))
			}
			slices.Sort(r.Latencies)
			return float64(r.Latencies[len(r.Latencies)*99/100]) / float64(time.Microsecond), nil
		}
	}
	answers := &Figure{Name: "5,000 names", Quantity: cachedAnswers, Target: "≥ 0.5 ×", Least: 0.5}
	latency := &Figure{Name: "the same", Quantity: slowAnswers}
	if err := answers.alternate(ctx, b.pairs, rate(somewhere), rate(daemon.Addr4)); err != nil {
		return nil, err
	}
	if err := latency.alternate(ctx, b.pairs, slow(somewhere), slow(daemon.Addr4)); err != nil {
		return nil, err
	}
	return []*Figure{answers, latency}, nil
}
