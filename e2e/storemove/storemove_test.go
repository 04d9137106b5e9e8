package storemove

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

func TestMain(m *testing.M) { estatetest.Main(m) }

// site is a lab with one CA and what was seen of it.
type site struct {
	*estatetest.Lab
	// signed are the serials of every generation that was ever seen, by certificate.
	signed map[string]map[int64]string
}

func start(t *testing.T) *site {
	t.Helper()
	s := &site{Lab: estatetest.Start(t), signed: map[string]map[int64]string{}}
	s.Issuer("ca")
	return s
}

// target makes a target of one file and returns its path.
func (s *site) target(name, agent string) string {
	s.T.Helper()
	path := filepath.Join(s.SiteDir(agent), name+".pem")
	b, err := json.Marshal(map[string]string{"pem_path": path})
	s.OK(err)
	s.Do("targets", "create", name, "--agent", agent, "--kind", "file", "--settings", string(b))
	return path
}

func (s *site) order(name, agent string) string {
	s.T.Helper()
	path := s.target(name, agent)
	s.Do("certs", "create", name, "--dns", name+".example.test", "--issuer", "ca", "--target", name, "--wait", "--wait-timeout", estatetest.Long)
	return path
}

func (s *site) renew(name string) {
	s.T.Helper()
	s.Do("certs", "renew", name, "--wait", "--wait-timeout", estatetest.Long)
}

// look notes what was signed for the certificates. A generation has one serial for ever, and a serial one generation.
func (s *site) look(names ...string) {
	s.T.Helper()
	for _, name := range names {
		if s.signed[name] == nil {
			s.signed[name] = map[int64]string{}
		}
		for _, v := range s.Versions(name) {
			if was, ok := s.signed[name][v.Generation]; ok && was != v.Serial {
				s.T.Errorf("generation %d of %s has serial %s and %s", v.Generation, name, was, v.Serial)
			}
			s.signed[name][v.Generation] = v.Serial
		}
	}
	owner := map[string]string{}
	for name, generations := range s.signed {
		for g, serial := range generations {
			me := fmt.Sprintf("generation %d of %s", g, name)
			if other, ok := owner[serial]; ok {
				s.T.Errorf("serial %s is that of %s and of %s", serial, me, other)
			}
			owner[serial] = me
		}
	}
}

func (s *site) leaf(path string) *x509.Certificate {
	s.T.Helper()
	p, err := tls.LoadX509KeyPair(path, path)
	s.OK(err)
	return p.Leaf
}

// served is the serial in a target's file.
func (s *site) served(path string) string {
	s.T.Helper()
	return estate.Serial(s.leaf(path))
}

// certmeshd runs a command of the server's, with its configuration.
func (s *site) certmeshd(args ...string) (string, error) {
	out, err := s.Run(s.Ctx, "certmeshd", s.ServerEnv(), args...)
	return string(out), err
}

func (s *site) crl(url string) *x509.RevocationList {
	s.T.Helper()
	var list *x509.RevocationList
	s.Until("a CRL", func() error {
		status, body, err := s.Estate.Get(s.Ctx, url)
		if err != nil {
			return err
		}
		if status != 200 {
			return fmt.Errorf("status %d", status)
		}
		list, err = x509.ParseRevocationList(body)
		return err
	})
	return list
}

func lists(l *x509.RevocationList, serial string) bool {
	return slices.ContainsFunc(l.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Text(16) == serial })
}

func (s *site) crlURL(path string) string {
	s.T.Helper()
	return s.leaf(path).CRLDistributionPoints[0]
}

func (s *site) database() string { return s.Path("server", "certmesh.db") }

func TestMove(t *testing.T) {
	t.Parallel()
	s := start(t)
	dsn, stop, err := s.StartPostgres(s.Ctx)
	s.OK(err)
	t.Cleanup(stop)
	agent, _ := s.Join(estate.AgentOptions{Name: "east"})
	path := s.order("one", "east")
	s.renew("one")
	s.order("two", "east")
	s.look("one", "two")

	// 1.
	out, err := s.certmeshd("store", "backup", "--to", s.Path("backup.db"))
	s.OK(err)
	if !strings.Contains(out, "bytes, schema version") {
		t.Errorf("backup: %s", out)
	}
	copying := []string{"store", "copy", "--from", "sqlite:" + s.database(), "--to", dsn}
	_, err = s.certmeshd(copying...)
	s.IsRefusal(err, 1, "stop")

	// 2.
	s.OK(s.Server.Stop(time.Minute))
	serve := []string{"CERTMESH_SECRETS_KEK_FILE=" + s.Path("server", "kek"), "CERTMESH_PKI_PUBLIC_URL=http://" + s.PKI, "CERTMESH_STORE_DSN=" + dsn}
	killed, half := 0, 0
	for range 12 {
		p, err := s.Start("copy", "certmeshd", s.ServerEnv(), copying...)
		s.OK(err)
		wait := time.NewTimer(time.Duration(rand.IntN(2500)) * time.Millisecond)
		select {
		case <-wait.C:
			p.Kill()
			killed++
		case <-p.Exited():
		}
		if p.ExitCode() == 0 {
			break
		}
		if _, err := s.Run(s.Ctx, "certmeshd", append(s.ServerEnv(), serve...), "apikey", "list", "--set", "store.migrate=false"); err != nil && strings.Contains(err.Error(), "not complete") {
			half++
		}
	}
	t.Logf("the copy was killed %d times, %d of them half way", killed, half)
	if _, err := s.certmeshd(copying...); err != nil {
		s.IsRefusal(err, 1, "not empty") // it had come to its end
	}
	if t.Failed() {
		return
	}

	// 3.
	s.Server, err = s.Serve(s.Ctx, serve...)
	s.OK(err)
	if out := s.Do("status"); !strings.Contains(out, "postgres") {
		t.Errorf("status does not name the store:\n%s", out)
	}
	_, err = s.WaitAgent(s.Ctx, agent, "east", "Online")
	s.OK(err)
	before := s.served(path)
	s.look("one", "two")
	if !slices.ContainsFunc(s.Versions("one"), func(v estate.Version) bool { return v.Serial == before }) {
		t.Errorf("the served serial %s is not known any more", before)
	}
	s.renew("one")
	s.order("three", "east")
	s.look("one", "two", "three")
	if now := s.served(path); now == before {
		t.Error("the renewal is not served")
	}
	s.Audited("store.copied=ok")
}

func TestRestore(t *testing.T) {
	t.Parallel()
	s := start(t)
	east, _ := s.Join(estate.AgentOptions{Name: "east"})
	one, two, zero := s.order("one", "east"), s.order("two", "east"), s.order("zero", "east")
	s.look("one", "two")
	backup := s.Path("backup.db")
	_, err := s.certmeshd("store", "backup", "--to", backup)
	s.OK(err)

	// 1. The time that will be lost.
	s.renew("one")
	s.renew("one")
	three := s.order("three", "east")
	url, lostZero := s.crlURL(zero), s.served(zero)
	s.Do("certs", "revoke", "zero")
	var early *x509.RevocationList
	s.Until("the CRL to list zero", func() error {
		if early = s.crl(url); !lists(early, lostZero) {
			return fmt.Errorf("it does not")
		}
		return nil
	})
	s.Do("certs", "revoke", "two", "--reason", "keyCompromise")
	s.look("one", "two", "three")
	lostOne, lostTwo, lostThree := s.served(one), s.served(two), s.served(three)
	var was *x509.RevocationList
	s.Until("the CRL to list two", func() error {
		if was = s.crl(url); !lists(was, lostTwo) {
			return fmt.Errorf("it does not")
		}
		return nil
	})
	_, err = s.certmeshd("recover", "--after-restore")
	s.IsRefusal(err, 1, "another certmeshd uses the data directory")
	s.Server.Kill()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(s.database() + suffix); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	s.OK(os.Rename(backup, s.database()))

	// 2. One CRL of the lost time is at hand, that of before the last revocation.
	s.OK(os.WriteFile(s.Path("last.crl"), early.Raw, 0o600))
	out, err := s.certmeshd("recover", "--after-restore", "--crl", s.Path("last.crl"))
	s.OK(err)
	if !strings.Contains(out, "leaves raised") || !strings.Contains(out, "revoked again: zero\n") || strings.Contains(out, "again: two") {
		t.Errorf("recover: %s", out)
	}

	// 3.
	s.StartServer()
	_, err = s.WaitAgent(s.Ctx, east, "east", "Online")
	s.OK(err)
	s.Until("the served leaf of one to be a version again", func() error {
		if !slices.ContainsFunc(s.Versions("one"), func(v estate.Version) bool { return v.Serial == lostOne && v.Generation == 3 }) {
			return fmt.Errorf("it is not")
		}
		return nil
	})
	s.Until("the leaf of three to be found", func() error {
		out, err := s.certmeshd("recover", "leaves")
		if err == nil && !strings.Contains(out, lostThree) {
			err = fmt.Errorf("it is not:\n%s", out)
		}
		return err
	})
	s.Current("one")
	if now := s.served(one); now != lostOne {
		t.Errorf("one served %s and serves %s", lostOne, now)
	}
	s.look("one", "two")

	// 4.
	s.renew("one")
	s.look("one", "two")
	newest := s.served(one)
	for _, v := range s.Versions("one") {
		if (v.Serial == newest) != (v.Generation > 1_000_000) {
			t.Errorf("generation %d has serial %s, %s is served", v.Generation, v.Serial, newest)
		}
	}
	now := s.crl(url)
	s.Until("a CRL with a higher number", func() error {
		if now = s.crl(url); now.Number.Cmp(was.Number) <= 0 {
			return fmt.Errorf("%d after %d", now.Number, was.Number)
		}
		return nil
	})

	// 5. What the CRL at hand lists is revoked again. Two was revoked after it: nobody here knows.
	if c := s.Certificate("zero"); c.Status != "Revoked" || !lists(now, lostZero) {
		t.Errorf("zero is %s", c.Status)
	}
	if c := s.Certificate("two"); c.Status != "Active" || lists(now, lostTwo) {
		t.Errorf("two is %s", c.Status)
	}
	_, err = s.certmeshd("recover", "revoke", lostThree)
	s.OK(err)
	s.Do("certs", "revoke", "two", "--reason", "keyCompromise") // which builds the CRL
	s.Until("the CRL to list both", func() error {
		if now = s.crl(url); !lists(now, lostTwo) || !lists(now, lostThree) {
			return fmt.Errorf("it does not")
		}
		return nil
	})
	if now.Number.Cmp(was.Number) <= 0 {
		t.Errorf("CRL number %d after %d", now.Number, was.Number)
	}
	s.Audited("store.recovered=ok", "certificate.adopted=ok", "leaf.found=ok", "leaf.revoked=ok")
}
