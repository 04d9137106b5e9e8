package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// skipList is skips.yaml: the few suites that may be missing.
type skipList struct {
	Suites []suite `yaml:"suites"`
}

// suite is one entry: either tests of a package, or a whole module that the module proxy may refuse to serve.
type suite struct {
	// Suite is its name, for people.
	Suite string `yaml:"suite"`
	// Reason says why it may be missing; required.
	Reason string `yaml:"reason"`
	// Package is the folder of the tests below the repository's root; "…/..." includes the folders below.
	Package string `yaml:"package"`
	// Tests are globs over the full name of a test (as path.Match, element by element); the subtests of what they match
	// are included. Required with Package.
	Tests []string `yaml:"tests"`
	// Env names variables: when one of them is set the suite was asked for and must not skip.
	Env []string `yaml:"env"`
	// Module is the folder of a module that may be missing as a whole, if the proxy refuses one of its modules.
	Module string `yaml:"module"`
}

// parseSkips reads and checks skips.yaml. Unknown keys are errors.
func parseSkips(text string) (skipList, error) {
	var list skipList
	decoder := yaml.NewDecoder(strings.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&list); err != nil {
		return skipList{}, fmt.Errorf("parse the list of skips: %w", err)
	}
	var problems []error
	for i, s := range list.Suites {
		switch {
		case s.Suite == "" || strings.TrimSpace(s.Reason) == "":
			problems = append(problems, fmt.Errorf("suites[%d]: suite and reason are required", i))
		case (s.Package == "") == (s.Module == ""):
			problems = append(problems, fmt.Errorf("suites[%d] (%s): give package and tests, or module", i, s.Suite))
		case s.Package != "" && len(s.Tests) == 0:
			problems = append(problems, fmt.Errorf("suites[%d] (%s): tests is required; a whole package may not skip", i, s.Suite))
		case s.Module != "" && !fs.ValidPath(s.Module):
			problems = append(problems, fmt.Errorf("suites[%d] (%s): module is a folder below the root", i, s.Suite))
		}
		for _, glob := range s.Tests {
			if _, err := path.Match(glob, ""); err != nil {
				problems = append(problems, fmt.Errorf("suites[%d] (%s): tests: %w", i, s.Suite, err))
			}
		}
	}
	return list, errors.Join(problems...)
}

// allows judges a skipped test. pkg is its folder below the root. The error says what to do.
func (l skipList) allows(pkg, test string, getenv func(string) string) (suite, error) {
	for _, s := range l.Suites {
		if s.Package == "" || !s.matches(pkg, test) {
			continue
		}
		for _, name := range s.Env {
			if getenv(name) != "" {
				return s, fmt.Errorf("%s is set, so the suite %q must run, not skip", name, s.Suite)
			}
		}
		return s, nil
	}
	return suite{}, errors.New("this skip is not listed: make the test run, or list it in e2e/testrun/skips.yaml with its reason")
}

// module returns the entry for a module folder that may be missing.
func (l skipList) module(folder string) (suite, bool) {
	for _, s := range l.Suites {
		if s.Module != "" && s.Module == folder {
			return s, true
		}
	}
	return suite{}, false
}

func (s suite) matches(pkg, test string) bool {
	if parent, recursive := strings.CutSuffix(s.Package, "/..."); recursive {
		if pkg != parent && !strings.HasPrefix(pkg, parent+"/") {
			return false
		}
	} else if pkg != s.Package {
		return false
	}
	return slices.ContainsFunc(s.Tests, func(glob string) bool { return matchTest(glob, test) })
}

// matchTest matches element by element, so that a star stays within one.
func matchTest(glob, test string) bool {
	pattern, name := strings.Split(glob, "/"), strings.Split(test, "/")
	if len(name) < len(pattern) {
		return false
	}
	for i := range pattern {
		if ok, err := path.Match(pattern[i], name[i]); err != nil || !ok {
			return false
		}
	}
	return true
}
