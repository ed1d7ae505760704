package config

import (
	"errors"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/geodata"
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
	before := len(d.errs)
	decode(d, at, d.entries(at, n), geodataKeys, nil, &c.Geodata)
	c.geodataBroken = len(d.errs) > before
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
	kind string // geodata.Geosite or Geoip, which are the keys of the fields too
	name string // lower case
	line int
}

// noteLists remembers the lists that a condition names.
func (d *decoder) noteLists(at string, c policy.Condition, lines []int) {
	kind := c.Field.Key
	if kind != geodata.Geosite && kind != geodata.Geoip {
		return
	}
	for i, v := range c.Values {
		d.lists = append(d.lists, listUse{strings.TrimSuffix(at, kind), kind, v.String(), lines[i]})
	}
}

// linkGeodata loads the lists that rules name. What is wrong with one is said where it is first named.
func (d *decoder) linkGeodata(c *draft) {
	if c.Geodata.Position.Line == 0 {
		for _, use := range d.lists {
			d.errorf(use.line, "%s%s %s: there is no geodata; add it: geodata: { %s: FILE }", use.at, use.kind, quote(use.name), use.kind)
		}
		return
	}
	if c.geodataBroken {
		return // reported
	}
	var wanted geodata.Wanted
	for _, use := range d.lists {
		if use.kind == geodata.Geoip {
			wanted.Codes = append(wanted.Codes, use.name)
		} else {
			wanted.Sites = append(wanted.Sites, use.name)
		}
	}
	lists, err := geodata.Load(geodata.Sources{Geosite: c.Geodata.Geosite, Geoip: c.Geodata.Geoip, Sets: c.Geodata.Sets}, wanted)
	if err == nil {
		c.Policy.Geo = lists
		return
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		d.errorf(c.Geodata.Position.Line, "geodata: %w", err)
		return
	}
	for _, err := range joined.Unwrap() {
		d.defect(c, err)
	}
}

// defect reports what is wrong with a list, or with the file that it is looked for in.
func (d *decoder) defect(c *draft, err error) {
	if defect := (*geodata.Defect)(nil); errors.As(err, &defect) {
		for _, use := range d.lists {
			if use.kind != defect.Kind || use.name != defect.Name {
				continue
			}
			at := use.at
			if defect.File != "" {
				at += use.kind + ": "
			}
			d.errorf(use.line, "%s%w", at, err)
			return
		}
	}
	d.errorf(c.Geodata.Position.Line, "geodata: %w", err)
}
