// Package config reads the configuration of sidegate: one YAML, JSON or TOML file, strictly decoded.
//
// Everything that is wrong with a file is reported at once, one line each,
//
//	FILE:LINE: rule "nas": unknown outbound "tokyo" (have: hk, us)
//
// naming the object and the fix. What loads here is what the gateway runs; `sidegate check` asks
// nothing more. The keys of a rule are those of policy.Fields: this package knows none of them.
// testdata/example.yaml shows every key.
package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/knadh/koanf/v2"

	"sidegate/appliance/policy"
)

// Config is a checked configuration. It is not changed after it is loaded. Printing it, or encoding
// it as JSON, shows no secret.
type Config struct {
	File       string // as the user named it
	Interfaces Interfaces
	OnFailure  policy.Verdict // of proxied flows while the proxy is down: Block or Direct
	ReturnPath ReturnPath
	IPv6       IPv6
	Sniff      Sniff
	Dial       Dial
	// TrustSniffed takes the name that a client's first bytes tell without asking DNS whether it has the
	// address that the client meant.
	TrustSniffed bool
	DNS          *DNS // nil: DNS is ordinary traffic
	Geodata      Geodata
	Published    []Service
	Gateway      Gateway
	Metrics      Metrics
	Proxy        Proxy
	PerClient    PerClient
	Outbounds    map[string]Outbound // by name, without direct and block
	Policy       *policy.Policy      // Geo is set if there is a geodata section
	Tests        []Test
	Warnings     []string // `FILE:LINE: …`, about what loads but is likely a mistake

	ruleLines []int // of Policy.Rules
}

// Interfaces are the sides of the gateway.
type Interfaces struct {
	LAN      []string // where clients are; exactly [Auto]: the interface of the default route
	Position Position
}

// Auto as the only LAN interface stands for the interface of the default route.
const Auto = "auto"

// ReturnPath is how replies of direct traffic reach the client.
type ReturnPath string

// The values of ReturnPath.
const (
	Asymmetric     ReturnPath = "asymmetric" // not translated: replies go from the router to the client, past the gateway
	Symmetric      ReturnPath = "symmetric"  // translated to the gateway's address: replies come back through it
	ReturnPathAuto ReturnPath = "auto"       // asymmetric, until the network is seen to drop that
)

// IPv6 is whether the gateway makes itself the LAN's IPv6 router.
type IPv6 string

// The values of IPv6.
const (
	IPv6Unmanaged IPv6 = "unmanaged" // clients use the gateway for IPv6 if somebody else tells them to
	IPv6Advertise IPv6 = "advertise" // by router advertisements, before the main router
)

// Gateway is how the box's own connections are treated.
type Gateway struct {
	Local    bool   // as the clients' are: by the rules
	Cgroup   string // a directory of cgroup v2, for the processes in and below it only; empty: all processes
	Position Position
}

// Sniff is when the first bytes of a flow are read for the name of its server.
type Sniff string

// The values of Sniff.
const (
	SniffOff       Sniff = "off"       // never
	SniffAmbiguous Sniff = "ambiguous" // the address was learned under names that lead to different outbounds
	SniffUnknown   Sniff = "unknown"   // or it has no name, and a rule that could match asks for one
)

// Dial is what an upstream proxy is told of a flow whose name is known.
type Dial string

// The values of Dial.
const (
	DialIP     Dial = "ip"     // the address that the client meant
	DialDomain Dial = "domain" // the name
)

// Metrics is the Prometheus endpoint.
type Metrics struct {
	Listen   string // a loopback address with its port; empty: none
	Position Position
}

// Proxy is how long the transparent proxy waits. 0 stands for the proxy's own choice.
type Proxy struct {
	DialTimeout      time.Duration // to resolve and reach an upstream over TCP
	HandshakeTimeout time.Duration // from the dial until bytes can flow, the upstream's own dial included
	HalfClosed       time.Duration // life of a connection that is silent and closed on one side
	UDPIdle          time.Duration // life of a silent UDP session (RFC 4787 section 4.3)
}

// PerClient is the share of one client, told by its address, of what all clients share. 0 stands for
// the choice of the part that counts.
type PerClient struct {
	Flows       uint32 // in the flow table
	Connections uint32 // proxied TCP connections
	UDPSessions uint32 // proxied UDP source endpoints
	UDPFlows    uint32 // proxied UDP source and destination pairs
	DNSQueries  uint32 // questions a second
}

// Load reads a configuration file, with the format that its suffix says, the password files that it
// names: a relative one under $CREDENTIALS_DIRECTORY if it is there, else beside the file; and of its
// geodata the lists that its rules name, with relative files beside it too.
// The error holds one *Error for each thing that is wrong, joined in the order of the file.
func Load(path string) (*Config, error) {
	format, err := FormatOf(path)
	if err != nil {
		return nil, err
	}
	data, err := read(path)
	if err != nil {
		return nil, Position{File: path}.Errorf("reading the config: %w", err)
	}
	return Parse(path, data, format)
}

// maxSize bounds a configuration file in bytes: some 500,000 prefixes.
const maxSize = 16 << 20

func read(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, reason(err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, reason(err)
	}
	data := bytes.NewBuffer(make([]byte, 0, min(info.Size(), maxSize)+bytes.MinRead))
	if n, err := data.ReadFrom(io.LimitReader(file, maxSize+1)); err != nil {
		return nil, reason(err)
	} else if n > maxSize {
		return nil, fmt.Errorf("it is larger than %d MiB", maxSize>>20)
	}
	return data.Bytes(), nil
}

// reason drops the path of a file error, where the message says it already.
func reason(err error) error {
	if at := (*fs.PathError)(nil); errors.As(err, &at) {
		return at.Err
	}
	return err
}

// Parse is Load of a text that is in memory. Name is what errors call it; its directory is where
// password files and geodata are looked for.
func Parse(name string, data []byte, format Format) (*Config, error) {
	d := newDecoder(name, len(data))
	if syntaxes[format] == nil {
		return nil, Position{File: name}.Errorf("unknown format %q %s", format, have([]string{string(YAML), string(JSON), string(TOML)}))
	}
	sections := koanf.New("/")
	if err := sections.Load(text(data), &document{format, d}); err != nil {
		return nil, Position{File: name}.Errorf("%w", err)
	}
	if len(d.errs) > 0 && len(sections.Keys()) == 0 { // it could not be parsed
		return nil, d.err()
	}
	c := d.config(filepath.Dir(name), sections)
	if err := d.err(); err != nil {
		return nil, err
	}
	inFileOrder(d.warnings)
	for _, w := range d.warnings {
		c.Warnings = append(c.Warnings, w.Error())
	}
	return c, nil
}

//go:embed default.yaml
var defaultYAML []byte

// Default is the configuration of a gateway that was given none: the interface of the default route
// is the LAN, and everything is direct.
func Default() *Config {
	c, err := Parse("default.yaml (built in)", defaultYAML, YAML)
	if err != nil {
		panic("the built-in config: " + err.Error()) // it is part of the program, and a test loads it
	}
	return c
}

// RulePosition is where Policy.Rules[index] stands; an index out of range, such as the -1 of the
// default, is the file as a whole.
func (c *Config) RulePosition(index int) Position {
	if index < 0 || index >= len(c.ruleLines) {
		return Position{File: c.File}
	}
	return Position{c.File, c.ruleLines[index]}
}
