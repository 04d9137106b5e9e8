package store

import "errors"

// Faults is a seam for tests: it sees every statement before it is sent and every commit before it is made. Nil in the
// product.
type Faults interface {
	// Before is asked before the n-th statement (from 1; 0: the beginning) of a run of the transaction called name. An
	// error takes the place of the statement's answer.
	Before(name string, n int) error
	// Commit is asked before a commit. ErrCommitKept commits and then says that the outcome is unknown, ErrCommitLost
	// rolls back and says the same, ErrCutAfterCommit commits and ends with ErrCut, any other error rolls back.
	Commit(name string) error
}

// What a Faults may answer.
var (
	// ErrSerialization stands for SQLSTATE 40001.
	ErrSerialization error = injected("40001")
	ErrCommitKept          = errors.New("injected: kept, but nobody was told")
	ErrCommitLost          = errors.New("injected: not kept, and nobody was told")
	// ErrCut: the process "died". It is never retried; the seam answers it to every later statement too.
	ErrCut            = errors.New("injected: the process was cut here")
	ErrCutAfterCommit = errors.New("injected: the process was cut after its commit")
)

type injected string

func (i injected) Error() string    { return "injected: SQLSTATE " + string(i) }
func (i injected) SQLState() string { return string(i) }
