package api

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// badRequest is a request that is wrong in one field.
type badRequest struct {
	name string
	req  proto.Message
	// field and says are the violation that the caller must be told.
	field, says string
}

func badOrder(name, field, says string, change func(*operatorpb.CreateCertificateRequest)) badRequest {
	o := order("new")
	change(o)
	return badRequest{name, o, field, says}
}

func repeat(n int, f func(i int) string) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = f(i)
	}
	return out
}

func badRequests() []badRequest {
	type order = operatorpb.CreateCertificateRequest
	type policy = operatorpb.RenewalPolicy
	window := func(start, end int32, days ...int32) *policy {
		return &policy{Windows: []*operatorpb.RenewalWindow{{Days: days, StartMinute: start, EndMinute: end}}}
	}
	host := func(i int) string { return fmt.Sprintf("h%d.example.com", i) }
	issuer := func(change func(*operatorpb.CreateIssuerRequest)) proto.Message {
		r := &operatorpb.CreateIssuerRequest{Name: "second", Kind: "local"}
		change(r)
		return r
	}
	place := func(change func(*operatorpb.CreateTargetRequest)) proto.Message {
		r := &operatorpb.CreateTargetRequest{Name: "new", Agent: "web1", Kind: "file", SettingsJson: goodSettings}
		change(r)
		return r
	}
	type issue = operatorpb.CreateIssuerRequest
	type place_ = operatorpb.CreateTargetRequest
	return []badRequest{
		badOrder("no name", "name", "is not a name", func(r *order) { r.Name = "" }),
		badOrder("long name", "name", "is not a name", func(r *order) { r.Name = strings.Repeat("a", 129) }),
		badOrder("name with space", "name", "is not a name", func(r *order) { r.Name = "a b" }),
		badOrder("name like a path", "name", "is not a name", func(r *order) { r.Name = "../../etc/passwd" }),
		badOrder("name with SQL", "name", "is not a name", func(r *order) { r.Name = "a'; DROP TABLE certificate; --" }),
		badOrder("name like an id", "name", "looks like an id", func(r *order) { r.Name = certID }),
		badOrder("no issuer", "issuer", "is empty", func(r *order) { r.Issuer = "" }),
		badOrder("long issuer", "issuer", "too long", func(r *order) { r.Issuer = strings.Repeat("a", 256) }),
		badOrder("unknown issuer", "issuer", "there is no issuer", func(r *order) { r.Issuer = "nobody" }),
		badOrder("no profile", "profile", "is empty", func(r *order) { r.Profile = "" }),
		badOrder("unknown profile", "profile", "there is no profile", func(r *order) { r.Profile = "nothing" }),
		badOrder("no targets", "targets", "at least one", func(r *order) { r.Targets = nil }),
		badOrder("too many targets", "targets", "too many", func(r *order) { r.Targets = repeat(101, host) }),
		badOrder("far too many targets", "targets", "201 entries", func(r *order) { r.Targets = repeat(201, host) }),
		badOrder("empty target", "targets[1]", "is empty", func(r *order) { r.Targets = []string{"site", ""} }),
		badOrder("unknown target", "targets[1]", "there is no target \"moon\"", func(r *order) { r.Targets = []string{"site", "moon"} }),
		badOrder("target twice", "targets[1]", "twice", func(r *order) { r.Targets = []string{"site", webTarget} }),
		badOrder("long owner", "owner", "longer than 255", func(r *order) { r.Owner = strings.Repeat("a", 256) }),
		badOrder("request id", "request_id", "at most 64", func(r *order) { r.RequestId = "a b" }),
		badOrder("long request id", "request_id", "at most 64", func(r *order) { r.RequestId = strings.Repeat("a", 65) }),
		badOrder("no names", "names", "at least one", func(r *order) { r.Names = nil }),
		badOrder("a common name alone", "names", "at least one", func(r *order) { r.Names = &operatorpb.Names{CommonName: "Anna Example"} }),
		badOrder("long common name", "names.common_name", "64 characters", func(r *order) { r.Names.CommonName = strings.Repeat("a", 65) }),
		badOrder("too many names", "names.dns", "too many", func(r *order) { r.Names.Dns = repeat(101, host) }),
		badOrder("DNS name", "names.dns[1]", "not a DNS name", func(r *order) { r.Names.Dns = []string{"a.example.com", "a_b.example.com"} }),
		badOrder("DNS name with a path", "names.dns[0]", "not a DNS name", func(r *order) { r.Names.Dns = []string{"../../x"} }),
		badOrder("inner wildcard", "names.dns[0]", "wildcard", func(r *order) { r.Names.Dns = []string{"a.*.example.com"} }),
		badOrder("IDN", "names.dns[0]", "xn--", func(r *order) { r.Names.Dns = []string{"bücher.example"} }),
		badOrder("address as DNS name", "names.dns[0]", "under ip", func(r *order) { r.Names.Dns = []string{"192.0.2.1"} }),
		badOrder("address", "names.ip[0]", "not an IP address", func(r *order) { r.Names.Ip = []string{"256.1.1.1"} }),
		badOrder("address with a zone", "names.ip[0]", "zone", func(r *order) { r.Names.Ip = []string{"fe80::1%eth0"} }),
		badOrder("e-mail", "names.email[0]", "not an e-mail", func(r *order) { r.Names.Email = []string{"Anna <anna@example.com>"} }),
		badOrder("URI", "names.uri[0]", "absolute URI", func(r *order) { r.Names.Uri = []string{"/relative"} }),
		badOrder("URI with password", "names.uri[0]", "user information", func(r *order) { r.Names.Uri = []string{"https://a:b@example.com/"} }),
		badOrder("fraction 1", "policy.fraction", "between 0 and 1", func(r *order) { r.Policy = &policy{Fraction: 1} }),
		badOrder("negative fraction", "policy.fraction", "between 0 and 1", func(r *order) { r.Policy = &policy{Fraction: -.1} }),
		badOrder("NaN", "policy.fraction", "NaN", func(r *order) { r.Policy = &policy{Fraction: math.NaN()} }),
		badOrder("threshold", "policy.alert_thresholds_days[1]", "number of days", func(r *order) { r.Policy = &policy{AlertThresholdsDays: []int32{1, -1}} }),
		badOrder("thresholds", "policy.alert_thresholds_days", "too many", func(r *order) { r.Policy = &policy{AlertThresholdsDays: make([]int32, 17)} }),
		badOrder("no days", "policy.windows[0].days", "one to seven", func(r *order) { r.Policy = window(0, 60) }),
		badOrder("day 7", "policy.windows[0].days", "not a day", func(r *order) { r.Policy = window(0, 60, 7) }),
		badOrder("start", "policy.windows[0].start_minute", "minute of the day", func(r *order) { r.Policy = window(-1, 60, 1) }),
		badOrder("end", "policy.windows[0].end_minute", "minute of the day", func(r *order) { r.Policy = window(0, 1441, 1) }),
		badOrder("windows", "policy.windows", "too many", func(r *order) { r.Policy = &policy{Windows: make([]*operatorpb.RenewalWindow, 33)} }),
		badOrder("S/MIME without an address", "names.email", "S/MIME", func(r *order) { r.Profile = "smime" }),
		badOrder("server without a host", "names.dns", "for servers", func(r *order) { r.Names = &operatorpb.Names{Email: []string{"a@example.com"}} }),
		badOrder("server named by URI", "names.dns", "for servers", func(r *order) { r.Names = &operatorpb.Names{Uri: []string{"spiffe://example.com/a"}} }),
		badOrder("peer named by address of a person", "names.dns", "peers", func(r *order) {
			r.Profile, r.Names = "tls-peer", &operatorpb.Names{Email: []string{"a@example.com"}}
		}),
		badOrder("profile that allows not its own key", "profile", "does not allow", func(r *order) { r.Profile = "broken" }),

		{"get without id", &operatorpb.GetCertificateRequest{}, "id", "is empty"},
		{"renew without id", &operatorpb.RenewCertificateRequest{}, "id", "is empty"},
		{"renew request id", &operatorpb.RenewCertificateRequest{Id: "www", RequestId: "\u00e9"}, "request_id", "at most 64"},
		{"revoke without id", &operatorpb.RevokeCertificateRequest{}, "id", "is empty"},
		{"revoke reason", &operatorpb.RevokeCertificateRequest{Id: "www", Reason: "boredom"}, "reason", "keyCompromise"},
		{"versions without id", &operatorpb.ListVersionsRequest{}, "certificate_id", "is empty"},
		{"explain without id", &operatorpb.ExplainCertificateRequest{}, "id", "is empty"},
		{"status", &operatorpb.ListCertificatesRequest{Status: "active"}, "status", "Active"},
		{"agent", &operatorpb.GetAgentRequest{}, "id", "is empty"},
		{"agent state", &operatorpb.ListAgentsRequest{State: "up"}, "state", "Online"},
		{"retire", &operatorpb.RetireAgentRequest{}, "id", "is empty"},
		{"release", &operatorpb.ReleaseAgentRequest{}, "id", "is empty"},
		{"short ttl", &operatorpb.CreateJoinTokenRequest{Ttl: durationpb.New(59 * time.Second)}, "ttl", "1 minute to 30 days"},
		{"long ttl", &operatorpb.CreateJoinTokenRequest{Ttl: durationpb.New(31 * 24 * time.Hour)}, "ttl", "1 minute to 30 days"},
		{"overflowing ttl", &operatorpb.CreateJoinTokenRequest{Ttl: &durationpb.Duration{Seconds: math.MaxInt64, Nanos: -1}}, "ttl", "1 minute to 30 days"},
		{"uses", &operatorpb.CreateJoinTokenRequest{MaxUses: 100_001}, "max_uses", "1 to 100000"},
		{"negative uses", &operatorpb.CreateJoinTokenRequest{MaxUses: -1}, "max_uses", "1 to 100000"},
		{"label key", &operatorpb.CreateJoinTokenRequest{Labels: map[string]string{"a b": "c"}}, "labels", "label's key"},
		{"label value", &operatorpb.CreateJoinTokenRequest{Labels: map[string]string{"a": strings.Repeat("c", 256)}}, "labels.a", "255"},
		{"no order", &operatorpb.ListCertificatesRequest{Sort: "owner"}, "sort", "use created, name or not_after"},
		{"order without index", &operatorpb.ListCertificatesRequest{IssuerId: "corp", Sort: "name"}, "sort", "issuer_id by created;"},
		{"filters without index", &operatorpb.ListCertificatesRequest{AgentId: "web1", Status: "Failed"}, "agent_id", "owner+status by created;"},
		{"prefix and owner", &operatorpb.ListCertificatesRequest{NamePrefix: "w", Owner: "red"}, "name_prefix", "not indexed together with owner"},
		{"expiry of an agent", &operatorpb.ListCertificatesRequest{AgentId: "web1", ExpiresBefore: timestamppb.New(start)}, "expires_before", "not indexed together with agent_id"},
		{"no such expiry", &operatorpb.ListCertificatesRequest{ExpiresAfter: timestamppb.New(start), ExpiresBefore: timestamppb.New(start)}, "expires_before", "not after expires_after"},
		{"time out of range", &operatorpb.ListCertificatesRequest{ExpiresAfter: &timestamppb.Timestamp{Seconds: math.MaxInt64}}, "expires_after", "not a time"},
		{"state of an agent", &operatorpb.ListJobsRequest{AgentId: "web1", State: "Running"}, "state", "use open"},
		{"jobs without index", &operatorpb.ListJobsRequest{AgentId: "web1", CertificateId: "www"}, "agent_id", "certificate_id+open"},
		{"job state", &operatorpb.ListJobsRequest{State: "Done"}, "state", "Completed"},
		{"job", &operatorpb.GetJobRequest{}, "id", "is empty"},
		{"cancel", &operatorpb.CancelJobRequest{}, "id", "is empty"},
		{"approve", &operatorpb.ApproveJobRequest{}, "id", "is empty"},
		{"approve for a novel", &operatorpb.ApproveJobRequest{Id: waitingJob, Reason: strings.Repeat("a", 257)}, "reason", "at most 256"},
		{"reject", &operatorpb.RejectJobRequest{Reason: "no"}, "id", "is empty"},
		{"reject without a reason", &operatorpb.RejectJobRequest{Id: waitingJob, Reason: " "}, "reason", "say why"},
		{"reject for a novel", &operatorpb.RejectJobRequest{Id: waitingJob, Reason: strings.Repeat("a", 257)}, "reason", "at most 256"},
		{"verify", &operatorpb.VerifyCertificateRequest{}, "id", "is empty"},
		{"verify id", &operatorpb.VerifyCertificateRequest{Id: "www", RequestId: "a b"}, "request_id", "at most 64"},
		{"deploy", &operatorpb.DeployCertificateRequest{}, "id", "is empty"},
		{"deploy id", &operatorpb.DeployCertificateRequest{Id: "www", RequestId: "a b"}, "request_id", "at most 64"},
		{"revoke a token", &operatorpb.RevokeJoinTokenRequest{}, "id", "is empty"},
		{"get issuer", &operatorpb.GetIssuerRequest{}, "id", "is empty"},
		{"issuer name", issuer(func(r *issue) { r.Name = "a/b" }), "name", "is not a name"},
		{"issuer kind", issuer(func(r *issue) { r.Kind = "acme" }), "kind", "local"},
		{"issuer called mesh", issuer(func(r *issue) { r.Name = "mesh" }), "name", "agents and nodes"},
		{"issuer common name", issuer(func(r *issue) { r.CommonName = strings.Repeat("ä", 65) }), "common_name", "64"},
		{"issuer key", issuer(func(r *issue) { r.KeyAlgorithm = "RSA-1024" }), "key_algorithm", "RSA-3072"},
		{"certificate without key", issuer(func(r *issue) { r.CaCertificatePem = "x" }), "ca_key_pem", "is missing"},
		{"key without certificate", issuer(func(r *issue) { r.CaKeyPem = "x" }), "ca_certificate_pem", "is missing"},
		{"certificate and subject", issuer(func(r *issue) { r.CaKeyPem, r.CaCertificatePem, r.CommonName = "x", "y", "z" }), "ca_certificate_pem", "leave common_name"},
		{"long PEM", issuer(func(r *issue) { r.CaCertificatePem = strings.Repeat("x", maxDocument+1) }), "ca_certificate_pem", "65537 bytes"},
		{"get target", &operatorpb.GetTargetRequest{}, "id", "is empty"},
		{"target name", place(func(r *place_) { r.Name = "-x" }), "name", "is not a name"},
		{"target agent", place(func(r *place_) { r.Agent = "" }), "agent", "is empty"},
		{"target of an unknown agent", place(func(r *place_) { r.Agent = "moon" }), "agent", "there is no agent \"moon\""},
		{"target kind", place(func(r *place_) { r.Kind = "iis" }), "kind", "file or nginx"},
		{"no target kind", place(func(r *place_) { r.Kind = "" }), "kind", "is empty"},
		{"target kind that the agent cannot", place(func(r *place_) { r.Agent, r.Kind = "mail1", "nginx" }), "kind", "announces target/file@1"},
		{"target settings", place(func(r *place_) { r.SettingsJson = "[]" }), "settings_json", "JSON object"},
		{"target setting", place(func(r *place_) { r.SettingsJson = `{"directory":"/a/../../etc"}` }), "settings_json.directory", "contains .."},
		{"verify address", place(func(r *place_) { r.VerifyAddress = "localhost" }), "verify_address", "host:port"},
		{"verify port", place(func(r *place_) { r.VerifyAddress = "localhost:0" }), "verify_address", "host:port"},
		{"verify host", place(func(r *place_) { r.VerifyAddress = "a b:443" }), "verify_address", "host:port"},
		{"verify URL", place(func(r *place_) { r.VerifyAddress = "https://localhost:443" }), "verify_address", "host:port"},
		{"verify address in the settings", place(func(r *place_) { r.SettingsJson = `{"verify_address":"localhost:443"}` }), "settings_json.verify_address", "verify_address of the target"},
		{"server name in the settings", place(func(r *place_) { r.SettingsJson = `{"verify_address":"","server_name":"a.example.com"}` }), "settings_json.server_name", "server_name of the target"},
		{"server name", place(func(r *place_) { r.ServerName = "*.example.com" }), "server_name", "host name"},
		{"watch kinds", &operatorpb.WatchRequest{Kinds: []string{"jobs", "moons"}}, "kinds[1]", "certificates"},
	}
}

// methodOf is the method that takes a request.
func methodOf(t testing.TB, req proto.Message) method {
	t.Helper()
	for _, m := range allMethods() {
		if m.Input().FullName() == req.ProtoReflect().Descriptor().FullName() {
			return m
		}
	}
	t.Fatalf("no method takes %T", req)
	return method{}
}

func TestWrongRequestsAreRefusedPrecisely(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	for _, b := range badRequests() {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			_, err := methodOf(t, b.req).call(r.as(t, authz.Admin), t, r.conn, b.req)
			wantField(t, err, b.field, b.says)
			if m := status.Convert(err).Message(); !strings.HasPrefix(m, b.field+": ") {
				t.Errorf("the message does not begin with the field: %q", m)
			}
		})
	}
	t.Cleanup(func() {
		for _, e := range r.store.trail() {
			if e.Outcome == "ok" {
				t.Errorf("something was changed: %+v", e)
			}
		}
	})
}

// TestEveryPageRuleHolds: 0 is 50, more than 1000 an error, and the cursors lead through a list without loss.
func TestEveryPageRuleHolds(t *testing.T) {
	t.Parallel()
	eachMethod(t, func(t *testing.T, m method, good proto.Message) {
		field := m.Input().Fields().ByName("page")
		if strings.HasPrefix(string(m.Name()), "List") != (field != nil) {
			t.Fatal("every list is paged, and nothing else")
		}
		if field == nil {
			return
		}
		r := newRig(t).estate(t)
		for _, c := range []struct {
			page *operatorpb.Page
			on   string
		}{
			{&operatorpb.Page{Size: 1001}, "page.size"}, {&operatorpb.Page{Size: -1}, "page.size"}, {&operatorpb.Page{Size: math.MaxInt32}, "page.size"},
			{&operatorpb.Page{Cursor: strings.Repeat("x", 513)}, "page.cursor"},
		} {
			req := proto.Clone(good)
			req.ProtoReflect().Set(field, protoreflect.ValueOfMessage(c.page.ProtoReflect()))
			_, err := m.call(r.as(t, authz.Viewer), t, r.conn, req)
			wantField(t, err, c.on, "")
		}
		for _, p := range []*operatorpb.Page{{Size: 1000}, {Size: 1}, {}, nil} {
			req := proto.Clone(good)
			if p != nil {
				req.ProtoReflect().Set(field, protoreflect.ValueOfMessage(p.ProtoReflect()))
			}
			if _, err := m.call(r.as(t, authz.Viewer), t, r.conn, req); err != nil {
				t.Errorf("%v: %v", p, err)
			}
		}
	})
}

func TestPagesLeadThroughAList(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Operator)
	for i := range 119 {
		c := domain.Certificate{ID: fmt.Sprintf("cert_1%031d", i), Name: fmt.Sprintf("c%d", i)}
		r.store.certs[c.ID] = c
	}
	first, err := r.certificates().ListCertificates(ctx, &operatorpb.ListCertificatesRequest{})
	if err != nil || len(first.GetCertificates()) != 50 || first.GetNextCursor() == "" {
		t.Fatalf("%d of 50 by default, next %q, %v", len(first.GetCertificates()), first.GetNextCursor(), err)
	}
	for _, size := range []int32{7, 60, 120, 1000} {
		seen := map[string]bool{}
		page := &operatorpb.Page{Size: size}
		for {
			got, err := r.certificates().ListCertificates(ctx, &operatorpb.ListCertificatesRequest{Page: page})
			if err != nil {
				t.Fatal(err)
			}
			if len(got.GetCertificates()) > int(size) {
				t.Fatalf("%d rows in a page of %d", len(got.GetCertificates()), size)
			}
			for _, c := range got.GetCertificates() {
				if seen[c.GetId()] {
					t.Fatalf("%s is there twice", c.GetId())
				}
				seen[c.GetId()] = true
			}
			if page.Cursor = got.GetNextCursor(); page.Cursor == "" {
				break
			}
		}
		if len(seen) != 120 {
			t.Errorf("pages of %d show %d of 120", size, len(seen))
		}
	}
}

// stringFields are the paths to every text of a message type, those in lists and maps included; not those of messages
// in lists.
func stringFields(d protoreflect.MessageDescriptor, to []protoreflect.FieldDescriptor) [][]protoreflect.FieldDescriptor {
	var out [][]protoreflect.FieldDescriptor
	for i := range d.Fields().Len() {
		fd := d.Fields().Get(i)
		at := append(slices.Clone(to), fd)
		switch {
		case fd.Kind() == protoreflect.StringKind, fd.IsMap() && fd.MapValue().Kind() == protoreflect.StringKind:
			out = append(out, at)
		case fd.Kind() == protoreflect.MessageKind && !fd.IsList() && !fd.IsMap():
			out = append(out, stringFields(fd.Message(), at)...)
		}
	}
	return out
}

func setText(m protoreflect.Message, path []protoreflect.FieldDescriptor, text string) {
	for _, fd := range path[:len(path)-1] {
		m = m.Mutable(fd).Message()
	}
	fd, v := path[len(path)-1], protoreflect.ValueOfString(text)
	switch {
	case fd.IsMap():
		all := m.NewField(fd).Map()
		all.Set(protoreflect.ValueOfString("k").MapKey(), v)
		v = protoreflect.ValueOfMap(all)
	case fd.IsList():
		all := m.NewField(fd).List()
		all.Append(v)
		v = protoreflect.ValueOfList(all)
	}
	m.Set(fd, v)
}

// hostile are texts that have broken something somewhere.
var hostile = map[string]string{
	"NUL":            "a\x00b",
	"newline":        "a\nlevel=ERROR msg=forged",
	"escape":         "a\x1b[2J\x1b]0;owned\x07",
	"carriage":       "a\rb",
	"C1 control":     "a\u009b31m",
	"line separator": "a\u2028b",
	"DEL":            "a\x7f",
	"over the bound": strings.Repeat("a", maxDocument+1),
	"SQL":            "' OR '1'='1'; DROP TABLE certificate; --",
	"path":           "../../../../etc/shadow",
	"template":       "{{.}} ${jndi:ldap://x} $(reboot) `reboot` %s%s%n",
	"bidi":           "\u202egnp.exe",
}

// TestHostileTextsAreHarmless: in every text field of every request they are refused as what they are, or taken as
// plain text; nothing panics, and no error is ours.
func TestHostileTextsAreHarmless(t *testing.T) {
	t.Parallel()
	control := map[string]bool{"NUL": true, "newline": true, "escape": true, "carriage": true, "C1 control": true, "line separator": true, "DEL": true, "over the bound": true}
	eachMethod(t, func(t *testing.T, m method, good proto.Message) {
		r := newRig(t).estate(t)
		for _, path := range stringFields(m.Input(), nil) {
			field := path[len(path)-1].Name()
			for name, text := range hostile {
				req := proto.Clone(good)
				setText(req.ProtoReflect(), path, text)
				_, err := m.call(r.as(t, authz.Admin), t, r.conn, req)
				switch code := status.Code(err); {
				case (control[name] && !documents[field] || name == "over the bound") && code != codes.InvalidArgument:
					t.Errorf("%s with %s: %v", path, name, err)
				case code == codes.Internal || code == codes.Unknown || code == codes.Unavailable:
					t.Errorf("%s with %s: %v", path, name, err)
				}
				if text := status.Convert(err).Message(); len(text) > 8<<10 || strings.ContainsAny(text, "\x00\x1b\n\r\x07") {
					t.Errorf("%s with %s: the message is not fit for a terminal: %.200q", path, name, text)
				}
			}
		}
		if strings.Contains(r.log.String(), "api panic") {
			t.Errorf("a panic:\n%s", r.log)
		}
	})
}

// TestOversizedAndBrokenMessages: what gRPC itself refuses is refused, and the server serves on.
func TestOversizedAndBrokenMessages(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Admin)
	_, err := r.certificates().GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: strings.Repeat("a", 1<<20)})
	wantCode(t, err, codes.ResourceExhausted)
	_, err = r.certificates().GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: strings.Repeat("a", 1<<20-64)})
	wantField(t, err, "id", "at most 1024")
	// Go's own encoder refuses broken UTF-8; another client's may not, so the bytes are made by hand.
	broken := &operatorpb.GetCertificateRequest{}
	broken.ProtoReflect().SetUnknown([]byte{0x0a, 0x02, 0xff, 0xfe})
	if _, err = r.certificates().GetCertificate(ctx, broken); err == nil {
		t.Error("broken UTF-8 was accepted")
	}
	deep := &operatorpb.GetStatusRequest{}
	deep.ProtoReflect().SetUnknown([]byte{0xff, 0xff, 0xff})
	if _, err = r.system().GetStatus(ctx, deep); err == nil {
		t.Error("garbage was accepted")
	}
	if _, err := r.system().GetStatus(ctx, &operatorpb.GetStatusRequest{}); err != nil {
		t.Error(err)
	}
	// An unknown field is of a later version and is left alone.
	later := &operatorpb.GetStatusRequest{}
	later.ProtoReflect().SetUnknown([]byte{0xf8, 0x06, 0x01})
	if _, err := r.system().GetStatus(ctx, later); err != nil {
		t.Error(err)
	}
}

// TestEveryRequestIsValidated: a message without rules of its own is a defect, found here and not in production.
func TestEveryRequestIsValidated(t *testing.T) {
	t.Parallel()
	eachMethod(t, func(t *testing.T, _ method, good proto.Message) {
		if err := validate(good); err != nil {
			t.Error(err)
		}
	})
	if err := validate(&operatorpb.Certificate{}); err == nil {
		t.Error("a message that is no request passes")
	}
}

func TestCanonicalNames(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	o := order("new")
	o.Names = &operatorpb.Names{CommonName: "WWW.Example.COM", Dns: []string{"B.Example.COM", "b.example.com"}, Ip: []string{"2001:DB8:0::1", "::ffff:192.0.2.7"}}
	got, err := r.certificates().CreateCertificate(r.as(t, authz.Operator), o)
	if err != nil {
		t.Fatal(err)
	}
	n := got.GetCertificate().GetNames()
	wantList(t, "dns", n.GetDns(), []string{"b.example.com", "www.example.com"})
	wantList(t, "ip", n.GetIp(), []string{"2001:db8::1", "192.0.2.7"})
}
