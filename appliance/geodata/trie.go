package geodata

import (
	"errors"
	"slices"
	"unicode/utf8"
)

// trie is a set of names that sing-box and mihomo write in one way: each name is reversed, all together are a
// trie, and its nodes are numbered by depth, then by order. The bitmap has for each node in turn a 0 for each child and then
// a 1; the children's labels are in the same order, so that the child of label i is node i+1. The bits of leaves are set for
// nodes at which a name ends. (G. Jacobson, Space-efficient static trees and graphs, 1989: LOUDS.)
type trie struct {
	leaves, bitmap words
	labels         []byte
}

// longestKey of a set: a name, and a mark.
const longestKey = 255

var errNoTrie = errors.New("it is damaged: its names are no tree; fetch it again")

// each calls f with every name of the set, in its own direction. The marks that a format puts behind a reversed name
// come first.
func (t *trie) each(f func(name []byte) error) error {
	parents, err := t.parents()
	if err != nil {
		return err
	}
	var name []byte
	for node := range parents {
		if !t.leaves.bit(node) {
			continue
		}
		name = name[:0]
		for at := node; at != 0; at = int(parents[at]) {
			if len(name) == longestKey {
				return errors.New("it is damaged: a name has more than 255 bytes")
			}
			name = append(name, t.labels[at-1])
		}
		if !utf8.Valid(name) { // characters were reversed, not bytes
			name = reversedRunes(name)
		}
		if err := f(name); err != nil {
			return err
		}
	}
	return nil
}

// parents returns each node's parent. The root's is itself.
func (t *trie) parents() ([]uint32, error) {
	parents := make([]uint32, 1, len(t.labels)+1)
	node := 0
	for bit := 0; node <= len(t.labels); bit++ {
		if bit >= len(t.bitmap)*8 || node >= len(parents) {
			return nil, errNoTrie
		}
		if t.bitmap.bit(bit) {
			node++
		} else {
			parents = append(parents, uint32(node))
		}
		if len(parents) > len(t.labels)+1 {
			return nil, errNoTrie
		}
	}
	return parents, nil
}

func reversedRunes(name []byte) []byte {
	name = slices.Clone(name)
	slices.Reverse(name)
	runes := []rune(string(name))
	slices.Reverse(runes)
	return []byte(string(runes))
}
