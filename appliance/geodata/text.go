package geodata

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"unicode"

	"sidegate/appliance/policy"
)

// A list of text has an entry a line:
//
//	example.com           this name
//	.example.com          the names below it; also *.example.com
//	+.example.com         both; also domain:example.com
//	a.*.example.com       names with some label there; so *.*.example.com has two
//	full:example.com      this name
//	keyword:track         names with this text anywhere
//	regexp:^ads?\.        names in which this expression is found; also regex:
//	192.0.2.0/24          these addresses
//	0.0.0.0 a.example     a hosts file's line: these names, whatever the address
//	# comment             also after an entry and a space

// badLine is what is wrong with a line.
type badLine struct {
	line int
	err  error
}

func (b *badLine) Error() string { return fmt.Sprintf("line %d: %v", b.line, b.err) }

const mostBadLines = 8 // are reported; who has more has another problem than each of them

func readText(data []byte, c *content) (errs []error) {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	number, bad := 0, 0
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		number++
		err := c.addLine(string(line))
		if err == nil {
			continue
		}
		if bad++; bad <= mostBadLines {
			errs = append(errs, &badLine{number, err})
		}
	}
	if bad > mostBadLines {
		errs = append(errs, fmt.Errorf("%d more lines are bad", bad-mostBadLines))
	}
	return errs
}

// linePrefixes in front of an entry say what it is. The first that fits counts.
var linePrefixes = []struct {
	prefix string
	field  *policy.Field
	put    string // in front of the rest
	wild   bool   // there may be wildcards in the rest
}{
	{"full:", exact, "", false},
	{"domain:", suffix, "", false},
	{"keyword:", keyword, "", false},
	{"regexp:", regex, "", false},
	{"regex:", regex, "", false},
	{"+.", suffix, "", true},
	{"*.", suffix, ".", true},
	{".", suffix, ".", true},
}

// otherSyntax are beginnings of lines that other programs read.
var otherSyntax = []struct{ prefix, fix string }{
	{"||", "this is an ad blocker's rule: take the list's form for hosts or DNS"},
	{"@@", "this is an ad blocker's rule: take the list's form for hosts or DNS"},
	{"!", "comments begin with #"},
	{"//", "comments begin with #"},
	{"payload:", "this is YAML: take the list's text form"},
	{"- ", "this is YAML: take the list's text form"},
	{"{", "this is JSON: compile it to .srs"},
	{"server=/", "this is a dnsmasq configuration: write only the names"},
	{"address=/", "this is a dnsmasq configuration: write only the names"},
	{"include:", "lists cannot include others: name both in the rule"},
	{"DOMAIN", "this is a Clash rule: write only its name, behind +. if it is a suffix"},
	{"IP-CIDR", "this is a Clash rule: write only its prefix"},
}

func (c *content) addLine(line string) error {
	line = withoutComment(strings.TrimSpace(line))
	if line == "" {
		return nil
	}
	for _, other := range otherSyntax {
		if strings.HasPrefix(line, other.prefix) {
			return fmt.Errorf("%.40q: %s", line, other.fix)
		}
	}
	for _, p := range linePrefixes {
		if rest, ok := strings.CutPrefix(line, p.prefix); ok {
			if strings.ContainsFunc(rest, unicode.IsSpace) && p.field != regex {
				return oneEntry(line)
			}
			if strings.Contains(rest, "*") && p.wild {
				return c.addTextWildcards(line)
			}
			return c.addName(p.field, p.put+rest)
		}
	}
	first, rest, more := strings.Cut(line, " ")
	if tab := strings.IndexByte(line, '\t'); tab >= 0 && (!more || tab < len(first)) {
		first, rest, more = line[:tab], line[tab+1:], true
	}
	_, err := netip.ParseAddr(first)
	switch {
	case more && err == nil:
		return c.addHosts(strings.Fields(rest))
	case more:
		return oneEntry(line)
	case err == nil || strings.ContainsAny(line, "/:"):
		return c.addAddress(line)
	}
	if strings.Contains(line, "*") {
		return c.addTextWildcards(line)
	}
	return c.addName(exact, line)
}

// addTextWildcards adds a name with wildcards not only in front: as mihomo has it, each is one label.
func (c *content) addTextWildcards(name string) error {
	if below, ok := strings.CutPrefix(name, "."); ok {
		return c.addWildcards("+." + below)
	}
	if itself, ok := strings.CutPrefix(name, "+."); ok {
		if err := c.addWildcards(itself); err != nil {
			return err
		}
	}
	return c.addWildcards(name)
}

func oneEntry(line string) error {
	if _, attribute, ok := strings.Cut(line, " @"); ok && !strings.Contains(attribute, " ") {
		return fmt.Errorf("%.40q: attributes are read from geosite files only: remove it", line)
	}
	return fmt.Errorf("%.40q: write one entry a line", line)
}

// withoutComment cuts at a # that begins the line or follows a space: an expression may have one.
func withoutComment(line string) string {
	for i := range len(line) {
		if line[i] == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
			return strings.TrimSpace(line[:i])
		}
	}
	return line
}

func (c *content) addAddress(text string) error {
	if strings.Contains(text, "://") {
		return fmt.Errorf("%.40q: this is a URL: write only the host's name", text)
	}
	condition, err := address.Parse(text)
	if err != nil {
		if !startsAsAddress(text) {
			return fmt.Errorf("%.40q: neither a name nor an address: write full:, domain:, keyword: or regexp: before what it is", text)
		}
		return err
	}
	return c.addPrefix(condition.Values[0].(netip.Prefix))
}

func startsAsAddress(text string) bool {
	before, _, _ := strings.Cut(text, "/")
	_, err := netip.ParseAddr(before)
	return err == nil
}

// hostsOwnNames are in every hosts file for the sake of the machine itself.
var hostsOwnNames = map[string]bool{
	"localhost": true, "localhost.localdomain": true, "local": true, "broadcasthost": true, "ip6-localhost": true,
	"ip6-loopback": true, "ip6-localnet": true, "ip6-mcastprefix": true, "ip6-allnodes": true, "ip6-allrouters": true, "ip6-allhosts": true,
}

func (c *content) addHosts(names []string) error {
	for _, name := range names {
		if _, err := netip.ParseAddr(name); err == nil || hostsOwnNames[strings.ToLower(name)] {
			continue
		}
		if err := c.addName(exact, name); err != nil {
			return err
		}
	}
	return nil
}
