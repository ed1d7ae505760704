package main

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// step is one scene of the demonstration: something happens, then claims about it are checked.
type step struct {
	title  string
	act    action
	host   string    // where the traffic goes; none: the step has none
	ip     ipVersion // and how
	claims []claim
	// What the flow table says afterwards; none: the flow does not pass the gateway.
	verdict, rule string
	// Shown before the claims, as the commands print it.
	show func(ctx context.Context, s *stage) (string, error)
}

// steps are the demonstration, in order. The last ones are done after a --keep.
var steps = []step{
	{title: "The gateway starts: sidegate run", act: startGateway, claims: []claim{gatewayIsReady}},

	{
		title: "Direct: a download over IPv4", act: download, host: lab.Server, ip: ipv4, verdict: "direct", rule: "default",
		claims: []claim{fileIsWhole, serverSeesLaptop, oneHop, repliesBypass, noRedirects},
	},
	{
		title: "Direct: a download over IPv6", act: download, host: lab.Server, ip: ipv6, verdict: "direct", rule: "default",
		claims: []claim{fileIsWhole, serverSeesLaptop, oneHop, repliesBypass},
	},
	{
		title: "Direct: a conversation over UDP", act: converse, host: lab.Server, ip: ipv4, verdict: "direct", rule: "default",
		claims: []claim{everyAnswer, serverSeesLaptop, oneHop, repliesBypass},
	},

	{
		title: "Proxied: a download over IPv4, through dante's SOCKS5", act: download, host: abroad, ip: ipv4, verdict: "proxy", rule: abroad,
		claims: []claim{fileIsWhole, serverSeesUpstream, hidden, onlySidegate},
	},
	{
		title: "Proxied: a download over IPv6", act: download, host: abroad, ip: ipv6, verdict: "proxy", rule: abroad,
		claims: []claim{fileIsWhole, serverSeesUpstream, hidden, onlySidegate},
	},
	{
		title: "Proxied: a conversation over UDP", act: converse, host: abroad, ip: ipv4, verdict: "proxy", rule: abroad,
		claims: []claim{everyAnswer, serverSeesUpstream, hidden, onlySidegate},
	},

	{
		title: "Blocked: a connection", act: knock, host: ads, ip: ipv4, verdict: "block", rule: ads,
		claims: []claim{silence, stopsHere, drops("rule_block")},
	},
	{
		title: "Rejected: a connection", act: knock, host: telemetry, ip: ipv4, verdict: "block", rule: telemetry,
		claims: []claim{refusal, reset, stopsHere, drops("rule_reject")},
	},

	{
		title: "DNS: the laptop asks " + resolver.String() + ", which is nowhere here, for " + films, act: ask(films),
		claims: []claim{answered, stopsHere, ispIsAsked, learned(films)},
		show:   func(ctx context.Context, s *stage) (string, error) { return s.command(ctx, "names") },
	},
	{
		title: "Proxied by its name: a download from " + films, act: downloadFrom(films), verdict: "proxy", rule: "films",
		claims: []claim{fileIsWhole, serverSeesUpstream, hidden, onlySidegate, upstreamAsks, otherwiseDirect, sniffed(0)},
	},
	{
		title: "Two names on one address: " + tracker + ", blocked", act: downloadFrom(tracker), verdict: "block", rule: "tracker",
		claims: []claim{sameAddress, cutOff, stopsHere, nobodyIsCalled, sniffed(1)},
	},
	{
		title: "And the other one, proxied as before: " + films, act: downloadFrom(films), verdict: "proxy", rule: "films",
		claims: []claim{sameAddress, fileIsWhole, serverSeesUpstream, hidden, onlySidegate, sniffed(2)},
	},

	{
		title: "The flow table explains each: sidegate flows", act: nothing, claims: []claim{tableExplains},
		show: func(ctx context.Context, s *stage) (string, error) { return s.command(ctx, "flows") },
	},
	{
		title: "And a flow that is not there yet: sidegate explain", act: nothing, claims: []claim{kernelAgrees},
		show: func(ctx context.Context, s *stage) (string, error) {
			return s.command(ctx, append([]string{"explain", "-c", s.gateway.Config}, s.question()...)...)
		},
	},
	{
		title: "And how it knows a name: sidegate explain", act: nothing, claims: []claim{namesAreTold},
		show: func(ctx context.Context, s *stage) (string, error) {
			return s.command(ctx, append([]string{"explain", "-c", s.gateway.Config}, s.atShared()...)...)
		},
	},
}

var lastSteps = []step{
	{title: "The gateway stops", act: stopGateway, claims: []claim{endsWell, nothingLeft}},
	{title: "The side router forwards plainly: what was blocked is reached", act: knock, host: ads, ip: ipv4, claims: []claim{connects}},
}

func nothing(context.Context, *stage, string, netip.Addr) (flow, error) { return flow{}, nil }

func startGateway(ctx context.Context, s *stage, _ string, _ netip.Addr) (_ flow, err error) {
	if s.pristine, err = s.kernelState(ctx); err != nil {
		return flow{}, err
	}
	// It ends in its own step or with the lab, not by Ctrl-C.
	s.gateway, err = s.sidegate.StartGateway(context.WithoutCancel(ctx), lab.GatewayOptions{Binary: s.binary, Config: s.config})
	if err != nil {
		return flow{}, err
	}
	s.admin = admin.NewClient(s.gateway.Socket)
	return flow{}, nil
}

func stopGateway(ctx context.Context, s *stage, _ string, _ netip.Addr) (f flow, err error) {
	start := time.Now()
	if err := s.gateway.Signal(unix.SIGTERM); err != nil {
		return f, err
	}
	select {
	case <-s.gateway.Done():
		f.err = s.gateway.Wait()
	case <-time.After(10 * time.Second):
		f.err = errors.New("it still runs 10 s after SIGTERM")
	}
	f.took = time.Since(start)
	return f, nil
}

// question is what the demonstration asks sidegate to explain: facts of a flow that nobody sent.
func (s *stage) question() []string {
	return []string{
		"source_ip=" + s.laptop.Addr4().String(),
		"ip=" + s.Host(abroad).Addr4().String(),
		"port=443",
		"network=tcp",
	}
}
