// Package fault holds the product's error classes.
//
// An error is classified once, where its class is known, and translated once, at the edge (gRPC status, exit code,
// Result message). Everything between wraps it with what was being done, by fmt.Errorf and %w. The package imports the
// standard library only, so that every room may import it.
package fault

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Class says what a caller may do about an error.
type Class string

const (
	// Retryable: the same call may succeed later; nothing is known to be wrong with the request.
	Retryable Class = "retryable"
	// RateLimited: the other side asked for patience; Error.Until says until when.
	RateLimited Class = "rate_limited"
	// Invalid: the request can never succeed as it is; Error.Field names what to change.
	Invalid Class = "invalid"
	// Conflict: the caller's belief about the state is stale; read again, then decide.
	Conflict Class = "conflict"
	// NotFound: no such thing, or none that the caller may know of.
	NotFound Class = "not_found"
	// Unauthorized: the caller has not shown who it is.
	Unauthorized Class = "unauthorized"
	// Forbidden: the caller is known and may not do this.
	Forbidden Class = "forbidden"
	// Unsupported: this side does not know how; another version or kind may.
	Unsupported Class = "unsupported"
	// Rejected: a policy or an external system decided against it for good.
	Rejected Class = "rejected"
	// Exhausted: a bound of ours was reached (message size, queue, credit).
	Exhausted Class = "exhausted"
	// Internal: a defect of ours; details go to the log, never to the user.
	Internal Class = "internal"
)

// Error is a classified error. Message is one sentence for a person, with the next step where there is one; it never
// contains a secret.
type Error struct {
	Class   Class
	Message string
	// Field is the path of the request field that is wrong (Invalid), empty otherwise.
	Field string
	// Until is the earliest time at which trying again makes sense (RateLimited), zero otherwise.
	Until time.Time
	// Err is the cause for the log; it does not reach users.
	Err error
}

func (e *Error) Error() string {
	s := e.Message
	if e.Field != "" {
		s = e.Field + ": " + s
	}
	if e.Err == nil {
		return s
	}
	if c := e.Err.Error(); c != "" {
		s += ": " + c
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// New returns an error of class c with a formatted sentence; a %w verb in format keeps the cause.
func New(c Class, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Class: c, Message: err.Error(), Err: hidden(err)}
}

// Wrap classifies err as c, with a sentence that says what was being done.
func Wrap(c Class, err error, format string, args ...any) *Error {
	return &Error{Class: c, Message: fmt.Sprintf(format, args...), Err: err}
}

// InvalidField returns an Invalid error about the request field named by path.
func InvalidField(path, format string, args ...any) *Error {
	return &Error{Class: Invalid, Field: path, Message: fmt.Sprintf(format, args...)}
}

// Limited returns a RateLimited error that may be tried again at until.
func Limited(until time.Time, format string, args ...any) *Error {
	return &Error{Class: RateLimited, Until: until, Message: fmt.Sprintf(format, args...)}
}

// ClassOf returns the class of the first classified error in err's tree. Deadlines and cancellation count as
// Retryable, any other unclassified error as Internal; nil has no class.
func ClassOf(err error) Class {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Class
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return Retryable
	}
	return Internal
}

// Is reports whether err is of class c.
func Is(err error, c Class) bool { return err != nil && ClassOf(err) == c }

// MayRetry reports whether trying the same thing again later can help: Retryable, RateLimited, Exhausted and
// Internal errors may pass; the others need a change first.
func MayRetry(err error) bool {
	switch ClassOf(err) {
	case Retryable, RateLimited, Exhausted, Internal:
		return true
	default:
		return false
	}
}

// hidden keeps err's causes reachable by errors.Is and errors.As without printing its text twice.
func hidden(err error) error {
	if errors.Unwrap(err) == nil {
		if _, ok := err.(interface{ Unwrap() []error }); !ok {
			return nil
		}
	}
	return cause{err}
}

type cause struct{ err error }

func (cause) Error() string   { return "" }
func (c cause) Unwrap() error { return c.err }
