package agentd_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/certmesh/certmesh/agent/agentd"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

const (
	certID   = "cert_0123456789abcdef0123456789abcdef"
	targetID = "tgt_0123456789abcdef0123456789abcdef"
)

func keyJob(id string, attempt, generation int64) *agentpb.Assignment {
	return &agentpb.Assignment{Id: id, Attempt: attempt, Class: agentpb.WorkClass_WORK_CLASS_KEY,
		Work: &agentpb.Assignment_Key{Key: &agentpb.KeyWork{CertificateId: certID, Generation: generation, KeyAlgorithm: "ECDSA-P256",
			CommonName: "www.example.com", DnsNames: []string{"www.example.com"}, IpAddresses: []string{"192.0.2.7"}}}}
}

// fileTarget installs below dir, which must be one of the agent's roots.
func fileTarget(dir string) *agentpb.TargetSpec {
	return &agentpb.TargetSpec{Id: targetID, Name: "site", Kind: "file",
		Settings: must(json.Marshal(map[string]any{"dir": filepath.Join(dir, "site")}))}
}

func deployJob(id string, attempt, generation int64, chain [][]byte, spec *agentpb.TargetSpec) *agentpb.Assignment {
	return &agentpb.Assignment{Id: id, Attempt: attempt, Class: agentpb.WorkClass_WORK_CLASS_DEPLOY,
		Work: &agentpb.Assignment_Deploy{Deploy: &agentpb.DeployWork{CertificateId: certID, Generation: generation, Chain: chain, Target: spec}}}
}

func installed(t testing.TB, dir string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "site", "current", "cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	return sha256.Sum256(block.Bytes)
}

// tap records the plain text of every connection, both ways.
type tap struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (t *tap) wrap(c net.Conn) net.Conn { return &tapped{c, t} }

func (t *tap) add(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
}

func (t *tap) bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Clone(t.buf.Bytes())
}

type tapped struct {
	net.Conn
	t *tap
}

func (c *tapped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.t.add(p[:n])
	return n, err
}

func (c *tapped) Write(p []byte) (int, error) {
	c.t.add(p)
	return c.Conn.Write(p)
}

// TestMainJob goes once through all of it: enrol, states, key, deploy, renew, retire, stop.
func TestMainJob(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	issuer := newAuthority()
	var wire tap
	cfg := config(t, f)
	root := t.TempDir()
	cfg.TargetRoots, cfg.WrapConn = []string{root}, wire.wrap
	cfg.Labels = map[string]string{"zone": "a"}
	r := start(t, cfg)
	s := f.next()
	h := s.hello
	if h.GetAgentId() != agentID || h.GetProtocol() != 1 || h.GetBootId() == "" || h.GetLabels()["zone"] != "a" ||
		h.GetFacts().GetHostname() != "host-1" || len(h.GetCredits()) != 3 || len(h.GetOpen()) != 0 || h.GetLeafCount() != 0 {
		t.Errorf("Hello is %v", h)
	}
	contains(t, fmt.Sprint(h.GetCapabilities()), "target/file@1", "target/nginx@")
	s.welcome()

	spec := fileTarget(root)
	v := &agentpb.StateVersion{Kind: "target", Name: targetID, Version: 3, Hash: []byte{1}}
	s.state(&agentpb.State{Version: v, Body: &agentpb.State_Target{Target: spec}})
	equal(t, "Applied", expect(s, appliedOf).GetVersion(), v)

	var private [][]byte
	for g := int64(1); g <= 2; g++ {
		s.assign(keyJob(fmt.Sprintf("job_k%d", g), 1, g))
		if a := expect(s, acceptedOf); a.GetAttempt() != 1 {
			t.Errorf("accepted %v", a)
		}
		csr := expect(s, csrOf)
		req, err := x509.ParseCertificateRequest(csr.GetCsr())
		if err != nil || req.CheckSignature() != nil || len(req.DNSNames) != 1 || len(req.IPAddresses) != 1 {
			t.Fatalf("the CSR is %+v, %v", req, err)
		}
		chain := [][]byte{issuer.leaf(csr.GetCsr())}
		s.settle(&agentpb.Settled{Id: csr.GetId(), Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK, CertificateId: certID, Generation: g})
		s.assign(deployJob(fmt.Sprintf("job_d%d", g), 1, g, chain, spec))
		res := expect(s, resultOf)
		want := sha256.Sum256(chain[0])
		if !bytes.Equal(res.GetDeployed().GetInstalledFingerprint(), want[:]) || installed(t, root) != want {
			t.Fatalf("generation %d: result %v", g, res)
		}
		for _, p := range must(filepath.Glob(filepath.Join(cfg.DataDir, "keys", certID, "*.pem"))) {
			private = append(private, must(os.ReadFile(p)))
			if st := must(os.Stat(p)); st.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", p, st.Mode())
			}
		}
		s.settle(&agentpb.Settled{Id: res.GetId(), Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK, CertificateId: certID, RetireBelow: g})
	}
	// Beats and credits apart, a state's answer follows everything that was handled before it.
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "settings", Version: 1}, Body: &agentpb.State_Settings{Settings: &agentpb.Settings{VerifyTimeoutMs: 10}}})
	expect(s, appliedOf)
	if left := must(filepath.Glob(filepath.Join(cfg.DataDir, "keys", certID, "*.pem"))); len(left) != 1 {
		t.Errorf("keys left after retirement: %v", left)
	}
	rep := must(agentd.Status(cfg))
	if !rep.Running || rep.Identity.AgentID != agentID || rep.Identity.Standing != "good" || len(rep.Open) != 0 ||
		len(rep.Keys) != 1 || rep.Keys[0].Generation != 2 || rep.Keys[0].NotAfter == nil || len(rep.States) != 2 {
		t.Errorf("status is %+v", rep)
	}
	r.stop()
	if g := expect(s, goodbyeOf); g.GetReason() != agentpb.Goodbye_REASON_SHUTDOWN {
		t.Errorf("the agent said %v", g)
	}
	if err := r.wait(); err != nil {
		t.Error(err)
	}
	if rep := must(agentd.Status(cfg)); rep.Running {
		t.Error("still running")
	}
	private = append(private, must(os.ReadFile(filepath.Join(cfg.DataDir, "identity", "identity.pem"))))
	seen := wire.bytes()
	if !bytes.Contains(seen, []byte(agentID)) {
		t.Fatal("the tap saw nothing; this test proves nothing")
	}
	for _, p := range private {
		noKey(t, seen, p)
	}
}

// noKey searches for every encoding that a private key has.
func noKey(t *testing.T, seen, pemBytes []byte) {
	t.Helper()
	block, _ := pem.Decode(pemBytes)
	if block == nil || block.Type != "PRIVATE KEY" {
		t.Fatal("not a key")
	}
	key := must(x509.ParsePKCS8PrivateKey(block.Bytes))
	scalar := must(key.(interface{ Bytes() ([]byte, error) }).Bytes())
	for what, b := range map[string][]byte{
		"PKCS#8":        block.Bytes,
		"scalar":        scalar,
		"base64 scalar": []byte(base64.RawStdEncoding.EncodeToString(scalar)),
		"hex scalar":    fmt.Appendf(nil, "%x", scalar),
		"PEM":           pemBytes[30:90],
	} {
		if bytes.Contains(seen, b) {
			t.Errorf("the stream carried a private key (%s)", what)
		}
	}
	if bytes.Contains(seen, []byte("PRIVATE KEY")) {
		t.Error("the stream carried a PEM header of a key")
	}
}
