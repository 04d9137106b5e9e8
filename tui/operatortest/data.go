package operatortest

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// Now is the time in the stand-in's world.
var Now = time.Date(2026, 12, 1, 10, 0, 0, 0, time.UTC)

const (
	hour = time.Hour
	day  = 24 * hour
)

// Hostile is text that an agent might send to take a terminal over: it clears the screen, sets the title, turns the
// direction of text and breaks the line.
const Hostile = "bad\x1b[2J\x1b]0;owned\a\u009b31m\u202egnp.exe\r\nnext"

// Data is what a server answers from.
type Data struct {
	Certificates []*operatorpb.Certificate
	Versions     []*operatorpb.Version
	Agents       []*operatorpb.Agent
	Jobs         []*operatorpb.Job
	Tokens       []*operatorpb.JoinToken
	Issuers      []*operatorpb.Issuer
	Profiles     []*operatorpb.Profile
	Targets      []*operatorpb.Target
	Events       []*operatorpb.AuditEvent
	Status       *operatorpb.GetStatusResponse
}

// Certificate is the one of that name; tests change it in place.
func (d *Data) Certificate(name string) *operatorpb.Certificate {
	for _, c := range d.Certificates {
		if c.GetName() == name {
			return c
		}
	}
	return nil
}

// Issue has every leaf of a certificate at the generation that was ordered, and its jobs done.
func (d *Data) Issue(name string) {
	c := d.Certificate(name)
	c.Status, c.NotAfter = "Active", timestamppb.New(Now.Add(90*day))
	for _, l := range c.GetLeaves() {
		l.Generation, l.Serial, l.NotAfter = max(l.GetOrderedGeneration(), 1), "77aa", c.GetNotAfter()
		l.NotBefore, l.DueAt = timestamppb.New(Now), timestamppb.New(Now.Add(60*day))
	}
	for _, j := range d.Jobs {
		if j.GetCertificateId() == c.GetId() {
			j.State, j.FinishedAt = "Completed", timestamppb.New(Now)
		}
	}
	for _, p := range c.GetPlacements() {
		p.Current = false
	}
	c.PlacementsCurrent = 0
}

// Serve has every placement of a certificate serve what is issued.
func (d *Data) Serve(name string) {
	c := d.Certificate(name)
	for _, p := range c.GetPlacements() {
		p.State, p.Current, p.ServedAt = "Served", true, timestamppb.New(Now)
		for _, l := range c.GetLeaves() {
			if l.GetAgentId() == p.GetAgentId() {
				p.InstalledGeneration, p.ServedGeneration = l.GetGeneration(), l.GetGeneration()
			}
		}
	}
	c.PlacementsCurrent = c.GetPlacementsTotal()
}

func id(kind string, n int) string { return fmt.Sprintf("%s_%032x", kind, n) }

func at(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(Now.Add(d)) }

// Seed is a small estate with a bit of everything in it.
func Seed() Data {
	web := &operatorpb.Certificate{
		Id: id("cert", 1), Name: "web", Names: &operatorpb.Names{CommonName: "www.example.com", Dns: []string{"www.example.com", "example.com"}, Ip: []string{"192.0.2.7"}},
		IssuerId: id("iss", 1), ProfileId: id("prof", 1), Owner: "shop", Policy: &operatorpb.RenewalPolicy{
			Fraction: 0.5, Windows: []*operatorpb.RenewalWindow{{Days: []int32{1, 2}, StartMinute: 60, EndMinute: 300}},
		},
		Status: "Active", NotAfter: at(12 * day), CreatedAt: at(-78 * day), UpdatedAt: at(-2 * hour), Revision: 4, PlacementsCurrent: 1, PlacementsTotal: 2,
		Leaves: []*operatorpb.Leaf{
			{AgentId: id("agt", 1), Generation: 2, OrderedGeneration: 2, Serial: "4f2a", NotBefore: at(-78 * day), NotAfter: at(12 * day), DueAt: at(3 * day)},
			{
				AgentId: id("agt", 2), Generation: 1, OrderedGeneration: 2, Serial: "1b3c", NotBefore: at(-78 * day), NotAfter: at(12 * day), DueAt: at(-hour), Failures: 2,
				BackoffUntil: at(hour), LastError: Hostile,
			},
		},
		Placements: []*operatorpb.Placement{
			{
				TargetId: id("tgt", 1), TargetName: "web-1-nginx", AgentId: id("agt", 1), State: "Served", InstalledGeneration: 2, ServedGeneration: 2,
				InstalledFingerprint: "ab12", ServedFingerprint: "ab12", ServedAt: at(-2 * hour), Current: true,
			},
			{TargetId: id("tgt", 2), TargetName: "web-2-file", AgentId: id("agt", 2), State: "Failed", InstalledGeneration: 1, LastError: "the reload ended with status 1"},
		},
	}
	return Data{
		Certificates: []*operatorpb.Certificate{
			web,
			{
				Id: id("cert", 2), Name: "db", Names: &operatorpb.Names{Dns: []string{"db.internal"}}, IssuerId: id("iss", 1), ProfileId: id("prof", 2), Status: "Pending",
				CreatedAt: at(-time.Minute), UpdatedAt: at(-time.Minute), Revision: 1, PlacementsTotal: 1,
			},
			{
				Id: id("cert", 3), Name: "old", Names: &operatorpb.Names{Dns: []string{"old.example.com"}}, IssuerId: id("iss", 2), ProfileId: id("prof", 1), Owner: Hostile,
				Status: "Expired", NotAfter: at(-3 * day), CreatedAt: at(-93 * day), UpdatedAt: at(-3 * day), Revision: 2, PlacementsTotal: 1,
			},
		},
		Versions: []*operatorpb.Version{
			{
				Serial: "4f2a", AgentId: id("agt", 1), Generation: 2, Fingerprint: "ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34", KeyAlgorithm: "ECDSA-P256",
				NotBefore: at(-10 * day), NotAfter: at(80 * day), CreatedAt: at(-10 * day), IssuerId: id("iss", 1), Pem: "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
			},
			{
				Serial: "1b3c", AgentId: id("agt", 1), Generation: 1, Fingerprint: "0a0b", KeyAlgorithm: "RSA-2048", NotBefore: at(-78 * day), NotAfter: at(12 * day),
				RevokedAt: at(-10 * day), RevocationReason: "superseded", CreatedAt: at(-78 * day), IssuerId: id("iss", 1),
			},
		},
		Agents: []*operatorpb.Agent{
			{
				Id: id("agt", 1), Name: "web-1", State: "Online", Labels: map[string]string{"site": "fra1", "tier": "web"}, Os: "linux", Platform: "debian 12", Architecture: "amd64",
				IpAddress: "192.0.2.7", Hostname: "web-1.example.com", Version: "v1.2.0", Capabilities: []string{"deploy", "issue"}, CreatedAt: at(-90 * day), LastSeen: at(-3 * time.Second),
				Credits: map[string]int32{"work": 8, "state": 2}, RejectedStates: []string{"target/" + id("tgt", 2) + " v3: " + Hostile},
			},
			{Id: id("agt", 2), Name: "web-2", State: "Quarantined", Hostname: Hostile, Version: "v1.1.0", CreatedAt: at(-90 * day), LastSeen: at(-hour), Reason: "two machines use one identity"},
		},
		Jobs: []*operatorpb.Job{
			{
				Id: id("job", 1), Kind: "Deployment", State: "Running", CertificateId: id("cert", 1), AgentId: id("agt", 1), TargetId: id("tgt", 1), Generation: 2, Attempt: 1, Tries: 1, MaxTries: 3,
				RunAt: at(-time.Minute), CreatedAt: at(-time.Minute), UpdatedAt: at(-30 * time.Second), Reason: "generation 2 is not served",
			},
			{
				Id: id("job", 2), Kind: "Renewal", State: "Failed", CertificateId: id("cert", 3), AgentId: id("agt", 2), Generation: 3, Attempt: 4, Tries: 3, MaxTries: 3, RunAt: at(-hour),
				CreatedAt: at(-2 * hour), UpdatedAt: at(-hour), FinishedAt: at(-hour), ErrorClass: "rejected", Error: Hostile, Reason: "due", RequestId: "req_7",
			},
		},
		Tokens: []*operatorpb.JoinToken{
			{Id: id("jt", 1), MaxUses: 3, Uses: 1, Labels: map[string]string{"site": "fra1"}, ExpiresAt: at(hour), CreatedBy: "operator:ann", CreatedAt: at(-hour)},
			{Id: id("jt", 2), MaxUses: 1, Uses: 1, ExpiresAt: at(hour), CreatedBy: "operator:ann", CreatedAt: at(-2 * hour)},
			{Id: id("jt", 3), MaxUses: 1, ExpiresAt: at(-hour), CreatedBy: Hostile, CreatedAt: at(-3 * hour)},
		},
		Issuers: []*operatorpb.Issuer{
			{Id: id("iss", 1), Name: "corp", Kind: "local", PublicUrl: "http://pki.test:8080", CreatedAt: at(-90 * day), NotAfter: at(3650 * day)},
			{Id: id("iss", 2), Name: "legacy", Kind: "local", PublicUrl: "http://pki.test:8080", CreatedAt: at(-900 * day), NotAfter: at(20 * day)},
		},
		Profiles: []*operatorpb.Profile{
			{
				Id: id("prof", 1), Name: "tls-server", KeyAlgorithm: "ECDSA-P256", AllowedKeyAlgorithms: []string{"ECDSA-P256", "RSA-3072"}, Ekus: []string{"serverAuth"},
				Ttl: durationpb.New(90 * day), MaxTtl: durationpb.New(397 * day),
			},
			{
				Id: id("prof", 2), Name: "short-lived", KeyAlgorithm: "Ed25519", AllowedKeyAlgorithms: []string{"Ed25519"}, Ekus: []string{"serverAuth", "clientAuth"},
				Ttl: durationpb.New(30 * time.Minute), MaxTtl: durationpb.New(90 * time.Minute),
			},
		},
		Targets: []*operatorpb.Target{
			{
				Id: id("tgt", 1), Name: "web-1-nginx", AgentId: id("agt", 1), Kind: "nginx", SettingsJson: `{"cert_path":"/etc/nginx/tls/site.pem","backup_retention":3}`,
				VerifyAddress: "localhost:443", ServerName: "www.example.com", Enabled: true, CreatedAt: at(-89 * day), Revision: 2,
			},
			{Id: id("tgt", 2), Name: "web-2-file", AgentId: id("agt", 2), Kind: "file", SettingsJson: `{"dir":"/etc/tls"}`, Enabled: false, CreatedAt: at(-80 * day), Revision: 1},
		},
		Events: []*operatorpb.AuditEvent{
			{
				Id: id("aud", 1), At: at(-hour), Actor: "operator:ann", Action: "certificate.created", Resource: "certificate/" + id("cert", 1), Outcome: "ok", RequestId: "req_1",
				RemoteAddr: "192.0.2.99", Detail: map[string]string{"name": "web", "issuer": "corp"},
			},
			{
				Id: id("aud", 2), At: at(-2 * hour), Actor: "anonymous", Action: "api.denied", Resource: "rpc/AgentsService/RetireAgent", Outcome: "unauthorized", RequestId: "req_2",
				RemoteAddr: "198.51.100.4", Detail: map[string]string{"message": Hostile},
			},
		},
		Status: &operatorpb.GetStatusResponse{
			NodeId: id("node", 1), Version: "v1.2.0", Store: "postgresql", SchemaVersion: 7, StartedAt: at(-3 * hour), CertificatesByStatus: map[string]int64{"Active": 12, "Failed": 1},
			AgentsByState: map[string]int64{"Online": 3, "Offline": 1}, OpenJobsByState: map[string]int64{}, Sessions: 3, TrustDomain: "mesh.test", PlacementsLagging: 2,
			Duties: []*operatorpb.DutyStatus{
				{Name: "renewal", Interval: durationpb.New(hour), LastRun: at(-10 * time.Minute), Epoch: 4},
				{Name: "reaper", Interval: durationpb.New(90 * time.Second), LastError: "the store is away", Epoch: 4},
			},
		},
	}
}
