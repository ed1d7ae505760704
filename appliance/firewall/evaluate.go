package firewall

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// truth is what is known of a condition.
type truth uint8

const (
	no truth = iota
	yes
	maybe
)

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

func (t truth) not() truth {
	switch t {
	case yes:
		return no
	case no:
		return yes
	}
	return maybe
}

// value is a register's content; nil where it is not known.
type value []byte

// evaluation is one rule applied to one packet.
type evaluation struct {
	*walk
	chain     *chain
	rule      *nftables.Rule
	registers map[uint32]value // by 4-byte offset
	numbers   map[uint32]bool  // registers that hold a number in the machine's byte order
	holds     truth
	choices   []*expr.Verdict // of a map of verdicts, if nobody knows which it is
}

// run evaluates the rule's conditions and returns the verdict that it comes to; nil: none, so that the next rule follows.
func (e *evaluation) run() (*expr.Verdict, truth) {
	e.registers, e.numbers, e.holds = map[uint32]value{}, map[uint32]bool{}, yes
	for _, x := range e.rule.Exprs {
		v, holds := e.apply(x)
		switch {
		case holds == no:
			return nil, no
		case holds == maybe:
			e.holds = maybe
		}
		if v != nil {
			return v, e.holds
		}
	}
	return nil, e.holds
}

// slot is the place of a register: those of 16 bytes and those of 4 share it (NFT_REG_1 is NFT_REG32_00 to NFT_REG32_03).
func slot(register uint32) uint32 {
	if register >= unix.NFT_REG32_00 {
		return register - unix.NFT_REG32_00 + 4
	}
	return register * 4
}

func (e *evaluation) store(register uint32, v value, number bool) {
	at := slot(register)
	e.numbers[at] = number
	if v == nil {
		delete(e.registers, at)
		return
	}
	for i := 0; i*4 < len(v); i++ {
		e.registers[at+uint32(i)] = slices.Clone(v[i*4 : min(i*4+4, len(v))])
	}
}

// load returns n bytes; nil if they are not all known.
func (e *evaluation) load(register uint32, n int) value {
	var v value
	for at := slot(register); len(v) < n; at++ {
		part, ok := e.registers[at]
		if !ok {
			return nil
		}
		if len(v)+len(part) < n && len(part) < 4 {
			part = append(slices.Clone(part), make([]byte, 4-len(part))...)
		}
		v = append(v, part...)
	}
	return v[:n]
}

func (e *evaluation) apply(x expr.Any) (*expr.Verdict, truth) {
	switch x := x.(type) {
	case *expr.Meta:
		if x.SourceRegister {
			e.setMeta(x)
			return nil, yes
		}
		v, number := e.meta(x.Key)
		e.store(x.Register, v, number)
	case *expr.Payload:
		if x.OperationType == expr.PayloadLoad {
			e.store(x.DestRegister, e.payload(x), false)
		}
	case *expr.Ct:
		if !x.SourceRegister {
			e.store(x.Register, e.conntrack(x.Key), true)
		}
	case *expr.Fib:
		e.store(x.Register, e.fib(x), true)
	case *expr.Bitwise:
		v := e.load(x.SourceRegister, int(x.Len))
		if len(x.Mask) == len(v) && len(x.Xor) == len(v) {
			for i := range v {
				v[i] = v[i]&x.Mask[i] ^ x.Xor[i]
			}
		} else {
			v = nil
		}
		e.store(x.DestRegister, v, e.numbers[slot(x.SourceRegister)])
	case *expr.Cmp:
		return nil, e.compare(x.Register, x.Op, x.Data)
	case *expr.Range:
		in := e.compare(x.Register, expr.CmpOpGte, x.FromData)
		if in == yes {
			in = e.compare(x.Register, expr.CmpOpLte, x.ToData)
		}
		if x.Op == expr.CmpOpNeq {
			in = in.not()
		}
		return nil, in
	case *expr.Lookup:
		return e.lookup(x)
	case *expr.Immediate:
		e.store(x.Register, x.Data, true)
	case *expr.Verdict:
		return x, yes
	case *expr.Reject:
		return &expr.Verdict{Kind: expr.VerdictDrop}, yes
	case *expr.Masq:
		return e.translate()
	case *expr.NAT:
		if x.Type == expr.NATTypeSourceNAT {
			return e.translate()
		}
		return &expr.Verdict{Kind: expr.VerdictAccept}, yes
	case *expr.Redir:
		return &expr.Verdict{Kind: expr.VerdictAccept}, yes
	case *expr.Queue:
		return &expr.Verdict{Kind: expr.VerdictQueue}, yes
	case *expr.Notrack:
		e.notrack()
	case *expr.Match:
		return nil, e.match(x)
	case *expr.Target:
		return e.target(x)
	case *expr.Counter, *expr.Log, *expr.Objref, *expr.FlowOffload, *expr.SecMark:
	default: // limits, quotas, sets that change, random numbers, and what we do not know; any may have written a register
		clear(e.registers)
		return nil, maybe
	}
	return nil, yes
}

func (e *evaluation) maybe() int { return e.walk.maybe }

// notrack exempts the packet, unless it has its connection already (net/netfilter/nft_ct.c, nft_notrack_eval).
func (e *evaluation) notrack() {
	switch {
	case e.tracked && e.packet.State != Invalid:
	case e.holds == yes && e.maybe() == 0:
		e.untracked = true
	default: // it is not known what connection tracking says of it
		e.packet.State = 0
	}
}

func (e *evaluation) translate() (*expr.Verdict, truth) {
	if e.hook == *nftables.ChainHookPostrouting {
		place := e.placeOf(e.chain, e.rule)
		e.nat, e.natDoubt = &place, e.holds != yes || e.maybe() > 0 || e.doubt
	}
	return &expr.Verdict{Kind: expr.VerdictAccept}, yes
}

func (e *evaluation) setMeta(x *expr.Meta) {
	if x.Key != expr.MetaKeyMARK {
		return
	}
	v := e.load(x.Register, 4)
	if v == nil || e.holds != yes || e.maybe() > 0 {
		e.markKnown = false
		return
	}
	e.packet.Mark = binary.NativeEndian.Uint32(v)
}

// meta returns a fact about the packet, and whether it is a number.
func (e *evaluation) meta(key expr.MetaKey) (v value, number bool) {
	p := &e.packet
	ipv6 := p.Destination.Addr().Is6()
	switch key {
	case expr.MetaKeyPROTOCOL:
		if ipv6 {
			return binary.BigEndian.AppendUint16(nil, unix.ETH_P_IPV6), false
		}
		return binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP), false
	case expr.MetaKeyNFPROTO:
		if ipv6 {
			return value{unix.NFPROTO_IPV6}, false
		}
		return value{unix.NFPROTO_IPV4}, false
	case expr.MetaKeyL4PROTO:
		return value{p.Protocol}, false
	case expr.MetaKeyMARK:
		if e.markKnown {
			return native(p.Mark), true
		}
	case expr.MetaKeyPKTTYPE:
		return value{unix.PACKET_HOST}, false
	case expr.MetaKeyIIF:
		return native(uint32(p.In.Index)), true
	case expr.MetaKeyOIF:
		if e.routed() {
			return native(uint32(p.Out.Index)), true
		}
	case expr.MetaKeyIIFNAME:
		return ifname(p.In.Name), false
	case expr.MetaKeyOIFNAME:
		if e.routed() {
			return ifname(p.Out.Name), false
		}
	}
	return nil, false
}

// routed: in prerouting nobody knows yet where it leaves.
func (e *evaluation) routed() bool { return e.hook != *nftables.ChainHookPrerouting }

func ifname(name string) value { return append([]byte(name), make([]byte, unix.IFNAMSIZ-len(name))...) }

// payload returns bytes of the packet's headers, as far as they are described.
func (e *evaluation) payload(x *expr.Payload) value {
	var header map[int]value
	src, dst := e.packet.Source, e.packet.Destination
	switch x.Base {
	case expr.PayloadBaseNetworkHeader:
		if dst.Addr().Is4() {
			header = map[int]value{9: {e.packet.Protocol}, 12: src.Addr().AsSlice(), 16: dst.Addr().AsSlice()}
		} else {
			header = map[int]value{6: {e.packet.Protocol}, 8: src.Addr().AsSlice(), 24: dst.Addr().AsSlice()}
		}
	case expr.PayloadBaseTransportHeader:
		header = map[int]value{}
		for at, port := range map[int]uint16{0: src.Port(), 2: dst.Port()} {
			if port != 0 {
				header[at] = binary.BigEndian.AppendUint16(nil, port)
			}
		}
		if e.packet.Protocol == unix.IPPROTO_TCP && e.packet.State == New {
			header[13] = value{2} // SYN
		}
	}
	for at, v := range header { // a prefix shorter than an address loads as many bytes
		if n := int(x.Offset) - at; n >= 0 && n+int(x.Len) <= len(v) {
			return slices.Clone(v[n : n+int(x.Len)])
		}
	}
	return nil
}

func (e *evaluation) conntrack(key expr.CtKey) value {
	switch {
	case key == expr.CtKeySTATUS && e.state() != Established: // nobody has translated it, nor answered
		return native(0)
	case key != expr.CtKeySTATE || !e.tracked:
		return nil
	}
	bits := map[State]uint32{
		New: expr.CtStateBitNEW, Established: expr.CtStateBitESTABLISHED,
		Invalid: expr.CtStateBitINVALID, Untracked: expr.CtStateBitUNTRACKED,
	}
	if bit := bits[e.state()]; bit != 0 {
		return native(bit)
	}
	return nil
}

func (w *walk) state() State {
	if w.untracked {
		return Untracked
	}
	return w.packet.State
}

// fib is what the kernel's routes say of the packet's addresses: RTN_UNICAST for what is forwarded, and the interface that it came by
// as the way back to its source.
func (e *evaluation) fib(x *expr.Fib) value {
	switch {
	case x.ResultADDRTYPE && x.FlagDADDR:
		return native(e.destinationType())
	case (x.ResultOIF || x.ResultOIFNAME) && x.FlagSADDR && e.packet.In.Index != 0:
		found := !(x.FlagMARK && e.packet.Steered)
		if e.packet.In == Loopback {
			var known bool
			if found, known = e.foundOnLoopback(); !known {
				return nil
			}
		}
		switch {
		case x.FlagPRESENT:
			return native(uint32(boolNumber(found)))
		case !found:
			return make(value, 4)
		case x.ResultOIFNAME:
			return ifname(e.packet.In.Name)
		}
		return native(uint32(e.packet.In.Index))
	case x.ResultOIF && x.FlagDADDR && x.FlagPRESENT && e.packet.Out.Index != 0:
		// with iif: whether it leaves by the interface that it came by
		return native(uint32(boolNumber(!x.FlagIIF || e.packet.In == e.packet.Out)))
	}
	return nil
}

func boolNumber(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (e *evaluation) compare(register uint32, op expr.CmpOp, data []byte) truth {
	v := e.load(register, len(data))
	if v == nil {
		return maybe
	}
	// A number is put into network order before it is compared for its size, by an expression that the library does not read.
	if e.numbers[slot(register)] && op != expr.CmpOpEq && op != expr.CmpOpNeq {
		return maybe
	}
	c := bytes.Compare(v, data)
	switch op {
	case expr.CmpOpEq:
		return truthOf(c == 0)
	case expr.CmpOpNeq:
		return truthOf(c != 0)
	case expr.CmpOpLt:
		return truthOf(c < 0)
	case expr.CmpOpLte:
		return truthOf(c <= 0)
	case expr.CmpOpGt:
		return truthOf(c > 0)
	case expr.CmpOpGte:
		return truthOf(c >= 0)
	}
	return maybe
}

func (e *evaluation) lookup(x *expr.Lookup) (*expr.Verdict, truth) {
	s := e.sets[setKey{e.chain.family, e.chain.table, x.SetName, e.chain.legacy}]
	if s == nil {
		return nil, maybe
	}
	found, holds := e.find(s, x.SourceRegister)
	if x.Invert {
		holds = holds.not()
	}
	toVerdict := s.IsMap && x.DestRegister == unix.NFT_REG_VERDICT
	switch {
	case holds == maybe && toVerdict:
		for _, el := range s.elements {
			e.choices = append(e.choices, verdictOf(el.Val))
		}
	case holds == maybe:
		clear(e.registers)
	case holds == no || !s.IsMap:
	case toVerdict:
		return verdictOf(found.Val), yes
	default:
		e.store(x.DestRegister, found.Val, true)
	}
	return nil, holds
}

// find looks the register's content up in a set.
func (e *evaluation) find(s *set, register uint32) (nftables.SetElement, truth) {
	none := nftables.SetElement{}
	anyKey := func(el nftables.SetElement) bool { return len(el.Key) == 0 } // "*": for what is not in it
	switch {
	case s.Concatenation && s.Interval, s.Dynamic, slices.ContainsFunc(s.elements, anyKey):
		return none, maybe
	case len(s.elements) == 0:
		return none, no
	}
	key := e.load(register, len(s.elements[0].Key)) // the library mistakes the key's type of a verdict map
	if key == nil {
		return none, maybe
	}
	found, ok := s.find(key)
	return found, truthOf(ok)
}

// verdictOf reads an element of a verdict map, which the library leaves as the kernel gives it (NFTA_DATA_VERDICT).
func verdictOf(data value) *expr.Verdict {
	attributes, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return &expr.Verdict{Kind: expr.VerdictQueue} // as good as unknown
	}
	attributes.ByteOrder = binary.BigEndian
	v := &expr.Verdict{Kind: expr.VerdictQueue}
	for attributes.Next() {
		switch attributes.Type() {
		case unix.NFTA_VERDICT_CODE:
			v.Kind = expr.VerdictKind(int32(attributes.Uint32()))
		case unix.NFTA_VERDICT_CHAIN:
			v.Chain = attributes.String()
		}
	}
	return v
}

// find returns the element that the key is, or lies in: intervals are their beginnings and, marked, what comes behind their ends.
func (s *set) find(key value) (nftables.SetElement, bool) {
	var best nftables.SetElement
	found := false
	for _, el := range s.elements {
		switch {
		case !s.Interval:
			if bytes.Equal(el.Key, key) {
				return el, true
			}
		case bytes.Compare(el.Key, key) <= 0 && (!found || bytes.Compare(el.Key, best.Key) > 0 || bytes.Equal(el.Key, best.Key) && best.IntervalEnd):
			best, found = el, true
		}
	}
	return best, found && !best.IntervalEnd
}
