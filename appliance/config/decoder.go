package config

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// decoder reads nodes into a Config. It never stops at an error: it reports it and goes on, so that
// one run says everything that is wrong. Each of its functions takes the node and at, the object that
// a message is about ("rule \"nas\": port").
type decoder struct {
	report
	// budget is how many more values may be read. A text without aliases cannot hold more values
	// than bytes, so only aliases that expand far beyond what was written exhaust it.
	budget int
	lists  []listUse
}

// aliasAllowance is what aliases may add to the values of a file that is small.
const aliasAllowance = 100_000

func newDecoder(file string, size int) *decoder {
	return &decoder{report: report{file: file}, budget: size + aliasAllowance}
}

// spend says whether n more values may be read. That they may not is reported once.
func (d *decoder) spend(line, n int) bool {
	if d.budget < 0 {
		return false
	}
	if d.budget -= n; d.budget < 0 {
		d.errorf(line, "aliases (*name) expand to too many values; write the lists out, or once in one rule")
		return false
	}
	return true
}

func join(at, key string) string {
	if at == "" {
		return key
	}
	return at + ": " + key
}

// about is at as the beginning of a message.
func about(at string) string {
	if at == "" {
		return ""
	}
	return at + ": "
}

// follow is what an alias stands for, and any other node itself.
func follow(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// plain follows an alias and refuses a tag of the user's own: !secret x is not the text x.
func (d *decoder) plain(at string, n *yaml.Node) *yaml.Node {
	n = follow(n)
	if n.Style&yaml.TaggedStyle != 0 && !strings.HasPrefix(n.Tag, "!!") {
		d.errorf(n.Line, "%sunknown tag %s; remove it", about(at), quote(n.Tag))
	}
	return n
}

// kind says what a node is, for "must be …, not …".
func kind(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case isNull(n):
		return "empty"
	case n.Tag == "!!int", n.Tag == "!!float":
		return "a number"
	case n.Tag == "!!bool":
		return n.Value
	}
	return "text"
}

// entry is one key of a mapping with its value, aliases resolved.
type entry struct {
	key   string
	line  int // of the key
	value *yaml.Node
}

// entries lists a mapping in the order of the file. A key that stands there twice counts once.
func (d *decoder) entries(at string, n *yaml.Node) []entry {
	n = follow(n)
	if n.Kind != yaml.MappingNode {
		d.errorf(n.Line, "%smust be a mapping (key: value), not %s", about(at), kind(n))
		return nil
	}
	if !d.spend(n.Line, len(n.Content)) {
		return nil
	}
	list := make([]entry, 0, len(n.Content)/2)
	lines := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := d.plain(at, n.Content[i])
		switch first, twice := lines[key.Value]; {
		case key.Kind != yaml.ScalarNode:
			d.errorf(key.Line, "%sa key must be text, not %s", about(at), kind(key))
		case key.Value == "":
			d.errorf(key.Line, "%sa key is empty; write one", about(at))
		case key.Tag == "!!merge":
			d.errorf(key.Line, "%smerge keys (<<) are not supported; write the keys out", about(at))
		case twice:
			d.errorf(key.Line, "%skey %s stands here twice (first on line %d); remove one", about(at), quote(key.Value), first)
		default:
			lines[key.Value] = key.Line
			value := d.plain(join(at, key.Value), n.Content[i+1])
			list = append(list, entry{key.Value, key.Line, value})
		}
	}
	return list
}

// keys is the table of one kind of object: what each key means.
type keys[T any] map[string]func(d *decoder, at string, n *yaml.Node, into *T)

// refusals are keys that are known, but not accepted, with the reason.
type refusals map[string]string

// notYet is the reason against what the design has, and this version has not.
const notYet = "is not in this version yet; remove it"

// decode reads the entries of an object by its table and returns the keys it has. A key that the table
// does not hold is an error, with the key that was probably meant; that one is then not missing.
func decode[T any](d *decoder, at string, entries []entry, table keys[T], refused refusals, into *T) (seen map[string]bool) {
	seen = make(map[string]bool, len(entries))
	for _, e := range entries {
		seen[e.key] = true
		switch read, known := table[e.key]; {
		case known:
			read(d, join(at, e.key), e.value, into)
		case refused[e.key] != "":
			d.errorf(e.line, "%s%s %s", about(at), e.key, refused[e.key])
		default:
			valid := slices.Collect(maps.Keys(table))
			d.errorf(e.line, "%sunknown key %s%s", about(at), quote(e.key), didYouMean(e.key, valid))
			if meant, ok := nearest(e.key, valid); ok {
				seen[meant] = true
			}
		}
	}
	return seen
}

// scalar is the text of a single value, as the user wrote it, without quotes.
func (d *decoder) scalar(at string, n *yaml.Node) (string, bool) {
	n = follow(n)
	switch {
	case n.Kind != yaml.ScalarNode:
		d.errorf(n.Line, "%smust be a single value, not %s", about(at), kind(n))
	case isNull(n):
		d.errorf(n.Line, "%shas no value; write one or remove the key", about(at))
	default:
		return n.Value, true
	}
	return "", false
}

// list is the items of a list; a single value is a list of one.
func (d *decoder) list(at string, n *yaml.Node) []*yaml.Node {
	n = follow(n)
	switch {
	case isNull(n):
		d.errorf(n.Line, "%shas no value; write one or remove the key", about(at))
		return nil
	case n.Kind != yaml.SequenceNode:
		return []*yaml.Node{n}
	case len(n.Content) == 0:
		d.errorf(n.Line, "%sthe list is empty; add a value or remove the key", about(at))
	case !d.spend(n.Line, len(n.Content)):
		return nil
	}
	for _, item := range n.Content {
		d.plain(at, item)
	}
	return n.Content
}

// texts is a list of single values and their lines.
func (d *decoder) texts(at string, n *yaml.Node) (values []string, lines []int) {
	items := d.list(at, n)
	values, lines = make([]string, 0, len(items)), make([]int, 0, len(items))
	for _, item := range items {
		if value, ok := d.scalar(at, item); ok {
			values, lines = append(values, value), append(lines, item.Line)
		}
	}
	return values, lines
}

// choice is one of a few words.
func (d *decoder) choice(at string, n *yaml.Node, words ...string) (string, bool) {
	value, ok := d.scalar(at, n)
	if ok && !slices.Contains(words, value) {
		d.errorf(n.Line, "%sunknown value %s%s", about(at), quote(value), didYouMean(value, words))
		return "", false
	}
	return value, ok
}

func (d *decoder) boolean(at string, n *yaml.Node, into *bool) {
	if value, ok := d.choice(at, n, "true", "false"); ok {
		*into = value == "true"
	}
}

// number is a whole number; 0x begins a hexadecimal one.
func (d *decoder) number(at string, n *yaml.Node, least, most uint32) (uint32, bool) {
	value, ok := d.scalar(at, n)
	if !ok {
		return 0, false
	}
	number, err := strconv.ParseUint(value, 0, 32)
	if err != nil || uint32(number) < least || uint32(number) > most {
		d.errorf(n.Line, "%s%s is not a number from %d to %d", about(at), quote(value), least, most)
		return 0, false
	}
	return uint32(number), true
}

func (d *decoder) duration(at string, n *yaml.Node, least, most time.Duration) (time.Duration, bool) {
	value, ok := d.scalar(at, n)
	if !ok {
		return 0, false
	}
	length, err := time.ParseDuration(value)
	switch {
	case err != nil:
		d.errorf(n.Line, `%s%s is not a duration; write it like 90s, 5m or 1h30m`, about(at), quote(value))
	case length < least || length > most:
		d.errorf(n.Line, "%s%s is out of range; write %s to %s", about(at), value, short(least), short(most))
	default:
		return length, true
	}
	return 0, false
}

// short is a duration without zero parts: 5m, not 5m0s.
func short(length time.Duration) string {
	text := length.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// numbered names an object of a list: `published #2`.
func numbered(what string, index int) string { return fmt.Sprintf("%s #%d", what, index+1) }
