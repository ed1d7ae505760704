package policy

import (
	"cmp"
	"errors"
	"slices"
)

var errPortClasses = errors.New("the rules divide the ports into more than 65,535 classes: use ranges instead of single ports")

// fill sweeps over the ports once, counting for each use how many of its spans cover the current one.
func (t *PortTable) fill(a axis, occurrences []occurrence[Span], groups [][]use) error {
	type edge struct {
		port  uint32 // from which on
		delta int
		use   use
	}
	edges := make([]edge, 0, 2*len(occurrences))
	for _, o := range occurrences {
		for _, u := range groups[o.group] {
			edges = append(edges, edge{uint32(o.value.First), 1, u}, edge{uint32(o.value.Last) + 1, -1, u})
		}
	}
	slices.SortFunc(edges, func(x, y edge) int { return cmp.Compare(x.port, y.port) })

	r := a.rows()
	var h hits
	covered := make([]int, 2*MaxRules)
	class := ClassOther
	for port := 1; port < len(t.Class); port++ {
		changed := false
		for ; len(edges) > 0 && edges[0].port <= uint32(port); edges = edges[1:] {
			e := edges[0]
			covered[e.use] += e.delta
			h.put(e.use, covered[e.use] > 0)
			changed = true
		}
		if changed {
			if class = r.class(a.row(&h)); class >= 1<<16 {
				return errPortClasses
			}
		}
		t.Class[port] = uint16(class)
	}
	t.Bits = r.bits()
	return nil
}
