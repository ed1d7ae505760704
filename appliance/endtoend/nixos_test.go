package endtoend

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What the NixOS module makes of a system is evaluated, and committed as text: kernel parameters, firewall, network, settings and the unit.
// TestSystemd and TestUnit run it, as it is in the golden files.
const goldens = "../../nixos-module/goldens"

func golden(t *testing.T, system, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(goldens, system, name))
	need(t, err)
	return string(text)
}

// unitCapabilities are those of the unit: what it may have, all of which it is given.
func unitCapabilities(t *testing.T, system string) []string {
	t.Helper()
	unit := golden(t, system, "sidegate.service")
	of := func(key string) (all []string) {
		for _, m := range regexp.MustCompile("(?m)^"+key+"=(.*)$").FindAllStringSubmatch(unit, -1) {
			all = append(all, strings.Fields(m[1])...)
		}
		return all
	}
	bounding := of("CapabilityBoundingSet")
	if len(bounding) == 0 || !slices.Equal(bounding, of("AmbientCapabilities")) || !slices.Equal(of("User"), []string{"sidegate"}) {
		t.Fatalf("the unit is root, or has capabilities that it is not given:\n%s", unit)
	}
	return bounding
}
