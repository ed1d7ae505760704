package config

import (
	"bytes"
	"errors"
	"path/filepath"
	"sort"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Format is the syntax of a configuration file.
type Format string

// The formats. All of them hold the same keys.
const (
	YAML Format = "yaml"
	JSON Format = "json"
	TOML Format = "toml"
)

var suffixes = map[string]Format{".yaml": YAML, ".yml": YAML, ".json": JSON, ".toml": TOML, "": YAML}

// FormatOf tells the format by the suffix of a file name; a name without one (/dev/stdin) is YAML.
func FormatOf(name string) (Format, error) {
	suffix := filepath.Ext(name)
	if f, ok := suffixes[strings.ToLower(suffix)]; ok {
		return f, nil
	}
	return "", Position{File: name}.Errorf("unknown format %q; name the file .yaml, .yml, .json or .toml", suffix)
}

var syntaxes = map[Format]func([]byte) (*yaml.Node, *syntaxError){YAML: parseYAML, JSON: parseJSON, TOML: parseTOML}

// syntaxError is why a text could not be parsed at all.
type syntaxError struct {
	line    int
	message string
}

// text is a koanf.Provider of bytes that are already in memory; koanf's own copies them.
type text []byte

func (t text) ReadBytes() ([]byte, error) { return t, nil }
func (text) Read() (map[string]any, error) {
	return nil, errors.New("a text has no keys before it is parsed")
}

// document is the koanf.Parser of every format. It parses the text once, into nodes that keep their
// lines, and gives koanf one section for each top-level key: koanf's maps hold neither lines nor
// order, nor two equal keys, and all three are needed to say what is wrong and where.
type document struct {
	format Format
	decode *decoder // reports, and counts values
}

// section is a top-level key with its value. koanf copies what it hands out; a deep copy of 100,000
// prefixes would be dear, hence shallow.
type section struct {
	Key   string
	Line  int
	Value *yaml.Node `copy:"shallow"`
}

func (p *document) Unmarshal(b []byte) (map[string]any, error) {
	if line, ok := tooDeep(b); ok {
		p.decode.errorf(line, "more than %d brackets are open here; close them", maxDepth)
		return nil, nil
	}
	root, bad := syntaxes[p.format](b)
	if bad != nil {
		p.decode.errorf(bad.line, "not valid %s: %s", strings.ToUpper(string(p.format)), bad.message)
		return nil, nil
	}
	if root != nil {
		root = p.decode.plain("", root)
	}
	if root == nil || isNull(root) {
		p.decode.errorf(1, `the file is empty; the least there can be is "default: direct"`)
		return nil, nil
	}
	sections := make(map[string]any)
	for _, e := range p.decode.entries("", root) {
		sections[e.key] = section{e.key, e.line, e.value}
	}
	return sections, nil
}

func (p *document) Marshal(map[string]any) ([]byte, error) {
	return nil, errors.New("a configuration is read, never written")
}

// maxDepth bounds the nesting of brackets: the parsers recurse, and a Go stack that is too large ends
// the program. Brackets in texts count too, so it is far above what a config nests.
const maxDepth = 10_000

// tooDeep finds the line at which too many brackets are open.
func tooDeep(b []byte) (line int, found bool) {
	depth, line := 0, 1
	for _, c := range b {
		switch c {
		case '[', '{':
			depth++
		case ']', '}':
			depth = max(depth-1, 0)
		case '\n':
			line++
		}
		if depth > maxDepth {
			return line, true
		}
	}
	return 0, false
}

// searchLimit is the size, in bytes, up to which it is worth parsing a broken text again and again.
const searchLimit = 1 << 20

// locate finds the line at which a parser gives up, where it does not tell: the end of the shortest
// run of whole lines, at least low, that it refuses with the same words.
func locate(b []byte, low int, refuses func([]byte) bool) int {
	if len(b) > searchLimit {
		return low
	}
	var ends []int // offset of the end of each line
	for line := range bytes.Lines(b) {
		ends = append(ends, len(line))
		if i := len(ends) - 1; i > 0 {
			ends[i] += ends[i-1]
		}
	}
	return low + sort.Search(len(ends)-low, func(i int) bool { return refuses(b[:ends[low+i-1]]) })
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }
