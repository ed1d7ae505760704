package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/policy"
)

func TestDefault(t *testing.T) {
	c := Default()
	if !slices.Equal(c.Interfaces.LAN, []string{Auto}) {
		t.Errorf("LAN is %q", c.Interfaces.LAN)
	}
	if c.Policy.Default != policy.OutboundDirect || len(c.Policy.Rules) != 0 {
		t.Errorf("the policy is %+v", c.Policy)
	}
	if c.OnFailure != policy.Block || c.ReturnPath != Asymmetric || c.Metrics.Listen != "" {
		t.Errorf("on_failure %v, return_path %v, metrics %q", c.OnFailure, c.ReturnPath, c.Metrics.Listen)
	}
}

// TestExample loads the reference, which promises to have every key.
func TestExample(t *testing.T) {
	credentials := t.TempDir()
	write(t, filepath.Join(credentials, "us.pass"), "from systemd\n", 0o600)
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	const name = "testdata/example.yaml"
	c, err := Load(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) > 0 {
		t.Errorf("warnings: %q", c.Warnings)
	}
	if err := c.Check(); err != nil {
		t.Errorf("its tests fail:\n%v", err)
	}
	if len(c.Tests) == 0 {
		t.Error("it has no tests")
	}
	if want := []Service{{netip.MustParseAddr("192.168.0.3"), 51820, policy.UDP, c.Published[0].Position}}; !slices.Equal(c.Published, want) {
		t.Errorf("published %+v", c.Published)
	}
	if want := (Proxy{5 * time.Second, 10 * time.Second, 2 * time.Hour, 5 * time.Minute}); c.Proxy != want {
		t.Errorf("proxy %+v", c.Proxy)
	}
	if want := (PerClient{8192, 16384, 512, 2048, 250000}); c.PerClient != want {
		t.Errorf("per_client %+v", c.PerClient)
	}
	us := c.Outbounds["us"]
	if us.URL != "https://proxy.example:443" || us.Username != "sidegate" || us.Password.Reveal() != "from systemd" {
		t.Errorf("outbound us: %s, user %s, password %q", us.URL, us.Username, us.Password.Reveal())
	}

	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var wanted []string
	for key := range sectionKeys {
		wanted = append(wanted, key)
	}
	for key := range ruleKeys {
		wanted = append(wanted, key)
	}
	for _, table := range []any{dnsKeys, dnsUpstreamKeys, dnsRuleKeys, dnsResponseKeys, dnsCacheKeys, geodataKeys, gatewayKeys, perClientKeys} {
		for _, key := range reflect.ValueOf(table).MapKeys() {
			wanted = append(wanted, key.String())
		}
	}
	for key := range flowKeys {
		wanted = append(wanted, key)
	}
	for _, key := range wanted {
		if !strings.Contains(string(text), key+":") {
			t.Errorf("it does not show %s", key)
		}
	}
	lines := strings.Split(string(text), "\n")
	for i, r := range c.Policy.Rules {
		at := c.RulePosition(i)
		if at.File != name || !strings.Contains(lines[at.Line-1], "name: "+r.Name) {
			t.Errorf("%s is said to be at %s", c.Policy.RuleLabel(i), at)
		}
	}
	for name, o := range c.Outbounds {
		if !strings.Contains(lines[o.Position.Line-1], name+":") {
			t.Errorf("outbound %q is said to be at %s", name, o.Position)
		}
	}
	if got := c.RulePosition(-1).String(); got != name {
		t.Errorf("the default is said to be at %s", got)
	}
}

// TestFormats writes one configuration in three formats.
func TestFormats(t *testing.T) {
	texts := map[Format]string{
		YAML: `
interfaces: { lan: eth0 }
on_failure: direct
outbounds:
  hk:
    url: socks5://bob@10.0.0.7:1080?x=y
rules:
  - name: nas
    ip_cidr: 10.0.0.0/8
    not:
      port: [443, 1000-2000]
    outbound: direct
    mark: 0x10
    snat: false
  - { source_port: 5, outbound: block, reject: true }
default: hk
tests:
  - { domain: [a.example, b.example], port: 5, network: tcp, expect: hk }
`,
		JSON: `{
	"interfaces": {"lan": ["eth0"]},
	"on_failure": "direct",
	"outbounds": {"hk": {"url": "socks5://bob@10.0.0.7:1080?x=y"}},
	"rules": [
		{"name": "nas", "ip_cidr": ["10.0.0.0\/8"], "not": {"port": [443, "1000-2000"]}, "outbound": "direct", "mark": 16, "snat": false},
		{"source_port":5,"outbound":"block","reject":true}
	],
	"default": "h\u006b",
	"tests": [{"domain": ["a.example", "b.example"], "port": 5, "network": "tcp", "expect": "hk"}]
}`,
		TOML: `
on_failure = "direct"
default = "hk"
interfaces.lan = "eth0"

[[rules]]
name = "nas"
ip_cidr = "10.0.0.0/8"
not.port = [ # comments are no values
  443,
  "1000-2000",
]
outbound = 'direct'
mark = 0x1_0
snat = false

[[rules]]
source_port = 5
outbound = "block"
reject = true

[outbounds.hk]
url = "socks5://bob@10.0.0.7:1080?x=y"

[[tests]]
domain = ["a.example", "b.example"]
port = 5
network = "tcp"
expect = "h\u006b"
`,
	}
	loaded := map[Format]*Config{}
	for format, text := range texts {
		c, err := Parse("f."+string(format), []byte(text), format)
		if err != nil {
			t.Errorf("%s: %v", format, err)
			continue
		}
		loaded[format] = withoutPositions(c)
	}
	if t.Failed() {
		return
	}
	y := loaded[YAML]
	if r := y.Policy.Rules[0]; r.Mark != 16 || r.SNAT == nil || *r.SNAT || len(r.Is) != 1 || len(r.Not) != 1 || len(r.Not[0].Values) != 2 {
		t.Errorf("rule nas is %+v", r)
	}
	if o := y.Outbounds["hk"]; o.URL != "socks5://10.0.0.7:1080?x=y" || o.Username != "bob" || !o.Password.IsZero() {
		t.Errorf("outbound hk is %+v", o)
	}
	if y.OnFailure != policy.Direct || !y.Policy.Rules[1].Reject || y.Policy.Default != "hk" {
		t.Errorf("the config is %+v", y)
	}
	for _, format := range []Format{JSON, TOML} {
		if !reflect.DeepEqual(loaded[format], y) {
			t.Errorf("%s is\n%+v\nbut YAML\n%+v", format, loaded[format], y)
		}
	}
}

func withoutPositions(c *Config) *Config {
	c.File, c.ruleLines = "", nil
	c.Interfaces.Position, c.Metrics.Position = Position{}, Position{}
	for name, o := range c.Outbounds {
		o.Position = Position{}
		c.Outbounds[name] = o
	}
	for i := range c.Tests {
		c.Tests[i].Position = Position{}
	}
	return c
}

func TestFormatOf(t *testing.T) {
	for name, want := range map[string]Format{"a.yaml": YAML, "a.YML": YAML, "a.json": JSON, "/x.y/a.toml": TOML, "/dev/stdin": YAML} {
		if got, err := FormatOf(name); err != nil || got != want {
			t.Errorf("%s is %q, %v", name, got, err)
		}
	}
	_, err := Load("side.conf")
	if want := `side.conf: unknown format ".conf"; name the file .yaml, .yml, .json or .toml`; fmt.Sprint(err) != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	_, err = Parse("x", []byte("default: direct"), "ini")
	if want := `x: unknown format "ini" (have: json, toml, yaml)`; fmt.Sprint(err) != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	_, err = Load("testdata/none.yaml")
	if want := "testdata/none.yaml: reading the config: no such file or directory"; fmt.Sprint(err) != want || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestTooLarge(t *testing.T) {
	name := filepath.Join(t.TempDir(), "large.yaml")
	write(t, name, "", 0o644)
	if err := os.Truncate(name, maxSize+1); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(name); err == nil || !strings.Contains(err.Error(), "larger than 16 MiB") {
		t.Errorf("got %v", err)
	}
}

// TestAliases uses what YAML offers against repetition, in bounds.
func TestAliases(t *testing.T) {
	c, err := Parse("a.yaml", []byte(`
default: direct
rules:
  - { name: a, ip_cidr: &office [192.0.2.0/24, &host 198.51.100.7], outbound: block }
  - { name: b, source_ip_cidr: *office, not: { ip_cidr: *host }, outbound: block }
`), YAML)
	if err != nil {
		t.Fatal(err)
	}
	b := c.Policy.Rules[1]
	if got := fmt.Sprint(b.Is[0].Values, b.Not[0].Values); got != "[192.0.2.0/24 198.51.100.7/32] [198.51.100.7/32]" {
		t.Errorf("got %s", got)
	}
	// An alias to what contains it has no end; an alias where another object is expected is wrong.
	for _, text := range []string{
		"default: direct\nrules: &r\n  - *r\n",
		"default: direct\nrules: &r [{ port: 1, not: *r, outbound: direct }, *r]\n",
		"&all\ndefault: direct\noutbounds: *all\nrules: *all\n",
		"default: direct\nrules: &r [{ name: x, port: 1, outbound: direct }]\ntests: *r\n",
	} {
		if _, err := Parse("a.yaml", []byte(text), YAML); err == nil {
			t.Errorf("it loads:\n%s", text)
		}
	}
}

func TestWarnings(t *testing.T) {
	c, err := Parse("w.yaml", []byte(`
default: direct
rules:
  - { name: web, port: [80, 443], network: tcp, outbound: direct }
  - { name: not web, not: { port: [80, 443], network: tcp }, outbound: direct }
  - { name: again, network: tcp, port: [80, 443], outbound: block }
  - { name: rest, outbound: block }
  - { port: 22, outbound: direct }
  - { port: 23, outbound: direct }
`), YAML)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		`w.yaml:6: rule "again": it never matches: rule "web" (line 4) has the same conditions; remove one`,
		`w.yaml:8: rule #5: it never matches, nor does any rule after it: rule "rest" (line 7) has no condition and takes everything; move that to the end`,
	}
	if !slices.Equal(c.Warnings, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(c.Warnings, "\n"), strings.Join(want, "\n"))
	}
}

func TestCheck(t *testing.T) {
	c, err := Parse("c.yaml", []byte(`
default: direct
rules:
  - { name: web, port: 443, network: tcp, outbound: block }
  - { port: 80, network: tcp, outbound: block }
tests:
  - { ip: 192.0.2.1, port: 443, network: tcp, expect: block, rule: web }
  - { ip: 192.0.2.1, port: 443, network: udp, expect: block }
  - { ip: 192.0.2.1, port: 80, network: tcp, expect: direct }
  - { ip: 192.0.2.1, port: 80, network: tcp, expect: block, rule: web }
`), YAML)
	if err != nil {
		t.Fatal(err)
	}
	want := `c.yaml:8: test #2: expected block, but the default says direct
c.yaml:9: test #3: expected direct, but rule #2 says block
c.yaml:10: test #4: it is block as expected, but by rule #2, not by rule "web"`
	if got := fmt.Sprint(c.Check()); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestSetFlow(t *testing.T) {
	var f policy.Flow
	for _, set := range []struct{ key, value, fail string }{
		{"source_ip", "::ffff:192.168.0.3", ""},
		{"source_port", "50000", ""},
		{"ip", "2001:db8::1", ""},
		{"port", "443", ""},
		{"network", "udp", ""},
		{"domain", "a.example", ""},
		{"domain", "b.example", ""},
		{"source_mac", "02:00:00:00:00:10", ""},
		{"dscp", "46", ""},
		{"interface", "eth0", ""},
		{"process_path", "/usr/bin/wget", ""},
		{"process", "curl", ""},
		{"unit", "web.service", ""},
		{"process_path", "bin/wget", `process_path: "bin/wget" is not an absolute path; write one like /usr/bin/curl`},
		{"port", "65536", `port: "65536" is not a port from 1 to 65535`},
		{"prot", "1", `unknown key "prot"; did you mean "port"?`},
		{"domain", "", `domain has no value; write one or leave it out`},
		{"source_mac", "02:00:00:00:00:00:00:10", `source_mac: "02:00:00:00:00:00:00:10" is not a MAC address; write it like 02:00:00:00:00:10`},
	} {
		err := SetFlow(&f, set.key, set.value)
		if fail := fmt.Sprint(err); set.fail == "" && err != nil || set.fail != "" && fail != set.fail {
			t.Errorf("%s=%s: got %v, want %q", set.key, set.value, err, set.fail)
		}
	}
	want := policy.Flow{
		Network: policy.UDP, Source: netip.MustParseAddrPort("192.168.0.3:50000"), Destination: netip.MustParseAddrPort("[2001:db8::1]:443"),
		DSCP: 46, SourceMAC: policy.MAC{2, 0, 0, 0, 0, 0x10}, Interface: "eth0", Names: []string{"a.example", "b.example"},
		Process: policy.Process{Name: "curl", Path: "/usr/bin/wget", Unit: "web.service"},
	}
	if !reflect.DeepEqual(f, want) {
		t.Errorf("got  %+v\nwant %+v", f, want)
	}
}

// TestPasswordFile tries the two places where a password file may be.
func TestPasswordFile(t *testing.T) {
	directory, credentials := t.TempDir(), t.TempDir()
	config := filepath.Join(directory, "sidegate.yaml")
	write(t, config, "default: hk\noutbounds: { hk: { url: 'socks5://10.0.0.7:1080', username: bob, password_file: hk.pass } }\n", 0o644)
	password := func() string {
		c, err := Load(config)
		if err != nil {
			return err.Error()
		}
		return strings.Join(append(c.Warnings, c.Outbounds["hk"].Password.Reveal()), "\n")
	}
	expect := func(when, want string) {
		if got := password(); got != want {
			t.Errorf("%s: got %q, want %q", when, got, want)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	at := config + `:2: outbound "hk": password_file: `
	beside, credential := filepath.Join(directory, "hk.pass"), filepath.Join(credentials, "hk.pass")
	expect("without a file", at+"there is no "+beside+"; write the password into it")
	write(t, beside, "beside ", 0o600)
	expect("beside the config", "beside ")
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	expect("beside the config, and an empty $CREDENTIALS_DIRECTORY", "beside ")
	write(t, credential, "credential\r\n", 0o400)
	expect("in $CREDENTIALS_DIRECTORY", "credential")
	if err := os.Chmod(credential, 0o444); err != nil {
		t.Fatal(err)
	}
	expect("readable by all", at+"everybody can read "+credential+"; chmod 600 it\ncredential")
	if err := os.Remove(credential); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(beside); err != nil {
		t.Fatal(err)
	}
	expect("without both", at+"there is no "+credential+" and no "+beside+"; write the password into it")
}

// TestSecretsStaySecret looks for a password in everything that a Config can be printed as.
func TestSecretsStaySecret(t *testing.T) {
	const canary = "canary-7f3a"
	directory := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	config := filepath.Join(directory, "sidegate.yaml")
	write(t, config, "default: hk\noutbounds: { hk: { url: 'socks5://10.0.0.7:1080', username: bob, password_file: hk.pass } }\n", 0o644)
	write(t, filepath.Join(directory, "hk.pass"), canary, 0o600)
	c, err := Load(config)
	if err != nil {
		t.Fatal(err)
	}
	hk := c.Outbounds["hk"]
	if hk.Password.Reveal() != canary {
		t.Fatalf("the password is %q", hk.Password.Reveal())
	}
	var log strings.Builder
	for _, handler := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(handler).Info("loaded", "config", c, "outbound", hk, "password", hk.Password)
	}
	encoded, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	hidden := struct{ o Outbound }{hk}
	shown := log.String() + string(encoded)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		for _, value := range []any{c, *c, hk, &hk, hk.Password, &hk.Password, hidden} {
			shown += fmt.Sprintf(verb+"\n", value)
		}
	}
	for _, form := range []string{canary, fmt.Sprintf("%x", canary), fmt.Sprint([]byte(canary))} {
		if strings.Contains(shown, form) {
			t.Errorf("%s is shown in\n%s", form, shown)
		}
	}
	if !strings.Contains(string(encoded), redacted) {
		t.Errorf("the JSON does not say that there is a password: %s", encoded)
	}
	if !hk.Password.Equal(NewSecret(canary)) || hk.Password.Equal(NewSecret("other")) || hk.Password.Equal(Secret{}) {
		t.Error("Equal is wrong")
	}
}

// TestErrorf is what the gateway does with an outbound that could not be made.
func TestErrorf(t *testing.T) {
	c, err := Parse("e.yaml", []byte("default: direct\noutbounds:\n  hk: { url: 'http://10.0.0.7' }\n"), YAML)
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("the url has no\nport")
	err = c.Outbounds["hk"].Position.Errorf("outbound %q: %w", "hk", cause)
	if want := `e.yaml:3: outbound "hk": the url has no port`; err.Error() != want || !errors.Is(err, cause) {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

// TestManyErrors bounds what is said about a file that is wrong all over.
func TestManyErrors(t *testing.T) {
	c, err := Parse("m.yaml", []byte("default: direct\nrules:\n"+strings.Repeat("  - { port: x, outbound: direct }\n", 150)), YAML)
	if c != nil || err == nil {
		t.Fatalf("it loads")
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != maxErrors+1 || lines[maxErrors] != "m.yaml: and 50 more errors" {
		t.Errorf("%d lines, the last is %q", len(lines), lines[len(lines)-1])
	}
}

func TestNearest(t *testing.T) {
	have := []string{"domain", "domain_suffix", "source_mac_address", "outbound", "outbounds", "us", "hk"}
	for text, want := range map[string]string{
		"domian": "domain", "Domain-Suffix": "domain_suffix", "source_mac": "source_mac_address", "outbond": "outbound",
		"uss": "us", "kh": "hk", "tokyo": "", "": "", "geosite": "", "x": "", strings.Repeat("outbound", 9): "",
	} {
		if got, _ := nearest(text, have); got != want {
			t.Errorf("for %q: %q, want %q", text, got, want)
		}
	}
}

func write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

// TestOwnCircle: an outbound on this box is no circle where its program is left direct, or where the box's own connections are.
func TestOwnCircle(t *testing.T) {
	for _, text := range []string{
		"outbounds: { hk: { url: \"socks5://localhost:1080\" } }\ndefault: hk\n",
		"gateway: { local: true }\noutbounds: { hk: { url: \"socks5://localhost:1080\" } }\nrules: [{ unit: xray.service, outbound: direct }]\ndefault: hk\n",
	} {
		if _, err := Parse("circle.yaml", []byte(text), YAML); err != nil {
			t.Errorf("%s%v", text, err)
		}
	}
}
