package firewall

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// describe writes a rule roughly as nft(8) does, so that people recognize theirs. What it has no words for is an ellipsis.
func describe(r *Ruleset, c *chain, rule *nftables.Rule) string {
	var words []string
	loaded := map[uint32]string{}
	add := func(format string, args ...any) { words = append(words, fmt.Sprintf(format, args...)) }
	for _, x := range rule.Exprs {
		switch x := x.(type) {
		case *expr.Meta:
			loaded[slot(x.Register)] = metaNames[x.Key]
		case *expr.Ct:
			loaded[slot(x.Register)] = map[bool]string{true: "ct state", false: "ct …"}[x.Key == expr.CtKeySTATE]
		case *expr.Payload:
			loaded[slot(x.DestRegister)] = payloadName(x)
		case *expr.Fib:
			loaded[slot(x.Register)] = "fib"
		case *expr.Bitwise:
			if loaded[slot(x.SourceRegister)] == "ct state" {
				loaded[slot(x.DestRegister)] = "ct state " + states(binary.NativeEndian.Uint32(append(x.Mask, 0, 0, 0, 0)))
				continue
			}
			loaded[slot(x.DestRegister)] = loaded[slot(x.SourceRegister)]
		case *expr.Cmp:
			what := orEllipsis(loaded[slot(x.Register)])
			if strings.HasPrefix(what, "ct state ") { // a mask that must not come to zero
				add("%s", what)
				continue
			}
			add("%s %s%s", what, map[expr.CmpOp]string{expr.CmpOpNeq: "!= "}[x.Op], datum(what, x.Data))
		case *expr.Lookup:
			what := orEllipsis(loaded[slot(x.SourceRegister)])
			name := "{ … }"
			if s := r.sets[setKey{c.family, c.table, x.SetName, c.legacy}]; s != nil && !s.Anonymous {
				name = "@" + x.SetName
			}
			if s := r.sets[setKey{c.family, c.table, x.SetName, c.legacy}]; s != nil && s.IsMap {
				what += " vmap"
			}
			add("%s %s", what, name)
		case *expr.Match:
			add("%s", matchName(x))
		case *expr.Target:
			add("%s", x.Name)
		case *expr.Verdict:
			add("%s", strings.TrimSpace(verdictNames[x.Kind]+" "+x.Chain))
		case *expr.Reject:
			add("reject")
		case *expr.Masq:
			add("masquerade")
		case *expr.NAT:
			add("%s", map[bool]string{true: "snat", false: "dnat"}[x.Type == expr.NATTypeSourceNAT])
		case *expr.Limit:
			add("limit …")
		}
	}
	return strings.Join(words, " ")
}

var metaNames = map[expr.MetaKey]string{
	expr.MetaKeyIIF: "iif", expr.MetaKeyOIF: "oif", expr.MetaKeyIIFNAME: "iifname", expr.MetaKeyOIFNAME: "oifname",
	expr.MetaKeyMARK: "meta mark", expr.MetaKeyL4PROTO: "meta l4proto", expr.MetaKeyNFPROTO: "meta nfproto",
}

var verdictNames = map[expr.VerdictKind]string{
	expr.VerdictDrop: "drop", expr.VerdictAccept: "accept", expr.VerdictJump: "jump", expr.VerdictGoto: "goto", expr.VerdictReturn: "return",
}

func orEllipsis(s string) string {
	if s == "" {
		return "…"
	}
	return s
}

func states(bits uint32) string {
	var all []string
	for _, s := range []struct {
		bit  uint32
		name string
	}{
		{expr.CtStateBitINVALID, "invalid"},
		{expr.CtStateBitESTABLISHED, "established"},
		{expr.CtStateBitRELATED, "related"},
		{expr.CtStateBitNEW, "new"},
		{expr.CtStateBitUNTRACKED, "untracked"},
	} {
		if bits&s.bit != 0 {
			all = append(all, s.name)
		}
	}
	return strings.Join(all, ",")
}

func payloadName(x *expr.Payload) string {
	switch {
	case x.Base == expr.PayloadBaseTransportHeader && x.Offset == 0 && x.Len == 2:
		return "sport"
	case x.Base == expr.PayloadBaseTransportHeader && x.Offset == 2 && x.Len == 2:
		return "dport"
	case x.Base == expr.PayloadBaseNetworkHeader && (x.Offset == 12 && x.Len <= 4 || x.Offset == 8):
		return "saddr"
	case x.Base == expr.PayloadBaseNetworkHeader && (x.Offset == 16 && x.Len <= 4 || x.Offset == 24):
		return "daddr"
	}
	return ""
}

func datum(what string, data []byte) string {
	switch {
	case what == "fib":
		return map[bool]string{true: "exists", false: "missing"}[len(bytes.Trim(data, "\x00")) > 0]
	case what == "meta nfproto" && len(data) == 1:
		return map[byte]string{unix.NFPROTO_IPV4: "ipv4", unix.NFPROTO_IPV6: "ipv6"}[data[0]]
	case strings.HasSuffix(what, "addr") && len(data) < 4: // as much as the prefix has
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(append(bytes.Clone(data), 0, 0, 0, 0))), 8*len(data)).String()
	case strings.HasSuffix(what, "name"):
		return fmt.Sprintf("%q", bytes.TrimRight(data, "\x00"))
	case what == "meta l4proto" && len(data) == 1:
		for number, name := range map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmpv6"} {
			if data[0] == number {
				return name
			}
		}
	case len(data) == 2:
		return fmt.Sprint(binary.BigEndian.Uint16(data))
	case strings.HasSuffix(what, "addr"):
		if a, ok := netip.AddrFromSlice(data); ok {
			return a.String()
		}
	case len(data) == 4:
		return fmt.Sprintf("%#x", binary.NativeEndian.Uint32(data))
	}
	return "…"
}

func matchName(x *expr.Match) string {
	mask := uint16(0)
	switch info := x.Info.(type) {
	case *xt.ConntrackMtinfo1:
		mask = uint16(info.StateMask)
	case *xt.ConntrackMtinfo2:
		mask = info.StateMask
	case *xt.ConntrackMtinfo3:
		mask = info.StateMask
	default:
		return x.Name + " …"
	}
	var all []string
	for _, s := range []struct {
		bit  uint16
		name string
	}{{1, "invalid"}, {2, "established"}, {4, "related"}, {8, "new"}, {1 << 8, "untracked"}} {
		if mask&s.bit != 0 {
			all = append(all, s.name)
		}
	}
	return "ct state " + strings.Join(all, ",")
}

func familyOf(name string) nftables.TableFamily {
	for _, f := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		if familyName(f) == name {
			return f
		}
	}
	return nftables.TableFamilyINet
}
