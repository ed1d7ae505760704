package sniff

import "strings"

const (
	maxName  = 253 // RFC 1035 section 2.3.4, as text
	maxLabel = 63
)

// hostName is a host's name in normal form: lower case, no trailing dot. Underscores occur in practice; what ends in a number is
// an IPv4 address or nothing (RFC 3696 section 2: no top-level domain is all digits).
func hostName(text string) (string, bool) {
	text = strings.TrimSuffix(text, ".")
	if text == "" || len(text) > maxName {
		return "", false
	}
	label, digits := 0, 0
	upper := false
	for i := range len(text) {
		switch c := text[i]; {
		case c == '.':
			if label == 0 {
				return "", false
			}
			label, digits = 0, 0
			continue
		case '0' <= c && c <= '9':
			digits++
		case 'A' <= c && c <= 'Z':
			upper = true
		case 'a' <= c && c <= 'z', c == '-', c == '_':
		default:
			return "", false
		}
		if label++; label > maxLabel {
			return "", false
		}
	}
	if label == digits { // also the empty label
		return "", false
	}
	if upper {
		text = strings.ToLower(text) // all is ASCII by now
	}
	return text, true
}

// withoutPort is the host of an authority (RFC 3986 section 3.2). An IPv6 literal keeps its brackets, and is no name.
func withoutPort(authority string) string {
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		authority = authority[at+1:]
	}
	colon := strings.LastIndexByte(authority, ':')
	if colon < 0 || strings.Trim(authority[colon+1:], "0123456789") != "" {
		return authority
	}
	return authority[:colon]
}
