package api

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/certmesh/certmesh/protocol/fault"
)

// errorDomain is the ErrorInfo domain of every status this API makes.
const errorDomain = "certmesh"

// retryDelay is what RetryInfo advises for errors that may pass by themselves.
const retryDelay = 2 * time.Second

// classes is the one translation of classes to the wire: the code, and the next step when the sentence has none.
var classes = map[fault.Class]struct {
	code codes.Code
	next string
}{
	fault.Retryable:    {codes.Unavailable, "try again in a few seconds"},
	fault.RateLimited:  {codes.ResourceExhausted, "try again after the time given"},
	fault.Invalid:      {codes.InvalidArgument, "change the field named and call again"},
	fault.Conflict:     {codes.Aborted, "read the resource again, then decide"},
	fault.NotFound:     {codes.NotFound, "check the id or name; the lists show what exists"},
	fault.Unauthorized: {codes.Unauthenticated, "log in with certmesh login or set CERTMESH_API_KEY"},
	fault.Forbidden:    {codes.PermissionDenied, "use an API key with a higher role"},
	fault.Unsupported:  {codes.Unimplemented, "compare the versions of tool and server"},
	fault.Rejected:     {codes.FailedPrecondition, "see the reason; the same call will be refused again"},
	fault.Exhausted:    {codes.ResourceExhausted, "ask for less at once"},
	fault.Internal:     {codes.Internal, "look for the request id in the server's log"},
}

// statusOf turns an error into what the caller sees: the sentence of the first classified error, never the chain. An
// unclassified error and a defect of ours show no text at all, but the request id by which the log is found.
func statusOf(ctx context.Context, err error, requestID string, now time.Time) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	var e *fault.Error
	classified := errors.As(err, &e)
	// What gRPC itself says of a broken stream or message is passed on as it is.
	if st, ok := status.FromError(err); ok && !classified {
		return st
	}
	class := fault.ClassOf(err)
	code := classes[class].code
	// The caller's own deadline or cancellation is not a fault of the service.
	if class == fault.Retryable {
		switch {
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			code = codes.DeadlineExceeded
		case errors.Is(ctx.Err(), context.Canceled):
			code = codes.Canceled
		}
	}
	message := sentence(err)
	if class == fault.Internal {
		message = "something failed inside the control plane; its log has it under request id " + requestID
	}
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{
		Reason: strings.ToUpper(string(class)), Domain: errorDomain,
		Metadata: map[string]string{"class": string(class), "next": classes[class].next, "request_id": requestID},
	}}
	if classified {
		switch {
		case class == fault.Invalid:
			all := violations{e}
			_ = errors.As(err, &all)
			details = append(details, &errdetails.BadRequest{
				FieldViolations: each(all, func(e *fault.Error) *errdetails.BadRequest_FieldViolation {
					return &errdetails.BadRequest_FieldViolation{Field: e.Field, Description: e.Message}
				}),
			})
		case class == fault.RateLimited && !e.Until.IsZero():
			details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(max(e.Until.Sub(now), 0))})
		}
	}
	if class == fault.Retryable {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryDelay)})
	}
	st := status.New(code, message)
	full, err := st.WithDetails(details...)
	if err != nil {
		return st
	}
	return full
}

// violations are all that is wrong with a request, for callers to mend at once. As an error it is its first part, and
// the status carries every one.
type violations []*fault.Error

// maxViolations bounds what one answer lists.
const maxViolations = 20

func (v *violations) add(field, format string, args ...any) {
	*v = append(*v, fault.InvalidField(field, format, args...))
}

// err is nil when nothing is wrong.
func (v violations) err() error {
	switch {
	case len(v) == 0:
		return nil
	case len(v) > maxViolations:
		v = v[:maxViolations]
	}
	return v
}

func (v violations) Error() string {
	all := make([]string, 0, len(v))
	for _, e := range v {
		all = append(all, e.Error())
	}
	return strings.Join(all, "; ")
}

// Unwrap lets errors.As find the class.
func (v violations) Unwrap() []error {
	return each(v, func(e *fault.Error) error { return e })
}

// renamed gives the field of an Invalid error its name in the request.
func renamed(err error, name func(string) string) error {
	var e *fault.Error
	if !errors.As(err, &e) || e.Class != fault.Invalid {
		return err
	}
	c := *e
	c.Field = name(e.Field)
	return &c
}

// sentence is what may be shown of an error: the first classified error's own sentence, with its field. Internal and
// unclassified errors have none.
func sentence(err error) string {
	if all, ok := errors.AsType[violations](err); ok {
		return all.Error()
	}
	var e *fault.Error
	if !errors.As(err, &e) {
		if fault.Is(err, fault.Retryable) {
			return "the call did not finish in time; try again"
		}
		return "internal error"
	}
	if e.Class == fault.Internal {
		return "internal error"
	}
	if e.Field != "" {
		return e.Field + ": " + e.Message
	}
	return e.Message
}
