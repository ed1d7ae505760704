package main

import "strings"

// Each licence is told by phrases that occur in its text, all of them, and in no other's.
// The texts are compared in lower case and with single spaces.
var known = []struct {
	name       string
	permissive bool
	phrases    []string
}{
	{"AGPL-3.0", false, []string{"gnu affero general public license version 3"}},
	{"LGPL", false, []string{"gnu lesser general public license version"}},
	{"LGPL-2.0", false, []string{"gnu library general public license version"}},
	{"GPL-3.0", false, []string{"gnu general public license version 3, 29 june 2007"}},
	{"GPL-2.0", false, []string{"gnu general public license version 2, june 1991"}},
	{"MPL-2.0", false, []string{"mozilla public license version 2.0"}},
	{"EPL", false, []string{"eclipse public license"}},
	{"EUPL", false, []string{"european union public licence"}},
	{"SSPL", false, []string{"server side public license"}},
	{"BUSL", false, []string{"business source license"}},
	{"CC-BY-SA", false, []string{"attribution-sharealike"}},

	{"Apache-2.0", true, []string{"apache license version 2.0, january 2004"}},
	{"MIT", true, []string{"permission is hereby granted, free of charge", "the above copyright notice and this permission notice"}},
	{"ISC", true, []string{"permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted, provided that"}},
	{"ISC", true, []string{"permission to use, copy, modify, and distribute this software for any purpose with or without fee is hereby granted, provided that"}},
	{"BSD", true, []string{"redistribution and use in source and binary forms, with or without modification, are permitted", "redistributions in binary form must reproduce the above copyright"}},
	{"Unlicense", true, []string{"this is free and unencumbered software released into the public domain"}},
	{"CC0-1.0", true, []string{"cc0 1.0 universal"}},
}

// classify names the licences that text is made of. It is permissive only if each of them is, and at
// least one was recognised: a text that says nothing known must be read by a person.
func classify(text string) (names []string, permissive bool) {
	text = strings.Join(strings.Fields(strings.ToLower(text)), " ")
	permissive = true
	for _, k := range known {
		if containsAll(text, k.phrases) {
			names = append(names, k.name)
			permissive = permissive && k.permissive
		}
	}
	if len(names) == 0 {
		return []string{"not recognised"}, false
	}
	return names, permissive
}

func containsAll(text string, phrases []string) bool {
	for _, p := range phrases {
		if !strings.Contains(text, p) {
			return false
		}
	}
	return true
}
