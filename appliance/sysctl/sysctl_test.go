package sysctl

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward":                   "/proc/sys/net/ipv4/ip_forward",
		"net.ipv4.conf.eth0.send_redirects":     "/proc/sys/net/ipv4/conf/eth0/send_redirects",
		"net.ipv4.conf.eth0/100.send_redirects": "/proc/sys/net/ipv4/conf/eth0.100/send_redirects",
	} {
		if got := path(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// namespace puts the test into a network namespace of its own, for good.
func namespace(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// everything is the value of each parameter of the namespace that a switch could reset.
func everything(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, pattern := range []string{"net/ipv4/ip_forward", "net/ipv4/conf/*/*", "net/ipv6/conf/*/*"} {
		files, err := filepath.Glob("/proc/sys/" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if value, err := os.ReadFile(file); err == nil {
				all[file] = strings.TrimSpace(string(value))
			}
		}
	}
	return all
}

func put(t *testing.T, name, value string) {
	t.Helper()
	if err := set(name, value); err != nil {
		t.Fatal(err)
	}
}

// TestApplyAndRestore: what was wrong is right, and what was there is there again, resets of the kernel included, even if
// it is another keeper that puts it back.
func TestApplyAndRestore(t *testing.T) {
	namespace(t)
	box := Surroundings{LAN: []string{"lo"}, IPv6: true}
	put(t, "net.ipv4.ip_forward", "0")
	put(t, "net.ipv6.conf.all.forwarding", "0")
	put(t, "net.ipv4.conf.all.accept_redirects", "1")
	put(t, "net.ipv6.conf.lo.forwarding", "1") // the switch resets it both ways
	put(t, "net.ipv4.conf.lo.send_redirects", "1")
	put(t, "net.ipv4.conf.all.send_redirects", "0") // good already
	before := everything(t)

	file := filepath.Join(t.TempDir(), "record")
	keeper, err := NewKeeper(file, "this")
	if err != nil {
		t.Fatal(err)
	}
	changes, err := keeper.Apply(box)
	if err != nil || len(changes) == 0 {
		t.Fatal(changes, err)
	}
	if wrong, err := Check(box); err != nil || len(wrong) > 0 {
		t.Errorf("after it was applied: %v, %v", wrong, err)
	}
	if again, err := keeper.Apply(box); err != nil || len(again) > 0 {
		t.Errorf("applied again it changes %v, %v", again, err)
	}

	// The process dies. Another finds nothing to do, and its successor puts back what the first one found.
	for range 2 {
		if keeper, err = NewKeeper(file, "this"); err != nil {
			t.Fatal(err)
		}
		put(t, "net.ipv4.conf.lo.send_redirects", "1") // somebody's mistake, which becomes no original
		if _, err := keeper.Apply(box); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := keeper.Restore(); err != nil {
		t.Fatal(err)
	}
	for file, value := range everything(t) {
		if value != before[file] {
			t.Errorf("%s is %s, and was %s", file, value, before[file])
		}
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("the record is still there")
	}
}

// TestRestoreLeavesOthersValues: what somebody has set meanwhile is theirs.
func TestRestoreLeavesOthersValues(t *testing.T) {
	namespace(t)
	put(t, "net.ipv6.conf.lo.accept_ra", "1")
	keeper, err := NewKeeper(filepath.Join(t.TempDir(), "record"), "this")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keeper.Apply(Surroundings{Uplinks: []string{"lo"}}); err != nil {
		t.Fatal(err)
	}
	put(t, "net.ipv6.conf.lo.accept_ra", "0")
	if _, err := keeper.Restore(); err != nil {
		t.Fatal(err)
	}
	if value, err := get("net.ipv6.conf.lo.accept_ra"); err != nil || value != "0" {
		t.Errorf("accept_ra is %s, %v", value, err)
	}
}

// TestRecordOfAnother: what was noted for another network namespace means nothing here.
func TestRecordOfAnother(t *testing.T) {
	namespace(t)
	file := filepath.Join(t.TempDir(), "record")
	text := `{"owner": "that", "changes": [{"name": "net.ipv4.ip_forward", "before": "0", "after": "1"}]}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, "net.ipv4.ip_forward", "1")
	keeper, err := NewKeeper(file, "this")
	if err != nil {
		t.Fatal(err)
	}
	if changes, err := keeper.Restore(); err != nil || len(changes) > 0 {
		t.Errorf("it put back %v, %v", changes, err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewKeeper(file, "this"); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("a broken record: %v", err)
	}
}

// TestReadme: the README's table is the list.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	const begin = "| kernel parameter | value | when | otherwise |\n|---|---|---|---|\n"
	_, rest, found := strings.Cut(string(text), begin)
	table, _, _ := strings.Cut(rest, "\n\n")
	var want []string
	for _, p := range List() {
		value := strings.Join(append([]string{p.Value}, p.Also...), " or ")
		want = append(want, "| `"+p.Name+"` | "+value+" | "+p.When+" | "+p.Why+" |")
	}
	if !found || !slices.Equal(strings.Split(strings.TrimRight(table, "\n"), "\n"), want) {
		t.Errorf("README.md does not have the list of kernel parameters as it is:\n%s%s", begin, strings.Join(want, "\n"))
	}
}

// TestApplianceHasTheList: the images and the NixOS module set the parameters of this list, which they read from images/appliance.json.
func TestApplianceHasTheList(t *testing.T) {
	text, err := os.ReadFile("../../images/appliance.json")
	if err != nil {
		t.Fatal(err)
	}
	var appliance struct{ Sysctls []Parameter }
	if err := json.Unmarshal(text, &appliance); err != nil {
		t.Fatal(err)
	}
	listed, err := json.Marshal(appliance.Sysctls)
	if err != nil {
		t.Fatal(err)
	}
	want, err := json.Marshal(List())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(listed, want) {
		t.Errorf("images/appliance.json has other sysctls than `sidegate sysctls --json`:\n%s\n%s", listed, want)
	}
}
