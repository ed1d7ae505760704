package config

import (
	"bytes"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// parseYAML makes nodes of YAML; nil of an empty text.
func parseYAML(b []byte) (*yaml.Node, *syntaxError) {
	if line, ok := notText(b); ok {
		return nil, &syntaxError{line, "the text is not UTF-8; save the file as UTF-8"}
	}
	first, second, err := yamlDocuments(b)
	switch {
	case err != nil:
		return nil, yamlError(b, err)
	case second != nil:
		return nil, &syntaxError{second.Line, "a second document begins here; a config is one document, remove the ---"}
	case first == nil:
		return nil, nil
	}
	return first.Content[0], nil
}

// yamlDocuments parses the first two documents of a text; nil is one that there is not.
func yamlDocuments(b []byte) (first, second *yaml.Node, err error) {
	decoder := yaml.NewDecoder(bytes.NewReader(b))
	for _, document := range []**yaml.Node{&first, &second} {
		var n yaml.Node
		if err := decoder.Decode(&n); err == io.EOF {
			return first, second, nil
		} else if err != nil {
			return nil, nil, err
		}
		*document = &n
	}
	return first, second, nil
}

var yamlMessage = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// yamlFixes says in the user's words what the YAML parser says in its own.
var yamlFixes = map[string]string{
	"did not find expected key":                             "the indentation differs from the lines above, or a quote or bracket is missing",
	"did not find expected '-' indicator":                   "the items of a list begin with - in the same column",
	"did not find expected ',' or ']'":                      "a comma or ] is missing",
	"did not find expected ',' or '}'":                      "a comma or } is missing",
	"did not find expected node content":                    "a value is missing, or a bracket or comma is out of place",
	"did not find expected alphabetic or numeric character": "quote a value that begins with * or &",
	"found character that cannot start any token":           "indent with spaces, not tabs; quote a value that begins with @, % or a backquote",
	"mapping values are not allowed in this context":        "indent the keys of a mapping alike; quote a value that has a colon and a space in it",
	"could not find expected ':'":                           "a key needs a colon and a space after it",
	"found unexpected end of stream":                        "a quote is not closed",
}

// yamlError is a message of the YAML package with a line of our own: it names the line where the
// mapping or list around the mistake begins, one less than that, or none.
func yamlError(b []byte, err error) *syntaxError {
	bad := &syntaxError{1, err.Error()}
	if m := yamlMessage.FindStringSubmatch(bad.message); m != nil {
		bad.message = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			bad.line = n
		}
	}
	bad.line = locate(b, bad.line, func(lines []byte) bool {
		_, _, again := yamlDocuments(lines)
		return again != nil && again.Error() == err.Error()
	})
	if fix := yamlFixes[bad.message]; fix != "" {
		bad.message += "; " + fix
	} else if strings.HasPrefix(bad.message, "unknown anchor ") {
		bad.message += "; define it above with &, or quote the text if it is no alias"
	}
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
