package endtoend

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestNamesOutliveTheDaemon: a client that has a name cached and does not ask again is subject to its rule after a reload,
// after a crash and while the daemon is dead. What breaks it is forgetting: the default sends what has no name direct.
func TestNamesOutliveTheDaemon(t *testing.T) {
	w := newNamesWorld(t)
	const near, far, unasked = "one.direct.test", "two.proxied.test", "three.proxied.test"
	addresses := map[string]int{near: 1, far: 2, unasked: 3}
	var records []string
	for name, i := range addresses {
		records = append(records, fmt.Sprintf("%s. 300 A %s", name, farAddress(i)))
	}
	w.serveNames(t, false, records...)
	w.serveSites(t, near, far, unasked)
	config := []string{"sniff: off", nameRules, "default: direct"}
	w.startWith(t, config...)
	for _, name := range []string{near, far} {
		need(t, lookUp(t.Context(), w.laptop(), name, farAddress(addresses[name])))
	}
	holds := func(when string) {
		t.Helper()
		for name, want := range map[string]string{near: "direct", far: "proxied", unasked: "direct" /* nobody has told */} {
			for _, protocol := range []string{"https", "h3"} {
				v, _, err := w.visitAt(t.Context(), w.laptop(), protocol, name, farAddress(addresses[name]))
				if got := w.outcome(v, err); got != want {
					t.Errorf("%s %s by %s was %s, want %s (%v)", when, name, protocol, got, want, err)
				}
			}
		}
	}
	holds("at first")
	w.cli(t, "reload")
	holds("after a reload of the same")
	text, err := os.ReadFile(w.gateway.Config)
	need(t, err)
	need(t, os.WriteFile(w.gateway.Config, append(text, "return_path: asymmetric\nper_client: { flows: 9000 }\n"...), 0o644))
	w.cli(t, "reload")
	holds("after a reload of another policy")
	need(t, w.gateway.Kill())
	if v, _, err := w.visitAt(within(t, 5e9), w.laptop(), "http", far, farAddress(addresses[far])); err == nil {
		t.Errorf("while the daemon is dead %s was %s", far, w.outcome(v, err))
	}
	w.start(t, string(text))
	holds("after a crash")
}

// TestWhereANameCameFrom: explain and names say what a flow would be decided by, and how it is known. What breaks it is a name
// that decides flows and that nobody can see.
func TestWhereANameCameFrom(t *testing.T) {
	w := newNamesWorld(t)
	const asked, read = "one.proxied.test", "two.proxied.test"
	w.serveNames(t, false, fmt.Sprintf("%s. 300 A %s", asked, farAddress(1)), fmt.Sprintf("%s. 300 A %s", read, farAddress(2)))
	w.serveSites(t, asked, read)
	w.startWith(t, "sniff: unknown", nameRules, "default: direct")
	need(t, lookUp(t.Context(), w.laptop(), asked, farAddress(1)))
	if v, _, err := w.visitAt(t.Context(), w.laptop(), "https", read, farAddress(2)); w.outcome(v, err) != "proxied" {
		t.Fatalf("%v, %v", v, err)
	}
	for i, want := range map[int][]string{1: {asked, "dns", "hk"}, 2: {read, "sniffed"}} {
		source, ip := "source_ip="+w.laptop().Addr4().String(), "ip="+farAddress(i).String()
		explanation := w.cli(t, "explain", source, ip, "port=443", "network=tcp")
		names := w.cli(t, "names", "client="+w.laptop().MAC().String(), ip)
		for _, text := range []string{explanation, names} {
			for _, word := range want[:2] {
				if !strings.Contains(text, word) {
					t.Errorf("there is no %q in:\n%s", word, text)
				}
			}
		}
		if len(want) > 2 && !strings.Contains(explanation, want[2]) {
			t.Errorf("the explanation does not lead to %s:\n%s", want[2], explanation)
		}
	}
}

// TestGeodataReload: a list that is replaced by a broken one is refused in one line, and what was read before stays in
// force; one that is replaced by another good one is in force at once. What breaks it is half a list, or none.
func TestGeodataReload(t *testing.T) {
	w := newNamesWorld(t)
	const one, two = "one.direct.test", "two.direct.test" // by the rule below, if it has them
	w.serveNames(t, false, one+". 300 A "+farAddress(1).String(), two+". 300 A "+farAddress(2).String())
	w.serveSites(t, one, two)
	list := filepath.Join(w.Dir(), "mine.txt")
	write := func(text string) { need(t, os.WriteFile(list, []byte(text), 0o644)) }
	write(one + "\n")
	w.startWith(t, "geodata: { sets: { mine: mine.txt } }", "rules:", "  - { name: mine, geosite: mine, outbound: hk }", "default: direct")
	inForce := func(when string, proxied, direct string) {
		t.Helper()
		for name, want := range map[string]string{proxied: "proxied", direct: "direct"} {
			v, err := w.visit(t, w.laptop(), "https://"+name+"/whoami")
			if got := w.outcome(v, err); got != want {
				t.Errorf("%s %s was %s, want %s (%v)", when, name, got, want, err)
			}
		}
	}
	inForce("at first", one, two)
	write("two.direct.test\nnot a name at all!\n")
	out, err := exec.CommandContext(t.Context(), binary, "reload", "--socket", w.gateway.Socket).CombinedOutput()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err == nil || len(lines) != 2 || !strings.Contains(lines[0], "mine.txt:2") || !strings.Contains(lines[1], "the one before stays in force") {
		t.Errorf("reloading a broken list: %v, %q, want one line that names mine.txt:2, and what became of it", err, lines)
	}
	inForce("after a broken list", one, two)
	write(two + "\n")
	w.cli(t, "reload")
	inForce("after another list", two, one)
}

// TestBadNamesConfiguration: what cannot work is refused by check, with exit code 1 and one clear line for each mistake.
func TestBadNamesConfiguration(t *testing.T) {
	dir := t.TempDir()
	need(t, os.WriteFile(filepath.Join(dir, "broken.dat"), []byte("\x0a\xff\xff\xff\xff\x0fno list"), 0o644))
	need(t, os.WriteFile(filepath.Join(dir, "mine.txt"), []byte("one.test\n"), 0o644))
	for name, c := range map[string]struct{ config, want string }{
		"a broken file": {
			"geodata: { geosite: broken.dat }\nrules:\n  - { name: cn, geosite: cn, outbound: block }\ndefault: direct\n", "broken.dat",
		},
		"an unknown list": {
			"geodata: { sets: { mine: mine.txt } }\nrules:\n  - { name: cn, geosite: mime, outbound: block }\ndefault: direct\n", `"mine"`,
		},
		"a circle": {
			"outbounds: { hk: { url: \"socks5://proxy.test:1080\" } }\ndns: { upstreams: { doh: { url: \"https://192.0.2.1/dns-query\", detour: hk } }, default: doh }\ndefault: hk\n", "hk",
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".yaml")
			need(t, os.WriteFile(file, []byte(c.config), 0o644))
			out, err := exec.CommandContext(t.Context(), binary, "check", "-c", file).CombinedOutput()
			text := strings.TrimSpace(string(out))
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || strings.Count(text, "\n") != 0 || !strings.Contains(text, c.want) || !strings.Contains(text, file+":") {
				t.Errorf("%v: %s\nwant one line with %s:LINE and %s", err, text, file, c.want)
			}
			t.Log(text)
		})
	}
}
