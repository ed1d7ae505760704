package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// parseJSON makes the same nodes of JSON that the YAML parser makes of YAML; nil of an empty text. (The
// YAML parser reads most JSON too, but not \/, which some programs write into every URL and prefix, nor
// surrogate pairs.)
func parseJSON(b []byte) (*yaml.Node, *syntaxError) {
	j := jsonReader{text: b, line: 1, tokens: json.NewDecoder(bytes.NewReader(b))}
	j.tokens.UseNumber()
	root, err := j.value()
	if err == io.EOF {
		return nil, nil
	}
	if err == nil {
		if _, err = j.tokens.Token(); err == nil {
			err = errors.New("something follows the closing }; remove it")
		}
	}
	if err == io.EOF {
		return root, nil
	}
	if err == io.ErrUnexpectedEOF {
		err = errors.New("the text ends too early; a quote, ] or } is missing")
	}
	if bad := (*json.SyntaxError)(nil); errors.As(err, &bad) {
		return nil, &syntaxError{j.lineOf(bad.Offset), err.Error()}
	}
	return nil, &syntaxError{j.lineOf(j.tokens.InputOffset()), err.Error()}
}

// jsonReader turns JSON tokens into nodes.
type jsonReader struct {
	tokens *json.Decoder
	text   []byte
	offset int64 // the last position asked for
	line   int   // its line
}

// lineOf counts the lines up to an offset, which is never less than the one before.
func (j *jsonReader) lineOf(offset int64) int {
	offset = min(max(offset, j.offset), int64(len(j.text)))
	j.line += bytes.Count(j.text[j.offset:offset], []byte{'\n'})
	j.offset = offset
	return j.line
}

// value reads the next value with all that is in it. The error is io.EOF only where a value could begin.
func (j *jsonReader) value() (*yaml.Node, error) {
	token, err := j.tokens.Token()
	if err != nil {
		return nil, err
	}
	n := &yaml.Node{Kind: yaml.ScalarNode, Line: j.lineOf(j.tokens.InputOffset())}
	switch token := token.(type) {
	case json.Delim:
		n.Kind, n.Tag = yaml.SequenceNode, "!!seq"
		if token == '{' {
			n.Kind, n.Tag = yaml.MappingNode, "!!map"
		}
		for j.tokens.More() { // of a mapping, keys and values in turn, as in the nodes
			item, err := j.value()
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, item)
		}
		if _, err := j.tokens.Token(); err == io.EOF {
			return nil, io.ErrUnexpectedEOF
		} else if err != nil {
			return nil, err
		}
	case string:
		n.Tag, n.Value = "!!str", token
	case json.Number:
		n.Tag, n.Value = "!!int", token.String()
	case bool:
		n.Tag, n.Value = "!!bool", strconv.FormatBool(token)
	default:
		n.Tag = "!!null"
	}
	return n, nil
}
