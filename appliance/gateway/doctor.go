package gateway

import (
	"context"
	"net/netip"
	"slices"

	"sidegate/appliance/admin"
	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/doctor"
	"sidegate/appliance/netstate"
	"sidegate/appliance/policy"
	"sidegate/appliance/sysctl"
)

// Examine runs the doctor for a configuration on this box. Running is the status of the gateway that runs here; nil if none does.
func Examine(ctx context.Context, plan *Plan, running *admin.Status) ([]doctor.Finding, error) {
	box, err := newBox(plan, running)
	if err != nil {
		return nil, err
	}
	return doctor.Examine(ctx, box), nil
}

// newBox tells the doctor of the box.
func newBox(plan *Plan, running *admin.Status) (*doctor.Box, error) {
	network, err := netstate.Read()
	if err != nil {
		return nil, err
	}
	lans := lanInterfaces(plan.Config.Interfaces.LAN, network, nil)
	box := &doctor.Box{
		Network:    network,
		Parameters: parametersOf(lans, network),
		DNS:        plan.Config.DNS != nil,
		Before:     before,
		Advertises: plan.Config.IPv6 == config.IPv6Advertise,
		Asymmetric: plan.Config.ReturnPath == config.Asymmetric,
		Proxies:    plan.proxies(),
		Marks: doctor.Marks{
			Direct: datapath.MarkDirect, Proxy: datapath.MarkProxy, Daemon: uint32(datapath.MarkOwn), Mask: datapath.MarkMask,
			OwnTable: datapath.OwnTable,
		},
		Own: ownOf(plan, network),
	}
	for _, l := range lans {
		box.LAN = append(box.LAN, doctor.LAN{Name: l.name, Index: l.index})
	}
	if running != nil {
		box.Problems = unseen(running.Problems, lans, box)
	}
	return box, nil
}

// ownOf tells of the box's own connections; nil: they are left alone. The running gateway may have the places, and others fit in.
func ownOf(plan *Plan, s *netstate.Snapshot) *doctor.Own {
	o := own(plan, s)
	if o == nil {
		return nil
	}
	told := &doctor.Own{Problem: o.Try()}
	for _, known := range []netip.Addr{o.Source4, o.Source6} {
		if known.IsValid() {
			told.Sources = append(told.Sources, datapath.OwnSource(known.Is6()))
		}
	}
	return told
}

// proxies reports whether anything is to come to the proxy or the DNS server.
func (p *Plan) proxies() bool {
	elsewhere := func(outbound string) bool {
		return outbound != policy.OutboundDirect && outbound != policy.OutboundBlock
	}
	return p.Config.DNS != nil || elsewhere(p.Config.Policy.Default) ||
		slices.ContainsFunc(p.Config.Policy.Rules, func(r policy.Rule) bool { return elsewhere(r.Outbound) })
}

func before(index int) ([]doctor.Program, error) {
	programs, err := datapath.ProgramsBefore(index)
	found := make([]doctor.Program, len(programs))
	for i, p := range programs {
		found[i] = doctor.Program(p)
	}
	return found, err
}

// unseen leaves out of a gateway's problems those that the doctor sees by itself.
func unseen(problems []string, lans []lan, box *doctor.Box) []string {
	var seen []string
	if box.Own != nil && box.Own.Problem != nil {
		seen = append(seen, undecided(box.Own.Problem).Error())
	}
	for _, l := range lans {
		if l.problem != nil {
			seen = append(seen, l.problem.Error())
		}
	}
	wrong, _ := sysctl.Check(box.Parameters) // the doctor tells the error
	for _, s := range wrong {
		seen = append(seen, s.String())
	}
	return slices.DeleteFunc(slices.Clone(problems), func(p string) bool { return slices.Contains(seen, p) })
}
