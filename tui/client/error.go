package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error is a call that failed, as a person should read it.
type Error struct {
	Code codes.Code
	// Message says what happened, Next what to do about it; either may hold text of the server's, to be cleaned before
	// it is shown on a terminal.
	Message, Next string
	st            *status.Status
}

func (e *Error) Error() string {
	if e.Next == "" {
		return e.Message
	}
	return e.Message + "; " + e.Next
}

// GRPCStatus keeps status.Code and friends working.
func (e *Error) GRPCStatus() *status.Status { return e.st }

// Code returns the gRPC code of err.
func Code(err error) codes.Code { return status.Code(err) }

// nexts are the next steps where the server says none: its answers have their own, in the details.
var nexts = map[codes.Code]string{
	codes.Canceled:           "run it again",
	codes.Unknown:            "check that the address is that of certmeshd's gRPC listener",
	codes.InvalidArgument:    "change what is named and try again",
	codes.DeadlineExceeded:   "try again, or allow more time by --timeout",
	codes.NotFound:           "check the name; the list command shows what exists",
	codes.AlreadyExists:      "choose another name",
	codes.PermissionDenied:   "use an API key with a higher role",
	codes.ResourceExhausted:  "ask for less at once, or try again later",
	codes.FailedPrecondition: "see the reason; the same call will be refused again",
	codes.Aborted:            "look at it again, then decide",
	codes.OutOfRange:         "change what is named and try again",
	codes.Unimplemented:      "compare the versions of certmesh and certmeshd",
	codes.Internal:           "look into the server's log",
	codes.Unavailable:        "try again in a few seconds",
	codes.DataLoss:           "look into the server's log",
	codes.Unauthenticated:    "log in with certmesh login or set CERTMESH_API_KEY",
}

// describe turns the outcome of a call into an Error. trouble is what the connection last failed of, if it did.
func (c *Client) describe(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	out := &Error{Code: st.Code(), Message: st.Message(), st: st}
	var info *errdetails.ErrorInfo
	var retry *errdetails.RetryInfo
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.RetryInfo:
			retry = d
		}
	}
	if info == nil {
		// gRPC itself speaks; of a connection that failed we know better why.
		if trouble := c.lastTrouble(); trouble != nil && (out.Code == codes.Unavailable || out.Code == codes.DeadlineExceeded) {
			if d, known := errors.AsType[*distrust](trouble); known {
				out.Message, out.Next = d.message, d.next
				return out
			}
			e := unreachable(c.address, trouble)
			out.Message, out.Next = e.message, e.next
			return out
		}
		if out.Code == codes.DeadlineExceeded {
			out.Message = fmt.Sprintf("the server at %s did not answer within %s", c.address, c.timeout)
		}
	}
	// A sentence of the server's often has the next step in it.
	if strings.Contains(out.Message, "; ") {
		return out
	}
	out.Next = nexts[out.Code]
	if info.GetMetadata()["next"] != "" {
		out.Next = info.GetMetadata()["next"]
	}
	if d := retry.GetRetryDelay().AsDuration(); out.Code == codes.ResourceExhausted && d > 0 {
		out.Next = "try again in " + d.Round(time.Second).String()
	}
	return out
}

// unreachable says why an address cannot be talked to.
func unreachable(address string, err error) *distrust {
	const next = "check that certmeshd runs there, and the address (--server, CERTMESH_SERVER_URL)"
	var dns *net.DNSError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	switch {
	case errors.As(err, &record):
		return &distrust{"what answers at " + address + " does not speak TLS", next}
	case errors.As(err, &alert):
		return &distrust{"the server at " + address + " broke off the TLS handshake: " + alert.Error(), next}
	case errors.As(err, &dns):
		return &distrust{fmt.Sprintf("the name %s cannot be resolved", dns.Name), "check the address (--server, CERTMESH_SERVER_URL)"}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &distrust{"nothing listens at " + address, next}
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return &distrust{"there is no answer from " + address, next}
	default:
		return &distrust{"the server at " + address + " cannot be reached: " + err.Error(), next}
	}
}
