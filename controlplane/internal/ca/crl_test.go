package ca

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

func TestCRLsVerify(t *testing.T) {
	t.Parallel()
	for _, alg := range []domain.KeyAlgorithm{domain.ECDSAP256, domain.RSA2048, domain.Ed25519} {
		a, m := newTestCA(t, alg)
		good, bad := issue(t, a, ask(t)), issue(t, a, ask(t))
		later := epoch.Add(time.Hour)
		entries := []domain.RevokedEntry{
			{Serial: SerialText(bad.SerialNumber), RevokedAt: epoch.Add(time.Minute), Reason: 1},
			{Serial: "1f", RevokedAt: later.Add(time.Hour), Reason: 0}, // a node's clock is ahead
		}
		der, err := a.CRL(41, 0, entries, later, later.Add(24*time.Hour))
		if err != nil {
			t.Fatalf("%s: %v", alg, err)
		}
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := list.CheckSignatureFrom(a.Certificate()); err != nil {
			t.Fatalf("%s: %v", alg, err)
		}
		if list.Number.Int64() != 41 || len(list.RevokedCertificateEntries) != 2 || list.RevokedCertificateEntries[0].ReasonCode != 1 ||
			list.RevokedCertificateEntries[1].RevocationTime.After(later) || len(list.RevokedCertificateEntries[1].Extensions) != 0 {
			t.Errorf("%s: %+v", alg, list.RevokedCertificateEntries)
		}

		dir := t.TempDir()
		roots, above := pemFile(t, dir, "root", "CERTIFICATE", m.Roots()...), pemFile(t, dir, "above", "CERTIFICATE", a.Chain()...)
		crl := pemFile(t, dir, "crl", "X509 CRL", der)
		check := func(c *x509.Certificate) (string, error) {
			// The CRL is the intermediate's: it covers leaves alone.
			return openssl(t, "verify", "-crl_check", "-extended_crl", "-attime", strconv.FormatInt(later.Add(time.Minute).Unix(), 10), "-CAfile", roots, "-untrusted", above,
				"-CRLfile", crl, pemFile(t, dir, "leaf", "CERTIFICATE", c.Raw))
		}
		if out, err := check(good); err != nil {
			t.Errorf("%s: openssl refuses the good one: %s", alg, out)
		}
		if out, err := check(bad); err == nil || !strings.Contains(out, "revoked") {
			t.Errorf("%s: openssl accepts the revoked one: %s", alg, out)
		}
		derFile := filepath.Join(dir, "crl.der")
		if err := os.WriteFile(derFile, der, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := openssl(t, "crl", "-inform", "DER", "-in", derFile, "-noout", "-verify", "-CAfile", above)
		if err != nil || !strings.Contains(out, "verify OK") {
			t.Errorf("%s: openssl crl: %v %s", alg, err, out)
		}
	}
}

func TestBadCRLsAreNotSigned(t *testing.T) {
	t.Parallel()
	a, _ := newTestCA(t, domain.ECDSAP256)
	key := counting(a)
	end := epoch.Add(time.Hour)
	entry := func(serial string, reason domain.RevocationReason) []domain.RevokedEntry {
		return []domain.RevokedEntry{{Serial: serial, RevokedAt: epoch, Reason: reason}}
	}
	for name, try := range map[string]func() ([]byte, error){
		"number 0":      func() ([]byte, error) { return a.CRL(0, 0, nil, epoch, end) },
		"shard -1":      func() ([]byte, error) { return a.CRL(1, -1, nil, epoch, end) },
		"no time":       func() ([]byte, error) { return a.CRL(1, 0, nil, epoch, epoch) },
		"serial":        func() ([]byte, error) { return a.CRL(1, 0, entry("xyz", 0), epoch, end) },
		"removeFromCRL": func() ([]byte, error) { return a.CRL(1, 0, entry("1f", 8), epoch, end) },
		"reason 7":      func() ([]byte, error) { return a.CRL(1, 0, entry("1f", 7), epoch, end) },
		"expired CA": func() ([]byte, error) {
			return a.CRL(1, 0, nil, a.Certificate().NotAfter.Add(time.Second), a.Certificate().NotAfter.Add(time.Hour))
		},
	} {
		if der, err := try(); err == nil || der != nil {
			t.Errorf("%s: signed", name)
		}
	}
	if key.used.Load() != 0 {
		t.Error("the CA's key was used")
	}
}
