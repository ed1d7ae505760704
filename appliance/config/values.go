package config

import (
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// Places outside the rules hold names and prefixes too: they are read as the fields of the policy read
// them, so that one thing is written in one way.

// values parses a list as the values of a field.
func (d *decoder) values(at, key string, n *yaml.Node) []policy.Value {
	texts, lines := d.texts(at, n)
	list := make([]policy.Value, 0, len(texts))
	for i, text := range texts {
		value, err := parseValue(key, text)
		if err != nil {
			d.errorf(lines[i], "%s: %w", at, err)
			continue
		}
		list = append(list, value)
	}
	return list
}

// parseValue parses one value of a field. The error does not name the field.
func parseValue(key, text string) (policy.Value, error) {
	field, ok := policy.LookupField(key)
	if !ok {
		panic("the policy has no field " + key)
	}
	condition, err := field.Parse(text)
	if err != nil {
		return nil, unnamed{key, err}
	}
	return condition.Values[0], nil
}

// unnamed is the error of a field in a place that has another name.
type unnamed struct {
	key string
	err error
}

func (u unnamed) Error() string {
	return strings.ReplaceAll(strings.TrimPrefix(u.err.Error(), u.key+" "), "write domain_suffix: .", "write .")
}

func (u unnamed) Unwrap() error { return u.err }

// normalName is the form in which names are compared: lower case, without the root's dot.
func normalName(text string) (string, error) {
	if strings.Contains(text, "*") {
		return "", fmt.Errorf("%s: names have no wildcards here; write each of them", quote(text))
	}
	value, err := parseValue("domain", text)
	if err != nil {
		return "", err
	}
	return value.String(), nil
}
