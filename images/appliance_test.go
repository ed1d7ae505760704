// Package images_test holds what appliance.json says to what the program says.
package images_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"sidegate/appliance/config"
	"sidegate/appliance/gateway"
	"sidegate/appliance/policy"
	"sidegate/appliance/sysctl"
)

type appliance struct {
	Settings     map[string]any
	Files        map[string]string
	Sysctls      []sysctl.Parameter
	Capabilities []string
}

func read(t *testing.T) (a appliance) {
	t.Helper()
	f, err := os.Open("appliance.json")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := json.NewDecoder(f).Decode(&a); err != nil {
		t.Fatal(err)
	}
	return a
}

// TestSysctlsAreTheProgrammes: who sets kernel parameters by appliance.json sets those of `sidegate sysctls --json`.
func TestSysctlsAreTheProgrammes(t *testing.T) {
	text, err := json.Marshal(sysctl.List())
	if err != nil {
		t.Fatal(err)
	}
	var want []sysctl.Parameter
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	if got := read(t).Sysctls; !reflect.DeepEqual(got, want) {
		t.Errorf("appliance.json has\n%+v\nand the program\n%+v\nreplace its sysctls by: sidegate sysctls --json", got, want)
	}
}

// TestCapabilitiesAreTheProgrammes: what the unit and the container are given is what the program says that it needs.
func TestCapabilitiesAreTheProgrammes(t *testing.T) {
	if got, want := read(t).Capabilities, gateway.Capabilities(); !slices.Equal(got, want) {
		t.Errorf("appliance.json has the capabilities %q, and the program %q", got, want)
	}
}

// TestSettingsAreTaken: the default configuration is one that the gateway starts with.
func TestSettingsAreTaken(t *testing.T) {
	text, err := json.Marshal(read(t).Settings)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "sidegate.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if !c.Gateway.Local || c.DNS != nil || c.Policy.Default != policy.OutboundDirect {
		t.Errorf("the box's own connections are decided: %t, DNS: %+v, default: %s", c.Gateway.Local, c.DNS, c.Policy.Default)
	}
}

// TestFilesAreThere: every file of rootfs has a place, and every place a file.
func TestFilesAreThere(t *testing.T) {
	placed := map[string]bool{}
	for place, file := range read(t).Files {
		if !strings.HasPrefix(place, "/") {
			t.Errorf("%s is no absolute path", place)
		}
		placed[file] = true
	}
	files, err := os.ReadDir("rootfs")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !placed[f.Name()] {
			t.Errorf("rootfs/%s has no place in appliance.json", f.Name())
		}
		delete(placed, f.Name())
	}
	for file := range placed {
		t.Errorf("there is no rootfs/%s", file)
	}
}
