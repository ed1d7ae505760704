// Package firewall reads the packet filters of a network namespace and says what becomes of a packet that somebody describes, and by
// which rule: the answer to "who drops my traffic" without sending any.
//
// It walks the rules as the kernel would. A condition that it does not know, or that depends on what was not described, is neither
// true nor false: the walk goes on both ways, and the answer says that it is not certain.
package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// State is what connection tracking says of a packet. The zero value is one that nobody knows.
type State uint8

// The states (nf_conntrack; nft(8), "ct state").
const (
	New         State = iota + 1
	Established       // of a connection that was seen both ways
	Invalid           // of no connection, or contrary to what was seen of it
	Untracked         // exempted by notrack
)

// Packet describes one. What is not given is unknown, except the mark.
type Packet struct {
	Source, Destination netip.AddrPort // of one family
	Protocol            uint8          // unix.IPPROTO_TCP …
	In, Out             Interface      // none: it begins, or ends, in the box
	Mark                uint32
	State               State
	// Steered packets have a mark that an ip rule leads to a local route, wherever they go to: reverse path filters which look the
	// source up with the mark find no way back.
	Steered bool
}

// Interface is a network interface.
type Interface struct {
	Name  string
	Index int
}

// Verdict is what becomes of a packet.
type Verdict uint8

// The verdicts.
const (
	Accepted   Verdict = iota + 1
	Dropped            // also: rejected
	Translated         // accepted, with another source address
)

// Judgement is what becomes of a packet, and whose doing it is.
type Judgement struct {
	Verdict Verdict
	// Certain is false where a condition could not be judged: with Dropped, something before may accept it; with Accepted, Place is
	// what may drop it.
	Certain bool
	Place   Place // what drops or translates it
}

// Place is a rule, or a chain's policy.
type Place struct {
	Family nftables.TableFamily
	Table  string
	Chain  string
	Rule   string // as nft(8) would write it, roughly; empty: the chain's policy
	Legacy bool   // it stands in iptables-legacy, and nft(8) does not know it
	// Leaving tells that packets are met there on their way out: the interface that they leave by is known, and none that they came by.
	Leaving bool
}

func (p Place) String() string {
	rule := p.Rule
	if rule == "" {
		rule = "policy drop"
	}
	if p.Legacy {
		return fmt.Sprintf("%s %s %s: %s", p.tool(), p.Table, p.Chain, rule)
	}
	return fmt.Sprintf("%s %s %s: %s", familyName(p.Family), p.Table, p.Chain, rule)
}

// tool is the program that changes the old iptables.
func (p Place) tool() string {
	if p.Family == nftables.TableFamilyIPv6 {
		return "ip6tables-legacy"
	}
	return "iptables-legacy"
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	}
	return "inet"
}

// Ruleset is a snapshot of the filters. It does not change.
type Ruleset struct {
	chains map[chainKey]*chain
	bases  []*chain
	sets   map[setKey]*set
	// Unread says what there is besides and was not read; empty: nothing.
	Unread string

	fibAsksSockets bool // see fibAsksSockets
}

type chainKey struct {
	family nftables.TableFamily
	table  string
	name   string
	legacy bool
}

type setKey = chainKey

type chain struct {
	chainKey
	*nftables.Chain
	rules []*nftables.Rule
}

type set struct {
	*nftables.Set
	elements []nftables.SetElement
}

func newRuleset() *Ruleset { return &Ruleset{chains: map[chainKey]*chain{}, sets: map[setKey]*set{}} }

// Read takes a snapshot of the calling thread's network namespace. It needs CAP_NET_ADMIN.
func Read(ctx context.Context) (*Ruleset, error) {
	r := newRuleset()
	r.fibAsksSockets = fibAsksSockets()
	r.readLegacy(ctx)
	old := len(r.chains)
	err := r.read(ctx)
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("reading the firewall: %w; it takes root, or CAP_NET_ADMIN", err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL) && len(r.chains) == old:
		return r, nil // a kernel without nftables
	case err != nil:
		return nil, fmt.Errorf("reading the firewall: %w", err)
	}
	return r, nil
}

// Generation changes whenever the rules do. It is cheap to ask for; of a kernel without nftables it is 0.
func Generation() (uint32, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("asking for the firewall's generation: %w", err)
	}
	defer c.Close()
	replies, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, 4), // struct nfgenmsg
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("asking for the firewall's generation: %w", err)
	}
	for _, reply := range replies {
		attributes, err := netlink.NewAttributeDecoder(reply.Data[min(4, len(reply.Data)):])
		if err != nil {
			return 0, fmt.Errorf("reading the firewall's generation: %w", err)
		}
		attributes.ByteOrder = binary.BigEndian
		for attributes.Next() {
			if attributes.Type() == unix.NFTA_GEN_ID {
				return attributes.Uint32(), nil
			}
		}
	}
	return 0, nil
}

// Without is the ruleset as it would be without the tables of a name.
func (r *Ruleset) Without(table string) *Ruleset {
	rest := *r
	rest.bases = slices.DeleteFunc(slices.Clone(r.bases), func(c *chain) bool { return c.table == table })
	return &rest
}

func (r *Ruleset) read(ctx context.Context) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	chains, err := c.ListChains()
	if err != nil {
		return err
	}
	names, err := expressionNames()
	if err != nil {
		return err
	}
	dormant, err := dormantTables(c)
	if err != nil {
		return err
	}
	tables := map[chainKey]*nftables.Table{}
	for _, ch := range chains {
		if err := ctx.Err(); err != nil {
			return err
		}
		switch ch.Table.Family {
		case nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet:
		default:
			continue
		}
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return fmt.Errorf("chain %s of table %s: %w", ch.Name, ch.Table.Name, err)
		}
		key := chainKey{family: ch.Table.Family, table: ch.Table.Name, name: ch.Name}
		for _, rule := range rules {
			rule.Exprs = complete(rule.Exprs, names[ruleKey{key.family, key.table, rule.Handle}])
		}
		r.chains[key] = &chain{key, ch, rules}
		if ch.Hooknum != nil && !dormant[chainKey{family: key.family, table: key.table}] {
			r.bases = append(r.bases, r.chains[key])
		}
		key.name = ""
		tables[key] = ch.Table
	}
	for key, table := range tables {
		sets, err := c.GetSets(table)
		if err != nil {
			return fmt.Errorf("sets of table %s: %w", table.Name, err)
		}
		for _, s := range sets {
			elements, err := c.GetSetElements(s)
			if err != nil {
				return fmt.Errorf("set %s of table %s: %w", s.Name, table.Name, err)
			}
			key.name = s.Name
			r.sets[key] = &set{s, elements}
		}
	}
	return nil
}

// dormantTables are those whose chains no packet sees (nft(8), "flags dormant").
func dormantTables(c *nftables.Conn) (map[chainKey]bool, error) {
	tables, err := c.ListTables()
	if err != nil {
		return nil, err
	}
	dormant := map[chainKey]bool{}
	for _, t := range tables {
		flags := binary.BigEndian.Uint32(native(t.Flags)) // the library takes them for the machine's byte order
		dormant[chainKey{family: t.Family, table: t.Name}] = flags&unix.NFT_TABLE_F_DORMANT != 0
	}
	return dormant, nil
}

// Forwarded is what becomes of a packet that the box forwards.
func (r *Ruleset) Forwarded(p Packet) Judgement {
	return r.walk(p, nftables.ChainHookPrerouting, nftables.ChainHookForward, nftables.ChainHookPostrouting)
}

// Delivered is what becomes of a packet that comes to a socket of the box.
func (r *Ruleset) Delivered(p Packet) Judgement {
	return r.walk(p, nftables.ChainHookPrerouting, nftables.ChainHookInput)
}

// Sent is what becomes of a packet that the box itself sends.
func (r *Ruleset) Sent(p Packet) Judgement {
	return r.walk(p, nftables.ChainHookOutput, nftables.ChainHookPostrouting)
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
