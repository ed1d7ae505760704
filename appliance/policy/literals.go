package policy

import (
	"cmp"
	"regexp/syntax"
	"slices"
	"strings"
)

// extract is what is known of every text that an expression matches, among names: lower case, ASCII.
type extract struct {
	whole bool     // it is one of texts; without any: nothing matches
	texts []string // otherwise it contains one of these; without any: nothing is known
}

const (
	mostTexts = 64 // of one expression; beyond, less is known
	longest   = 64 // bytes of a text that is joined from parts
	mostRunes = 10 // of a class whose members are tried one by one: the digits
)

// requiredTexts returns texts of which each name that the expression is found in has one. None may
// be: then no name matches. It is not ok if there are no such texts.
func requiredTexts(expression string) (texts []string, ok bool) {
	re, err := syntax.Parse(expression, syntax.Perl) // as regexp.Compile does
	if err != nil {
		return nil, false
	}
	e := extractOf(re.Simplify())
	if e.whole && len(e.texts) == 0 {
		return nil, true
	}
	if e.worth() == 0 {
		return nil, false
	}
	slices.SortFunc(e.texts, func(a, b string) int { return cmp.Or(len(a)-len(b), strings.Compare(a, b)) })
	for _, text := range e.texts {
		if !slices.ContainsFunc(texts, func(shorter string) bool { return strings.Contains(text, shorter) }) {
			texts = append(texts, text)
		}
	}
	return texts, true
}

func extractOf(re *syntax.Regexp) extract {
	switch re.Op {
	case syntax.OpNoMatch:
		return extract{whole: true}
	case syntax.OpEmptyMatch, syntax.OpBeginLine, syntax.OpEndLine, syntax.OpBeginText, syntax.OpEndText,
		syntax.OpWordBoundary, syntax.OpNoWordBoundary:
		return extract{true, []string{""}}
	case syntax.OpLiteral:
		text := string(re.Rune)
		if re.Flags&syntax.FoldCase != 0 {
			text = strings.Map(lowerASCII, text)
		}
		return extract{true, []string{text}}
	case syntax.OpCharClass:
		return extractOfClass(re.Rune)
	case syntax.OpCapture:
		return extractOf(re.Sub[0])
	case syntax.OpPlus:
		return extractOf(re.Sub[0]).within()
	case syntax.OpQuest:
		if e := extractOf(re.Sub[0]); e.whole && len(e.texts) < mostTexts {
			return extract{true, append(e.texts, "")}
		}
	case syntax.OpConcat:
		return extractOfConcat(re.Sub)
	case syntax.OpAlternate:
		return extractOfAlternate(re.Sub)
	}
	return extract{} // and of `.` and `*`
}

// extractOfClass ignores what is not in names.
func extractOfClass(ranges []rune) extract {
	e := extract{whole: true}
	for i := 0; i < len(ranges); i += 2 {
		for c := ranges[i]; c <= min(ranges[i+1], 0x7f); c++ {
			if 'A' <= c && c <= 'Z' {
				continue
			}
			if len(e.texts) == mostRunes {
				return extract{}
			}
			e.texts = append(e.texts, string(c))
		}
	}
	return e
}

// extractOfConcat joins neighbours as long as they are known whole, and takes the best of what that gives.
func extractOfConcat(subs []*syntax.Regexp) extract {
	run, best := extract{true, []string{""}}, extract{}
	broken := false
	for _, sub := range subs {
		e := extractOf(sub)
		if e.whole && len(run.texts)*len(e.texts) <= mostTexts && run.longest()+e.longest() <= longest {
			run.texts = product(run.texts, e.texts)
			continue
		}
		broken = true
		best = better(best, run.within())
		run = e
		if !e.whole {
			best = better(best, e)
			run = extract{true, []string{""}}
		}
	}
	if !broken {
		return run
	}
	return better(best, run.within())
}

func (e extract) longest() (most int) {
	for _, text := range e.texts {
		most = max(most, len(text))
	}
	return most
}

func product(a, b []string) []string {
	texts := make([]string, 0, len(a)*len(b))
	for _, x := range a {
		for _, y := range b {
			texts = append(texts, x+y)
		}
	}
	return texts
}

func extractOfAlternate(subs []*syntax.Regexp) extract {
	all := extract{whole: true}
	for _, sub := range subs {
		e := extractOf(sub)
		if !e.whole && len(e.texts) == 0 || len(all.texts)+len(e.texts) > mostTexts {
			return extract{}
		}
		all.whole = all.whole && e.whole
		all.texts = append(all.texts, e.texts...)
	}
	return all
}

// within forgets that there is nothing around the texts.
func (e extract) within() extract { return extract{texts: e.texts} }

func better(a, b extract) extract {
	x, y := a.worth(), b.worth()
	if y > x || y == x && len(b.texts) < len(a.texts) {
		return b
	}
	return a
}

// commonplaces are in so many names that to look for a part of one spares nothing.
var commonplaces = []string{"www.", ".com.", ".net.", ".org.", ".com.cn"}

// worth is how well the texts tell names apart: as the worst of them does. 0: not at all.
func (e extract) worth() int {
	if len(e.texts) == 0 {
		return 0
	}
	worst := 1 << 30
	for _, text := range e.texts {
		worth := 2 * len(text)
		if slices.ContainsFunc(commonplaces, func(c string) bool { return strings.Contains(c, text) }) {
			worth = min(worth, 1)
		}
		worst = min(worst, worth)
	}
	return worst
}
