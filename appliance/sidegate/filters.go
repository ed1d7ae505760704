package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// filters say by key whether a thing is what the user asked for. An error means that the value matches
// nothing, whatever the thing.
type filters[T any] map[string]func(thing T, value string) (bool, error)

// parse makes one predicate of key=value arguments: those of different keys must all match, those of one key
// are alternatives.
func (f filters[T]) parse(args []string) (func(T) bool, error) {
	wanted, err := parseFacts(args)
	if err != nil {
		return nil, err
	}
	var none T
	for key, values := range wanted {
		match, known := f[key]
		if !known {
			return nil, fmt.Errorf("unknown filter %q (have: %s)", key, strings.Join(slices.Sorted(maps.Keys(f)), ", "))
		}
		for _, value := range values {
			if _, err := match(none, value); err != nil {
				return nil, fmt.Errorf("%s: %w", key, err)
			}
		}
	}
	return func(thing T) bool {
		for key, values := range wanted {
			if !slices.ContainsFunc(values, func(v string) bool { ok, _ := f[key](thing, v); return ok }) {
				return false
			}
		}
		return true
	}, nil
}

func equal[T any](of func(T) string) func(T, string) (bool, error) {
	return func(thing T, value string) (bool, error) { return of(thing) == strings.ToLower(value), nil }
}

func within4or6(a netip.Addr, value string) (bool, error) {
	if prefix, err := netip.ParsePrefix(value); err == nil {
		return prefix.Contains(a), nil
	}
	address, err := netip.ParseAddr(value)
	if err != nil {
		return false, fmt.Errorf("%q is not an address or prefix: write 192.168.0.3 or 192.168.0.0/24", value)
	}
	return a == address.Unmap(), nil
}
