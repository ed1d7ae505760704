package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"sidegate/appliance/policy"
)

// generation is one policy in the kernel: its programs, and the maps that only they use.
type generation struct {
	number  uint32
	desired Desired
	tables  *policy.Tables
	objects gatewayObjects
	clock   clock

	usesNames  bool // some rule does
	names      *nameClasses
	interfaces map[string]uint32 // name → index, as the interfaces map has them
}

// LAN interfaces, beyond those that rules name.
const maxInterfaces = 256

// newGeneration compiles the policy, loads programs with it, fills their maps and tests the whole. Nothing
// of it is attached.
func newGeneration(number uint32, want Desired, shared *gatewayMaps) (*generation, error) {
	tables, err := policy.Compile(want.Policy)
	if err == nil {
		err = hashesDiffer(want.Policy)
	}
	if err != nil {
		return nil, err
	}
	g := &generation{
		number:  number,
		desired: want,
		tables:  tables,

		usesNames: lookAtNames(tables),
	}
	if err := g.load(shared); err != nil {
		return nil, err
	}
	g.names = newNameClasses(&tables.Name, g.objects.NameBits, g.objects.CertainBits)
	if err := errors.Join(g.fill(), g.setInterfaces(want.Interfaces)); err != nil {
		g.Close()
		return nil, err
	}
	if err := errors.Join(g.setClock(), g.selfTest()); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

func (g *generation) setClock() error {
	up, err := uptime()
	if err != nil {
		return err
	}
	now, err := g.now()
	g.clock = clockAt(now, up)
	return err
}

func (g *generation) load(shared *gatewayMaps) error {
	spec, err := loadGateway()
	if err != nil {
		return err
	}
	if err := errors.Join(g.setConstants(spec), g.setSizes(spec)); err != nil {
		return err
	}
	// A pinned map is replaced by the one we hold: the pin itself is the state's business.
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	err = spec.LoadAndAssign(&g.objects, &ebpf.CollectionOptions{MapReplacements: shared.shared()})
	var verifier *ebpf.VerifierError
	if errors.As(err, &verifier) {
		return fmt.Errorf("the kernel's verifier refuses the programs: %w", verifier)
	}
	return err
}

func (g *generation) setConstants(spec *ebpf.CollectionSpec) error {
	var s gatewaySpecs
	if err := spec.Assign(&s); err != nil {
		return err
	}
	netns, err := netnsCookie()
	if err != nil {
		return err
	}
	onFailure := gatewayFailurePolicyON_FAILURE_BLOCK
	if g.desired.OnFailure == policy.Direct {
		onFailure = gatewayFailurePolicyON_FAILURE_DIRECT
	}
	t := g.tables
	return errors.Join(
		s.Generation.Set(g.number),
		s.OnFailure.Set(uint8(onFailure)),
		s.ClientFlows.Set(g.desired.ClientFlows),
		s.ClientFresh.Set(g.desired.ClientFresh),
		s.ClientQuestions.Set(g.desired.ClientAsks),
		s.DirectMark.Set(g.mark(len(t.Rules))),
		s.InterceptDns.Set(boolByte(g.desired.interceptsDNS())),
		s.OwnNetns.Set(netns),
		s.OwnDns.Set(boolByte(g.desired.answersOwn())),
		s.Sniff.Set(uint8(g.sniffMode())),
		s.UsesName.Set(boolByte(g.usesNames)),
		s.RuleWords.Set(uint32(t.Words)),
		s.HeaderClass.Set(t.Header.Class),
		s.UsesDestination.Set(uses(t.Destination.Bits)),
		s.UsesSource.Set(uses(t.Source.Bits)),
		s.UsesDestinationPort.Set(uses(t.DestinationPort.Bits)),
		s.UsesSourcePort.Set(uses(t.SourcePort.Bits)),
		s.UsesMac.Set(uses(t.MAC.Bits)),
		s.UsesInterface.Set(uses(t.Interface.Bits)),
		s.UsesProcessName.Set(uses(t.ProcessName.Bits)),
		s.UsesProcessPath.Set(uses(t.ProcessPath.Bits)),
		s.UsesProcessUnit.Set(uses(t.ProcessUnit.Bits)),
	)
}

func (g *generation) sniffMode() gatewaySniffMode {
	switch g.desired.Sniff {
	case SniffAmbiguous:
		return gatewaySniffModeSNIFF_AMBIGUOUS
	case SniffUnknown:
		return gatewaySniffModeSNIFF_UNKNOWN
	}
	return gatewaySniffModeSNIFF_OFF
}

// uses reports whether the dimension tells any flows apart: then some class differs from another.
func uses(rows []policy.Bits) uint8 {
	for _, row := range rows[1:] {
		if row != rows[0] {
			return 1
		}
	}
	return 0
}

func (g *generation) setSizes(spec *ebpf.CollectionSpec) error {
	t := g.tables
	count4 := func(p []policy.PrefixClass) int {
		return len(slices.Collect(ofFamily(p, true)))
	}
	for name, n := range map[string]int{
		gatewayMapDestination4:        count4(t.Destination.Prefixes),
		gatewayMapDestination6:        len(t.Destination.Prefixes) - count4(t.Destination.Prefixes),
		gatewayMapSource4:             count4(t.Source.Prefixes),
		gatewayMapSource6:             len(t.Source.Prefixes) - count4(t.Source.Prefixes),
		gatewayMapMacs:                len(t.MAC.Class),
		gatewayMapInterfaces:          len(t.Interface.Class) + maxInterfaces,
		gatewayMapDestinationBits:     len(t.Destination.Bits),
		gatewayMapSourceBits:          len(t.Source.Bits),
		gatewayMapDestinationPortBits: len(t.DestinationPort.Bits),
		gatewayMapSourcePortBits:      len(t.SourcePort.Bits),
		gatewayMapHeaderBits:          len(t.Header.Bits),
		gatewayMapMacBits:             len(t.MAC.Bits),
		gatewayMapInterfaceBits:       len(t.Interface.Bits),
		gatewayMapProcessNames:        len(t.ProcessName.Class),
		gatewayMapProcessPaths:        len(t.ProcessPath.Class),
		gatewayMapProcessUnits:        len(t.ProcessUnit.Class),
		gatewayMapProcessNameBits:     len(t.ProcessName.Bits),
		gatewayMapProcessPathBits:     len(t.ProcessPath.Bits),
		gatewayMapProcessUnitBits:     len(t.ProcessUnit.Bits),
		gatewayMapNameBits:            g.nameRows(2 + maxNameClasses),
		gatewayMapCertainBits:         g.nameRows(2 + maxNameClasses),
		gatewayMapNames:               g.nameRows(2 * maxPages),
		gatewayMapAlike:               ruleDefault + 1,
	} {
		m, ok := spec.Maps[name]
		if !ok {
			return fmt.Errorf("the compiled programs have no map %q", name)
		}
		m.MaxEntries = uint32(max(n, 1))
	}
	return nil
}

// nameRows is the size of a table of names: small where no rule looks at them.
func (g *generation) nameRows(otherwise int) int {
	if !g.usesNames {
		return 2
	}
	return otherwise
}

// lookAtNames reports whether any rule looks at names: those rules do not permit an unknown one.
func lookAtNames(t *policy.Tables) bool {
	for i := range t.Rules {
		if t.Name.Unknown[i/64]&(1<<(i%64)) == 0 {
			return true
		}
	}
	return false
}

// fill writes the tables into the maps.
func (g *generation) fill() error {
	m, t := &g.objects.gatewayMaps, g.tables
	return errors.Join(
		fillPrefixes(m.Destination4, m.Destination6, t.Destination.Prefixes),
		fillPrefixes(m.Source4, m.Source6, t.Source.Prefixes),
		m.DestinationPorts.Put(uint32(0), gatewayPortClasses{Class: t.DestinationPort.Class}),
		m.SourcePorts.Put(uint32(0), gatewayPortClasses{Class: t.SourcePort.Class}),
		fillMACs(m.Macs, t.MAC.Class),
		fillBits(m.DestinationBits, t.Destination.Bits),
		fillBits(m.SourceBits, t.Source.Bits),
		fillBits(m.DestinationPortBits, t.DestinationPort.Bits),
		fillBits(m.SourcePortBits, t.SourcePort.Bits),
		fillBits(m.HeaderBits, t.Header.Bits),
		fillBits(m.MacBits, t.MAC.Bits),
		fillBits(m.InterfaceBits, t.Interface.Bits),
		fillBits(m.ProcessNameBits, t.ProcessName.Bits),
		fillBits(m.ProcessPathBits, t.ProcessPath.Bits),
		fillBits(m.ProcessUnitBits, t.ProcessUnit.Bits),
		fillProcesses(m.ProcessNames, policy.ProcessName, t.ProcessName.Class),
		fillProcesses(m.ProcessPaths, policy.ProcessPath, t.ProcessPath.Class),
		fillProcesses(m.ProcessUnits, policy.ProcessUnit, t.ProcessUnit.Class),
		fillBits(m.NameBits, []policy.Bits{t.Name.Unknown, t.Name.Other}),
		fillBits(m.CertainBits, []policy.Bits{t.Name.Unknown, t.Name.Other}),
		fillBits(m.Alike, g.alike()),
		g.fillActions(),
	)
}

func (g *generation) alike() []policy.Bits {
	rows := make([]policy.Bits, ruleDefault+1)
	for i := range g.tables.Rules {
		rows[i] = g.tables.Alike(i)
	}
	rows[ruleDefault] = g.tables.Alike(-1)
	return rows
}

// ofFamily yields the prefixes of one family as map keys.
func ofFamily(prefixes []policy.PrefixClass, v4 bool) func(func(policy.PrefixClass) bool) {
	return func(yield func(policy.PrefixClass) bool) {
		for _, p := range prefixes {
			if p.Prefix.Addr().Is4() == v4 && !yield(p) {
				return
			}
		}
	}
}

func fillPrefixes(map4, map6 *ebpf.Map, prefixes []policy.PrefixClass) error {
	err4 := fillBatches(map4, ofFamily(prefixes, true), func(p policy.PrefixClass) (gatewayPrefix4, uint32) {
		a := p.Prefix.Addr().As4()
		return gatewayPrefix4{Length: uint32(p.Prefix.Bits()), Address: binary.NativeEndian.Uint32(a[:])}, p.Class
	})
	err6 := fillBatches(map6, ofFamily(prefixes, false), func(p policy.PrefixClass) (gatewayPrefix6, uint32) {
		return gatewayPrefix6{Length: uint32(p.Prefix.Bits()), Address: addressOf(p.Prefix.Addr()).W}, p.Class
	})
	return errors.Join(err4, err6)
}

func fillMACs(m *ebpf.Map, classes map[policy.MAC]policy.Class) error {
	return fillBatches(m, maps.Keys(classes), func(mac policy.MAC) (uint64, uint32) {
		var key [8]byte
		copy(key[:], mac[:])
		return binary.NativeEndian.Uint64(key[:]), classes[mac]
	})
}

func fillBits(m *ebpf.Map, rows []policy.Bits) error {
	class := policy.Class(0)
	return fillBatches(m, slices.Values(rows), func(row policy.Bits) (policy.Class, gatewayBits) {
		class++
		return class - 1, gatewayBits{W: row}
	})
}

// fillBatches writes entries a few thousand at a system call, in buffers that do not grow with their number.
func fillBatches[E, K, V any](m *ebpf.Map, entries func(func(E) bool), entry func(E) (K, V)) error {
	const batch = 4096
	keys, values := make([]K, 0, batch), make([]V, 0, batch)
	flush := func() error {
		if len(keys) == 0 {
			return nil
		}
		_, err := m.BatchUpdate(keys, values, nil)
		keys, values = keys[:0], values[:0]
		if err != nil {
			return fmt.Errorf("filling the map %s: %w", m, err)
		}
		return nil
	}
	for e := range entries {
		k, v := entry(e)
		keys, values = append(keys, k), append(values, v)
		if len(keys) == batch {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// mark is what a direct flow of the rule is marked with, besides the rule's own mark; the default's comes after the last rule's.
func (g *generation) mark(rule int) uint32 {
	if rule == len(g.tables.Rules) {
		rule = -1
	}
	if g.desired.Policy.Translated(rule, g.desired.ReturnPath == Symmetric) {
		return uint32(gatewayMarkMARK_TRANSLATED)
	}
	return uint32(gatewayMarkMARK_DIRECT)
}

// isTranslated reports whether a direct packet of this mark is masqueraded.
func isTranslated(mark uint32) bool {
	return mark&uint32(gatewayMarkMARK_MASK) == uint32(gatewayMarkMARK_TRANSLATED)
}

func (g *generation) fillActions() error {
	actions := make([]policy.RuleAction, 0, len(g.tables.Rules)+1)
	actions = append(append(actions, g.tables.Rules...), g.tables.Default)
	for i, a := range actions {
		row := uint32(i)
		if i == len(g.tables.Rules) {
			row = ruleDefault
		}
		err := g.objects.Actions.Put(row, gatewayAction{
			Mark:     g.mark(i) | a.Mark,
			Outbound: a.OutboundID,
			Verdict:  uint8(a.Verdict),
			Reject:   boolByte(a.Reject),
		})
		if err != nil {
			return fmt.Errorf("writing the action of rule %d: %w", i, err)
		}
	}
	return nil
}

// ruleDefault is RULE_DEFAULT of bpf/types.h.
const ruleDefault = policy.MaxRules

func boolByte(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// setInterfaces tells the programs which class each interface is of, by its present index. Interfaces that
// rules name and that are not there now get an index that no packet has, so that they can be asked about.
func (g *generation) setInterfaces(interfaces []Interface) error {
	indexes := make(map[string]uint32, len(interfaces)+len(g.tables.Interface.Class))
	for name, class := range g.tables.Interface.Class {
		indexes[name] = absentInterface + class
	}
	for _, i := range interfaces {
		indexes[i.Name] = uint32(i.Index)
	}
	if _, named := indexes[loopback]; named {
		indexes[loopback] = loopbackIndex
	}
	if maps.Equal(indexes, g.interfaces) {
		return nil
	}
	classes := make(map[uint32]policy.Class, len(indexes))
	for name, index := range indexes {
		class, ok := g.tables.Interface.Class[name]
		if !ok {
			class = policy.ClassOther
		}
		classes[index] = class
	}
	if err := replace(g.objects.Interfaces, classes, "interfaces"); err != nil {
		return err
	}
	g.interfaces = indexes
	return nil
}

// Interface indexes are positive in int32 and handed out from 1: these never meet one.
const absentInterface = 1 << 30

// interfaceIndex is what a packet of the interface would carry.
func (g *generation) interfaceIndex(name string) uint32 {
	if index, ok := g.interfaces[name]; ok {
		return index
	}
	return absentInterface // class 0 is never handed out above
}

// flowsByRule counts the flows that each rule decided; the last entry is the default's.
func (g *generation) flowsByRule() ([]uint64, error) {
	counts := make([]uint64, len(g.tables.Rules)+1)
	for i := range counts {
		row := uint32(i)
		if i == len(g.tables.Rules) {
			row = ruleDefault
		}
		n, err := perCPUSum(g.objects.RuleFlows, row)
		if err != nil {
			return nil, fmt.Errorf("reading the flows of rule %d: %w", i, err)
		}
		counts[i] = n
	}
	return counts, nil
}

func perCPUSum(m *ebpf.Map, key uint32) (uint64, error) {
	var perCPU []uint64
	if err := m.Lookup(key, &perCPU); err != nil {
		return 0, err
	}
	var sum uint64
	for _, n := range perCPU {
		sum += n
	}
	return sum, nil
}

// Close releases the programs and maps; what is attached stays until its link lets go.
func (g *generation) Close() error {
	// The shared maps in objects are clones: closing them leaves the state's own.
	return g.objects.Close()
}
