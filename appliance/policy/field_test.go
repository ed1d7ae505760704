package policy

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// The keys of the design, in its order of dimensions.
func TestFields(t *testing.T) {
	want := strings.Fields(`domain domain_suffix domain_keyword domain_regex geosite ip_cidr geoip ip_is_private
		source_ip_cidr port source_port network ip_version dscp source_mac_address inbound_interface process_name process_path unit`)
	var got []string
	for _, f := range Fields() {
		got = append(got, f.Key)
	}
	if !slices.Equal(got, want) {
		t.Errorf("fields %v, want %v", got, want)
	}
}

// What the reference shows as an example is accepted, and each field has a row of three cells.
func TestReference(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(Reference()), "\n")
	if len(lines) != len(fields)+2 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, f := range fields {
		line := strings.ReplaceAll(lines[i+2], `\|`, "")
		if !strings.Contains(line, "`"+f.Key+"`") || strings.Count(line, "|") != 4 || !strings.HasSuffix(f.Doc, ".") {
			t.Errorf("row %q", line)
		}
		for text := range strings.SplitSeq(strings.Trim(f.Example, "[]"), ", ") {
			if _, err := f.Parse(strings.Trim(text, "'")); err != nil {
				t.Errorf("example of %s: %v", f.Key, err)
			}
		}
	}
}

// Every value's text is accepted again and is the same value.
func TestValueText(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 0))
	for _, f := range fields {
		for range 200 {
			text := f.random(r)
			c, err := f.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			normal := c.Values[0].String()
			again, err := f.Parse(normal)
			if err != nil || again.Values[0].String() != normal {
				t.Errorf("%s %q is written as %q: %v", f.Key, text, normal, err)
			}
		}
	}
}

// FuzzField: whatever a user writes is refused in one line or is a value that survives its text, and
// then Match and the tables agree on flows around it.
func FuzzField(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 0))
	for i, field := range fields {
		for range 3 {
			f.Add(uint8(i), field.random(r), uint64(1))
		}
	}
	for _, text := range []string{"::ffff:10.0.0.0/104", "0.0.0.0/0", "::/0", "1-65535", "EXAMPLE.com.", `(?i)^\.`, "\x00", "02-00-00-00-00-10"} {
		for i := range fields {
			f.Add(uint8(i), text, uint64(2))
		}
	}
	f.Fuzz(func(t *testing.T, index uint8, text string, seed uint64) {
		field := fields[int(index)%len(fields)]
		c, err := field.Parse(text)
		if err != nil {
			if message := err.Error(); strings.ContainsAny(message, "\n\r") {
				t.Errorf("more than one line: %q", message)
			}
			return
		}
		normal := c.Values[0].String()
		if again, err := field.Parse(normal); err != nil || again.Values[0].String() != normal {
			t.Fatalf("%s %q is written as %q: %v", field.Key, text, normal, err)
		}
		r := rand.New(rand.NewPCG(seed, 0))
		p := &Policy{Default: "direct", Rules: []Rule{{Is: []Condition{c}, Outbound: "hk"}, {Not: []Condition{c}, Outbound: "us"}}}
		p.Geo = &lists{
			sites: map[string][]Value{normal: {suffixName("cn")}},
			codes: randomGeo(r).codes,
		}
		if field.Key == "geoip" {
			p.Geo.(*lists).codes[normal] = p.Geo.(*lists).codes["cn"]
		}
		tables, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			flow := blur(r, p.RandomFlow(r))
			if got, want := tables.Match(flow), p.Match(flow); got != want {
				t.Fatalf("%s %q, %+v: the tables say %+v, Match says %+v", field.Key, text, flow, got, want)
			}
		}
	})
}
