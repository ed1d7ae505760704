package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"sidegate/appliance/policy"
)

// Assignment is a flow that the programs have handed to the proxy.
type Assignment struct {
	Outbound string           // what the policy says so far
	Mark     uint32           // of its packets, if they are direct
	Own      bool             // the client is this box: its packets come by the loopback device, and cannot be forwarded
	Sniff    bool             // it may say something else once the flow's name is known
	Names    []string         // that the client itself asked for, without aliases, and has this address for
	Facts    policy.Flow      // without names
	verdict  gatewayVerdict   // of the table
	entry    gatewayFlow      // as it was read
	key      gatewayFlowKey   // of the entry
	client   gatewayClientKey // who
}

// loopbackIndex is the interface index of lo, in every network namespace (LOOPBACK_IFINDEX).
const loopbackIndex = 1

// Assigned tells the proxy what the programs decided on a flow that they handed to it. A flow that they did not hand
// over is not ok, whoever sent it found the listener by himself; except one that has just been settled as direct, of
// which datagrams may still be under way.
func (d *Datapath) Assigned(network policy.Network, client, destination netip.AddrPort) (a Assignment, ok bool) {
	a.key = gatewayFlowKey{
		Source:          addressOf(client.Addr()),
		Destination:     addressOf(destination.Addr()),
		SourcePort:      bigEndian(client.Port()),
		DestinationPort: bigEndian(destination.Port()),
		Protocol:        uint8(network),
	}
	if a.entry, ok = d.state.flow(a.key); !ok {
		return a, false
	}
	a.verdict = gatewayVerdict(a.entry.Verdict)
	switch a.verdict {
	case gatewayVerdictVERDICT_PROXY, gatewayVerdictVERDICT_SNIFF:
	case gatewayVerdictVERDICT_DIRECT:
		if network == policy.TCP {
			return a, false
		}
	default:
		return a, false
	}
	if a.Outbound, ok = (*d.outbounds.Load())[a.entry.Outbound]; !ok {
		return a, false
	}
	a.Sniff, a.Mark = a.verdict == gatewayVerdictVERDICT_SNIFF, a.entry.Mark
	a.Own = a.entry.Interface == loopbackIndex
	a.client = clientOf(a.key, a.entry)
	a.Facts = policy.Flow{
		Network: network, Source: client, Destination: destination,
		DSCP: a.entry.Dscp, SourceMAC: a.entry.ClientMac,
	}
	a.Names = d.learning.asked(gatewayNameKey{Client: a.client, Address: a.key.Destination})
	return a, true
}

func (s *state) flow(key gatewayFlowKey) (flow gatewayFlow, ok bool) {
	for _, table := range s.flowTables() {
		if table.Lookup(key, &flow) == nil {
			return flow, true
		}
	}
	return flow, false
}

// asked are the names that a client has asked for, and got this address.
func (l *learning) asked(key gatewayNameKey) (names []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.book.page(key); p != nil {
		for _, lesson := range p.lessons {
			if lesson.source == FromDNS {
				names = append(names, lesson.names[0])
			}
		}
	}
	return names
}

// aliases are those that the client was told of a name.
func (l *learning) aliases(key gatewayNameKey, name string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.book.page(key); p != nil {
		for _, lesson := range p.lessons {
			if lesson.source == FromDNS && lesson.names[0] == name {
				return lesson.names[1:]
			}
		}
	}
	return nil
}

// Decide asks the policy again about a flow whose name the first bytes told, and puts the answer into the flow's
// entry. An empty name means that they told none: then what was decided without stands. The name is learned, so that,
// where such names are trusted, the client's next flow to where this one went direct is the kernel's from its first
// packet.
func (d *Datapath) Decide(a Assignment, name string) (outbound string, mark uint32, err error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return "", 0, fmt.Errorf("deciding a flow again: no policy is in force")
	}
	s := gatewaySettlement{
		Key: a.key, Mark: a.entry.Mark, Outbound: a.entry.Outbound, Generation: a.entry.Generation,
		Rule: a.entry.Rule, Reject: a.entry.Reject,
	}
	outbound = a.Outbound
	if name != "" {
		outbound = d.again(a, name, &s)
		key := gatewayNameKey{Client: a.client, Address: a.key.Destination}
		if err := d.learning.sniffed(key, name, outbound == policy.OutboundDirect); err != nil {
			return "", 0, fmt.Errorf("learning the name %s of a flow: %w", name, err)
		}
	}
	s.Verdict = uint8(settledVerdict(a.Facts.Network, outbound))
	return outbound, s.Mark, d.generation.settle(s)
}

// settledVerdict: a TCP connection that has been accepted stays with the proxy, wherever it goes. A UDP flow that is
// direct is the kernel's.
func settledVerdict(network policy.Network, outbound string) gatewayVerdict {
	switch {
	case outbound == policy.OutboundBlock:
		return gatewayVerdictVERDICT_BLOCK
	case outbound == policy.OutboundDirect && network == policy.UDP:
		return gatewayVerdictVERDICT_DIRECT
	}
	return gatewayVerdictVERDICT_PROXY
}

// again asks the policy in force, with the name.
func (d *Datapath) again(a Assignment, name string, s *gatewaySettlement) string {
	g := d.generation
	f := a.Facts
	f.Names = []string{name}
	if aliases := d.learning.aliases(gatewayNameKey{Client: a.client, Address: a.key.Destination}, name); aliases != nil {
		f.Aliases = map[string][]string{name: aliases}
	}
	f.Interface = g.interfaceAt(a.entry.Interface)
	decided := g.tables.Match(f)
	action, mark := g.tables.Default, g.mark(len(g.tables.Rules))
	s.Rule = ruleDefault
	if decided.Rule >= 0 {
		action = g.tables.Rules[decided.Rule]
		s.Rule, mark = uint16(decided.Rule), g.mark(decided.Rule)
	}
	s.Mark, s.Reject = mark|action.Mark, boolByte(action.Reject)
	s.Outbound, s.Generation = action.OutboundID, g.number
	return decided.Outbound
}

// settle runs the program of that name: it changes the entry where it lies, while packets count in it. An entry that
// is gone, or was settled before, is left.
func (g *generation) settle(s gatewaySettlement) error {
	var in bytes.Buffer
	if err := binary.Write(&in, binary.NativeEndian, s); err != nil {
		return fmt.Errorf("writing a flow's settlement: %w", err)
	}
	if _, _, err := g.objects.Settle.Test(in.Bytes()); err != nil {
		return fmt.Errorf("settling a flow: %w", err)
	}
	return nil
}

// interfaceAt is the name of a LAN interface; empty if no rule can name it.
func (g *generation) interfaceAt(index uint32) string {
	for name, i := range g.interfaces {
		if i == index {
			return name
		}
	}
	return ""
}

// isProxied reports whether the flow's packets go to the proxy.
func isProxied(v gatewayFlow) bool {
	verdict := gatewayVerdict(v.Verdict)
	return verdict == gatewayVerdictVERDICT_PROXY || verdict == gatewayVerdictVERDICT_SNIFF
}
