package config

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// DNSRule takes the questions that it matches. One of Upstream, Answer and Reject is set; upstream is
// the default one where the rule only sets a preference.
type DNSRule struct {
	Match      policy.Rule // of the question's name and of the client; Outbound is empty
	QueryTypes []uint16    // numbers of IANA; empty: all
	Upstream   string
	Answer     []netip.Addr
	Reject     Rejection
	IPVersion  *Preference
	StripECH   *bool
	Position   Position
}

// DNSResponse judges the answers that it matches. One of Upstream, Reject and Accept is set.
type DNSResponse struct {
	Match    policy.Rule // of the question's name, of the client, and of any address of the answer
	From     []string    // upstreams; empty: all
	Upstream string      // is asked instead
	Reject   Rejection
	Accept   bool // ask no further rule
	Position Position
}

// Rejection is how a question is refused. Empty: it is not.
type Rejection string

// The values of Rejection.
const (
	RejectRefused  Rejection = "refused"  // REFUSED
	RejectNXDomain Rejection = "nxdomain" // there is no such name
	RejectEmpty    Rejection = "empty"    // the name has nothing of that type
	RejectDrop     Rejection = "drop"     // silence
)

// dnsRule is a DNSRule on the way.
type dnsRule struct {
	DNSRule
	at       string
	upstream reference
	// Lines of the keys that exclude each other; 0 where they are absent.
	ask, answer, reject, version, ech int
}

// dnsResponse is a DNSResponse on the way.
type dnsResponse struct {
	DNSResponse
	at       string
	upstream reference
	from     []reference
	// Lines of the keys that exclude each other; 0 where they are absent.
	ask, reject, accept int
}

func (d *decoder) dnsRules(at string, n *yaml.Node, c *draft) {
	d.ruleList("dns rule", "upstream", n, func(at, name string, item *yaml.Node) {
		r := dnsRule{at: at, DNSRule: DNSRule{Match: policy.Rule{Name: name}, Position: Position{d.file, item.Line}}}
		entries := d.entries(at, item)
		seen := decode(d, at, entries, dnsRuleKeys, dnsRuleRefusals, &r)
		if d.dnsRuleFits(&r); entries != nil && !hasAny(seen, "upstream", "answer", "reject", "ip_version", "strip_ech") {
			d.errorf(item.Line, "%s: it says nothing to do; add upstream, answer or reject", at)
		}
		c.dns.rules = append(c.dns.rules, r)
	})
}

func hasAny(seen map[string]bool, wanted ...string) bool {
	return slices.ContainsFunc(wanted, func(key string) bool { return seen[key] })
}

// dnsRuleFits reports keys that do not go together.
func (d *decoder) dnsRuleFits(r *dnsRule) {
	d.oneOf(r.at, []action{{"upstream", r.ask}, {"answer", r.answer}, {"reject", r.reject}})
	if r.ask != 0 || r.answer+r.reject == 0 {
		return
	}
	for _, useless := range []action{{"ip_version", r.version}, {"strip_ech", r.ech}} {
		if useless.line != 0 {
			d.errorf(useless.line, "%s: %s has no use where no upstream is asked; remove it", r.at, useless.key)
		}
	}
}

// action is a key that says what to do, and its line; 0: it is absent.
type action struct {
	key  string
	line int
}

// oneOf reports actions that stand beside each other.
func (d *decoder) oneOf(at string, actions []action) {
	var present []action
	for _, a := range actions {
		if a.line != 0 {
			present = append(present, a)
		}
	}
	if len(present) > 1 {
		d.errorf(max(present[0].line, present[1].line), "%s: %s and %s exclude each other; keep one", at, present[0].key, present[1].key)
	}
}

func (d *decoder) dnsResponses(at string, n *yaml.Node, c *draft) {
	d.ruleList("dns response", "upstream", n, func(at, name string, item *yaml.Node) {
		r := dnsResponse{at: at, DNSResponse: DNSResponse{Match: policy.Rule{Name: name}, Position: Position{d.file, item.Line}}}
		entries := d.entries(at, item)
		seen := decode(d, at, entries, dnsResponseKeys, dnsResponseRefusals, &r)
		d.oneOf(at, []action{{"upstream", r.ask}, {"reject", r.reject}, {"accept", r.accept}})
		if entries != nil && !hasAny(seen, "upstream", "reject", "accept") {
			d.errorf(item.Line, "%s: it says nothing to do; add upstream, reject or accept", at)
		}
		c.dns.responses = append(c.dns.responses, r)
	})
}

// What a question tells: its name and type, and who asks. An answer has addresses besides.
var (
	questionFacts = []policy.Dimension{policy.DestinationName, policy.SourceAddress, policy.SourceMAC, policy.InboundInterface}
	answerFacts   = append(slices.Clone(questionFacts), policy.DestinationAddress)
)

// noFact are the reasons against fields of the policy in the rules of DNS.
func noFact(dimension policy.Dimension) string {
	switch dimension {
	case policy.DestinationAddress:
		return "is not known before the answer; judge that under responses"
	case policy.IPVersion:
		return "is not asked here; to tell clients addresses of one version only, write it in a rule of dns, beside not"
	case policy.ProcessName, policy.ProcessPath, policy.ProcessUnit:
		return "is not known of a question; remove it"
	}
	return "is a fact of connections, and a question is none; remove it"
}

// matchKeys are a name and conditions, for rules that know these facts.
func matchKeys[T any](facts []policy.Dimension, match func(*T) *policy.Rule) (keys[T], refusals) {
	conditions, refused := keys[[]policy.Condition]{}, refusals{}
	for _, field := range policy.Fields() {
		if slices.Contains(facts, field.Dimension) {
			conditions[field.Key] = conditionKeys[field.Key]
		} else {
			refused[field.Key] = noFact(field.Dimension)
		}
	}
	table := keys[T]{
		"name": func(d *decoder, at string, n *yaml.Node, r *T) { d.ruleName(at, n) },
		"not": func(d *decoder, at string, n *yaml.Node, r *T) {
			d.not(at, n, conditions, refused, &match(r).Not)
		},
	}
	for key, read := range conditions {
		table[key] = func(d *decoder, at string, n *yaml.Node, r *T) { read(d, at, n, &match(r).Is) }
	}
	return table, refused
}

var dnsRuleKeys, dnsRuleRefusals = func() (keys[dnsRule], refusals) {
	table, refused := matchKeys(questionFacts, func(r *dnsRule) *policy.Rule { return &r.Match })
	maps.Copy(table, keys[dnsRule]{
		"query_type": func(d *decoder, at string, n *yaml.Node, r *dnsRule) {
			values, lines := d.texts(at, n)
			for i, value := range values {
				number, ok := queryType(value)
				if !ok {
					d.errorf(lines[i], "%s: unknown type %s%s", at, quote(value), didYouMean(value, slices.Collect(maps.Keys(queryTypes))))
				}
				r.QueryTypes = append(r.QueryTypes, number)
			}
		},
		"upstream": func(d *decoder, at string, n *yaml.Node, r *dnsRule) {
			r.upstream, r.ask = d.reference(at, n), n.Line
		},
		"answer": func(d *decoder, at string, n *yaml.Node, r *dnsRule) {
			r.Answer, r.answer = d.addresses(at, n), n.Line
		},
		"reject": func(d *decoder, at string, n *yaml.Node, r *dnsRule) {
			r.Reject, r.reject = d.rejection(at, n), n.Line
		},
		"ip_version": func(d *decoder, at string, n *yaml.Node, r *dnsRule) {
			r.IPVersion, r.version = new(Preference), n.Line
			d.preference(at, n, r.IPVersion)
		},
		"strip_ech": func(d *decoder, at string, n *yaml.Node, r *dnsRule) {
			r.StripECH, r.ech = new(bool), n.Line
			d.boolean(at, n, r.StripECH)
		},
	})
	return table, refused
}()

var dnsResponseKeys, dnsResponseRefusals = func() (keys[dnsResponse], refusals) {
	table, refused := matchKeys(answerFacts, func(r *dnsResponse) *policy.Rule { return &r.Match })
	maps.Copy(table, keys[dnsResponse]{
		"from": func(d *decoder, at string, n *yaml.Node, r *dnsResponse) {
			names, lines := d.texts(at, n)
			for i, name := range names {
				r.from = append(r.from, reference{name, lines[i]})
			}
			r.From = names
		},
		"upstream": func(d *decoder, at string, n *yaml.Node, r *dnsResponse) {
			r.upstream, r.ask = d.reference(at, n), n.Line
			r.Upstream = r.upstream.name
		},
		"reject": func(d *decoder, at string, n *yaml.Node, r *dnsResponse) {
			r.Reject, r.reject = d.rejection(at, n), n.Line
		},
		"accept": func(d *decoder, at string, n *yaml.Node, r *dnsResponse) {
			r.accept = n.Line
			word, ok := d.choice(at, n, "true")
			r.Accept = ok && word == "true"
		},
	})
	return table, refused
}()

func (d *decoder) rejection(at string, n *yaml.Node) Rejection {
	word, _ := d.choice(at, n, string(RejectRefused), string(RejectNXDomain), string(RejectEmpty), string(RejectDrop))
	return Rejection(word)
}

// linkDNS resolves what the section refers to.
func (d *decoder) linkDNS(c *draft) {
	if c.DNS == nil {
		return
	}
	d.knownUpstream("dns: default", c.dns.fallback, c)
	c.DNS.Default = c.dns.fallback.name
	for _, detour := range c.dns.detours {
		d.detourFits(detour, c)
	}
	rules := make([]conditional, 0, len(c.dns.rules))
	for _, r := range c.dns.rules {
		r.Upstream = r.upstream.name
		if d.knownUpstream(r.at, r.upstream, c); r.ask+r.answer+r.reject == 0 {
			r.Upstream = c.DNS.Default
		}
		c.DNS.Rules = append(c.DNS.Rules, r.DNSRule)
		rules = append(rules, conditional{r.at, r.Position.Line, r.Match, fmt.Sprint(slices.Sorted(slices.Values(r.QueryTypes)))})
	}
	d.unreachable(rules)
	responses := make([]conditional, 0, len(c.dns.responses))
	for _, r := range c.dns.responses {
		d.knownUpstream(r.at, r.upstream, c)
		for _, from := range r.from {
			if d.knownUpstream(r.at, from, c) && from.name == r.upstream.name {
				d.errorf(from.line, "%s: from has %s, which is also asked instead; remove it from one of them", r.at, quote(from.name))
			}
		}
		c.DNS.Responses = append(c.DNS.Responses, r.DNSResponse)
		responses = append(responses, conditional{r.at, r.Position.Line, r.Match, fmt.Sprint(slices.Sorted(slices.Values(r.From)))})
	}
	d.unreachable(responses)
}

// knownUpstream says whether a reference leads to an upstream, and reports it if not. One that could not
// be read was reported before.
func (d *decoder) knownUpstream(at string, to reference, c *draft) bool {
	if to.name == "" {
		return false
	}
	if _, ok := c.DNS.Upstreams[to.name]; ok {
		return true
	}
	if len(c.DNS.Upstreams) == 0 {
		return false // reported
	}
	d.errorf(to.line, "%s: unknown dns upstream %s%s", at, quote(to.name), didYouMean(to.name, slices.Collect(maps.Keys(c.DNS.Upstreams))))
	return false
}

// queryTypes are the types of records that people ask for, by their mnemonics (IANA, "Resource Record
// (RR) TYPEs"). TYPEn is any of them (RFC 3597 section 5).
var queryTypes = map[string]uint16{
	"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "PTR": 12, "HINFO": 13, "MX": 15, "TXT": 16, "AAAA": 28, "SRV": 33, "NAPTR": 35, "DNAME": 39,
	"DS": 43, "SSHFP": 44, "RRSIG": 46, "NSEC": 47, "DNSKEY": 48, "TLSA": 52, "SVCB": 64, "HTTPS": 65, "URI": 256, "CAA": 257, "ANY": 255,
}

// queryType reads a mnemonic, or TYPEn.
func queryType(text string) (uint16, bool) {
	upper := strings.ToUpper(text)
	if number, ok := queryTypes[upper]; ok {
		return number, true
	}
	digits, generic := strings.CutPrefix(upper, "TYPE")
	number, err := strconv.ParseUint(digits, 10, 16)
	return uint16(number), generic && err == nil && number != 0
}
