package main

import (
	"context"
	"fmt"
	"math"
	"slices"
)

// Quantity is what is measured, and what it is compared with.
type Quantity struct {
	What   string `json:"what"`
	Unit   string `json:"unit"`
	Beside string `json:"beside"` // the same quantity of something simpler
}

// Figure is one line of the result.
type Figure struct {
	Name string `json:"name"`
	Quantity
	Target string `json:"target,omitempty"` // what the project promises
	// Most or Least bounds Ratio under --check; 0: no bound.
	Most  float64 `json:"most,omitempty"`
	Least float64 `json:"least,omitempty"`

	Samples []Sample `json:"samples"`
	Median  float64  `json:"median"`
	// Reference is the median of what was measured beside it, Ratio the median over the samples of value ÷ reference.
	Reference float64 `json:"reference"`
	Ratio     float64 `json:"ratio"`
}

// Sample is one measurement and its neighbour in time.
type Sample struct {
	Value     float64 `json:"value"`
	Reference float64 `json:"reference"`
}

// add appends samples and brings the medians up to date.
func (f *Figure) add(samples ...Sample) {
	f.Samples = append(f.Samples, samples...)
	var values, references, ratios []float64
	for _, s := range f.Samples {
		values = append(values, s.Value)
		references = append(references, s.Reference)
		ratios = append(ratios, s.Value/s.Reference)
	}
	f.Median, f.Reference, f.Ratio = median(values), median(references), median(ratios)
}

// broken says how the figure breaks its bound, if it does.
func (f *Figure) broken() (how string, is bool) {
	switch {
	case f.Most > 0 && f.Ratio > f.Most:
		return fmt.Sprintf("%s: %s is %.2f times that of %s; at most %.2f", f.Name, f.What, f.Ratio, f.Beside, f.Most), true
	case f.Least > 0 && f.Ratio < f.Least:
		return fmt.Sprintf("%s: %s is %.2f times that of %s; at least %.2f", f.Name, f.What, f.Ratio, f.Beside, f.Least), true
	}
	return "", false
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	half := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[half]
	}
	return (sorted[half-1] + sorted[half]) / 2
}

// measurement returns one value; its length is up to it.
type measurement func(context.Context) (float64, error)

// alternate measures two things in turn, pairs times, and adds the samples to the figure. Every second pair begins with
// the other one, so that neither always profits from what the first of a pair leaves behind.
func (f *Figure) alternate(ctx context.Context, pairs int, value, beside measurement) error {
	for i := range pairs {
		var s Sample
		order := []struct {
			measure measurement
			into    *float64
		}{{value, &s.Value}, {beside, &s.Reference}}
		if i%2 == 1 {
			slices.Reverse(order)
		}
		for _, o := range order {
			v, err := o.measure(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", f.Name, err)
			}
			*o.into = v
		}
		f.add(s)
	}
	return nil
}

// significant prints three digits, without an exponent.
func significant(v float64) string {
	switch digits := 2 - int(math.Floor(math.Log10(math.Abs(v)))); {
	case v == 0:
		return "0"
	case digits <= 0:
		return fmt.Sprintf("%.0f", v)
	default:
		return fmt.Sprintf("%.*f", min(digits, 3), v)
	}
}
