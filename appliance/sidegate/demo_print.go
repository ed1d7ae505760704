package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"sidegate/appliance/lab"
)

// script prints the demonstration as it goes.
type script struct {
	out   io.Writer
	color bool
	steps int // printed so far
}

// Escape sequences of ECMA-48, used on a terminal only.
const (
	plain = "\x1b[0m"
	bold  = "\x1b[1m"
	faint = "\x1b[2m"
	green = "\x1b[32m"
	red   = "\x1b[31m"
)

func (p *script) paint(style, text string) string {
	if !p.color {
		return text
	}
	return style + text + plain
}

func (p *script) line(format string, args ...any) { fmt.Fprintf(p.out, format+"\n", args...) }

// block prints a text as it is, indented.
func (p *script) block(text string) {
	p.line("")
	for line := range strings.Lines(strings.Trim(text, "\n")) {
		p.line("%s", strings.TrimRight("    "+line, " \n"))
	}
	p.line("")
}

// title begins a step.
func (p *script) title(text string) {
	p.steps++
	if p.steps == 1 {
		p.line("%s", p.paint(faint, fmt.Sprintf("      %-*s %s", claimWidth, "what is expected", "what was seen")))
	}
	p.line("%s", p.paint(bold, fmt.Sprintf("%2d  %s", p.steps, text)))
}

// claimWidth aligns what was seen, in characters: the longest claim.
const claimWidth = 55

func (p *script) verdict(text, seen string, ok bool) {
	mark := p.paint(green, "✓")
	if !ok {
		mark = p.paint(red, "✗")
		seen = p.paint(red, seen)
	}
	p.line("    %s %-*s %s", mark, claimWidth, text, seen)
}

func counted(c lab.Counts) string {
	switch c.Packets {
	case 0:
		return "0 packets"
	case 1:
		return "1 packet"
	}
	return fmt.Sprintf("%d packets (%s)", c.Packets, size(c.Bytes))
}

// size is a number of bytes in decimal units.
func size(n uint64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}

// brief keeps two or three digits of a duration.
func brief(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= 10*time.Millisecond:
		return d.Round(time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(time.Microsecond).String()
}
