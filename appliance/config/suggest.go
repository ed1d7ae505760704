package config

import (
	"slices"
	"strings"
)

// nearest finds the candidate that the user most likely meant: one that differs in case or hyphens
// only, one that goes on where the text ends, or the one with the fewest typing errors.
func nearest(text string, candidates []string) (string, bool) {
	plain := strings.ReplaceAll(strings.ToLower(text), "-", "_")
	if plain == "" || len(plain) > 64 { // a longer text is no typing error, and would be slow to compare
		return "", false
	}
	best, errors := "", 1+len(plain)/4
	for _, c := range slices.Sorted(slices.Values(candidates)) {
		if n := typingErrors(plain, c); n < errors || n == errors && best == "" {
			best, errors = c, n
		}
	}
	if best != "" {
		return best, true
	}
	for _, c := range slices.Sorted(slices.Values(candidates)) {
		if strings.HasPrefix(c, plain+"_") || strings.HasPrefix(plain, c+"_") || c == plain+"s" {
			return c, true
		}
	}
	return "", false
}

// typingErrors is the number of letters inserted, left out, replaced, or swapped with their
// neighbour between a and b (optimal string alignment distance).
func typingErrors(a, b string) int {
	before, above, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
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
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, above, row = above, row, before
	}
	return above[len(b)]
}

// didYouMean is the end of a message about an unknown text: the likely one, or all that there are.
func didYouMean(text string, candidates []string) string {
	if c, ok := nearest(text, candidates); ok {
		return `; did you mean "` + c + `"?`
	}
	return " " + have(candidates)
}

// have lists what there is, sorted and shortened.
func have(candidates []string) string {
	const limit = 24
	sorted := slices.Sorted(slices.Values(candidates))
	if len(sorted) > limit {
		sorted = append(sorted[:limit:limit], "…")
	}
	return "(have: " + strings.Join(sorted, ", ") + ")"
}
