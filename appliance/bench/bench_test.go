package main

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"sidegate/appliance/config"
	"sidegate/appliance/policy"
)

// TestPolicies holds what the figures rest on: the policies load, are as large as they say, and let the traffic of the
// benchmark go direct, half of it by the set of prefixes.
func TestPolicies(t *testing.T) {
	for _, size := range []policySize{{10, 10}, {900, 10}, {10, 10_000}, {900, 100_000}} {
		c, err := config.Parse("policy.yaml", []byte(policyConfig(size)), config.YAML)
		if err != nil {
			t.Fatalf("%s: %v", size, err)
		}
		if len(c.Policy.Rules) != size.rules {
			t.Errorf("%s: there are %d rules", size, len(c.Policy.Rules))
		}
		if n := len(c.Policy.Rules[size.rules-1].Is[0].Values); n != size.prefixes {
			t.Errorf("%s: the last rule has %d prefixes", size, n)
		}
		inSet := 0
		to := destinations(1000)
		for _, d := range to {
			decision := c.Policy.Match(policy.Flow{
				Network:     policy.UDP,
				Source:      netip.MustParseAddrPort("192.168.0.3:10000"),
				Destination: d,
				SourceMAC:   [6]byte{2, 0, 192, 168, 0, 3},
			})
			if decision.Verdict != policy.Direct {
				t.Fatalf("%s: %s is decided %s by rule %d", size, d, decision.Verdict, decision.Rule)
			}
			if decision.Rule == size.rules-1 {
				inSet++
			}
		}
		if size.prefixes >= len(to) && inSet < len(to)/4 {
			t.Errorf("%s: the set decides %d of %d flows", size, inSet, len(to))
		}
	}
}

func TestPrefixesAreDistinctAndNested(t *testing.T) {
	few, many := prefixes(100), prefixes(10_000)
	if !slices.Equal(few, many[:100]) {
		t.Error("a longer list does not begin with a shorter one")
	}
	seen := map[netip.Prefix]bool{}
	for _, p := range many {
		if seen[p] || p != p.Masked() {
			t.Fatalf("%s is there twice, or has bits behind its length", p)
		}
		seen[p] = true
	}
}

func TestAlternate(t *testing.T) {
	var order string
	values := []float64{10, 30, 20}
	value := func(context.Context) (float64, error) {
		order += "v"
		return values[strings.Count(order, "v")-1], nil
	}
	beside := func(context.Context) (float64, error) {
		order += "b"
		return 5, nil
	}
	f := Figure{Name: "x", Quantity: Quantity{What: "time", Beside: "y"}, Most: 4.5}
	if err := f.alternate(t.Context(), 3, value, beside); err != nil {
		t.Fatal(err)
	}
	if order != "vbbvvb" {
		t.Errorf("the order is %s", order)
	}
	if f.Median != 20 || f.Reference != 5 || f.Ratio != 4 {
		t.Errorf("medians %v and %v, ratio %v; expected 20, 5, 4", f.Median, f.Reference, f.Ratio)
	}
	if how, broken := f.broken(); broken {
		t.Errorf("a ratio of 4 breaks a bound of 4.5: %s", how)
	}
	f.add(Sample{100, 5}, Sample{100, 5})
	if how, broken := f.broken(); !broken || how != "x: time is 6.00 times that of y; at most 4.50" {
		t.Errorf("a ratio of 6 against a bound of 4.5: %q", how)
	}
	least := Figure{Least: 0.8, Ratio: 0.7}
	if _, broken := least.broken(); !broken {
		t.Error("a ratio of 0.7 keeps a bound of at least 0.8")
	}
}

func TestSignificant(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.1234: "0.123", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 12345: "12345"} {
		if got := significant(v); got != want {
			t.Errorf("%v is printed as %s, expected %s", v, got, want)
		}
	}
}
