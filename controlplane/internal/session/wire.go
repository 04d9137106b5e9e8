package session

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// The translations between the wire and the domain. Everything that comes from an agent is hostile input.

// clean makes an agent's text fit for the store, logs and terminals: valid UTF-8 in one line, no control or formatting
// characters, no private key, at most most bytes.
func clean(s string, most int) string {
	if strings.Contains(s, "PRIVATE KEY") {
		s = "(withheld: the text contains a private key)"
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\u2028' || r == '\u2029':
			return ' '
		case r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Cf, r):
			return -1
		default:
			return r
		}
	}, strings.ToValidUTF8(s, ""))
	s = strings.TrimSpace(s)
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "")
	}
	return s
}

func factsFrom(f *agentpb.Facts) domain.Facts {
	return domain.Facts{OS: clean(f.GetOs(), 64), Platform: clean(f.GetPlatform(), 128), Architecture: clean(f.GetArchitecture(), 32),
		IPAddress: clean(f.GetIpAddress(), 64), Hostname: clean(f.GetHostname(), 253), Version: clean(f.GetVersion(), 64)}
}

// classFrom knows the classes of this protocol version; credits of others are of no use here.
func classFrom(c agentpb.WorkClass) (dispatch.Class, bool) {
	switch c {
	case agentpb.WorkClass_WORK_CLASS_KEY:
		return dispatch.Key, true
	case agentpb.WorkClass_WORK_CLASS_DEPLOY:
		return dispatch.Deploy, true
	case agentpb.WorkClass_WORK_CLASS_VERIFY:
		return dispatch.Verify, true
	default:
		return 0, false
	}
}

func keyFrom(v *agentpb.StateVersion) (stateKey, bool) {
	if len(v.GetName()) > maxID || v.GetVersion() < 0 {
		return stateKey{}, false
	}
	switch v.GetKind() {
	// Constants, so that a message is not kept alive by a piece of it.
	case kindTrustBundle:
		return stateKey{kindTrustBundle, ""}, v.GetName() == ""
	case kindSettings:
		return stateKey{kindSettings, ""}, v.GetName() == ""
	case kindTarget:
		return stateKey{kindTarget, strings.Clone(v.GetName())}, v.GetName() != ""
	default:
		return stateKey{}, false
	}
}

func hashFrom(b []byte) [sha256.Size]byte {
	if len(b) != sha256.Size {
		return [sha256.Size]byte{}
	}
	return [sha256.Size]byte(b)
}

var classes = []fault.Class{fault.Retryable, fault.RateLimited, fault.Invalid, fault.Conflict, fault.NotFound, fault.Unauthorized,
	fault.Forbidden, fault.Unsupported, fault.Rejected, fault.Exhausted, fault.Internal}

const (
	maxFailure = 1 << 10
	maxOutput  = 2 << 10
)

func failureFrom(f *agentpb.Failure) dispatch.Failure {
	out := dispatch.Failure{Class: fault.Internal, Message: clean(f.GetMessage(), maxFailure)}
	for _, c := range classes {
		if string(c) == f.GetClass() {
			out.Class = c
		}
	}
	if out.Message == "" {
		out.Message = "the agent gave no reason"
	}
	output := f.GetOutput()
	if len(output) > maxOutput {
		output = output[len(output)-maxOutput:]
	}
	if o := clean(output, maxOutput); o != "" {
		out.Message += "; output: " + o
	}
	return out
}

func deployedFrom(d *agentpb.Deployed) domain.DeployResult {
	r := domain.DeployResult{Address: clean(d.GetAddress(), 300)}
	// Of another length they are no fingerprints, and the store refuses them.
	if b := d.GetInstalledFingerprint(); len(b) <= sha256.Size {
		r.InstalledFingerprint = hex.EncodeToString(b)
	}
	if b := d.GetServedFingerprint(); len(b) <= sha256.Size {
		r.ServedFingerprint = hex.EncodeToString(b)
	} else {
		r.ServedFingerprint = "too long"
	}
	if us := d.GetServedUnixUs(); us > 0 && r.ServedFingerprint != "" {
		r.ServedAt = time.UnixMicro(us).UTC()
	}
	return r
}

// observationFrom reads an Observed; ok is false when it names no placement that there could be.
func observationFrom(o *agentpb.Observed) (domain.Observation, bool) {
	for _, id := range []string{o.GetTargetId(), o.GetCertificateId()} {
		if id == "" || len(id) > maxID || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
			return domain.Observation{}, false
		}
	}
	for _, b := range [][]byte{o.GetInstalledFingerprint(), o.GetServedFingerprint()} {
		if len(b) != 0 && len(b) != sha256.Size {
			return domain.Observation{}, false
		}
	}
	if o.GetGeneration() < 1 {
		return domain.Observation{}, false
	}
	out := domain.Observation{CertificateID: strings.Clone(o.GetCertificateId()), TargetID: strings.Clone(o.GetTargetId()), Generation: o.GetGeneration(),
		InstalledFingerprint: hex.EncodeToString(o.GetInstalledFingerprint()), ServedFingerprint: hex.EncodeToString(o.GetServedFingerprint())}
	if f := o.GetProblem(); f != nil {
		out.Problem = failureFrom(f).Message
	}
	return out, true
}

func failurePB(f dispatch.Failure) *agentpb.Failure {
	if f == (dispatch.Failure{}) {
		return nil
	}
	return &agentpb.Failure{Class: string(f.Class), Message: clean(f.Message, maxFailure)}
}

func settledPB(s dispatch.Settled) *agentpb.Settled {
	out := &agentpb.Settled{Id: s.Ref.JobID, Attempt: s.Ref.Attempt, Generation: s.Generation, CertificateId: s.CertificateID,
		RetireBelow: s.RetireBelow}
	switch s.Outcome {
	case dispatch.OK:
		out.Outcome = agentpb.Settled_OUTCOME_OK
	case dispatch.Failed:
		out.Outcome, out.Failure = agentpb.Settled_OUTCOME_FAILED, failurePB(s.Failure)
	default:
		out.Outcome, out.Failure = agentpb.Settled_OUTCOME_IGNORED, failurePB(s.Failure)
	}
	return out
}

// verdictPB leaves out of Settled what the verdict says itself, and reasons: five hundred verdicts fit into one message.
func verdictPB(v dispatch.Verdict) *agentpb.Verdict {
	out := &agentpb.Verdict{Id: v.Ref.JobID, Attempt: v.Ref.Attempt}
	switch v.Decision {
	case dispatch.Continue:
		out.Decision = agentpb.Verdict_DECISION_CONTINUE
	case dispatch.RedoReport:
		out.Decision = agentpb.Verdict_DECISION_REDO_REPORT
	default:
		out.Decision = agentpb.Verdict_DECISION_FORGET
		out.Settled = settledPB(v.Settled)
		out.Settled.Id, out.Settled.Attempt, out.Settled.CertificateId, out.Settled.Failure = "", 0, "", nil
	}
	return out
}

func targetPB(t domain.Target) *agentpb.TargetSpec {
	return &agentpb.TargetSpec{Id: t.ID, Name: t.Name, Kind: t.Kind, Settings: t.Settings, VerifyAddress: t.VerifyAddress, ServerName: t.ServerName}
}

func assignmentPB(w domain.Work) *agentpb.Assignment {
	a := &agentpb.Assignment{Id: w.Job.ID, Attempt: w.Job.Attempt, RequestId: w.Job.RequestID}
	if dispatch.ClassOf(w.Job.Kind) == dispatch.Key {
		a.Class = agentpb.WorkClass_WORK_CLASS_KEY
		a.Work = &agentpb.Assignment_Key{Key: &agentpb.KeyWork{CertificateId: w.Job.CertificateID, Generation: w.Job.Generation,
			KeyAlgorithm: string(w.KeyAlgorithm), CommonName: w.Names.CommonName, DnsNames: w.Names.DNS, IpAddresses: w.Names.IP,
			EmailAddresses: w.Names.Email, Uris: w.Names.URI}}
		return a
	}
	if dispatch.ClassOf(w.Job.Kind) == dispatch.Verify {
		a.Class = agentpb.WorkClass_WORK_CLASS_VERIFY
		want := sha256.Sum256(w.Version.DER)
		a.Work = &agentpb.Assignment_Verify{Verify: &agentpb.VerifyWork{CertificateId: w.Job.CertificateID, Generation: w.Job.Generation,
			Fingerprint: want[:], Target: targetPB(w.Target)}}
		return a
	}
	a.Class = agentpb.WorkClass_WORK_CLASS_DEPLOY
	chain := make([][]byte, 0, 1+len(w.Version.Chain))
	chain = append(append(chain, w.Version.DER), w.Version.Chain...)
	a.Work = &agentpb.Assignment_Deploy{Deploy: &agentpb.DeployWork{CertificateId: w.Job.CertificateID, Generation: w.Job.Generation,
		Chain: chain, Target: targetPB(w.Target)}}
	return a
}

func codeOf(c fault.Class) codes.Code {
	switch c {
	case fault.Retryable:
		return codes.Unavailable
	case fault.RateLimited, fault.Exhausted:
		return codes.ResourceExhausted
	case fault.Invalid:
		return codes.InvalidArgument
	case fault.Conflict:
		return codes.Aborted
	case fault.NotFound:
		return codes.NotFound
	case fault.Unauthorized:
		return codes.Unauthenticated
	case fault.Forbidden:
		return codes.PermissionDenied
	case fault.Unsupported, fault.Rejected:
		return codes.FailedPrecondition
	default:
		return codes.Internal
	}
}

// statusOf turns an error into what the caller sees: a sentence, its class, and what to change or wait for. What gRPC
// itself says is passed on.
func statusOf(err error, requestID string, now time.Time) error {
	if err == nil {
		return nil
	}
	var e *fault.Error
	classified := errors.As(err, &e)
	if st, ok := status.FromError(err); ok && !classified {
		return st.Err()
	}
	f := dispatch.FailureOf(err)
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: strings.ToUpper(string(f.Class)), Domain: "certmesh",
		Metadata: map[string]string{"class": string(f.Class), "request_id": requestID}}}
	if classified && e.Class == fault.Invalid {
		details = append(details, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: e.Field, Description: e.Message}}})
	}
	if classified && !e.Until.IsZero() {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(max(e.Until.Sub(now), 0))})
	}
	st, derr := status.New(codeOf(f.Class), f.Message).WithDetails(details...)
	if derr != nil {
		return status.Error(codeOf(f.Class), f.Message)
	}
	return st.Err()
}
