package geodata

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// didYouMean is the end of a message about an unknown name: those that are near it, or a few that there are.
func didYouMean(name string, all []string) string {
	type candidate struct {
		name string
		far  int
	}
	var near []candidate
	if len(name) <= 64 { // a longer one is no typing error, and slow to compare
		for _, other := range all {
			far := typingErrors(name, other)
			if len(name) > 1 && far > 1 && (strings.Contains(other, name) || len(other) > 3 && strings.Contains(name, other)) {
				far = 2 // after those with one error
			}
			if far <= 1+len(name)/4 {
				near = append(near, candidate{other, far})
			}
		}
	}
	slices.SortFunc(near, func(a, b candidate) int {
		return cmp.Or(a.far-b.far, len(a.name)-len(b.name), strings.Compare(a.name, b.name))
	})
	const most = 3
	if len(near) > 0 {
		var quoted []string
		for _, c := range near[:min(most, len(near))] {
			quoted = append(quoted, fmt.Sprintf("%q", c.name))
		}
		return "; did you mean " + strings.Join(quoted, " or ") + "?"
	}
	if len(all) == 0 {
		return ""
	}
	all = slices.Compact(slices.Sorted(slices.Values(all)))
	if len(all) > 12 {
		return fmt.Sprintf("; it has %d others, such as %s", len(all), strings.Join(all[:most], ", "))
	}
	return " (have: " + strings.Join(all, ", ") + ")"
}

// typingErrors is the number of letters inserted, left out or replaced between a and b.
func typingErrors(a, b string) int {
	above, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range above {
		above[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			replaced := above[j]
			if a[i] != b[j] {
				replaced++
			}
			row[j+1] = min(replaced, above[j+1]+1, row[j]+1)
		}
		above, row = row, above
	}
	return above[len(b)]
}
