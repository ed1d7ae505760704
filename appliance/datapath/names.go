package datapath

import (
	"fmt"
	"sync"

	"github.com/cilium/ebpf/btf"
)

// names are the texts of the enums in bpf/types.h, read from the object's own type information, so that
// there is no second list to keep equal.
var names = sync.OnceValue(loadNames)

type enumNames struct{ verdicts, reasons, states map[uint32]string }

func loadNames() enumNames {
	spec, err := loadGateway()
	if err != nil {
		panic("the embedded BPF object does not parse: " + err.Error()) // a broken build, never input
	}
	texts := func(enum, prefix string) map[uint32]string {
		var t *btf.Enum
		if err := spec.Types.TypeByName(enum, &t); err != nil {
			panic("the embedded BPF object lacks enum " + enum)
		}
		out := map[uint32]string{}
		for _, v := range t.Values {
			out[uint32(v.Value)] = lower(v.Name, prefix)
		}
		return out
	}
	return enumNames{
		verdicts: texts("verdict", "VERDICT_"),
		reasons:  texts("reason", "REASON_"),
		states:   texts("flow_state", "FLOW_"),
	}
}

func textOf(names map[uint32]string, n uint32) string {
	if name, ok := names[n]; ok {
		return name
	}
	return fmt.Sprintf("#%d", n)
}

func (e enumNames) verdict(n uint32) string { return textOf(e.verdicts, n) }
func (e enumNames) state(n uint32) string   { return textOf(e.states, n) }

func reasonText(n uint32) string { return textOf(names().reasons, n) }
