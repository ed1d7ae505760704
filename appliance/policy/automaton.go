package policy

import (
	"math/bits"
	"slices"
)

// automaton finds which of many texts occur in a name, in one pass over it (Aho and Corasick, 1975). A node
// stands for the beginning of some texts. Children are packed behind a bit mask, 32 bytes a node: a table
// with a column for each character would cost ten times as much, and names are short.
type automaton struct {
	nodes []node   // in the order of their depth; 0 is the empty text
	owner []uint32 // of texts, node by node
}

type node struct {
	children uint64 // by symbol
	first    uint32 // the first child; its siblings follow in the order of their symbols
	fallback uint32 // the longest proper ending of this node's text that is a node
	found    uint32 // the nearest node at or behind this one, by fallback, in which a text ends; 0: none
	from, to uint32 // the owners of the texts that end here, in automaton.owner
}

// wanted is a text to look for, and whose it is. It is not empty.
type wanted struct {
	text  string
	owner uint32
}

// symbols numbers the characters of names. Everything else is one symbol: a text that has one of those is found
// where it may be, not only where it is.
var symbols = func() (symbol [256]uint8) {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-_."
	for i := range symbol {
		symbol[i] = uint8(len(alphabet))
	}
	for i := range alphabet {
		symbol[alphabet[i]] = uint8(i)
	}
	return symbol
}()

func newAutomaton(texts []wanted) automaton {
	type sorted struct {
		symbols []byte
		owner   uint32
	}
	all := make([]sorted, len(texts))
	for i, w := range texts {
		all[i] = sorted{[]byte(w.text), w.owner}
		for k, c := range all[i].symbols {
			all[i].symbols[k] = symbols[c]
		}
	}
	slices.SortFunc(all, func(a, b sorted) int { return slices.Compare(a.symbols, b.symbols) })

	// The texts that begin as a node does stand side by side, the shorter ones first.
	type part struct{ from, to, depth int }
	a := automaton{nodes: []node{{}}}
	parts := []part{{0, len(all), 0}}
	for at := 0; at < len(parts); at++ {
		p := parts[at]
		n := node{fallback: a.nodes[at].fallback, from: uint32(len(a.owner)), first: uint32(len(a.nodes))}
		for p.from < p.to && len(all[p.from].symbols) == p.depth {
			a.owner = append(a.owner, all[p.from].owner)
			p.from++
		}
		n.to = uint32(len(a.owner))
		n.found = uint32(at)
		if n.from == n.to {
			n.found = a.nodes[n.fallback].found
		}
		for p.from < p.to {
			symbol := all[p.from].symbols[p.depth]
			end := p.from
			for end < p.to && all[end].symbols[p.depth] == symbol {
				end++
			}
			child := node{}
			if at > 0 {
				child.fallback = a.step(n.fallback, symbol)
			}
			n.children |= 1 << symbol
			a.nodes = append(a.nodes, child)
			parts = append(parts, part{p.from, end, p.depth + 1})
			p.from = end
		}
		a.nodes[at] = n
	}
	a.nodes, a.owner = slices.Clone(a.nodes), slices.Clone(a.owner) // without room to grow
	return a
}

// step reads one more symbol.
func (a *automaton) step(at uint32, symbol uint8) uint32 {
	for {
		n := &a.nodes[at]
		if n.children>>symbol&1 != 0 {
			return n.first + uint32(bits.OnesCount64(n.children&(1<<symbol-1)))
		}
		if at == 0 {
			return 0
		}
		at = n.fallback
	}
}

// owners calls found with the owner of each text that occurs in the name, once for each occurrence.
func (a *automaton) owners(name string, found func(owner uint32)) {
	at := uint32(0)
	for i := range len(name) {
		at = a.step(at, symbols[name[i]])
		for end := a.nodes[at].found; end != 0; end = a.nodes[a.nodes[end].fallback].found {
			for _, owner := range a.owner[a.nodes[end].from:a.nodes[end].to] {
				found(owner)
			}
		}
	}
}
