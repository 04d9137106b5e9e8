package mainjob

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

// foreign is a certificate that certmesh has nothing to do with.
type foreign struct {
	serial    string
	cert, key []byte // PEM
}

func (h *hosts) foreign(host string) foreign {
	h.T.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.OK(err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(0xbad), Subject: pkix.Name{CommonName: "by hand"}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	h.OK(err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	h.OK(err)
	return foreign{estate.Serial(tmpl), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})}
}

// overwrite puts f into a site's files, as somebody would by hand.
func (h *hosts) overwrite(site *estate.Site, f foreign) {
	h.T.Helper()
	h.OK(os.WriteFile(site.CertPath, f.cert, 0o600))
	h.OK(os.WriteFile(site.KeyPath, f.key, 0o600))
}

// shows waits until a site serves serial.
func (h *hosts) shows(site *estate.Site, serial string) {
	h.T.Helper()
	h.Until(site.Host+" to serve "+serial, func() error {
		c, err := estate.Served(h.Ctx, site.Addr, site.Host)
		if err != nil {
			return err
		}
		if got := estate.Serial(c); got != serial {
			return fmt.Errorf("it serves %s", got)
		}
		return nil
	})
}

// TestVerifyOnDemand: somebody replaces the certificate of a real nginx. certs verify says so, and certmesh puts the right
// one back. Agents do not look by themselves here.
func TestVerifyOnDemand(t *testing.T) {
	t.Parallel()
	h := &hosts{Lab: estatetest.Start(t, "CERTMESH_VERIFY_INTERVAL=0s")}
	commands := h.NginxCommands("east", "web")
	_, h.east = h.Join(estate.AgentOptions{Name: "east", Commands: commands})
	h.issuer = h.Issuer("ca")
	h.roots = estate.SelfSigned(h.issuer.ChainPEM)
	site, err := h.StartNginx(h.Ctx, "east", "web", "web.example.test")
	h.OK(err)
	defer site.Stop()
	h.Do(site.TargetArgs("web", "east")...)
	h.order("web", "--dns", "web.example.test", "--issuer", "ca", "--target", "web")
	serial := h.LastSerial("web", h.east.ID)
	before := h.Certificate("web").Placements[0]

	// All is well, and known anew.
	h.Do("certs", "verify", "web", "--wait", "--wait-timeout", estatetest.Long)
	if p := h.Certificate("web").Placements[0]; p.State != "Served" || p.ServedFingerprint != before.ServedFingerprint {
		h.T.Errorf("%+v", p)
	}

	bad := h.foreign(site.Host)
	h.overwrite(site, bad)
	h.Tool(commands[1][0], commands[1][1:]...)
	h.shows(site, bad.serial)
	_, err = h.CLI(h.Ctx, "certs", "verify", "web", "--wait", "--wait-timeout", estatetest.Long)
	var ce *estate.CLIError
	if !errors.As(err, &ce) || ce.Code != 3 {
		h.T.Fatalf("a certificate that somebody replaced should be found by status 3: %v", err)
	}
	if !strings.Contains(err.Error(), "not the one that was deployed there") {
		h.T.Errorf("it is not said what was found: %v", err)
	}
	h.shows(site, serial)
	h.Current("web")
	h.Serves(site, serial, h.roots)
	h.Audited("certificate.verified=ok", "placement.drifted=ok", "placement.restored=ok")
}

// TestDriftFoundByItself: nobody asks, and what somebody changed by hand is found and put right. When that happens again it is
// shown, and put right when an operator asks. A second target that names the same files is refused.
func TestDriftFoundByItself(t *testing.T) {
	t.Parallel()
	h := &hosts{Lab: estatetest.Start(t, "CERTMESH_VERIFY_INTERVAL=1s")}
	_, h.east = h.Join(estate.AgentOptions{Name: "east"})
	h.issuer = h.Issuer("ca")
	h.roots = estate.SelfSigned(h.issuer.ChainPEM)
	site, err := h.StartBuiltin("east", "shop", "shop.example.test")
	h.OK(err)
	defer site.Stop()
	h.Do(site.TargetArgs("shop", "east")...)
	h.order("shop", "--dns", "shop.example.test", "--issuer", "ca", "--target", "shop")
	serial := h.LastSerial("shop", h.east.ID)

	bad := h.foreign(site.Host)
	h.overwrite(site, bad)
	h.Audited("placement.drifted=ok", "placement.restored=ok")
	h.shows(site, serial)
	c := h.Current("shop")
	h.Serves(site, serial, h.roots)
	if p := c.Placements[0]; p.State != "Served" || p.LastError != "" {
		h.T.Errorf("%+v", p)
	}

	// The same again, as configuration management would do it: found again, put right at once only if somebody asks.
	h.overwrite(site, bad)
	h.Until("the second drift to be shown", func() error {
		if p := h.Certificate("shop").Placements[0]; p.State != "Pending" || !strings.Contains(p.LastError, "not the one that was deployed there") {
			return fmt.Errorf("it is %+v", p)
		}
		return nil
	})
	h.shows(site, bad.serial)
	h.Do("certs", "deploy", "shop", "--wait", "--wait-timeout", estatetest.Long)
	h.shows(site, serial)
	h.Current("shop")

	h.Do(site.TargetArgs("shop-too", "east")...)
	h.Until("the second target to be refused", func() error {
		a, err := h.WaitAgent(h.Ctx, nil, "east", "Online")
		if err != nil {
			return err
		}
		if text := strings.Join(a.RejectedStates, "; "); !strings.Contains(text, `is written by target "shop" already`) {
			return fmt.Errorf("refused are: %s", text)
		}
		return nil
	})
}
