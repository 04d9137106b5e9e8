package api

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// The bounds of requests. Each is far above sensible use and far below what would hurt.
const (
	maxString       = 1024
	maxDocument     = 64 << 10 // PEM and JSON
	maxCursor       = 512
	maxRepeated     = 200
	maxTargets      = 100 // placements of one certificate
	maxThresholds   = 16
	maxWindows      = 32
	maxTokenUses    = 100_000
	minTokenTTL     = time.Minute
	maxTokenTTL     = 30 * 24 * time.Hour
	defaultTokenTTL = time.Hour
	maxLabels       = 32
	minutesADay     = 24 * 60
)

var (
	resourceName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	// idLike names would be ambiguous: everything is found by id or name.
	idLike   = regexp.MustCompile(`^[a-z]{2,4}_[0-9a-f]{32}$`)
	labelKey = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$`)
	// documents are the fields that hold whole files.
	documents = map[protoreflect.Name]bool{"settings_json": true, "ca_certificate_pem": true, "ca_key_pem": true}
)

// validate is the only place where requests are checked for form: first what holds for every message (lengths,
// control characters, page sizes), then the message's own rules. What needs the store (does the target exist) is the
// handler's. Handlers rely on it.
func validate(m proto.Message) error {
	if err := validateStrings(m.ProtoReflect(), ""); err != nil {
		return err
	}
	switch r := m.(type) {
	case *operatorpb.ListCertificatesRequest:
		return validateCertificateList(r)
	case *operatorpb.GetCertificateRequest:
		return ref("id", r.GetId())
	case *operatorpb.CreateCertificateRequest:
		return validateOrder(r)
	case *operatorpb.RenewCertificateRequest:
		return first(ref("id", r.GetId()), validateRequestID(r.GetRequestId()))
	case *operatorpb.DeployCertificateRequest:
		return first(ref("id", r.GetId()), validateRequestID(r.GetRequestId()))
	case *operatorpb.VerifyCertificateRequest:
		return first(ref("id", r.GetId()), validateRequestID(r.GetRequestId()))
	case *operatorpb.RevokeCertificateRequest:
		_, err := domain.ParseRevocationReason(r.GetReason())
		return first(ref("id", r.GetId()), err)
	case *operatorpb.ListVersionsRequest:
		return first(ref("certificate_id", r.GetCertificateId()), page(r.GetPage()))
	case *operatorpb.ExplainCertificateRequest:
		return ref("id", r.GetId())
	case *operatorpb.ListAgentsRequest:
		return first(page(r.GetPage()), oneOf("state", r.GetState(), agentStates))
	case *operatorpb.GetAgentRequest:
		return ref("id", r.GetId())
	case *operatorpb.RetireAgentRequest:
		return ref("id", r.GetId())
	case *operatorpb.ReleaseAgentRequest:
		return ref("id", r.GetId())
	case *operatorpb.CreateJoinTokenRequest:
		return validateJoinToken(r)
	case *operatorpb.ListJoinTokensRequest:
		return page(r.GetPage())
	case *operatorpb.RevokeJoinTokenRequest:
		return ref("id", r.GetId())
	case *operatorpb.ListJobsRequest:
		_, err := jobFilter(r).Listing()
		return first(page(r.GetPage()), oneOf("state", r.GetState(), jobStates), err)
	case *operatorpb.GetJobRequest:
		return ref("id", r.GetId())
	case *operatorpb.CancelJobRequest:
		return ref("id", r.GetId())
	case *operatorpb.ApproveJobRequest:
		return first(ref("id", r.GetId()), validateReason(r.GetReason()))
	case *operatorpb.RejectJobRequest:
		if strings.TrimSpace(r.GetReason()) == "" {
			return first(ref("id", r.GetId()), fault.InvalidField("reason", "is empty; say why the job is rejected"))
		}
		return first(ref("id", r.GetId()), validateReason(r.GetReason()))
	case *operatorpb.ListIssuersRequest:
		return page(r.GetPage())
	case *operatorpb.GetIssuerRequest:
		return ref("id", r.GetId())
	case *operatorpb.CreateIssuerRequest:
		return validateIssuer(r)
	case *operatorpb.ListProfilesRequest:
		return page(r.GetPage())
	case *operatorpb.ListTargetsRequest:
		return page(r.GetPage())
	case *operatorpb.GetTargetRequest:
		return ref("id", r.GetId())
	case *operatorpb.CreateTargetRequest:
		return validateTarget(r)
	case *operatorpb.GetStatusRequest:
		return nil
	case *operatorpb.ListAuditEventsRequest:
		return page(r.GetPage())
	case *operatorpb.WatchRequest:
		for i, k := range r.GetKinds() {
			if err := oneOf(fmt.Sprintf("kinds[%d]", i), k, hub.Kinds); err != nil {
				return err
			}
		}
		return nil
	}
	return fault.New(fault.Internal, "%s has no validation", m.ProtoReflect().Descriptor().FullName())
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func validateCertificateList(r *operatorpb.ListCertificatesRequest) error {
	if err := first(page(r.GetPage()), oneOf("status", r.GetStatus(), certificateStatuses)); err != nil {
		return err
	}
	for field, t := range map[string]*timestamppb.Timestamp{"expires_before": r.GetExpiresBefore(), "expires_after": r.GetExpiresAfter()} {
		if t != nil && !t.IsValid() {
			return fault.InvalidField(field, "is not a time between the years 1 and 9999")
		}
	}
	_, err := certificateFilter(r).Listing()
	return err
}

// validateStrings walks a whole message.
func validateStrings(m protoreflect.Message, path string) error {
	var failed error
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := path + string(f.Name())
		switch {
		case f.IsMap():
			if v.Map().Len() > maxRepeated {
				failed = fault.InvalidField(name, "has %d entries; at most %d are allowed", v.Map().Len(), maxRepeated)
				break
			}
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				failed = first(checkString(name, f.Name(), k.String()), checkString(name+"."+k.String(), f.Name(), v.String()))
				return failed == nil
			})
		case f.IsList():
			l := v.List()
			if l.Len() > maxRepeated {
				failed = fault.InvalidField(name, "has %d entries; at most %d are allowed", l.Len(), maxRepeated)
				break
			}
			for i := 0; i < l.Len() && failed == nil; i++ {
				failed = checkValue(fmt.Sprintf("%s[%d]", name, i), f, l.Get(i))
			}
		default:
			failed = checkValue(name, f, v)
		}
		return failed == nil
	})
	return failed
}

func checkValue(path string, f protoreflect.FieldDescriptor, v protoreflect.Value) error {
	switch f.Kind() {
	case protoreflect.StringKind:
		return checkString(path, f.Name(), v.String())
	case protoreflect.MessageKind:
		return validateStrings(v.Message(), path+".")
	default:
		return nil
	}
}

func checkString(path string, field protoreflect.Name, s string) error {
	limit := maxString
	if documents[field] {
		limit = maxDocument
	}
	if len(s) > limit {
		return fault.InvalidField(path, "is %d bytes long; at most %d are allowed", len(s), limit)
	}
	if !utf8.ValidString(s) {
		return fault.InvalidField(path, "is not UTF-8")
	}
	if !documents[field] && strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' }) {
		return fault.InvalidField(path, "contains a control character")
	}
	return nil
}

func page(p *operatorpb.Page) error {
	if n := p.GetSize(); n < 0 || n > domain.MaxPageSize {
		return fault.InvalidField("page.size", "%d is not a page size; use 1 to %d, or 0 for 50, and page.cursor for what follows", n, domain.MaxPageSize)
	}
	if len(p.GetCursor()) > maxCursor {
		return fault.InvalidField("page.cursor", "is not a cursor of this API; use next_cursor of the previous answer")
	}
	return nil
}

var (
	certificateStatuses = []string{
		string(domain.CertificatePending), string(domain.CertificateActive), string(domain.CertificateExpiring),
		string(domain.CertificateExpired), string(domain.CertificateRenewalInProgress), string(domain.CertificateFailed),
		string(domain.CertificateRevoked), string(domain.CertificateArchived),
	}
	agentStates = []string{
		string(domain.AgentOnline), string(domain.AgentStale), string(domain.AgentOffline),
		string(domain.AgentQuarantined), string(domain.AgentRetired),
	}
	jobStates = []string{
		string(domain.JobPending), string(domain.JobAwaitingCSR), string(domain.JobAwaitingApproval), string(domain.JobRunning),
		string(domain.JobCompleted), string(domain.JobFailed), string(domain.JobCancelled),
	}
	caAlgorithms = []string{string(domain.ECDSAP256), string(domain.ECDSAP384), string(domain.RSA3072), string(domain.RSA4096)}
)

func oneOf(field, v string, allowed []string) error {
	if v == "" || slices.Contains(allowed, v) {
		return nil
	}
	return fault.InvalidField(field, "%q is not known; use one of %s", v, strings.Join(allowed, ", "))
}

// ref checks the form of an id or a name that is looked up.
func ref(field, v string) error {
	switch {
	case v == "":
		return fault.InvalidField(field, "is empty; give an id or a name")
	case len(v) > 255:
		return fault.InvalidField(field, "is too long for an id or a name")
	}
	return nil
}

// newName checks the name of something to be made.
func newName(field, v string) error {
	switch {
	case !resourceName.MatchString(v):
		return fault.InvalidField(field, "%q is not a name; use 1 to 128 letters, digits, dots, dashes or underscores, beginning with a letter or digit", v)
	case idLike.MatchString(v):
		return fault.InvalidField(field, "%q looks like an id; choose another name", v)
	}
	return nil
}

func validateRequestID(v string) error {
	if v != "" && !requestID.MatchString(v) {
		return fault.InvalidField("request_id", "use at most 64 letters, digits, dots, dashes or underscores")
	}
	return nil
}

// maxReason bounds what a decision is explained with.
const maxReason = 256

func validateReason(v string) error {
	if len(v) > maxReason {
		return fault.InvalidField("reason", "is %d bytes long; at most %d are allowed", len(v), maxReason)
	}
	return nil
}

func validateOrder(r *operatorpb.CreateCertificateRequest) error {
	if err := first(newName("name", r.GetName()), validateRequestID(r.GetRequestId()), ref("issuer", r.GetIssuer()), ref("profile", r.GetProfile())); err != nil {
		return err
	}
	switch n := len(r.GetTargets()); {
	case n == 0:
		return fault.InvalidField("targets", "name at least one target; certmesh targets list shows them")
	case n > maxTargets:
		return fault.InvalidField("targets", "%d targets are too many for one certificate; at most %d are allowed", n, maxTargets)
	}
	for i, t := range r.GetTargets() {
		if err := ref(fmt.Sprintf("targets[%d]", i), t); err != nil {
			return err
		}
	}
	if len(r.GetOwner()) > 255 {
		return fault.InvalidField("owner", "is longer than 255 bytes")
	}
	if _, err := namesOf(r.GetNames()); err != nil {
		return err
	}
	return validatePolicy(r.GetPolicy())
}

func validatePolicy(p *operatorpb.RenewalPolicy) error {
	if f := p.GetFraction(); math.IsNaN(f) || f < 0 || f >= 1 {
		return fault.InvalidField("policy.fraction", "%v is not a fraction of the lifetime; use a number between 0 and 1, or 0 for 2/3", f)
	}
	if n := len(p.GetAlertThresholdsDays()); n > maxThresholds {
		return fault.InvalidField("policy.alert_thresholds_days", "%d thresholds are too many; at most %d are allowed", n, maxThresholds)
	}
	for i, d := range p.GetAlertThresholdsDays() {
		if d < 0 || d > 3650 {
			return fault.InvalidField(fmt.Sprintf("policy.alert_thresholds_days[%d]", i), "%d is not a number of days from 0 to 3650", d)
		}
	}
	if n := len(p.GetWindows()); n > maxWindows {
		return fault.InvalidField("policy.windows", "%d windows are too many; at most %d are allowed", n, maxWindows)
	}
	for i, w := range p.GetWindows() {
		field := fmt.Sprintf("policy.windows[%d]", i)
		if len(w.GetDays()) == 0 || len(w.GetDays()) > 7 {
			return fault.InvalidField(field+".days", "name one to seven days; 0 is Sunday")
		}
		for _, d := range w.GetDays() {
			if d < 0 || d > 6 {
				return fault.InvalidField(field+".days", "%d is not a day; 0 is Sunday and 6 is Saturday", d)
			}
		}
		for _, end := range []struct {
			name   string
			minute int32
		}{{"start_minute", w.GetStartMinute()}, {"end_minute", w.GetEndMinute()}} {
			if end.minute < 0 || end.minute > minutesADay {
				return fault.InvalidField(field+"."+end.name, "%d is not a minute of the day; use 0 to %d", end.minute, minutesADay)
			}
		}
	}
	return nil
}

func validateJoinToken(r *operatorpb.CreateJoinTokenRequest) error {
	if r.GetTtl() != nil {
		d := r.GetTtl().AsDuration()
		if !r.GetTtl().IsValid() || d < minTokenTTL || d > maxTokenTTL {
			return fault.InvalidField("ttl", "a join token lives from 1 minute to 30 days")
		}
	}
	if n := r.GetMaxUses(); n < 0 || n > maxTokenUses {
		return fault.InvalidField("max_uses", "%d is not a number of uses; use 1 to %d, or 0 for 1", n, maxTokenUses)
	}
	if len(r.GetLabels()) > maxLabels {
		return fault.InvalidField("labels", "%d labels are too many; at most %d are allowed", len(r.GetLabels()), maxLabels)
	}
	for k, v := range r.GetLabels() {
		if !labelKey.MatchString(k) {
			return fault.InvalidField("labels", "%q is not a label's key; use 1 to 63 letters, digits, dots, slashes, dashes or underscores", k)
		}
		if len(v) > 255 {
			return fault.InvalidField("labels."+k, "is longer than 255 bytes")
		}
	}
	return nil
}

func validateIssuer(r *operatorpb.CreateIssuerRequest) error {
	if err := newName("name", r.GetName()); err != nil {
		return err
	}
	if r.GetKind() != domain.IssuerLocal {
		return fault.InvalidField("kind", "%q is not a kind of issuer; use %q", r.GetKind(), domain.IssuerLocal)
	}
	if r.GetName() == domain.MeshCA {
		return fault.InvalidField("name", "%q is the CA of agents and nodes; choose another name", domain.MeshCA)
	}
	if utf8.RuneCountInString(r.GetCommonName()) > maxCommonName {
		return fault.InvalidField("common_name", "is longer than %d characters (RFC 5280, appendix A)", maxCommonName)
	}
	switch cert, key := r.GetCaCertificatePem() != "", r.GetCaKeyPem() != ""; {
	case cert && !key:
		return fault.InvalidField("ca_key_pem", "is missing; a sub-CA needs its certificate and its key")
	case key && !cert:
		return fault.InvalidField("ca_certificate_pem", "is missing; a sub-CA needs its certificate and its key")
	case cert && (r.GetCommonName() != "" || r.GetKeyAlgorithm() != ""):
		return fault.InvalidField("ca_certificate_pem", "brings its own subject and key; leave common_name and key_algorithm empty")
	}
	return oneOf("key_algorithm", r.GetKeyAlgorithm(), caAlgorithms)
}

func validateTarget(r *operatorpb.CreateTargetRequest) error {
	if err := first(newName("name", r.GetName()), ref("agent", r.GetAgent()), ref("kind", r.GetKind())); err != nil {
		return err
	}
	if s := r.GetSettingsJson(); s != "" {
		var o map[string]json.RawMessage
		if err := json.Unmarshal([]byte(s), &o); err != nil {
			return fault.InvalidField("settings_json", "is not a JSON object: %v", err)
		}
		// These two are the target's own: it is the target's that the agent probes, whatever the settings say.
		for _, own := range []string{"verify_address", "server_name"} {
			if v := string(o[own]); v != "" && v != `""` && v != "null" {
				return fault.InvalidField("settings_json."+own, "give it as %s of the target", own)
			}
		}
	}
	if a := r.GetVerifyAddress(); a != "" {
		host, port, err := net.SplitHostPort(a)
		n, perr := strconv.ParseUint(port, 10, 16)
		if err != nil || perr != nil || n == 0 || host == "" || !isHost(host) {
			return fault.InvalidField("verify_address", "%q is not host:port, e.g. localhost:443", a)
		}
	}
	if s := r.GetServerName(); s != "" && !isHost(s) {
		return fault.InvalidField("server_name", "%q is not a host name", s)
	}
	return nil
}

// isHost reports whether s is an IP address or the name of one host.
func isHost(s string) bool {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Zone() == ""
	}
	_, err := ca.CheckNames(domain.Names{DNS: []string{s}})
	return err == nil && !strings.HasPrefix(s, "*")
}

// maxCommonName is ub-common-name of RFC 5280, appendix A.
const maxCommonName = 64

// namesOf brings the names of an order into the form in which they will be signed, by the CA's own rules: what is
// accepted here can be issued.
func namesOf(n *operatorpb.Names) (domain.Names, error) {
	return ca.CheckNames(domain.Names{
		CommonName: n.GetCommonName(), DNS: n.GetDns(), IP: n.GetIp(), Email: n.GetEmail(), URI: n.GetUri(),
	})
}
