package datapath

import (
	"errors"
	"fmt"
	"maps"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// markTable is the one nftables table that is ours, inet sidegate: it has what the kernel does to direct packets by their mark.
//
// It is there only while it is needed, for NAT makes the kernel track every connection of the box. Once it translates it does
// so until Close, whatever is wanted afterwards: a live flow keeps the return path that it began with, as long as its endpoints
// keep it, and a translated packet that left as it is would reset its connection. The table has no owner, so it outlives a
// crash of the daemon as the programs do, and who comes after finds it.
type markTable struct {
	dial    []nftables.ConnOption // how to reach the kernel; none: in this thread's network namespace
	applied bool                  // by this process; what a predecessor left may be of another version
	wanted  map[string]string     // what apply last made of it, as read returns it
}

const (
	ownTable       = "sidegate"
	translateChain = "translate"
	takenChain     = "taken"
	repliesChain   = "replies"
	untrackedChain = "untracked"
)

// translating are the chains that a flow needs whose replies are to come back through here.
var translating = []string{translateChain, takenChain, repliesChain}

// ownChain is a chain of the table, with its only rule.
type ownChain struct {
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	mark     gatewayMark // whose packets
	then     []expr.Any
	comment  string
}

var ownChains = map[string]ownChain{
	translateChain: {
		nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, gatewayMarkMARK_TRANSLATED,
		[]expr.Any{&expr.Masq{}},
		"direct flows whose replies are to come back through here",
	},
	// UDP that the proxy carries may become direct: when its first bytes tell a name, or when the proxy dies. Tracked before, it
	// would have an entry without a translation, which holds for the flow's life.
	takenChain: {
		nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, gatewayMarkMARK_PROXY,
		append(isUDP(), &expr.Notrack{}),
		"proxied UDP, which may go direct later",
	},
	repliesChain: {
		nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityRaw, gatewayMarkMARK_OWN,
		append(isUDP(),
			&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagSADDR: true}, // the address that the client meant
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
			&expr.Notrack{}),
		"and its replies",
	},
	// Only where the packet leaves by the interface that it came by do the replies go past the box. Beyond another
	// interface the box may be the router, with NAT of its own, which sees both halves and needs to.
	untrackedChain: {
		nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, gatewayMarkMARK_DIRECT,
		[]expr.Any{
			&expr.Fib{Register: 1, ResultOIF: true, FlagDADDR: true, FlagMARK: true, FlagIIF: true, FlagPRESENT: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(1)},
			&expr.Notrack{},
		},
		"direct flows of which the box sees one half",
	},
}

func isUDP() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
	}
}

// rule is the chain's: the packets of its mark, then what is done to them.
func (c ownChain) rule() []expr.Any {
	number := binaryutil.NativeEndian.PutUint32
	return append([]expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: number(uint32(gatewayMarkMARK_MASK)), Xor: number(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: number(uint32(c.mark))},
	}, c.then...)
}

// translates reports whether any new flow is to be masqueraded.
func (want *Desired) translates() bool {
	for i := range want.Policy.Rules {
		if want.Policy.Rules[i].Outbound == policy.OutboundDirect && want.Policy.Translated(i, false) {
			return true
		}
	}
	return want.ReturnPath == Symmetric
}

// apply makes the table what want needs, in one transaction, and says whether it had to put it back.
func (m *markTable) apply(want Desired) (restored []string, err error) {
	if m.applied && len(m.wanted) == 0 && !want.translates() && !want.Untracked {
		return nil, nil
	}
	c, err := nftables.New(m.dial...)
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	have, err := read(c)
	if err != nil && (want.translates() || want.Untracked) {
		return nil, needsNAT(err)
	}
	wanted := map[string]string{}
	_, before := m.wanted[translateChain]
	_, inherited := have[translateChain]
	if want.translates() || before || inherited && !m.applied {
		for _, name := range translating {
			wanted[name] = ownChains[name].comment
		}
	}
	if want.Untracked {
		wanted[untrackedChain] = ownChains[untrackedChain].comment
	}
	if m.applied && maps.Equal(have, wanted) || have == nil && len(wanted) == 0 {
		m.applied, m.wanted = true, wanted
		return nil, nil
	}
	if err := write(c, wanted); err != nil {
		return nil, needsNAT(err)
	}
	if m.applied && maps.Equal(m.wanted, wanted) {
		restored = []string{"the nftables table " + ownTable}
	}
	m.applied, m.wanted = true, wanted
	return restored, nil
}

// remove takes the table away. Connections that are translated end with it.
func (m *markTable) remove() error {
	c, err := nftables.New(m.dial...)
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	if have, err := read(c); err != nil || have == nil {
		return nil // a kernel without nftables has no table of ours
	}
	return write(c, nil)
}

// read returns the comment of each chain's rule, or nil if there is no table. A chain that is not as we make them has another.
func read(c *nftables.Conn) (map[string]string, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("reading the nftables tables: %w", err)
	}
	var table *nftables.Table
	for _, t := range tables {
		if t.Name == ownTable {
			table = t
		}
	}
	if table == nil {
		return nil, nil
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("reading the chains of the nftables table %s: %w", ownTable, err)
	}
	have := map[string]string{}
	for _, chain := range chains {
		if chain.Table.Name != ownTable {
			continue
		}
		rules, err := c.GetRules(table, chain)
		if errors.Is(err, unix.ENOENT) {
			return map[string]string{}, nil // somebody is just removing it
		}
		if err != nil {
			return nil, fmt.Errorf("reading the chain %s of the nftables table %s: %w", chain.Name, ownTable, err)
		}
		have[chain.Name] = fmt.Sprintf("%d rules", len(rules))
		if want := ownChains[chain.Name]; len(rules) == 1 && chain.Type == want.kind && chain.Hooknum != nil && *chain.Hooknum == *want.hook {
			have[chain.Name], _ = userdata.GetString(rules[0].UserData, userdata.TypeComment)
		}
	}
	return have, nil
}

// write replaces the table, in one transaction: no packet meets half of it, and the connections that are translated go on.
func write(c *nftables.Conn, wanted map[string]string) error {
	table := c.AddTable(&nftables.Table{Name: ownTable, Family: nftables.TableFamilyINet})
	c.DelTable(table)
	if len(wanted) > 0 {
		c.AddTable(table)
	}
	for _, name := range sortedKeys(wanted) {
		own := ownChains[name]
		chain := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: own.kind, Hooknum: own.hook, Priority: own.priority})
		c.AddRule(&nftables.Rule{
			Table: table, Chain: chain, Exprs: own.rule(),
			UserData: userdata.AppendString(nil, userdata.TypeComment, own.comment),
		})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("writing the nftables table %s: %w", ownTable, err)
	}
	return nil
}

// needsNAT says what a kernel lacks that knows no such table, chain or expression.
func needsNAT(err error) error {
	for _, lacking := range []error{unix.ENOENT, unix.EOPNOTSUPP, unix.EINVAL, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT} {
		if errors.Is(err, lacking) {
			return fmt.Errorf("%w: this kernel lacks nftables NAT (CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_MASQ, CONFIG_NFT_FIB_INET); "+
				"use return_path: asymmetric, and snat: true in no rule", err)
		}
	}
	return err
}
