package sniff

import (
	"bytes"
	"strings"
)

// maxMethod is beyond the longest registered method, UPDATEREDIRECTREF.
const maxMethod = 32

// httpVersion ends a request line, with one digit more.
const httpVersion = " HTTP/1."

// http1 reads a request: RFC 9112 sections 3 and 5. What a strict server would refuse is taken where it is harmless, because some
// server will take it.
func http1(b []byte) Result {
	if trimmed, ok := bytes.CutPrefix(b, []byte("\r")); ok { // one empty line before it: section 2.2
		b = trimmed
	}
	b = bytes.TrimPrefix(b, []byte("\n"))

	line, b, whole := cutLine(b)
	status, host := requestLine(line, whole)
	switch {
	case status != Found:
		return Result{Status: status}
	case host != "": // it overrides the field: section 3.2.2
		return named(ProtocolHTTP1, host)
	}
	for empty := false; ; { // the Host field has begun, and nothing stands in it yet
		line, b, whole = cutLine(b)
		field, value, ok := bytes.Cut(line, []byte(":"))
		switch {
		case hasControl(line):
			return Result{Status: Nothing, Protocol: ProtocolHTTP1}
		case !whole:
			return Result{Status: More, Protocol: ProtocolHTTP1}
		case len(line) > 0 && (line[0] == ' ' || line[0] == '\t'): // the line before goes on: section 5.2
			if !empty {
				continue
			}
			value = line
		case empty, !ok: // no line of the host has one; or the header's end, or what is none
			return Result{Status: Nothing, Protocol: ProtocolHTTP1}
		case !isHost(bytes.TrimRight(field, " \t")):
			continue
		}
		empty = true
		if value = bytes.Trim(value, " \t"); len(value) > 0 {
			return named(ProtocolHTTP1, withoutPort(string(value)))
		}
	}
}

func isHost(field []byte) bool { return len(field) == 4 && strings.EqualFold(string(field), "host") }

// cutLine cuts the first line off, without its end; whole says that its end has come. A bare LF ends one too: section 2.2.
func cutLine(b []byte) (line, rest []byte, whole bool) {
	line, rest, whole = bytes.Cut(b, []byte("\n"))
	return bytes.TrimSuffix(line, []byte("\r")), rest, whole
}

func hasControl(line []byte) bool {
	for _, c := range line {
		if c < ' ' && c != '\t' || c == 0x7f {
			return true
		}
	}
	return false
}

// requestLine is Found for a request line, with the host if its target has one; More for what may become one.
func requestLine(line []byte, whole bool) (Status, string) {
	unfinished := More
	if whole {
		unfinished = Nothing
	}
	method := 0
	for method < len(line) && isMethod(line[method]) {
		method++
	}
	if method > maxMethod {
		return Nothing, ""
	}
	if method == len(line) {
		return unfinished, ""
	}
	if method == 0 || line[method] != ' ' {
		return Nothing, ""
	}

	target := line[method+1:]
	end := bytes.IndexFunc(target, func(c rune) bool { return c <= ' ' || c == 0x7f })
	if end >= 0 {
		target = target[:end]
	}
	if len(target) == 0 {
		if end >= 0 {
			return Nothing, ""
		}
		return unfinished, ""
	}
	if c := target[0]; c != '/' && c != '*' && c != '[' && !isAlphanumeric(c) {
		return Nothing, ""
	}
	if end < 0 {
		return unfinished, ""
	}

	version, ok := bytes.CutPrefix(line[method+1+end:], []byte(httpVersion))
	if !ok && !whole && strings.HasPrefix(httpVersion, string(version)) {
		return More, ""
	}
	if !ok || len(version) > 1 || len(version) == 1 && !isDigit(version[0]) {
		return Nothing, ""
	}
	if len(version) == 0 {
		return unfinished, ""
	}
	if !whole {
		return More, ""
	}
	return Found, targetHost(string(line[:method]), string(target))
}

// isMethod is what common servers take in a method. The grammar allows more, such as digits and full stops, and with it the
// beginnings of other protocols (SSH-2.0).
func isMethod(c byte) bool { return 'A' <= c && c <= 'Z' || c == '-' || c == '_' }

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isAlphanumeric(c byte) bool { return isDigit(c) || 'a' <= c|0x20 && c|0x20 <= 'z' }

// targetHost is the host of a target in absolute or authority form, and empty for one that leaves it to the Host field: RFC 9112
// section 3.2.
func targetHost(method, target string) string {
	authority := target
	if method != "CONNECT" {
		scheme, rest, ok := strings.Cut(target, "://")
		if !ok || strings.TrimLeft(scheme, schemeBytes) != "" {
			return ""
		}
		authority = rest
	}
	if i := strings.IndexAny(authority, "/?#"); i >= 0 {
		authority = authority[:i]
	}
	return withoutPort(authority)
}

const schemeBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-."
