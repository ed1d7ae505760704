package config

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Position is where something stands in a configuration file.
type Position struct {
	File string // as the user named it
	Line int    // from 1; 0 is the file as a whole
}

func (p Position) String() string {
	if p.Line == 0 {
		return p.File
	}
	return p.File + ":" + strconv.Itoa(p.Line)
}

// Errorf makes an error about what stands here: `FILE:LINE: ` and the formatted message. It is for
// later stages (constructing an outbound, binding an address), so that their errors look like those
// of Load. %w wraps.
func (p Position) Errorf(format string, args ...any) error {
	return &Error{Position: p, Err: fmt.Errorf(format, args...)}
}

// Error is one thing that is wrong with a configuration: one line, `FILE:LINE: object: what is wrong
// and what to do`.
type Error struct {
	Position Position
	Err      error
}

func (e *Error) Error() string { return e.Position.String() + ": " + oneLine(e.Err.Error()) }
func (e *Error) Unwrap() error { return e.Err }

// userinfo is what stands between "://" and the last "@" of the same word or quoted string: the place
// of a password in a URL.
var userinfo = regexp.MustCompile(`://(?:[^"\\]|\\.)*@`)

// oneLine makes a message safe to print: no line break that would break the one-line form, and no
// password of a URL, wherever the message got it from.
func oneLine(message string) string {
	const limit = 2000 // bytes: a value of a megabyte is not worth printing
	message = userinfo.ReplaceAllString(strings.Join(strings.Fields(message), " "), "://…@")
	if len(message) > limit {
		message = strings.ToValidUTF8(message[:limit], "") + "…"
	}
	return message
}

// quote quotes a piece of the file for a message, shortened.
func quote(text string) string {
	const limit = 60 // runes: enough to recognise a value, short enough for one line
	if runes := []rune(text); len(runes) > limit {
		text = string(runes[:limit]) + "…"
	}
	return strconv.Quote(text)
}

// maxErrors bounds what is said about one file. Nobody reads further.
const maxErrors = 100

// report collects what is wrong with a file.
type report struct {
	file     string
	errs     []*Error
	warnings []*Error
	unsaid   int
}

func (r *report) errorf(line int, format string, args ...any) {
	if len(r.errs) == maxErrors {
		r.unsaid++
		return
	}
	r.errs = append(r.errs, &Error{Position{r.file, line}, fmt.Errorf(format, args...)})
}

func (r *report) warnf(line int, format string, args ...any) {
	if len(r.warnings) < maxErrors {
		r.warnings = append(r.warnings, &Error{Position{r.file, line}, fmt.Errorf(format, args...)})
	}
}

// err is everything that was reported, in the order of the file; nil if nothing was.
func (r *report) err() error {
	if len(r.errs) == 0 {
		return nil
	}
	inFileOrder(r.errs)
	all := make([]error, 0, len(r.errs)+1)
	for _, e := range r.errs {
		all = append(all, e)
	}
	if r.unsaid > 0 {
		all = append(all, &Error{Position{File: r.file}, fmt.Errorf("and %d more errors", r.unsaid)})
	}
	return errors.Join(all...)
}

func inFileOrder(errs []*Error) {
	slices.SortStableFunc(errs, func(a, b *Error) int { return a.Position.Line - b.Position.Line })
}
