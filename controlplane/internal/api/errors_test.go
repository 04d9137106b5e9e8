package api

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func retryOf(err error) *errdetails.RetryInfo {
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			return r
		}
	}
	return nil
}

// failing lets authentication and audit work and everything else fail.
func failing(err error) func(string) error {
	return func(method string) error {
		if method == "APIKeyByHash" || method == "Audit" {
			return nil
		}
		return err
	}
}

// TestEveryClassHasItsStatus: one table of classes, one translation, with details a program can act on.
func TestEveryClassHasItsStatus(t *testing.T) {
	t.Parallel()
	want := map[fault.Class]codes.Code{
		fault.Retryable: codes.Unavailable, fault.RateLimited: codes.ResourceExhausted, fault.Invalid: codes.InvalidArgument,
		fault.Conflict: codes.Aborted, fault.NotFound: codes.NotFound, fault.Unauthorized: codes.Unauthenticated,
		fault.Forbidden: codes.PermissionDenied, fault.Unsupported: codes.Unimplemented, fault.Rejected: codes.FailedPrecondition,
		fault.Exhausted: codes.ResourceExhausted, fault.Internal: codes.Internal,
	}
	if len(want) != len(classes) {
		t.Errorf("%d classes are translated, %d are expected", len(classes), len(want))
	}
	r := newRig(t).estate(t)
	for class, code := range want {
		r.store.setBefore(failing(fmt.Errorf("read the job: %w", fault.Wrap(class, errPlain, "a sentence for people"))))
		_, err := r.jobs().GetJob(r.as(t, authz.Viewer), &operatorpb.GetJobRequest{Id: jobID})
		wantCode(t, err, code)
		info := infoOf(err)
		if info.GetDomain() != "certmesh" || info.GetReason() != strings.ToUpper(string(class)) || info.GetMetadata()["class"] != string(class) ||
			info.GetMetadata()["next"] == "" || info.GetMetadata()["request_id"] == "" {
			t.Errorf("%s: info %v", class, info)
		}
		message := status.Convert(err).Message()
		if strings.Contains(message, "secret_table") || strings.Contains(message, "read the job") {
			t.Errorf("%s leaks: %q", class, message)
		}
		if (class == fault.Internal) == strings.Contains(message, "a sentence for people") {
			t.Errorf("%s: %q", class, message)
		}
		if (retryOf(err) != nil) != (class == fault.Retryable) {
			t.Errorf("%s: retry %v", class, retryOf(err))
		}
		if _, ok := violationsOf(err)[""]; ok != (class == fault.Invalid) {
			t.Errorf("%s: violations %v", class, violationsOf(err))
		}
	}
	r.store.setBefore(failing(fault.Limited(start.Add(90*time.Second), "the CA asked for patience")))
	_, err := r.jobs().GetJob(r.as(t, authz.Viewer), &operatorpb.GetJobRequest{Id: jobID})
	wantCode(t, err, codes.ResourceExhausted, "patience")
	if d := retryOf(err).GetRetryDelay().AsDuration(); d != 90*time.Second {
		t.Errorf("retry after %s", d)
	}
}

// TestInternalErrorsLeakNothing: whatever fails inside and wherever, the caller sees a request id by which the log has
// the whole chain. A panic is no different, and the server serves on.
func TestInternalErrorsLeakNothing(t *testing.T) {
	t.Parallel()
	inside := map[string]func(string) error{
		"plain":    failing(fmt.Errorf("select from job: %w", errPlain)),
		"internal": failing(fault.Wrap(fault.Internal, errPlain, "job 7 lost its secret_table")),
		"panic": func(method string) error {
			if method == "APIKeyByHash" || method == "Audit" {
				return nil
			}
			panic(errPlain)
		},
	}
	eachMethod(t, func(t *testing.T, m method, good proto.Message) {
		if m.name == operatorpb.SystemService_Watch_FullMethodName {
			return // reads nothing
		}
		for name, before := range inside {
			r := newRig(t).estate(t)
			if name != "panic" {
				r.issuers.err = func(LocalCA) error { return before("CreateLocal") }
			}
			r.store.setBefore(before)
			var header metadata.MD
			answer := m.newAnswer(t)
			err := r.conn.Invoke(r.as(t, authz.Admin), m.name, good, answer, grpc.Header(&header))
			wantCode(t, err, codes.Internal, "request id")
			text := fmt.Sprint(status.Convert(err).Proto())
			if strings.Contains(text, "secret_table") || strings.Contains(text, "10.1.2.3") {
				t.Errorf("%s leaks: %s", name, text)
			}
			id := infoOf(err).GetMetadata()["request_id"]
			if id == "" || len(header.Get(requestIDHeader)) != 1 || header.Get(requestIDHeader)[0] != id {
				t.Errorf("%s: request id %q, header %v", name, id, header.Get(requestIDHeader))
			}
			if log := r.log.String(); !strings.Contains(log, "secret_table") || !strings.Contains(log, id) || !strings.Contains(log, `"level":"ERROR"`) {
				t.Errorf("%s: the log lacks the cause: %s", name, log)
			}
			for _, e := range r.store.trail() {
				if strings.Contains(fmt.Sprint(e), "secret_table") {
					t.Errorf("%s: the trail leaks: %v", name, e)
				}
			}
			r.store.setBefore(nil)
			if _, err := r.system().GetStatus(r.as(t, authz.Viewer), &operatorpb.GetStatusRequest{}); err != nil {
				t.Errorf("%s: afterwards %v", name, err)
			}
		}
	})
}

// TestFailedWritesAreAudited, reads are not; and an audit that fails does not hide the refusal.
func TestFailedWritesAreAudited(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	_, err := r.jobs().CancelJob(r.as(t, authz.Operator), &operatorpb.CancelJobRequest{Id: "job_nothing"})
	wantCode(t, err, codes.NotFound)
	_, err = r.jobs().GetJob(r.as(t, authz.Operator), &operatorpb.GetJobRequest{Id: "job_nothing"})
	wantCode(t, err, codes.NotFound)
	trail := r.store.trail()
	if len(trail) != 1 || trail[0].Action != "api.failed" || trail[0].Outcome != "not_found" || trail[0].Resource != "rpc/JobsService/CancelJob" ||
		trail[0].Actor != "operator:operator" || trail[0].RemoteAddr == "" || trail[0].RequestID == "" || !strings.Contains(trail[0].Detail["message"], "job_nothing") {
		t.Errorf("trail %+v", trail)
	}
	r.store.setBefore(func(method string) error {
		if method == "Audit" {
			return errPlain
		}
		return nil
	})
	_, err = r.jobs().CancelJob(r.as(t, authz.Viewer), &operatorpb.CancelJobRequest{Id: jobID})
	wantCode(t, err, codes.PermissionDenied)
	if !strings.Contains(r.log.String(), "audit of a refusal failed") {
		t.Error("the log does not say that the audit failed")
	}
}

// TestAStoreThatIsAway is unavailable, not a lack of permission.
func TestAStoreThatIsAway(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	r.store.setBefore(func(string) error { return fault.New(fault.Retryable, "the store does not answer") })
	_, err := r.jobs().GetJob(r.as(t, authz.Viewer), &operatorpb.GetJobRequest{Id: jobID})
	wantCode(t, err, codes.Unavailable, "does not answer")
	if retryOf(err).GetRetryDelay().AsDuration() != retryDelay {
		t.Errorf("retry %v", retryOf(err))
	}
}

func TestTheCallersOwnDeadline(t *testing.T) {
	t.Parallel()
	done, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	for _, c := range []struct {
		ctx  context.Context
		err  error
		want codes.Code
	}{
		{done, context.Canceled, codes.Canceled}, {late, context.DeadlineExceeded, codes.DeadlineExceeded},
		{t.Context(), context.DeadlineExceeded, codes.Unavailable}, {late, fault.New(fault.Retryable, "x"), codes.DeadlineExceeded},
		{late, fault.New(fault.Conflict, "x"), codes.Aborted}, {t.Context(), nil, codes.OK}, {t.Context(), status.Error(codes.DataLoss, "x"), codes.DataLoss},
	} {
		if got := statusOf(c.ctx, c.err, "req_1", start).Code(); got != c.want {
			t.Errorf("%v: %s, want %s", c.err, got, c.want)
		}
	}
}

// TestAllThatIsWrongIsSaidAtOnce: an order with three unknown parts names all three.
func TestAllThatIsWrongIsSaidAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	o := order("new")
	o.Issuer, o.Profile, o.Targets = "i", "p", []string{"site", "x", "y"}
	_, err := r.certificates().CreateCertificate(r.as(t, authz.Operator), o)
	wantCode(t, err, codes.InvalidArgument, "issuer: ", "profile: ", "targets[1]: ", "targets[2]: ")
	if got := violationsOf(err); len(got) != 4 {
		t.Errorf("violations %v", got)
	}
	o = order("new")
	o.Targets = repeat(100, func(i int) string { return fmt.Sprintf("none%d", i) })
	_, err = r.certificates().CreateCertificate(r.as(t, authz.Operator), o)
	wantCode(t, err, codes.InvalidArgument)
	if got := violationsOf(err); len(got) != maxViolations {
		t.Errorf("%d violations, want at most %d", len(got), maxViolations)
	}
	if err := (violations{}).err(); err != nil {
		t.Errorf("no violations are an error: %v", err)
	}
	if err := renamed(errPlain, orderField); !errors.Is(err, errPlain) {
		t.Error(err)
	}
}

func TestRequestIDs(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	for sent, kept := range map[string]bool{"my-id.7": true, "": false, "a b": false, strings.Repeat("a", 65): false, "<script>": false} {
		var header metadata.MD
		ctx := r.as(t, authz.Viewer)
		if sent != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, requestIDHeader, sent)
		}
		if _, err := r.system().GetStatus(ctx, &operatorpb.GetStatusRequest{}, grpc.Header(&header)); err != nil {
			t.Fatal(err)
		}
		got := header.Get(requestIDHeader)
		if len(got) != 1 || (got[0] == sent) != kept || !strings.Contains(r.log.String(), got[0]) {
			t.Errorf("sent %q, got %q", sent, got)
		}
	}
}

func TestNewRefusesHalfAConfig(t *testing.T) {
	t.Parallel()
	if _, err := New(Config{}); !fault.Is(err, fault.Internal) {
		t.Error(err)
	}
}
