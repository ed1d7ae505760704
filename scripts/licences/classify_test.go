package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestClassify(t *testing.T) {
	const (
		mit = "MIT License\n\nPermission is hereby granted, free of charge, to any person …\n\nThe above copyright notice and this\npermission notice shall be included …"
		gpl = "                    GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007\n"
	)
	cases := []struct {
		text       string
		names      string
		permissive bool
	}{
		{mit, "MIT", true},
		{"Apache License\n  Version 2.0, January 2004", "Apache-2.0", true},
		{gpl, "GPL-3.0", false},
		{"GNU AFFERO GENERAL PUBLIC LICENSE\n Version 3, 19 November 2007", "AGPL-3.0", false},
		{"GNU LESSER GENERAL PUBLIC LICENSE\n Version 2.1, February 1999", "LGPL", false},
		{"Mozilla Public License Version 2.0", "MPL-2.0", false},
		{mit + gpl, "GPL-3.0 MIT", false}, // a permissive part does not outweigh the other
		{"All rights reserved.", "not recognised", false},
		{"", "not recognised", false},
	}
	for _, c := range cases {
		names, permissive := classify(c.text)
		if strings.Join(names, " ") != c.names || permissive != c.permissive {
			t.Errorf("%.40q: got %v %v, want %s %v", c.text, names, permissive, c.names, c.permissive)
		}
	}
}

func TestJudgeReadsEveryLicenceFile(t *testing.T) {
	dir := t.TempDir()
	if v := judge(dir); v.permissive {
		t.Errorf("without a licence file: %v is permissive", v)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("LICENSE", "Apache License\nVersion 2.0, January 2004")
	if v := judge(dir); !v.permissive {
		t.Errorf("Apache alone: %v is refused", v)
	}
	write("COPYING.txt", "GNU GENERAL PUBLIC LICENSE\nVersion 2, June 1991")
	if v := judge(dir); v.permissive {
		t.Errorf("with a GPL beside it: %v is permissive", v)
	}
}
