// Package cli is the operators' command line: commands that call the operators' API by tui/client and show what it
// answers by tui/render. One file per noun. Errors are one line that says what happened and what to do; the exit status
// tells success (0), refusal or failure (1), bad usage (2) and a wait that ended without success (3) apart.
package cli
