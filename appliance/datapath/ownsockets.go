package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"sidegate/appliance/policy"
)

// ownSockets lists the connections of the box itself that are direct. No program sees their packets: the list is that of the
// sockets themselves, with what was decided where they connected, and says nothing of what they carry.
func (d *Datapath) ownSockets(now uint64) ([]Flow, error) {
	entries, err := d.ownEntries()
	if err != nil {
		return nil, err
	}
	var flows []Flow
	for _, e := range entries {
		v := e.Socket.Flow
		v.LastSeen, v.State = now, uint8(gatewayFlowStateFLOW_ESTABLISHED)
		flows = append(flows, d.describe(e.Key, v, now))
		f := &flows[len(flows)-1]
		f.Interface, f.Process = loopback, e.Socket.Origin.process()
	}
	return flows, nil
}

// ownEntries is that list as the programs write it. Reading it also makes them keep what is in it for as long as its socket lives: see
// own_recent in bpf/maps.h. The caller holds d.mu.
func (d *Datapath) ownEntries() ([]gatewayOwnEntry, error) {
	if d.applied == nil || d.applied.Own == nil || d.ownProblem != nil {
		return nil, nil
	}
	entries, err := d.generation.listSockets()
	if err != nil {
		return nil, fmt.Errorf("reading the box's own sockets: %w", err)
	}
	return entries, nil
}

// listSockets runs the programs that list over the sockets of the network namespace.
func (g *generation) listSockets() (entries []gatewayOwnEntry, err error) {
	for _, p := range []*ebpf.Program{g.objects.OwnListTcp, g.objects.OwnListUdp} {
		if entries, err = appendSockets(entries, p); err != nil {
			return nil, err
		}
	}
	return entries, nil
}

func appendSockets(entries []gatewayOwnEntry, p *ebpf.Program) ([]gatewayOwnEntry, error) {
	iterator, err := link.AttachIter(link.IterOptions{Program: p})
	if err != nil {
		return nil, err
	}
	defer iterator.Close()
	list, err := iterator.Open()
	if err != nil {
		return nil, err
	}
	defer list.Close()
	for {
		var e gatewayOwnEntry
		err := binary.Read(list, binary.NativeEndian, &e)
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
}

func (o gatewayOrigin) process() *Process {
	return &Process{Name: cString(o.Name[:]), Unit: cString(o.Unit[:]), PID: o.Pid}
}

// processAt is what rules see of a process. Its path is known by its hash only: it is that of the rule that has it, or one that no
// rule can have.
func (g *generation) processAt(o gatewayOrigin) policy.Process {
	p := policy.Process{Name: cString(o.Name[:]), Unit: cString(o.Unit[:])}
	if o.Process.Path == 0 {
		return p
	}
	p.Path = "?"
	for path := range g.tables.ProcessPath.Class {
		if hashPath(path) == o.Process.Path {
			p.Path = path
		}
	}
	return p
}
