package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Flow is one entry of the flow table, as people and programs read it.
type Flow struct {
	Protocol    string         `json:"protocol"` // tcp, udp, or the IP protocol's number
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	Verdict     string         `json:"verdict"`              // direct, proxy, block, sniff
	Translated  bool           `json:"translated,omitempty"` // direct, with the gateway's own address
	Outbound    string         `json:"outbound,omitempty"`
	Rule        string         `json:"rule"` // its name, or #index, or "default"
	Generation  uint32         `json:"generation"`
	State       string         `json:"state"`
	Packets     uint64         `json:"packets"` // of the client, as the hook sees them: after GRO
	Bytes       uint64         `json:"bytes"`
	Age         time.Duration  `json:"age_ns"`
	Idle        time.Duration  `json:"idle_ns"`
	ClientMAC   string         `json:"client_mac,omitempty"`
	Interface   string         `json:"interface"`
	Process     *Process       `json:"process,omitempty"` // of the box itself, that opened it
	Crowd       bool           `json:"crowd,omitempty"`   // in the table of clients that are over their share
}

// Process is who on this box opened a flow.
type Process struct {
	Name string `json:"name"` // of the executable
	Unit string `json:"unit"` // of systemd, or the cgroup's directory
	PID  uint32 `json:"pid"`
}

// flowTables are the two tables a flow can be in.
func (s *state) flowTables() []*ebpf.Map {
	return []*ebpf.Map{s.maps.Flows, s.maps.CrowdFlows}
}

// Flows reads the flow tables. It is a picture of a moving thing: a flow may be missing or seen at two times.
func (d *Datapath) Flows() ([]Flow, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return nil, nil
	}
	now, err := d.generation.now()
	if err != nil {
		return nil, err
	}
	interfaces := map[uint32]string{}
	var flows []Flow
	for i, table := range d.state.flowTables() {
		err := eachFlow(table, func(k gatewayFlowKey, v gatewayFlow) {
			f := d.describe(k, v, now)
			f.Crowd = i == 1
			f.Interface = interfaceName(interfaces, v.Interface)
			if isOwn(v) {
				f.Process = d.state.originOf(k)
			}
			flows = append(flows, f)
		})
		if err != nil {
			return nil, err
		}
	}
	own, err := d.ownSockets(now)
	if err != nil {
		return nil, err
	}
	return append(flows, own...), nil
}

func interfaceName(known map[uint32]string, index uint32) string {
	if index == 0 {
		return loopback // of the box itself
	}
	name, ok := known[index]
	if !ok {
		if i, err := net.InterfaceByIndex(int(index)); err == nil {
			name = i.Name
		} else {
			name = fmt.Sprintf("#%d", index)
		}
		known[index] = name
	}
	return name
}

// eachFlow reads a table in batches; a batch that outgrows its bucket is asked for again, larger.
func eachFlow(table *ebpf.Map, visit func(gatewayFlowKey, gatewayFlow)) error {
	for size := 4096; ; size *= 4 {
		err := eachFlowIn(table, size, visit)
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
	}
}

func eachFlowIn(table *ebpf.Map, size int, visit func(gatewayFlowKey, gatewayFlow)) error {
	keys, values := make([]gatewayFlowKey, size), make([]gatewayFlow, size)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := table.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			visit(keys[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the flow table: %w", err)
		}
	}
}

func (d *Datapath) describe(k gatewayFlowKey, v gatewayFlow, now uint64) Flow {
	f := Flow{
		Protocol:    protocolName(k.Protocol),
		Source:      netip.AddrPortFrom(k.Source.addr(), bigEndian(k.SourcePort)),
		Destination: netip.AddrPortFrom(k.Destination.addr(), bigEndian(k.DestinationPort)),
		Verdict:     names().verdict(uint32(v.Verdict)),
		Rule:        d.ruleName(v.Generation, v.Rule),
		Generation:  v.Generation,
		State:       names().state(uint32(v.State)),
		Packets:     v.Packets,
		Bytes:       v.Bytes,
		Age:         d.generation.clock.since(now, v.FirstSeen),
		Idle:        d.generation.clock.since(now, v.LastSeen),
	}
	f.Translated = gatewayVerdict(v.Verdict) == gatewayVerdictVERDICT_DIRECT && isTranslated(v.Mark)
	if isProxied(v) {
		f.Outbound = d.outboundName(v.Outbound)
	}
	if v.ClientMac != [6]byte{} {
		f.ClientMAC = net.HardwareAddr(v.ClientMac[:]).String()
	}
	return f
}

func protocolName(protocol uint8) string {
	switch protocol {
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_ICMPV6:
		return "icmpv6"
	}
	if n := networkOf(protocol); n != 0 {
		return n.String()
	}
	return fmt.Sprint(protocol)
}

func (d *Datapath) ruleName(generation uint32, rule uint16) string {
	if rule == ruleDefault {
		return "default"
	}
	if rules := d.rules[generation]; int(rule) < len(rules) && rules[rule] != "" {
		return rules[rule]
	}
	return fmt.Sprintf("#%d", rule+1)
}

func (d *Datapath) outboundName(id uint32) string {
	if name, ok := (*d.outbounds.Load())[id]; ok {
		return name
	}
	return fmt.Sprintf("gone(%08x)", id)
}

// clientOf is the key of the clients map that the programs count this flow under.
func clientOf(k gatewayFlowKey, v gatewayFlow) gatewayClientKey {
	if isOwn(v) {
		return boxKey()
	}
	return clientBy(k.Source, v.ClientMac)
}

// clientBy is the key of a client in the LAN: its MAC address, or where the link has none its own.
func clientBy(source gatewayAddress, mac [6]byte) gatewayClientKey {
	var c gatewayClientKey
	if mac != [6]byte{} {
		var b [8]byte
		copy(b[:], mac[:])
		c.W[0], c.W[1] = binary.NativeEndian.Uint32(b[:4]), binary.NativeEndian.Uint32(b[4:])
		return c
	}
	c.W = source.W
	if !source.addr().Is4() {
		c.W[2], c.W[3] = 0, 1
	}
	return c
}

// lower turns REASON_RULE_BLOCK into rule_block.
func lower(name, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(name, prefix))
}
