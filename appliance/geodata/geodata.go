// Package geodata reads the lists of names and addresses that rules refer to by geosite and geoip:
//
//   - geosite .dat and geoip .dat of V2Ray and its kin: many lists in one file;
//   - geoip .mmdb, MaxMind's and those made for sing-box and mihomo;
//   - sets of one list each: text, one entry a line; sing-box .srs; mihomo .mrs.
//
// What a file says is honoured whole or refused: a list that means something else than its author
// meant is worse than none. Which of the formats a file has, its content says, not its name.
//
// The formats have no specifications. They are described where they are read.
package geodata

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"

	"sidegate/appliance/policy"
)

// The kinds of lists.
const (
	Geosite = "geosite" // of names
	Geoip   = "geoip"   // of addresses
)

// Sources are the files that lists come from.
type Sources struct {
	Geosite, Geoip string            // files of many lists; empty: none
	Sets           map[string]string // files of one list each, by name in lower case; they come before the lists of the others
}

// Wanted are names of lists in lower case, such as policy.ListsOf returns. GOOGLE's entries with the attribute ads
// are `google@ads`.
type Wanted struct{ Sites, Codes []string }

// Data are the wanted lists. It is not changed after Load; it implements policy.GeoData.
type Data struct {
	sites map[string]list[policy.Value]
	codes map[string]list[netip.Prefix]
}

type list[T any] struct {
	entries []T
	file    string
}

// Site returns the patterns of a wanted list of names.
func (d *Data) Site(category string) ([]policy.Value, bool) {
	l, ok := d.sites[category]
	return l.entries, ok
}

// IP returns the prefixes of a wanted list of addresses.
func (d *Data) IP(code string) ([]netip.Prefix, bool) {
	l, ok := d.codes[code]
	return l.entries, ok
}

// Origin returns the file that a wanted list came from, or "". The kind is Geosite or Geoip.
func (d *Data) Origin(kind, name string) string {
	if kind == Geoip {
		return d.codes[name].file
	}
	return d.sites[name].file
}

// Defect is one thing that is wrong with a file, or a wanted list that is nowhere. Its text is one line.
type Defect struct {
	Kind, Name string // a wanted list that it spoils
	File       string
	Line       int // from 1; 0: it has no line
	Err        error
}

func (d *Defect) Error() string {
	switch {
	case d.File == "":
		return d.Err.Error()
	case d.Line == 0:
		return fmt.Sprintf("%s: %v", d.File, d.Err)
	}
	return fmt.Sprintf("%s:%d: %v", d.File, d.Line, d.Err)
}

func (d *Defect) Unwrap() error { return d.Err }

// content is what a file says under one name.
type content struct {
	names    []policy.Value
	prefixes []netip.Prefix
}

// loader collects lists and defects.
type loader struct {
	Data
	errs []error
}

// Load reads the wanted lists, and no file that none of them needs. The error joins a Defect for each thing that is wrong.
func Load(s Sources, w Wanted) (*Data, error) {
	l := loader{Data: Data{sites: map[string]list[policy.Value]{}, codes: map[string]list[netip.Prefix]{}}}
	sites, codes := slices.Compact(slices.Sorted(slices.Values(w.Sites))), slices.Compact(slices.Sorted(slices.Values(w.Codes)))
	ofSet := func(name string) bool { _, ok := s.Sets[name]; return ok }
	for _, name := range slices.Sorted(maps.Keys(s.Sets)) {
		asSite, asCode := slices.Contains(sites, name), slices.Contains(codes, name)
		if asSite || asCode {
			l.set(name, s.Sets[name], asSite, asCode)
		}
	}
	l.many(Geosite, s.Geosite, slices.DeleteFunc(sites, ofSet), s.Sets)
	l.many(Geoip, s.Geoip, slices.DeleteFunc(codes, ofSet), s.Sets)
	if err := errors.Join(l.errs...); err != nil {
		return nil, err
	}
	return &l.Data, nil
}

func (l *loader) defect(kind, name, file string, err error) {
	l.errs = append(l.errs, &Defect{Kind: kind, Name: name, File: file, Err: err})
}

func (l *loader) add(kind, name, file string, c *content) {
	if kind == Geosite {
		l.sites[name] = list[policy.Value]{slices.Clip(c.names), file}
	} else {
		l.codes[name] = list[netip.Prefix]{slices.Clip(c.prefixes), file}
	}
}

// set reads the file of one list.
func (l *loader) set(name, file string, asSite, asCode bool) {
	kind := Geoip
	if asSite {
		kind = Geosite
	}
	data, err := read(file)
	if err != nil {
		l.defect(kind, name, file, err)
		return
	}
	format := formatOf(data)
	if format.one == nil {
		l.defect(kind, name, file, fmt.Errorf("%s, not a set: %s", format.name, format.fix))
		return
	}
	var c content
	if errs := format.one(data, &c); len(errs) > 0 {
		for _, err := range errs {
			d := &Defect{Kind: kind, Name: name, File: file, Err: err}
			if bad := (*badLine)(nil); errors.As(err, &bad) {
				d.Line, d.Err = bad.line, bad.err
			}
			l.errs = append(l.errs, d)
		}
		return
	}
	// A list that is empty, or that is for all its entries, would silently never match: a download went wrong, or the key
	// is. One of a file of many may be empty; its authors keep it for the sake of those who name it.
	if c.names == nil && c.prefixes == nil {
		l.defect(kind, name, file, fmt.Errorf("it has no entries: fetch it again, or write some into it"))
		return
	}
	if asSite && c.names == nil && c.prefixes != nil {
		l.defect(Geosite, name, file, fmt.Errorf("it lists only addresses: name it under geoip, not geosite"))
		return
	}
	if asCode && c.prefixes == nil && c.names != nil {
		l.defect(Geoip, name, file, fmt.Errorf("it lists only names: name it under geosite, not geoip"))
		return
	}
	if asSite {
		l.add(Geosite, name, file, &c)
	}
	if asCode {
		l.add(Geoip, name, file, &c)
	}
}

// many takes lists out of a file of many.
func (l *loader) many(kind, file string, wanted []string, sets map[string]string) {
	if len(wanted) == 0 {
		return
	}
	if file == "" {
		for _, name := range wanted {
			l.defect(kind, name, "", fmt.Errorf("%s %q is in no file: there is neither a %s file nor a set of that name%s",
				kind, name, kind, didYouMean(name, slices.Collect(maps.Keys(sets)))))
		}
		return
	}
	data, err := read(file)
	if err != nil {
		l.defect(kind, wanted[0], file, err)
		return
	}
	format := formatOf(data)
	if format.many[kind] == nil {
		l.defect(kind, wanted[0], file, fmt.Errorf("%s, not %s data: %s", format.name, kind, format.fix))
		return
	}
	found, all, err := format.many[kind](data, wanted)
	if err != nil {
		l.defect(kind, wanted[0], file, err)
		return
	}
	for _, name := range wanted {
		switch c := found[name]; {
		case c == nil:
			category, _, _ := strings.Cut(name, "@")
			l.defect(kind, name, file, fmt.Errorf("it has no list %q%s", name, didYouMean(category, all)))
		case c.err != nil:
			l.defect(kind, name, file, fmt.Errorf("%s %q: %w", kind, name, c.err))
		default:
			l.add(kind, name, file, &c.content)
		}
	}
}

// one is a list of a file of many, or what is wrong with it.
type one struct {
	content
	err error
}

// format is how a file is written.
type format struct {
	name string // `it is a …`
	fix  string // where it is not what was asked for
	one  func(data []byte, c *content) []error
	// many returns the wanted lists and the names of all.
	many map[string]func(data []byte, wanted []string) (found map[string]*one, all []string, err error)
}

var (
	formatSRS  = &format{name: "it is a sing-box rule set, one list", fix: "name it under sets", one: readSRS}
	formatMRS  = &format{name: "it is a mihomo rule set, one list", fix: "name it under sets", one: readMRS}
	formatText = &format{name: "it is text, one list", fix: "name it under sets", one: readText}
	formatMMDB = &format{name: "it is an .mmdb database, with lists of addresses", fix: "name it under geoip", many: map[string]func([]byte, []string) (map[string]*one, []string, error){Geoip: readMMDB}}
	formatDat  = &format{name: "it is binary data of many lists", fix: "name it under geosite or geoip", many: map[string]func([]byte, []string) (map[string]*one, []string, error){
		Geosite: readSiteDat, Geoip: readIPDat,
	}}
	formatHTML = &format{name: "it is a web page", fix: "the download went wrong; fetch the file itself"}
)

// formatOf looks at the beginning, but an .mmdb's mark is near its end. Text has no zero bytes, and .dat always has lengths or
// numbers that are no text.
func formatOf(data []byte) *format {
	begins := func(mark string) bool { return bytes.HasPrefix(data, []byte(mark)) }
	switch {
	case begins(magicSRS):
		return formatSRS
	case begins(magicZstd):
		return formatMRS
	case isMMDB(data):
		return formatMMDB
	case isHTML(data):
		return formatHTML
	case isText(data):
		return formatText
	}
	return formatDat
}

func isHTML(data []byte) bool {
	begin := strings.ToLower(strings.TrimSpace(string(data[:min(len(data), 64)])))
	return strings.HasPrefix(begin, "<!doctype") || strings.HasPrefix(begin, "<html")
}

// isText looks for control characters, which lines of text have none of.
func isText(data []byte) bool {
	return !bytes.ContainsFunc(data[:min(len(data), 4096)], func(r rune) bool { return r < ' ' && r != '\n' && r != '\r' && r != '\t' })
}

// maxFile bounds what is read at once. The largest databases that people use for routing have 70 MB.
const maxFile = 256 << 20

func read(file string) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a pipe would wait for its writer
	if err == nil {
		defer f.Close()
		var data []byte
		if data, err = readAll(f); err == nil {
			return data, nil
		}
	}
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		err = path.Err // the file's name stands before it already
	}
	return nil, fmt.Errorf("reading it: %w", err)
}

func readAll(f *os.File) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a file")
	}
	if info.Size() == 0 {
		return nil, errors.New("it is empty")
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("it has more than %d MiB", maxFile>>20)
	}
	data := bytes.NewBuffer(make([]byte, 0, info.Size()+bytes.MinRead)) // room, so that it is not copied at the end
	_, err = io.Copy(data, io.LimitReader(f, maxFile))
	return data.Bytes(), err
}
