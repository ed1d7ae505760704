package datapath

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"sidegate/appliance/policy"
)

// hashText is the 64-bit FNV-1a hash by which the programs know a text of a process (struct process of bpf/types.h).
// 0 means that the text is not known, which is what the empty one is.
func hashText(text string) uint64 {
	if text == "" {
		return 0
	}
	return hashOn(fnvOffset, text)
}

const (
	fnvOffset = uint64(0xcbf29ce484222325)
	fnvPrime  = uint64(0x100000001b3)
	// What the programs read of a name (NAME_BYTES); of longer ones they see no more.
	maxName = 63
)

func hashOn(hash uint64, text string) uint64 {
	for i := range min(len(text), maxName) {
		hash = (hash ^ uint64(text[i])) * fnvPrime
	}
	return hash
}

// hashPath is hashText of the components from the last to the first, each with a slash behind it. The programs
// walk from a file's directory entry towards the root and never see the path as a whole.
func hashPath(path string) uint64 {
	components := strings.Split(strings.Trim(path, "/"), "/")
	if components[0] == "" {
		return 0
	}
	hash := fnvOffset
	for _, c := range slices.Backward(components) {
		hash = hashOn(hashOn(hash, c), "/")
	}
	return hash
}

func processOf(p policy.Process) gatewayProcess {
	return gatewayProcess{Name: hashText(p.Name), Path: hashPath(p.Path), Unit: hashText(p.Unit)}
}

// processHashes are the hashes by dimension of the policy.
var processHashes = map[policy.Dimension]func(string) uint64{
	policy.ProcessName: hashText,
	policy.ProcessPath: hashPath,
	policy.ProcessUnit: hashText,
}

// hashesDiffer refuses a policy of which the programs would take two texts for one, or a text for an unknown one.
func hashesDiffer(p *policy.Policy) error {
	type key struct {
		dimension policy.Dimension
		hash      uint64
	}
	texts := map[key]string{}
	for i := range p.Rules {
		for _, c := range slices.Concat(p.Rules[i].Is, p.Rules[i].Not) {
			hash, ok := processHashes[c.Field.Dimension]
			if !ok {
				continue
			}
			for _, v := range c.Values {
				k, text := key{c.Field.Dimension, hash(v.String())}, v.String()
				if other, taken := texts[k]; taken && other != text {
					return fmt.Errorf("%s: %s %q has the same 64-bit hash as %q: the kernel cannot tell them apart, use one of them",
						p.RuleLabel(i), c.Field.Key, text, other)
				}
				if k.hash == 0 {
					return fmt.Errorf("%s: the 64-bit hash of %s %q is zero, by which the kernel knows none: remove it", p.RuleLabel(i), c.Field.Key, text)
				}
				texts[k] = text
			}
		}
	}
	return nil
}

// fillProcesses writes the classes of the texts that rules name under their hashes.
func fillProcesses(m *ebpf.Map, dimension policy.Dimension, classes map[string]policy.Class) error {
	hash := processHashes[dimension]
	return fillBatches(m, maps.Keys(classes), func(text string) (uint64, uint32) { return hash(text), classes[text] })
}
