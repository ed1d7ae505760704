package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Format is the syntax of a configuration file.
type Format string

// The formats. All of them hold the same keys.
const (
	YAML Format = "yaml"
	JSON Format = "json" // read by the YAML parser, of which it is a subset
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

var syntaxes = map[Format]func([]byte) (*yaml.Node, *syntaxError){YAML: parseYAML, JSON: parseYAML, TOML: parseTOML}

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
	parse  func([]byte) (*yaml.Node, *syntaxError)
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
	root, bad := p.parse(b)
	if bad != nil {
		p.decode.errorf(bad.line, "%s", bad.message)
		return nil, nil
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

// parseYAML returns nil for an empty document.
func parseYAML(b []byte) (*yaml.Node, *syntaxError) {
	if line, ok := notText(b); ok {
		return nil, &syntaxError{line, "the text is not UTF-8; save the file as UTF-8"}
	}
	decoder := yaml.NewDecoder(bytes.NewReader(b))
	var first, second yaml.Node
	if err := decoder.Decode(&first); err == io.EOF {
		return nil, nil
	} else if err != nil {
		return nil, yamlError(b, err)
	}
	if err := decoder.Decode(&second); err == nil {
		return nil, &syntaxError{second.Line, "a second document begins here; a config is one document, remove the ---"}
	} else if err != io.EOF {
		return nil, yamlError(b, err)
	}
	return first.Content[0], nil
}

var (
	yamlLine   = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)
	yamlAnchor = regexp.MustCompile(`^unknown anchor '(.*)' referenced$`)
)

// yamlError takes the line out of the YAML package's message, which has none for the first line and
// for anchors.
func yamlError(b []byte, err error) *syntaxError {
	bad := &syntaxError{1, err.Error()}
	if m := yamlLine.FindStringSubmatch(bad.message); m != nil {
		bad.message = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			bad.line = n
		}
	}
	if m := yamlAnchor.FindStringSubmatch(bad.message); m != nil {
		if at := bytes.Index(b, []byte("*"+m[1])); at >= 0 {
			bad.line = 1 + bytes.Count(b[:at], []byte{'\n'})
		}
		bad.message = fmt.Sprintf("*%s refers to an anchor that is not defined before it; quote the text if it is no alias", m[1])
	}
	bad.message = "not valid YAML or JSON: " + bad.message
	return bad
}

// notText finds the first line that is not UTF-8. (UTF-16, which YAML would allow, is not.)
func notText(b []byte) (line int, found bool) {
	if utf8.Valid(b) {
		return 0, false
	}
	line = 1
	for len(b) > 0 {
		r, size := utf8.DecodeRune(b)
		if r == utf8.RuneError && size == 1 {
			break
		}
		if r == '\n' {
			line++
		}
		b = b[size:]
	}
	return line, true
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }
