package firewall

import (
	"encoding/binary"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// What iptables-nft writes into nftables are the matches and targets of the old iptables (Linux, include/uapi/linux/netfilter/xt_*.h).

// ctState is the bit of a state in xt_conntrack.
var ctState = map[State]uint16{Invalid: 1, Established: 2, New: 8, Untracked: 1 << 8}

// ctMatchState is the flag of xt_conntrack for the state; others are for what we do not describe.
const ctMatchState = 1

func (e *evaluation) match(x *expr.Match) truth {
	switch info := x.Info.(type) {
	case *xt.Comment:
		return yes
	case *xt.ConntrackMtinfo1:
		return e.ctMatch(info.ConntrackMtinfoBase, uint16(info.StateMask))
	case *xt.ConntrackMtinfo2:
		return e.ctMatch(info.ConntrackMtinfoBase, info.StateMask)
	case *xt.ConntrackMtinfo3:
		return e.ctMatch(info.ConntrackMtinfoBase, info.StateMask)
	case *xt.AddrTypeV1:
		if info.Source != 0 || info.Flags != 0 {
			return maybe
		}
		return truthOf(info.Dest&(1<<e.destinationType()) != 0)
	case *xt.Unknown:
		if b := []byte(*info); x.Name == "mark" && x.Rev == 1 && len(b) >= 9 {
			if !e.markKnown {
				return maybe
			}
			mark, mask := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:])
			return truthOf((e.packet.Mark&mask == mark) != (b[8] != 0))
		}
	}
	return maybe
}

func (e *evaluation) ctMatch(base xt.ConntrackMtinfoBase, states uint16) truth {
	bit := ctState[e.state()]
	if base.MatchFlags != ctMatchState || bit == 0 || !e.tracked {
		return maybe
	}
	return truthOf((states&bit != 0) != (base.InvertFlags&ctMatchState != 0))
}

func (e *evaluation) target(x *expr.Target) (*expr.Verdict, truth) {
	switch x.Name {
	case "REJECT":
		return &expr.Verdict{Kind: expr.VerdictDrop}, yes
	case "MASQUERADE", "SNAT", "NETMAP":
		return e.translate()
	case "DNAT", "REDIRECT", "TPROXY":
		return &expr.Verdict{Kind: expr.VerdictAccept}, yes
	case "NFQUEUE":
		return &expr.Verdict{Kind: expr.VerdictQueue}, yes
	case "CT":
		if info, ok := x.Info.(*xt.Unknown); ok && len(*info) >= 2 && binary.NativeEndian.Uint16(*info)&1 != 0 { // XT_CT_NOTRACK
			e.notrack()
		}
	case "MARK", "CONNMARK":
		e.markKnown = false
	}
	return nil, yes
}
