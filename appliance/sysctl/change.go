package sysctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Change is a parameter that was changed. Before is what it is put back to.
type Change struct {
	Name   string `json:"name"`
	Before string `json:"before"`
	After  string `json:"after"`
}

func (c Change) String() string {
	return fmt.Sprintf("%s: %s → %s", c.Name, c.Before, c.After)
}

// resets are parameters that the kernel changes when another one is changed (ip-sysctl.rst: "its change resets all configuration
// parameters to their default state").
var resets = map[string][]string{
	"net.ipv4.ip_forward":          {"net.ipv4.conf.*.forwarding", "net.ipv4.conf.all.accept_redirects"},
	"net.ipv6.conf.all.forwarding": {"net.ipv6.conf.*.forwarding"},
}

// Set gives one parameter a value, and returns what that changed, in the order in which it happened: more than the parameter
// itself where the kernel resets others with it.
func Set(name, value string) ([]Change, error) {
	before, err := get(name)
	if err != nil {
		return nil, err
	}
	if before == value {
		return nil, nil
	}
	others, err := readAll(resets[name])
	if err != nil {
		return nil, err
	}
	if err := set(name, value); err != nil {
		return nil, err
	}
	changes := []Change{{name, before, value}}
	for _, o := range others {
		now, err := get(o.Name)
		if errors.Is(err, fs.ErrNotExist) { // its interface is gone
			continue
		}
		if err != nil {
			return changes, err
		}
		if o.Name != name && now != o.Before {
			changes = append(changes, Change{o.Name, o.Before, now})
		}
	}
	return changes, nil
}

func readAll(patterns []string) ([]Change, error) {
	var all []Change
	for _, pattern := range patterns {
		files, _ := filepath.Glob(path(pattern)) // the pattern is well-formed
		for _, file := range files {
			name := path(strings.TrimPrefix(file, "/proc/sys/"))[len("/proc/sys/"):] // its own inverse
			value, err := get(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			all = append(all, Change{Name: name, Before: value})
		}
	}
	return all, nil
}

// Keeper applies the list and puts back what was there before, even if it is another process that does so: what was there is
// written to a file before it is changed. Its methods are not for concurrent use.
type Keeper struct {
	file  string
	owner string
	kept  []Change // in the order in which they were made; Before is the original
}

// record is the file.
type record struct {
	Owner   string   `json:"owner"`
	Changes []Change `json:"changes"`
}

// NewKeeper makes one that keeps its record in a file. Owner tells the network namespace from others that had or will have the
// same file; a record of another owner means nothing, and is forgotten.
func NewKeeper(file, owner string) (*Keeper, error) {
	k := &Keeper{file: file, owner: owner}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the kernel parameters to put back: %w", err)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("reading the kernel parameters to put back: %s: %w; remove it if you know them", file, err)
	}
	if r.Owner == owner {
		k.kept = r.Changes
	}
	return k, nil
}

// Apply sets what is wrong, in the order of the list, and returns what it changed. It goes on after an error: a container may be
// forbidden one parameter and not the other.
func (k *Keeper) Apply(to Surroundings) ([]Change, error) {
	wrong, err := Check(to)
	errs := []error{err}
	var done []Change
	for _, s := range wrong {
		changes, err := k.set(s.Name, s.Value)
		done = append(done, changes...)
		errs = append(errs, err)
	}
	return done, errors.Join(errs...)
}

// set writes down the value that it expects to change before it does, so that a crash in between loses nothing.
func (k *Keeper) set(name, value string) ([]Change, error) {
	before, err := get(name)
	if err != nil {
		return nil, err
	}
	// What the kernel resets with it may be as it will be, and yet be reset when it is put back.
	others, err := readAll(resets[name])
	if err != nil {
		return nil, err
	}
	without := slices.Clone(k.kept)
	for _, o := range append(others, Change{Name: name, Before: before}) {
		k.keep(Change{o.Name, o.Before, o.Before})
	}
	k.keep(Change{name, before, value})
	if err := k.save(); err != nil {
		k.kept = without
		return nil, err
	}
	changes, err := Set(name, value)
	for _, c := range changes {
		k.keep(c)
	}
	return changes, errors.Join(err, k.save())
}

// keep notes a change. The first one of a parameter knows the original.
func (k *Keeper) keep(c Change) {
	at := slices.IndexFunc(k.kept, func(o Change) bool { return o.Name == c.Name })
	if at < 0 {
		k.kept = append(k.kept, c)
		return
	}
	k.kept[at].After = c.After
}

func (k *Keeper) save() error {
	text, err := json.MarshalIndent(record{k.owner, k.kept}, "", "  ")
	if err != nil {
		return fmt.Errorf("keeping the kernel parameters to put back: %w", err)
	}
	beside := k.unfinished()
	err = os.MkdirAll(filepath.Dir(k.file), 0o755)
	if err == nil {
		err = os.WriteFile(beside, append(text, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(beside, k.file)
	}
	if err != nil {
		return fmt.Errorf("keeping the kernel parameters to put back: %w", err)
	}
	return nil
}

// unfinished is what a record is called while it is written. Who is killed then leaves it.
func (k *Keeper) unfinished() string { return k.file + ".new" }

// Restore puts back what Apply changed, here or in a process before, and returns that. A parameter that somebody has set otherwise
// meanwhile stays as it is, and so does what is gone.
func (k *Keeper) Restore() ([]Change, error) {
	var ours []Change
	for _, c := range k.kept {
		if now, err := get(c.Name); err == nil && now == c.After {
			ours = append(ours, c)
		}
	}
	// Backwards. What a switch has reset was noted after it, but has to be put back after it, too: it resets again.
	var done []Change
	var errs []error
	for _, later := range []bool{false, true} {
		for _, c := range slices.Backward(ours) {
			if isReset(c.Name) != later {
				continue
			}
			if err := set(c.Name, c.Before); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
				continue
			}
			if c.Before != c.After {
				done = append(done, Change{c.Name, c.After, c.Before})
			}
		}
	}
	if len(errs) > 0 {
		return done, errors.Join(errs...)
	}
	k.kept = nil
	for _, file := range []string{k.file, k.unfinished()} {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return done, fmt.Errorf("forgetting the kernel parameters that are put back: %w", err)
		}
	}
	return done, nil
}

// resetBy reports whether the kernel changes a parameter along with a switch.
func resetBy(switched, parameter string) bool {
	return slices.ContainsFunc(resets[switched], func(pattern string) bool {
		matches, _ := filepath.Match(path(pattern), path(parameter)) // the pattern is well-formed
		return matches
	})
}

// isReset reports whether the kernel changes a parameter along with another one.
func isReset(name string) bool {
	if _, is := resets[name]; is {
		return false
	}
	for other := range resets {
		if resetBy(other, name) {
			return true
		}
	}
	return false
}
