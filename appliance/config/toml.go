package config

import (
	"bytes"
	"errors"
	"strings"

	koanftoml "github.com/knadh/koanf/parsers/toml/v2"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"go.yaml.in/yaml/v3"
)

// parseTOML makes the same nodes of TOML that the YAML parser makes of YAML. A TOML library returns
// values without their lines, so the text is read twice: by koanf's parser, which checks all that the
// standard asks for, and as syntax, for values and lines. Only the first can fail.
func parseTOML(b []byte) (*yaml.Node, *syntaxError) {
	if _, err := koanftoml.Parser().Unmarshal(b); err != nil {
		return nil, tomlError(b, err)
	}
	t := tomlReader{text: b, line: 1}
	t.parser.Reset(b)
	root := t.mapping(1)
	table := root
	for t.parser.NextExpression() {
		switch e := t.parser.Expression(); e.Kind {
		case unstable.Table:
			table = t.descend(root, e.Key(), false)
		case unstable.ArrayTable:
			table = t.descend(root, e.Key(), true)
		case unstable.KeyValue:
			t.assign(table, e)
		}
	}
	if err := t.parser.Error(); err != nil {
		return nil, &syntaxError{1, err.Error()}
	}
	return root, nil
}

func tomlError(b []byte, err error) *syntaxError {
	bad := &syntaxError{message: strings.TrimPrefix(err.Error(), "toml: ")}
	if at := (*toml.DecodeError)(nil); errors.As(err, &at) {
		bad.line, _ = at.Position()
	} else { // a key or table that is defined twice
		bad.line = locate(b, 1, func(lines []byte) bool {
			_, again := koanftoml.Parser().Unmarshal(lines)
			return again != nil && again.Error() == err.Error()
		})
		bad.message += "; define it once"
	}
	return bad
}

// tomlReader turns TOML syntax into nodes. It relies on the text being valid.
type tomlReader struct {
	parser unstable.Parser
	text   []byte
	offset int // the last position asked for
	line   int // its line
}

// lineOf counts the lines up to an offset. Offsets come almost in order, so that it is quick.
func (t *tomlReader) lineOf(offset int) int {
	if offset < t.offset {
		t.line -= bytes.Count(t.text[offset:t.offset], []byte{'\n'})
	} else {
		t.line += bytes.Count(t.text[t.offset:offset], []byte{'\n'})
	}
	t.offset = offset
	return t.line
}

func (t *tomlReader) mapping(line int) *yaml.Node {
	return &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map", Line: line}
}

// member finds a key of a mapping.
func member(table *yaml.Node, key string) *yaml.Node {
	for i := 0; i < len(table.Content); i += 2 {
		if table.Content[i].Value == key {
			return table.Content[i+1]
		}
	}
	return nil
}

func (t *tomlReader) add(table *yaml.Node, key *unstable.Node, value *yaml.Node) *yaml.Node {
	line := t.lineOf(int(key.Raw.Offset))
	if value.Line == 0 {
		value.Line = line
	}
	table.Content = append(table.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: string(key.Data), Line: line}, value)
	return value
}

// descend follows a dotted key from a table, making what is missing. In a list of tables it goes on
// in the last. With another, the key's last part is a list that gets one more table.
func (t *tomlReader) descend(table *yaml.Node, key unstable.Iterator, another bool) *yaml.Node {
	for key.Next() {
		part := key.Node()
		next := member(table, string(part.Data))
		if another && part.Next() == nil {
			if next == nil {
				next = t.add(table, part, &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"})
			}
			next.Content = append(next.Content, t.mapping(t.lineOf(int(part.Raw.Offset))))
		}
		if next == nil {
			next = t.add(table, part, t.mapping(0))
		}
		if next.Kind == yaml.SequenceNode {
			next = next.Content[len(next.Content)-1]
		}
		table = next
	}
	return table
}

// assign puts `a.b = value` into a table.
func (t *tomlReader) assign(table *yaml.Node, e *unstable.Node) {
	key := e.Key()
	for key.Next() {
		part := key.Node()
		if part.Next() == nil {
			t.add(table, part, t.value(e.Value()))
			return
		}
		next := member(table, string(part.Data))
		if next == nil {
			next = t.add(table, part, t.mapping(0))
		}
		table = next
	}
}

var tomlTags = map[unstable.Kind]string{unstable.String: "!!str", unstable.Bool: "!!bool", unstable.Integer: "!!int", unstable.Float: "!!float"}

// value makes a node of a value. Its line is 0 if the syntax does not tell it.
func (t *tomlReader) value(v *unstable.Node) *yaml.Node {
	switch v.Kind {
	case unstable.Array:
		list := &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		for items := v.Children(); items.Next(); {
			if item := items.Node(); item.Kind != unstable.Comment {
				list.Content = append(list.Content, t.value(item))
			}
		}
		if len(list.Content) > 0 {
			list.Line = list.Content[0].Line
		}
		return list
	case unstable.InlineTable:
		table := t.mapping(t.lineOf(int(v.Raw.Offset)))
		for items := v.Children(); items.Next(); {
			t.assign(table, items.Node())
		}
		return table
	}
	n := &yaml.Node{Kind: yaml.ScalarNode, Tag: tomlTags[v.Kind], Value: string(v.Data)}
	if v.Kind == unstable.String { // the text of an escaped string is not part of the file; Raw is
		n.Line = t.lineOf(int(v.Raw.Offset))
	} else {
		n.Line = t.lineOf(int(t.parser.Range(v.Data).Offset))
	}
	return n
}
