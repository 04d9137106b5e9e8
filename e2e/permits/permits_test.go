package permits

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

const trustDomain = "permits.test"

func TestMain(m *testing.M) {
	if os.Getenv(nodeVariable) != "" {
		if err := nodeMain(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const (
	lease    = 3 * time.Second
	inFlight = 6
	rate     = 30
	workers  = 8
)

// TestOneCapForTheCluster kills a follower and the leader while everybody calls as much as it may.
func TestOneCapForTheCluster(t *testing.T) {
	t.Parallel()
	count, length := number(t, "CERTMESH_PERMITS_NODES", 3), time.Duration(number(t, "CERTMESH_PERMITS_SECONDS", 0))*time.Second
	c := &ca{inFlight: inFlight, rate: rate, now: map[string]bool{}, call: func(n int) (takes, pause time.Duration) {
		// Both bounds are met: six calls of 300 ms are 20 a second, of 20 ms far more than 30.
		if takes = 20 * time.Millisecond; n%100 < 60 {
			takes = 300 * time.Millisecond
		}
		if n%80 == 40 {
			pause = time.Second
		}
		return takes, pause
	}}
	server := httptest.NewServer(c)
	defer server.Close()
	p := newPlay(t, count, server.URL)
	for _, id := range p.ids {
		p.start(id)
	}
	p.waitFor(c, "every node calls", 30*time.Second, 1, p.ids...)

	end := time.Now().Add(length)
	for round := 0; round == 0 || time.Now().Before(end); round++ {
		_, _, leader := c.calls()
		follower := p.ids[round%len(p.ids)]
		if follower == leader {
			follower = p.ids[(round+1)%len(p.ids)]
		}
		p.kill(follower)
		p.start(follower)
		p.waitFor(c, "the others go on, and the one that was killed comes back", 30*time.Second, 6, p.ids...)

		_, _, leader = c.calls()
		p.kill(leader)
		p.start(leader)
		p.waitFor(c, "every node calls under the new leader", 30*time.Second, 8, p.ids...)
	}
	for _, id := range p.ids {
		p.kill(id)
	}
	for _, problem := range c.verdict(count) {
		t.Error(problem)
	}
	total, byNode, _ := c.calls()
	t.Logf("%d calls %v, %d at once at most of %d, %d times told to wait", total, byNode, c.most, inFlight, len(c.told))
	if c.most < inFlight-1 {
		t.Errorf("at most %d of %d permits were ever used", c.most, inFlight)
	}
}

func number(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// play is the cluster's processes.
type play struct {
	t        *testing.T
	dir      string
	ids      []string
	settings map[string]settings
	running  map[string]*process
}

type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	log   *os.File
}

func newPlay(t *testing.T, count int, ca string) *play {
	t.Helper()
	p := &play{t: t, dir: t.TempDir(), settings: map[string]settings{}, running: map[string]*process{}}
	addresses, err := estate.FreeAddrs(2 * count)
	if err != nil {
		t.Fatal(err)
	}
	key, root, rootPEM := authority(t)
	nodes := map[string]string{}
	for i := range count {
		p.ids = append(p.ids, fmt.Sprintf("n%d", i+1))
		nodes[p.ids[i]] = addresses[2*i]
	}
	for i, id := range p.ids {
		s := settings{ID: id, Dir: filepath.Join(p.dir, id), Raft: addresses[2*i+1], Mesh: addresses[2*i], CA: ca, Nodes: nodes, Root: rootPEM,
			LeaseTime: lease, InFlight: inFlight, Rate: rate, Workers: workers}
		s.Certificate, s.Key = identity(t, key, root, id)
		p.settings[id] = s
	}
	t.Cleanup(p.end)
	return p
}

func (p *play) start(id string) {
	p.t.Helper()
	self, err := os.Executable()
	if err != nil {
		p.t.Fatal(err)
	}
	text, err := json.Marshal(p.settings[id])
	if err != nil {
		p.t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(p.dir, id+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), nodeVariable+"="+string(text))
	cmd.Stderr = log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.running[id] = &process{cmd, stdin, log}
}

func (p *play) kill(id string) {
	p.t.Helper()
	r := p.running[id]
	delete(p.running, id)
	if err := r.cmd.Process.Kill(); err != nil {
		p.t.Errorf("kill %s: %v", id, err)
	}
	_ = r.cmd.Wait() // It was killed.
	_ = r.log.Close()
}

func (p *play) end() {
	for id := range p.running {
		p.kill(id)
	}
	if !p.t.Failed() {
		return
	}
	for _, id := range p.ids {
		text, err := os.ReadFile(filepath.Join(p.dir, id+".log"))
		if err != nil {
			continue
		}
		lines := bytes.Split(text, []byte("\n"))
		p.t.Logf("%s:\n%s", id, bytes.Join(lines[max(0, len(lines)-30):], []byte("\n")))
	}
}

// waitFor waits until each node has made so many calls more.
func (p *play) waitFor(c *ca, what string, patience time.Duration, more int, ids ...string) {
	p.t.Helper()
	_, before, _ := c.calls()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, now, _ := c.calls()
		missing := ""
		for _, id := range ids {
			if now[id] < before[id]+more {
				missing = id
			}
		}
		if missing == "" {
			return
		}
		select {
		case <-deadline.C:
			p.t.Fatalf("waited in vain until %s; missing: %s (%v, before %v)", what, missing, now, before)
		case <-tick.C:
		}
	}
}

func authority(t *testing.T) (*ecdsa.PrivateKey, *x509.Certificate, []byte) {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mesh"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func identity(t *testing.T, signer *ecdsa.PrivateKey, root *x509.Certificate, id string) (certificate, keyPEM []byte) {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: id},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: trustDomain, Path: "/node/" + id}}}
	der, err := x509.CreateCertificate(rand.Reader, template, root, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
