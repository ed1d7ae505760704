package firewall

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// readLegacy adds what stands in the tables of the old iptables, whose rules are in nobody's netlink: its own tool lists them, and the
// newer iptables translates them into nftables in a network namespace that exists for nothing else. Unread says what it cannot read.
func (r *Ruleset) readLegacy(ctx context.Context) {
	var all []string
	for _, family := range []struct{ file, tool, translate string }{
		{"ip_tables_names", "iptables-legacy", "iptables-nft-restore"},
		{"ip6_tables_names", "ip6tables-legacy", "ip6tables-nft-restore"},
	} {
		tables, err := os.ReadFile("/proc/thread-self/net/" + family.file)
		if err != nil || len(tables) == 0 {
			continue
		}
		text, err := exec.CommandContext(ctx, family.tool+"-save").Output()
		if err != nil {
			all = append(all, fmt.Sprintf("%s (%s-save cannot be asked: %v)", family.tool, family.tool, err))
			continue
		}
		rules := 0
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "-A ") || strings.HasPrefix(line, ":") && strings.Contains(line, " DROP ") {
				rules++
			}
		}
		if rules == 0 {
			continue
		}
		translated, err := translate(ctx, family.translate, text)
		if err != nil {
			all = append(all, fmt.Sprintf("%s (%d rules and policies)", family.tool, rules))
			continue
		}
		r.add(translated)
	}
	r.Unread = strings.Join(all, " and ")
}

// translate reads rules as iptables-save writes them. The namespace goes with the thread, which is never unlocked.
func translate(ctx context.Context, tool string, text []byte) (*Ruleset, error) {
	r := newRuleset()
	failed := make(chan error)
	go func() {
		runtime.LockOSThread()
		failed <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("making a network namespace: %w", err)
			}
			restore := exec.CommandContext(ctx, tool)
			restore.Stdin = bytes.NewReader(text)
			if out, err := restore.CombinedOutput(); err != nil {
				return fmt.Errorf("running %s: %w: %s", tool, err, bytes.TrimSpace(out))
			}
			return r.read(ctx)
		}()
	}()
	return r, <-failed
}

// add puts the chains of the old iptables beside those of nftables, which may have the same names.
func (r *Ruleset) add(legacy *Ruleset) {
	for key, c := range legacy.chains {
		key.legacy, c.legacy = true, true
		r.chains[key] = c
	}
	for key, s := range legacy.sets {
		key.legacy = true
		r.sets[key] = s
	}
	r.bases = append(r.bases, legacy.bases...)
}
