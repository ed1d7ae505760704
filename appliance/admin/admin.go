// Package admin is how people and programs look into a running gateway: a JSON API on a unix socket, which
// only the socket's group may open, and figures for Prometheus on a loopback port, which are read-only.
//
// The types here are the API. The gateway fills them; this package knows nothing of how.
package admin

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"sidegate/appliance/policy"
)

// DefaultSocket is where the API is, unless told otherwise.
const DefaultSocket = "/run/sidegate/admin.sock"

// Gateway is what the API shows and changes. Its methods are called concurrently.
type Gateway interface {
	Status(ctx context.Context) (Status, error)
	// Flows is the flow table, in no order.
	Flows(ctx context.Context) ([]Flow, error)
	// Rules is the policy in force, in order, the default last.
	Rules(ctx context.Context) ([]Rule, error)
	// Names is what clients know addresses by, in no order.
	Names(ctx context.Context) ([]Name, error)
	// FlowCounts are figures that never fall while the gateway lives.
	FlowCounts(ctx context.Context) ([]FlowCount, error)
	// Explain decides a flow with these facts, written as in `sidegate explain` (source_ip, ip, port, …).
	// Where they have an address and no name, it takes the names that are learned for it, as a packet's
	// would be. What is wrong with the facts is a BadRequest.
	Explain(ctx context.Context, facts map[string][]string) (LiveExplanation, error)
	// Reload reads the configuration again. A failure changes nothing.
	Reload(ctx context.Context) (Reload, error)
}

// Status is what the gateway is and how it fares. Counters begin with the daemon, except Drops, which
// survive its restart.
type Status struct {
	Version      string            `json:"version"`
	PID          int               `json:"pid"`
	Started      time.Time         `json:"started"`
	Config       Config            `json:"config"`
	Generation   uint32            `json:"generation"` // number of the policy in force
	Interfaces   []Interface       `json:"interfaces"`
	OwnAddresses []netip.Addr      `json:"own_addresses"`
	LastReload   Reload            `json:"last_reload"`
	Problems     []string          `json:"problems"` // what keeps the gateway from doing its work; each with the fix
	Drops        map[string]uint64 `json:"drops"`    // packets dropped or refused, by reason
	Tables       map[string]Table  `json:"tables"`
	Proxy        Proxy             `json:"proxy"`
	Sniff        Sniff             `json:"sniff"`
	DNS          *DNS              `json:"dns,omitempty"` // nil: DNS is ordinary traffic
}

// Config is the configuration in force.
type Config struct {
	File          string `json:"file"`             // empty: the built-in default
	Digest        string `json:"digest,omitempty"` // SHA-256 of the file, in hexadecimal
	Rules         int    `json:"rules"`            // without the implicit ones
	ImplicitRules int    `json:"implicit_rules"`
	Default       string `json:"default"`
	OnFailure     string `json:"on_failure"`  // block or direct
	ReturnPath    string `json:"return_path"` // asymmetric or symmetric, or auto: … with what it has come to
	IPv6          string `json:"ipv6"`        // advertise or unmanaged
}

// Interface is a LAN interface of the configuration.
type Interface struct {
	Name       string `json:"name"`
	Port       string `json:"port,omitempty"` // the interface of the configuration, if it is a port of this one
	Index      int    `json:"index"`          // 0: there is no such interface at present
	Attached   bool   `json:"attached"`       // packets meet the policy
	Advertised bool   `json:"advertised"`     // clients are told that the box is their IPv6 router
}

// Table is how full a table of the datapath is.
type Table struct {
	Entries uint32 `json:"entries"`
	Max     uint32 `json:"max"`
}

// Proxy is what the transparent proxy does. Refused is by reason: TCP connections and UDP datagrams.
type Proxy struct {
	Connections int                `json:"connections"` // TCP, alive
	Sessions    int                `json:"sessions"`    // UDP mappings, alive
	Flows       int                `json:"flows"`       // UDP pairs of endpoints, alive
	Outbounds   map[string]Traffic `json:"outbounds"`
	Refused     map[string]uint64  `json:"refused"`
}

// Traffic is what went through one outbound. Up is from the client.
type Traffic struct {
	Connections uint64 `json:"connections"` // opened
	Sessions    uint64 `json:"sessions"`
	Failures    uint64 `json:"failures"`
	BytesUp     uint64 `json:"bytes_up"`
	BytesDown   uint64 `json:"bytes_down"`
	PacketsUp   uint64 `json:"packets_up"` // UDP
	PacketsDown uint64 `json:"packets_down"`
}

// Sniff is what the first bytes of flows told, where the policy needed a name. Each flow counts once.
type Sniff struct {
	TLS     uint64 `json:"tls"` // a name, in the protocol's words
	HTTP    uint64 `json:"http"`
	QUIC    uint64 `json:"quic"`
	Nothing uint64 `json:"nothing"` // they have no name: the address decided
	Timeout uint64 `json:"timeout"` // they did not come in time: the address decided
}

// DNS is how the LAN's questions fare.
type DNS struct {
	Queries   uint64 `json:"queries"`
	Cached    uint64 `json:"cached"` // answered from the cache
	Stale     uint64 `json:"stale"`  // of those: past their end, because the upstream did not answer
	Failed    uint64 `json:"failed"` // answered SERVFAIL
	Truncated uint64 `json:"truncated"`
	Taught    uint64 `json:"taught"`   // times that an answer's names were written down before it left
	Filtered  uint64 `json:"filtered"` // answers of which the rebinding filter took something

	Connections int                    `json:"connections"` // TCP, alive
	Entries     int                    `json:"entries"`     // in the cache
	Upstreams   map[string]DNSUpstream `json:"upstreams"`
	Dropped     map[string]uint64      `json:"dropped"` // queries without an answer, by reason
}

// DNSUpstream is what became of the questions to one upstream.
type DNSUpstream struct {
	Queries  uint64 `json:"queries"`
	Failures uint64 `json:"failures"`
}

// Name is what a client knows an address by.
type Name struct {
	Client  string     `json:"client,omitempty"` // its MAC address, or its IP address where there is none; empty: any client
	Address netip.Addr `json:"address"`
	Names   []string   `json:"names"`           // the one that was asked for, then those that it stands for (CNAME)
	Source  string     `json:"source"`          // dns: an answer that the client got; sniffed: the first bytes of a flow
	Age     float64    `json:"age_seconds"`     // since it was last learned
	Expires float64    `json:"expires_seconds"` // until it may be forgotten; flows that use it keep it
}

// Flow is one entry of the flow table.
type Flow struct {
	Network     string         `json:"network"` // tcp, udp, icmp, or the IP protocol's number
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	Verdict     string         `json:"verdict"`
	Translated  bool           `json:"translated,omitempty"` // direct, with the gateway's own address
	Outbound    string         `json:"outbound,omitempty"`
	Rule        string         `json:"rule"` // its name, #N for the Nth of the file if it has none, or default
	Generation  uint32         `json:"generation"`
	State       string         `json:"state"`
	Packets     uint64         `json:"packets"` // from the client, as the hook sees them: after receive offload
	Bytes       uint64         `json:"bytes"`
	Age         float64        `json:"age_seconds"`
	Idle        float64        `json:"idle_seconds"`
	ClientMAC   string         `json:"client_mac,omitempty"`
	Interface   string         `json:"interface"`         // lo: the flow is of the box itself
	Process     *Process       `json:"process,omitempty"` // that opened such a flow; its packets are not counted where it is direct
}

// Process is one on the box itself.
type Process struct {
	Name string `json:"name"` // of the executable
	Unit string `json:"unit"` // of systemd, or the cgroup's directory
	PID  uint32 `json:"pid"`
}

// Rule is one rule of the policy in force and how many flows it decided since that policy came into force.
type Rule struct {
	Index      int    `json:"index"`              // in the file, from 0; -1: the default, or an implicit rule
	Implicit   bool   `json:"implicit,omitempty"` // not in the file: it keeps an upstream proxy from being proxied
	Name       string `json:"name"`               // #N for the Nth of the file if it has none
	Matches    string `json:"matches"`
	Verdict    string `json:"verdict"`
	Translated bool   `json:"translated,omitempty"` // direct, with the gateway's own address
	Outbound   string `json:"outbound"`
	Flows      uint64 `json:"flows"`
}

// FlowCount is how many flows were decided by rules of this name and with this outcome.
type FlowCount struct {
	Rule, Verdict, Outbound string
	Flows                   uint64
}

// Answer is a decision on a flow.
type Answer struct {
	Verdict    policy.Verdict `json:"verdict"`
	Translated bool           `json:"translated,omitempty"` // direct, with the gateway's own address
	Outbound   string         `json:"outbound"`
	Rule       *string        `json:"rule"`  // null: the default
	Index      int            `json:"index"` // as Rule.Index
	Implicit   bool           `json:"implicit,omitempty"`
}

// Same reports whether two answers are one.
func (a Answer) Same(b Answer) bool {
	return a.Verdict == b.Verdict && a.Translated == b.Translated && a.Outbound == b.Outbound && a.Index == b.Index && a.Implicit == b.Implicit &&
		(a.Rule == nil) == (b.Rule == nil) && (a.Rule == nil || *a.Rule == *b.Rule)
}

// Explanation is an answer with its reasons.
type Explanation struct {
	Answer
	Ambiguous bool      `json:"ambiguous,omitempty"` // the flow's names lead to different outcomes
	Sniff     bool      `json:"sniff,omitempty"`     // its first bytes are read, and this is for want of a name there
	Skipped   []Skipped `json:"skipped"`             // every earlier rule, in order
	Sources   Sources   `json:"sources,omitzero"`
}

// Sources are where that comes from which a decision rests on, besides the facts of the question.
type Sources struct {
	Names []Name `json:"names,omitempty"` // learned for the address; none if the question had names
	Lists []List `json:"lists,omitempty"` // that the rules name which were looked at
}

// Known are all learned names, each once, in their order: the names of the flow.
func (s Sources) Known() []string {
	var all []string
	for _, n := range s.Names {
		for _, name := range n.Names {
			if !slices.Contains(all, name) {
				all = append(all, name)
			}
		}
	}
	return all
}

// List is a list of names or addresses, and the file that it was read from.
type List struct {
	Kind string `json:"kind"` // geosite or geoip
	Name string `json:"name"`
	File string `json:"file"`
}

// Skipped is a rule that did not match, and its first field that failed.
type Skipped struct {
	Rule     string `json:"rule"`
	Index    int    `json:"index"`
	Implicit bool   `json:"implicit,omitempty"`
	Field    string `json:"field"`
	Reason   string `json:"reason"`
}

// LiveExplanation is what the policy in force says on a flow, and what the kernel does. They are the same,
// or the gateway is broken.
type LiveExplanation struct {
	Config     Config      `json:"config"`
	Generation uint32      `json:"generation"`
	Policy     Explanation `json:"policy"`
	Kernel     *Answer     `json:"kernel"` // null: the flow has no address, as no packet does
}

// Reload is the outcome of reading the configuration again, or for the first time.
type Reload struct {
	Time       time.Time `json:"time"`
	OK         bool      `json:"ok"`
	Error      string    `json:"error,omitempty"` // one line for each thing that is wrong
	Generation uint32    `json:"generation"`
	Warnings   []string  `json:"warnings,omitempty"`
}
