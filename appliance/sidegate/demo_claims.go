package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"

	"sidegate/appliance/lab"
	"sidegate/appliance/policy"
)

// claim is one thing that a step is expected to show. Its check says what was seen, and whether that is it.
type claim struct {
	text  string
	check func(ctx context.Context, s *stage, f flow) (seen string, ok bool, err error)
}

// What is claimed of the traffic itself.
var (
	fileIsWhole = claim{"the file arrives whole", func(_ context.Context, _ *stage, f flow) (string, bool, error) {
		if f.err != nil {
			return "", false, f.err
		}
		if !f.whole {
			return fmt.Sprintf("%d of %d bytes, or not those that were sent", f.got, f.asked), false, nil
		}
		return size(uint64(f.got)) + " with the original's SHA-256", true, nil
	}}

	everyAnswer = claim{"every datagram is answered by whom it was sent to", func(_ context.Context, _ *stage, f flow) (string, bool, error) {
		return fmt.Sprintf("%d sent, %d answered by %s", f.asked, f.got, f.server), f.whole, f.err
	}}

	serverSeesLaptop = claim{"the server sees the laptop's own address and port", func(_ context.Context, _ *stage, f flow) (string, bool, error) {
		return seenFrom(f), f.seenFrom == f.client, nil
	}}

	serverSeesUpstream = claim{"the server sees the upstream proxy", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		upstream := s.Host(lab.Upstream)
		is := f.seenFrom.Addr()
		return seenFrom(f), is == upstream.Addr4() || is == upstream.Addr6(), nil
	}}

	connects = claim{"the laptop reaches it", func(_ context.Context, _ *stage, f flow) (string, bool, error) {
		return fmt.Sprintf("connected in %s", brief(f.took)), f.err == nil, f.err
	}}

	silence = claim{"nobody answers", func(_ context.Context, _ *stage, f flow) (string, bool, error) {
		var timeout net.Error
		ok := errors.As(f.err, &timeout) && timeout.Timeout()
		return fmt.Sprintf("%s after %s", outcome(f.err), brief(f.took)), ok, nil
	}}

	refusal = claim{"the connection is refused at once", func(_ context.Context, _ *stage, f flow) (string, bool, error) {
		return fmt.Sprintf("%s after %s", outcome(f.err), brief(f.took)), errors.Is(f.err, syscall.ECONNREFUSED), nil
	}}
)

// What is claimed of its way, by the packets that passed the side router's interface and the router's.
var (
	repliesBypass = claim{"no reply crosses the side router", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		here, err1 := s.atSidegate.Count(f.back)
		there, err2 := s.atRouter.Count(f.back)
		return fmt.Sprintf("%s there, %s at the router", counted(here), counted(there)),
			here.Packets == 0 && there.Bytes >= uint64(f.got), errors.Join(err1, err2)
	}}

	oneHop = claim{"requests do, and lose one hop of their lifetime", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		in, out := lifetimes(s.atSidegate, f)
		packets, err := s.atSidegate.Count(func(p lab.Packet) bool { return f.forth(p) && !p.Out })
		ok := len(in) == 1 && len(out) == 1 && out[0] == in[0]-1
		return fmt.Sprintf("%s, TTL %s in, %s out", counted(packets), list(in), list(out)), ok, err
	}}

	hidden = claim{"the router never sees laptop and server together", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		seen, err := s.atRouter.Count(lab.Between(f.client.Addr(), f.server.Addr()))
		return counted(seen), seen.Packets == 0, err
	}}

	onlySidegate = claim{"it sees the side router and the upstream proxy", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		seen, err := s.atRouter.Count(func(p lab.Packet) bool {
			return p.Protocol == f.protocol && lab.Between(s.sidegate.Addr4(), s.Host(lab.Upstream).Addr4())(p)
		})
		return counted(seen), seen.Bytes >= uint64(f.got), err
	}}

	stopsHere = claim{"nothing of it reaches the router", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		here, err1 := s.atSidegate.Count(f.forth)
		there, err2 := s.atRouter.Count(f.both)
		return fmt.Sprintf("%s at the side router, %s at the router", counted(here), counted(there)),
			here.Packets > 0 && there.Packets == 0, errors.Join(err1, err2)
	}}

	reset = claim{"a TCP reset says so", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		const rst = 4
		seen, err := s.atSidegate.Count(func(p lab.Packet) bool { return f.back(p) && p.Out && p.TCPFlags&rst != 0 })
		return fmt.Sprintf("%s with RST from %s", counted(seen), f.server), seen.Packets > 0, err
	}}

	noRedirects = claim{"no ICMP redirect tells the laptop to go elsewhere", func(_ context.Context, s *stage, _ flow) (string, bool, error) {
		sent, err := s.sidegate.Counter("Icmp", "OutRedirects")
		return fmt.Sprintf("OutRedirects %d", sent), sent == 0, err
	}}
)

// drops claims that packets were counted under a reason, as `sidegate status` names it.
func drops(reason string) claim {
	return claim{"it is counted", func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		status, err := s.admin.Status(ctx)
		if err != nil {
			return "", false, err
		}
		n := status.Drops[reason]
		return fmt.Sprintf("%s: %d", reason, n), n > 0, nil
	}}
}

// What is claimed of the gateway.
var (
	gatewayIsReady = claim{"it says that it is ready", func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		status, err := s.admin.Status(ctx)
		if err != nil {
			return "", false, err
		}
		ok := len(status.Problems) == 0 && len(status.Interfaces) == 1 && status.Interfaces[0].Attached
		return fmt.Sprintf("after %s: policy %d with %d rules in force on %s", brief(s.gateway.Took), status.Generation, status.Config.Rules, status.Interfaces[0].Name), ok, nil
	}}

	tableExplains = claim{"every flow above is in it, with its verdict and rule", func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		table, err := s.admin.Flows(ctx)
		if err != nil {
			return "", false, err
		}
		found := 0
		for _, f := range s.flows {
			for _, row := range table {
				if row.Source == f.client && row.Destination == f.server {
					if row.Verdict != f.verdict || row.Rule != f.rule {
						return fmt.Sprintf("%s: %s by %s, expected %s by %s", f, row.Verdict, row.Rule, f.verdict, f.rule), false, nil
					}
					found++
				}
			}
		}
		return fmt.Sprintf("%d of %d", found, len(s.flows)), found == len(s.flows) && found > 0, nil
	}}

	kernelAgrees = claim{"the kernel gives the same answer as the file", func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		live, err := s.explain(ctx, s.question())
		if err != nil {
			return "", false, err
		}
		kernel := *live.Kernel // there is one: the question has an address
		ok := kernel.Same(live.Policy.Answer) && kernel.Verdict == policy.Proxy && kernel.Rule != nil && *kernel.Rule == abroad
		return fmt.Sprintf("kernel: %s through %s", kernel.Verdict, kernel.Outbound), ok, nil
	}}

	endsWell = claim{"it ends by itself", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		return fmt.Sprintf("after %s", brief(f.took)), f.err == nil, f.err
	}}

	nothingLeft = claim{"policy routing and pins are as they were before it", func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		now, err := s.kernelState(ctx)
		if err != nil {
			return "", false, err
		}
		if d := difference(s.pristine, now); len(d) > 0 {
			return fmt.Sprintf("%d differences; the first: %s", len(d), d[0]), false, nil
		}
		return fmt.Sprintf("the same %d rules and routes, no pin", len(now)), true, nil
	}}
)

func seenFrom(f flow) string {
	if !f.seenFrom.IsValid() {
		return "nobody"
	}
	return f.seenFrom.String()
}

// lifetimes lists the distinct TTLs or hop limits of the client's packets, as they came in and as they went out.
func lifetimes(c *lab.Capture, f flow) (in, out []uint8) {
	for p := range c.All() {
		switch {
		case !f.forth(p):
		case p.Out:
			out = append(out, p.TTL)
		default:
			in = append(in, p.TTL)
		}
	}
	slices.Sort(in)
	slices.Sort(out)
	return slices.Compact(in), slices.Compact(out)
}

func list(numbers []uint8) string {
	if len(numbers) == 0 {
		return "none"
	}
	text := ""
	for i, n := range numbers {
		if i > 0 {
			text += " and "
		}
		text += fmt.Sprint(n)
	}
	return text
}

func outcome(err error) string {
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case err == nil:
		return "connected"
	case errors.As(err, &errno):
		return errno.Error()
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timed out"
	}
	return err.Error()
}
