package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"sidegate/appliance/admin"
	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/doctor"
	"sidegate/appliance/doctor/probe"
	"sidegate/appliance/netstate"
)

// ProbeOptions narrow a probe. The zero value probes what there is.
type ProbeOptions struct {
	As      netip.Addr     // the client's address
	Target  netip.AddrPort // the server
	Running *admin.Client  // the gateway that runs here; nil if none does
}

// Probe sends connections of an invented client through the box: one for each LAN interface and family. It returns what became of
// each, and what of it the doctor finds. An error says that it could not.
func Probe(ctx context.Context, plan *Plan, o ProbeOptions) (results []probe.Result, findings []doctor.Finding, err error) {
	network, err := netstate.Read()
	if err != nil {
		return nil, nil, err
	}
	for _, l := range lanInterfaces(plan.Config.Interfaces.LAN, network, nil) {
		link, ok := network.Link(l.index)
		if !ok || !link.Up || !link.Ethernet {
			continue // the doctor's other checks say so; on a link without Ethernet nothing goes past the box
		}
		for _, ipv6 := range []bool{false, true} {
			if !o.wants(network, link, ipv6) {
				continue
			}
			r, err := probeLAN(ctx, network, link, ipv6, o)
			if err != nil {
				return results, findings, fmt.Errorf("probing %s: %w", link.Name, err)
			}
			results = append(results, r)
			if f := r.Finding(plan.Config.ReturnPath != config.Asymmetric); f != nil {
				findings = append(findings, *f)
			}
		}
	}
	if len(results) == 0 {
		return nil, nil, errors.New("probing: no LAN interface with Ethernet is up and has an address and a default route of the family; see: sidegate doctor")
	}
	return results, findings, nil
}

// wants reports whether a family is to be probed on a LAN interface.
func (o ProbeOptions) wants(network *netstate.Snapshot, link netstate.Link, ipv6 bool) bool {
	if o.Target.IsValid() && o.Target.Addr().Is6() != ipv6 || o.As.IsValid() && o.As.Is6() != ipv6 {
		return false
	}
	if _, ok := network.Default(ipv6); !ok {
		return false
	}
	for _, a := range network.AddressesOf(link.Index) {
		address := a.Prefix.Addr()
		if address.Is6() == ipv6 && !address.IsLinkLocalUnicast() && (!o.As.IsValid() || a.Prefix.Contains(o.As)) {
			return true
		}
	}
	return false
}

func probeLAN(ctx context.Context, network *netstate.Snapshot, link netstate.Link, ipv6 bool, o ProbeOptions) (r probe.Result, err error) {
	options := probe.Options{Network: network, LAN: link, IPv6: ipv6, As: o.As, Target: o.Target, Mark: datapath.MarkBypass}
	bypass, err := datapath.OpenInjector(ctx, link.Index, datapath.MarkBypass)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, bypass.Close()) }()
	options.Bypass = bypass.Inject
	if o.Running != nil {
		through, err := datapath.OpenInjector(ctx, link.Index, 0)
		if err != nil {
			return r, err
		}
		defer func() { err = errors.Join(err, through.Close()) }()
		options.Through = through.Inject
		options.Expect = func(ctx context.Context, mac netstate.MAC, from, to netip.AddrPort) (probe.Expectation, error) {
			e, err := o.Running.Explain(ctx, map[string][]string{
				"source_ip": {from.Addr().String()}, "source_mac": {mac.String()}, "interface": {link.Name},
				"ip": {to.Addr().String()}, "port": {fmt.Sprint(to.Port())}, "network": {"tcp"},
			})
			return probe.Expectation{Verdict: e.Policy.Verdict, Sniffed: e.Policy.Ambiguous || e.Policy.Sniff}, err
		}
	}
	return probe.Run(ctx, options)
}
