package firewall

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// unread stands for an expression that the library leaves out of a rule without a word: what follows would be judged by registers
// that it has written, and a rule without it reads as if it held for more packets.
type unread struct{ expr.Any }

// leftOut are the kernel's expressions that the library does not know (github.com/google/nftables v0.3.0, expr.exprFromName).
var leftOut = []string{"byteorder", "dup", "fwd", "inner", "last", "osf", "rt", "socket", "tproxy", "tunnel", "xfrm"}

type ruleKey struct {
	family nftables.TableFamily
	table  string
	handle uint64
}

// complete puts what was left out of a rule's expressions back, by the names of all that it has.
func complete(known []expr.Any, names []string) []expr.Any {
	if len(names) <= len(known) {
		return known
	}
	var all []expr.Any
	rest := known
	for _, name := range names {
		switch {
		case slices.Contains(leftOut, name):
			all = append(all, unread{})
		case len(rest) > 0:
			all, rest = append(all, rest[0]), rest[1:]
		}
	}
	if len(all) != len(names) || len(rest) > 0 { // an expression newer than the list: nobody knows where it stands
		return append([]expr.Any{unread{}}, known[max(len(known)-1, 0):]...)
	}
	return all
}

// expressionNames are those of every rule of the namespace.
func expressionNames() (map[ruleKey][]string, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	replies, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, 4), // struct nfgenmsg
	})
	if err != nil {
		return nil, err
	}
	all := map[ruleKey][]string{}
	for _, reply := range replies {
		if len(reply.Data) < 4 {
			continue
		}
		attributes, err := netlink.NewAttributeDecoder(reply.Data[4:])
		if err != nil {
			return nil, err
		}
		attributes.ByteOrder = binary.BigEndian
		key := ruleKey{family: nftables.TableFamily(reply.Data[0])}
		var names []string
		for attributes.Next() {
			switch attributes.Type() {
			case unix.NFTA_RULE_TABLE:
				key.table = attributes.String()
			case unix.NFTA_RULE_HANDLE:
				key.handle = attributes.Uint64()
			case unix.NFTA_RULE_EXPRESSIONS:
				attributes.Nested(func(list *netlink.AttributeDecoder) error {
					for list.Next() {
						list.Nested(func(one *netlink.AttributeDecoder) error {
							for one.Next() {
								if one.Type() == unix.NFTA_EXPR_NAME {
									names = append(names, one.String())
								}
							}
							return nil
						})
					}
					return nil
				})
			}
		}
		if err := attributes.Err(); err != nil {
			return nil, err
		}
		all[key] = names
	}
	return all, nil
}
