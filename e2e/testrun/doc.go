// Testrun runs every test of the repository and judges the run, for `make test`.
//
//	go run ./e2e/testrun -race -check 'format=gofmt -l .' . e2e/sqlgrammar tools
//
// The arguments are module folders, relative to the repository's root; each gets `go test -json ./...`. Beyond what
// go test judges, the run fails when a test skips that skips.yaml does not list (what is silently skipped is silently
// untested), when a listed suite skips although its environment was given, and when a module ran no test at all.
//
// A check is a command that counts as one test: it passes if it exits with status 0. The last line printed is
//
//	N passed, N failed, N skipped
//
// where a test with subtests is counted by its subtests. The exit status is 0 only if nothing failed.
package main
