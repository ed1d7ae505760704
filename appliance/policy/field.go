package policy

import "fmt"

// Value is one alternative of a condition, parsed and checked; String is its normal form.
type Value interface{ fmt.Stringer }

// Field is one thing that a rule can ask about a flow.
type Field struct {
	Key     string // as in the configuration
	Doc     string // what it matches, one sentence
	Example string // a value in YAML
}
