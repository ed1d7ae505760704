package config

import (
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// Geodata are the files of the lists that rules name. Load reads those that they do name.
type Geodata struct {
	Geosite  string            // a file of domain lists; empty: none
	Geoip    string            // a file of address lists; empty: none
	Sets     map[string]string // files of one list each, by the list's name in lower case
	Position Position
}

func (d *decoder) geodata(at string, n *yaml.Node, c *draft) {
	c.Geodata.Position = Position{d.file, n.Line}
	entries := d.entries(at, n)
	decode(d, at, entries, geodataKeys, nil, &c.Geodata)
	beside := func(path *string) {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(c.directory, *path)
		}
	}
	beside(&c.Geodata.Geosite)
	beside(&c.Geodata.Geoip)
	for name, path := range c.Geodata.Sets {
		beside(&path)
		c.Geodata.Sets[name] = path
	}
}

var geodataKeys = keys[Geodata]{
	"geosite": func(d *decoder, at string, n *yaml.Node, g *Geodata) {
		g.Geosite, _ = d.scalar(at, n)
	},
	"geoip": func(d *decoder, at string, n *yaml.Node, g *Geodata) {
		g.Geoip, _ = d.scalar(at, n)
	},
	"sets": func(d *decoder, at string, n *yaml.Node, g *Geodata) {
		entries := d.entries(at, n)
		g.Sets = make(map[string]string, len(entries))
		for _, e := range entries {
			value, err := parseValue("geosite", e.key)
			if err != nil {
				d.errorf(e.line, "%s: %w", at, err)
				continue
			}
			name := value.String()
			if _, taken := g.Sets[name]; taken {
				d.errorf(e.line, "%s: %s stands here twice (case does not matter); rename one", at, quote(name))
			}
			g.Sets[name], _ = d.scalar(join(at, e.key), e.value)
		}
	},
}

// listUse is where a rule names a list.
type listUse struct {
	at   string // the rule
	kind string // geosite or geoip
	name string // lower case
	line int
}

// noteLists remembers the lists that a condition names.
func (d *decoder) noteLists(at string, c policy.Condition, lines []int) {
	kind := c.Field.Key
	if kind != "geosite" && kind != "geoip" {
		return
	}
	for i, v := range c.Values {
		d.lists = append(d.lists, listUse{strings.TrimSuffix(at, kind), kind, v.String(), lines[i]})
	}
}

// linkGeodata loads the lists that rules name. What is wrong with a list is said where it is named.
func (d *decoder) linkGeodata(c *draft) {
	var there []listUse
	for _, use := range d.lists {
		file := c.Geodata.Geosite
		if use.kind == "geoip" {
			file = c.Geodata.Geoip
		}
		switch _, set := c.Geodata.Sets[use.name]; {
		case file != "" || set:
			there = append(there, use)
		case c.Geodata.Position.Line == 0:
			d.errorf(use.line, "%s%s %s: there is no geodata; add it: geodata: { %s: FILE }", use.at, use.kind, quote(use.name), use.kind)
		default:
			d.errorf(use.line, "%s%s %s: geodata has neither a %s file nor a set of this name; add one", use.at, use.kind, quote(use.name), use.kind)
		}
	}
}
