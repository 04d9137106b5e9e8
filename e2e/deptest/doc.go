// Package deptest holds the walls between the rooms of the repository: which package may import what, directly and by
// way of others. The rules are those of docs/development.md; each failure says which rule and why. A rule about a package
// that does not exist yet holds trivially.
package deptest
