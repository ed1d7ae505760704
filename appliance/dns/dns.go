// Package dns answers the LAN's DNS queries: it takes what the datapath steers to its sockets, whatever
// resolver the client asked, and replies with that resolver's address as source.
//
// A Resolver is what the configuration says: rules, upstreams and a cache. It is immutable, so a reload is
// another Resolver. A Server is the sockets, which outlive reloads.
//
// Whoever gets an address from here was first shown to the Learner: the answer leaves after Learn returned,
// on every path, and does not leave at all if it failed. So the datapath knows each name before the client
// can use it.
//
// A cached answer is a message in wire form. Sending it again means copying it and writing the client's id,
// the case of its question, and the time that is left; it happens on the thread that read the query, between
// recvmmsg and sendmmsg. Everything that can wait for anything has a goroutine.
package dns

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/policy"
)

// Exchanger asks one upstream one question. Package exchange has them for every protocol. It is called from
// many goroutines; the question is not shared and may be changed. The context may last for Overtime longer than a
// client waits: the answer is kept for when it asks again.
type Exchanger interface {
	Exchange(ctx context.Context, question *dns.Msg) (*dns.Msg, error)
}

// Learner is told which names lead to which addresses before a client is.
type Learner interface {
	// Learn returns when the kernel knows. Names are in lower case without the last dot: the name that the
	// client asked for, then those of its CNAME chain. It is called from many goroutines, again for each
	// client, never without addresses. It must not change the slices. An error keeps the answer from the
	// client.
	Learn(ctx context.Context, client netip.Addr, names []string, addrs []netip.Addr, ttl time.Duration) error
}

// Settings are what the configuration says about DNS. Upstreams and Default are required; every other field
// has a usable zero value.
type Settings struct {
	Upstreams map[string]Exchanger // the caller closes them, after the Resolver
	Default   string               // the upstream of questions that no rule matches
	Hosts     map[string][]netip.Addr
	Rules     []Rule
	Responses []Response
	Geo       policy.GeoData

	IPVersion Preference
	StripECH  bool // remove encrypted-client-hello keys from HTTPS and SVCB records

	// RebindAllow are suffixes whose names may have private addresses, beside those that always may: lan,
	// local, home.arpa, internal, localhost, names of one label, and ipv4only.arpa itself. As in domain_suffix one is the
	// name and what is below it; with a leading dot, only what is below it.
	RebindAllow []string
	// Own reports the gateway's own addresses: no public name may lead to them. nil: none.
	Own func(netip.Addr) bool

	Cache Cache
	Log   *slog.Logger // nil: no log
}

// Cache bounds what is kept and for how long.
type Cache struct {
	Entries int           // also bounds the memory, to 1 KiB for each, but no less than 2 MiB; 0: 65,536
	MinTTL  time.Duration // shorter lives are raised to it
	MaxTTL  time.Duration // longer ones are cut; 0: 24 h
	// Stale is for how long after its end an answer may be used while its upstream does not answer
	// (RFC 8767). 0: never.
	Stale      time.Duration
	FailureTTL time.Duration // for how long an upstream that failed a question is not asked it again (RFC 9520); 0: 5 s
	Prefetch   bool          // renew an answer that is asked for in the last tenth of its life
}

// Rule is about questions. The first that matches decides; rules do not apply to Settings.Hosts.
type Rule struct {
	// Match has conditions on the name and on the client: source_ip_cidr, source_mac_address and
	// inbound_interface. Its Outbound is not looked at.
	Match      policy.Rule
	QueryTypes []uint16 // 1 is A, 28 AAAA, 65 HTTPS; empty: every type

	// One of these, or none: then the default upstream is asked.
	Upstream string
	Answer   []netip.Addr // of A and AAAA questions; others get an empty answer
	Reject   Reject

	IPVersion *Preference // nil: as Settings say
	StripECH  *bool       // nil: as Settings say
}

// Response is about answers. The first that matches decides; if none does the answer is accepted.
type Response struct {
	// Match is as in Rule, and has conditions on the destination address: those hold if they hold for any
	// address in the answer. The names are the question's and those of the answer's CNAME chain.
	Match policy.Rule
	From  []string // the upstreams whose answers are meant; empty: any

	// One of these.
	Upstream string // ask this one instead; a rule that leads to one already asked is passed over
	Reject   Reject
	Accept   bool
}

// Preference says which family of addresses clients are told.
type Preference uint8

// The preferences. Preferred means: the other family is told only where a name has no address of this one.
const (
	AnyVersion Preference = iota
	Prefer4
	Prefer6
	Only4
	Only6
)

// Reject says how a question is refused.
type Reject uint8

// The ways to refuse.
const (
	RejectNone Reject = iota
	Refused           // REFUSED
	NXDomain          // no such name
	Empty             // the name exists, but has nothing of this type
	Drop              // silence
)

// Options says what a Server works with. Learner is required; every other field has a usable zero value.
type Options struct {
	Learner Learner
	// ClientFacts returns the client's MAC address and the interface it is behind, as far as they are known.
	// nil: nothing is known.
	ClientFacts func(netip.Addr) (policy.MAC, string)
	// Allow reports who may ask; others get no answer. nil: private and link-local addresses. What it and
	// ClientFacts say of a client is believed for some seconds.
	Allow func(netip.Addr) bool

	Mark   uint32       // firewall mark (SO_MARK) of the sockets that face the clients; 0: none
	Log    *slog.Logger // nil: no log
	Limits Limits
}

// Limits bounds what one device may hold, so that a flood costs nobody else anything. A device is a MAC
// address, or where ClientFacts knows none an IPv4 address or an IPv6 subnet of 64 bits. 0 is the default.
type Limits struct {
	Queries     int // of one address a second; beyond it they are dropped. 250,000
	Outstanding int // queries that wait for an upstream; beyond it they are dropped. 512
	Connections int // TCP; beyond it new ones are reset. 32
}
