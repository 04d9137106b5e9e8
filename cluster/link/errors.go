package link

import (
	"errors"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/protocol/fault"
)

// codeOf is the table of classes and codes between nodes.
var codeOf = map[fault.Class]codes.Code{
	fault.Retryable: codes.Unavailable, fault.RateLimited: codes.ResourceExhausted, fault.Exhausted: codes.ResourceExhausted,
	fault.Invalid: codes.InvalidArgument, fault.Conflict: codes.FailedPrecondition, fault.Rejected: codes.FailedPrecondition,
	fault.NotFound: codes.NotFound, fault.Unauthorized: codes.Unauthenticated, fault.Forbidden: codes.PermissionDenied,
	fault.Unsupported: codes.Unimplemented, fault.Internal: codes.Internal,
}

// statusOf turns an error into what travels: its class and its sentence, not its cause.
func statusOf(err error) error {
	if err == nil {
		return nil
	}
	var e *fault.Error
	if !errors.As(err, &e) {
		e = fault.Wrap(fault.Internal, err, "a fault in this node; its log has more")
	}
	text := e.Message
	if e.Field != "" {
		text = e.Field + ": " + text
	}
	st, derr := status.New(codeOf[e.Class], text).WithDetails(&errdetails.ErrorInfo{Reason: string(e.Class), Domain: "certmesh"})
	if derr != nil {
		return status.Error(codeOf[e.Class], text)
	}
	return st.Err()
}

// faultOf is its mirror image.
func faultOf(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "certmesh" {
			if class := fault.Class(info.Reason); codeOf[class] != codes.OK {
				return fault.New(class, "%s", st.Message())
			}
		}
	}
	return fault.New(fault.Retryable, "the other node cannot be reached: %s", st.Message())
}
