package config

import (
	"path/filepath"

	"go.yaml.in/yaml/v3"
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
