package policy

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// pattern is a value of the name dimension. Names come in normal form: lower case, no trailing dot.
type pattern interface {
	Value
	matches(name string) bool
}

type (
	exactName string
	// suffixName begins with a dot if only the subdomains match.
	suffixName  string
	keywordName string
	regexName   struct {
		source string
		re     *regexp.Regexp
	}
	siteName string // a category of the geosite data, lower case; not a pattern: it stands for many
)

func (p exactName) String() string   { return string(p) }
func (p suffixName) String() string  { return string(p) }
func (p keywordName) String() string { return string(p) }
func (p regexName) String() string   { return p.source }
func (p siteName) String() string    { return string(p) }

func (p exactName) matches(name string) bool   { return name == string(p) }
func (p keywordName) matches(name string) bool { return strings.Contains(name, string(p)) }
func (p regexName) matches(name string) bool   { return p.re.MatchString(name) }

func (p suffixName) matches(name string) bool {
	if strings.HasPrefix(string(p), ".") {
		return strings.HasSuffix(name, string(p))
	}
	return name == string(p) || strings.HasSuffix(name, "."+string(p))
}

func matchName(v Value, f *facts, _ GeoData) bool {
	return slices.ContainsFunc(f.name, v.(pattern).matches)
}

func matchSite(v Value, f *facts, geo GeoData) bool {
	for _, p := range sitePatterns(geo, v.(siteName)) {
		if slices.ContainsFunc(f.name, p.(pattern).matches) {
			return true
		}
	}
	return false
}

// sitePatterns returns nothing for an unknown category: Validate has refused it.
func sitePatterns(geo GeoData, category siteName) []Value {
	if geo == nil {
		return nil
	}
	values, _ := geo.Site(string(category))
	return values
}

// normalName is the form that names are compared in: ASCII lower case without the root's dot.
func normalName(name string) string {
	name = strings.TrimSuffix(name, ".")
	for i := range len(name) {
		if 'A' <= name[i] && name[i] <= 'Z' {
			return strings.Map(lowerASCII, name)
		}
	}
	return name
}

func lowerASCII(r rune) rune {
	if 'A' <= r && r <= 'Z' {
		return r + 'a' - 'A'
	}
	return r
}

func parseDomain(text string) (Value, error) {
	name := normalName(text)
	if err := checkName(name); err != nil {
		return nil, err
	}
	return exactName(name), nil
}

func parseSuffix(text string) (Value, error) {
	name := normalName(text)
	if err := checkName(strings.TrimPrefix(name, ".")); err != nil {
		return nil, err
	}
	return suffixName(name), nil
}

// parseKeyword keeps a trailing dot: in the middle of a name it means something.
func parseKeyword(text string) (Value, error) {
	keyword := strings.Map(lowerASCII, text)
	if keyword == "" {
		return nil, errors.New("empty text is in every name: remove it")
	}
	if err := checkCharacters(keyword); err != nil {
		return nil, err
	}
	return keywordName(keyword), nil
}

func parseRegex(text string) (Value, error) {
	if text == "" {
		return nil, errors.New("the empty expression matches every name: remove it")
	}
	re, err := regexp.Compile(text)
	if err != nil {
		return nil, fmt.Errorf("not an RE2 expression: %s", strings.TrimPrefix(err.Error(), "error parsing regexp: "))
	}
	if !isASCII(text) {
		return nil, errNotASCII
	}
	// Names are in lower case, so an upper-case letter would silently never match.
	if strings.ContainsFunc(text, func(r rune) bool { return 'A' <= r && r <= 'Z' }) {
		if re, err = regexp.Compile("(?i)" + text); err != nil {
			return nil, fmt.Errorf("not an RE2 expression when case is ignored: %w", err)
		}
	}
	return regexName{text, re}, nil
}

func parseSite(text string) (Value, error) {
	category, err := parseCategory(text)
	return siteName(category), err
}

// checkName refuses what cannot be a host's name on the wire (RFC 1035 section 2.3.4; underscores occur
// in practice, RFC 2782).
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty")
	case strings.Contains(name, "://"):
		return errors.New("this is a URL: write only the host's name")
	case strings.HasPrefix(name, "*."):
		return fmt.Errorf("names have no wildcards: write domain_suffix: %s", name[1:])
	}
	if isAddr(name) {
		return errors.New("this is an address: use ip_cidr")
	}
	if err := checkCharacters(name); err != nil {
		return err
	}
	if len(name) > 253 {
		return fmt.Errorf("the name has %d bytes, and names have at most 253", len(name))
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" {
			return errors.New("two dots follow each other, or the name begins with one: remove it")
		}
		if len(label) > 63 {
			return fmt.Errorf("the label %.12s… has %d bytes, and labels have at most 63", label, len(label))
		}
	}
	return nil
}

var errNotASCII = errors.New("only ASCII is compared: write the name's punycode form, such as xn--bcher-kva.example for bücher.example")

func checkCharacters(name string) error {
	if !isASCII(name) {
		return errNotASCII
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		case c == '*':
			return errors.New("names have no wildcards: use domain_suffix, domain_keyword or domain_regex")
		default:
			return fmt.Errorf("%q cannot be in a name: use letters, digits, hyphens and dots", c)
		}
	}
	return nil
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
