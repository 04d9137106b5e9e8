package mainjob

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

func TestMain(m *testing.M) { estatetest.Main(m) }

// hosts are the agents of TestMainJob.
type hosts struct {
	*estatetest.Lab
	east, west estate.Agent
	issuer     estate.Issuer
	roots      string
}

func (h *hosts) with(t *testing.T) *hosts {
	t.Parallel()
	c := *h
	c.Lab = h.With(t)
	return &c
}

func TestMainJob(t *testing.T) {
	t.Parallel()
	h := &hosts{Lab: estatetest.Start(t, "CERTMESH_SCHEDULER_RENEWAL_CHECK_INTERVAL=2s")}
	_, h.east = h.Join(estate.AgentOptions{Name: "east", Commands: h.NginxCommands("east", "web")})
	_, h.west = h.Join(estate.AgentOptions{Name: "west"})
	h.issuer = h.Issuer("ca")
	h.roots = estate.SelfSigned(h.issuer.ChainPEM)
	if h.roots == "" {
		t.Fatalf("the issuer's chain has no root:\n%s", h.issuer.ChainPEM)
	}
	t.Run("nginx", func(t *testing.T) { h.with(t).nginx() })
	t.Run("files", func(t *testing.T) { h.with(t).files() })
	t.Run("two agents", func(t *testing.T) { h.with(t).twoAgents() })
	t.Run("names", func(t *testing.T) { h.with(t).names() })
	t.Run("smime", func(t *testing.T) { h.with(t).smime() })
	t.Run("CA keys", func(t *testing.T) { h.with(t).caKeys() })
	t.Run("sub-CA", func(t *testing.T) { h.with(t).subCA() })
	t.Run("short-lived", func(t *testing.T) { h.with(t).shortLived() })
	t.Run("keys by profile", func(t *testing.T) { h.with(t).keysByProfile() })
	t.Run("revocation", func(t *testing.T) { h.with(t).revocation() })
	t.Run("lists", func(t *testing.T) { h.with(t).lists() })
}

// order makes a certificate and waits until it is served.
func (h *hosts) order(name string, args ...string) estate.Certificate {
	h.T.Helper()
	h.Do(append([]string{"certs", "create", name, "--wait", "--wait-timeout", estatetest.Long}, args...)...)
	c := h.Certificate(name)
	if c.Status != "Active" || c.PlacementsCurrent != c.PlacementsTotal || c.PlacementsTotal == 0 {
		h.T.Fatalf("--wait came back, but %s is %s with %d of %d placements current", name, c.Status, c.PlacementsCurrent, c.PlacementsTotal)
	}
	return c
}

// renew renews a certificate and waits until it is served.
func (h *hosts) renew(name string) {
	h.T.Helper()
	h.Do("certs", "renew", name, "--wait", "--wait-timeout", estatetest.Long)
}

// fileTarget makes a target of kind file on an agent.
func (h *hosts) fileTarget(name, agent string, settings map[string]string) {
	h.T.Helper()
	b, err := json.Marshal(settings)
	h.OK(err)
	h.Do("targets", "create", name, "--agent", agent, "--kind", "file", "--settings", string(b))
}

// pemTarget makes a target that is one file, and returns its path.
func (h *hosts) pemTarget(name, agent string) string {
	h.T.Helper()
	path := filepath.Join(h.SiteDir(agent), name+".pem")
	h.fileTarget(name, agent, map[string]string{"pem_path": path})
	return path
}

func (h *hosts) nginx() {
	site, err := h.StartNginx(h.Ctx, "east", "web", "web.example.test")
	h.OK(err)
	h.Do(site.TargetArgs("web", "east")...)

	c := h.order("web", "--dns", "web.example.test", "--issuer", "ca", "--target", "web")
	first := h.LastSerial("web", h.east.ID)
	h.Serves(site, first, h.roots)
	h.Keys("east", c.ID, 1)
	if p := c.Placements[0]; p.State != "Served" || p.ServedGeneration != 1 || p.ServedFingerprint == "" {
		h.T.Errorf("the placement does not tell that it is served: %+v", p)
	}
	key := h.KeyFiles("east", c.ID)
	if fi, err := os.Stat(key[0]); err != nil || fi.Mode().Perm() != 0o600 {
		h.T.Errorf("the key's mode is %v, not 0600 (%v)", fi.Mode(), err)
	}

	h.renew("web")
	second := h.LastSerial("web", h.east.ID)
	if second == first {
		h.T.Fatal("renewal did not change the serial")
	}
	h.Serves(site, second, h.roots)
	h.Keys("east", c.ID, 1)
	if after := h.KeyFiles("east", c.ID); after[0] == key[0] {
		h.T.Error("the key that is left is the former one")
	}
	versions := h.Versions("web")
	if len(versions) != 2 || versions[0].Generation == versions[1].Generation {
		h.T.Errorf("there should be generations 1 and 2: %+v", versions)
	}
	why := h.Do("certs", "why", "web")
	if !strings.Contains(why, "not due") {
		h.T.Errorf("why does not say that the certificate is not due:\n%s", why)
	}
	h.Audited("token.created=ok", "agent.enrolled=ok", "issuer.created=ok", "target.created=ok", "certificate.created=ok",
		"certificate.issued=ok", "certificate.deployed=ok", "certificate.renewal_ordered=ok")
}

func (h *hosts) files() {
	root := h.SiteDir("east")
	dir, pair := filepath.Join(root, "versions"), filepath.Join(root, "pair.pem")
	cert, key, chain := filepath.Join(root, "fixed.crt"), filepath.Join(root, "fixed.key"), filepath.Join(root, "fixed.chain")
	h.fileTarget("f-dir", "east", map[string]string{"dir": dir})
	h.fileTarget("f-pair", "east", map[string]string{"pem_path": pair})
	h.fileTarget("f-fixed", "east", map[string]string{"cert_path": cert, "key_path": key, "chain_path": chain})
	c := h.order("files", "--dns", "files.example.test", "--issuer", "ca", "--target", "f-dir", "--target", "f-pair", "--target", "f-fixed")
	if len(c.Leaves) != 1 || len(c.Placements) != 3 {
		h.T.Fatalf("three targets of one agent share one leaf; there are %d leaves and %d placements", len(c.Leaves), len(c.Placements))
	}
	check := func() string {
		h.T.Helper()
		serial := h.LastSerial("files", h.east.ID)
		for _, f := range [][2]string{
			{filepath.Join(dir, "current", "fullchain.pem"), filepath.Join(dir, "current", "key.pem")},
			{filepath.Join(dir, "current", "cert.pem"), filepath.Join(dir, "current", "key.pem")},
			{pair, pair}, {cert, key},
		} {
			p, err := tls.LoadX509KeyPair(f[0], f[1])
			h.OK(err)
			if got := estate.Serial(p.Leaf); got != serial {
				h.T.Errorf("%s holds %s, not %s", f[0], got, serial)
			}
			if fi, err := os.Stat(f[1]); err != nil || fi.Mode().Perm() != 0o600 {
				h.T.Errorf("%s has mode %v, not 0600 (%v)", f[1], fi.Mode(), err)
			}
		}
		return serial
	}
	first := check()
	before, err := os.Readlink(filepath.Join(dir, "current"))
	h.OK(err)
	h.Tool("openssl", "verify", "-CAfile", h.File("files-root.pem", h.roots), "-untrusted", chain, cert)

	h.renew("files")
	if second := check(); second == first {
		h.T.Error("renewal did not change the serial")
	}
	after, err := os.Readlink(filepath.Join(dir, "current"))
	h.OK(err)
	if before == after {
		h.T.Errorf("the link still leads to %s", after)
	}
	for _, p := range h.Certificate("files").Placements {
		if p.State != "Installed" || p.ServedGeneration != 0 || p.InstalledGeneration != 2 {
			h.T.Errorf("a target without a verify address is installed, not served: %+v", p)
		}
	}
	h.Keys("east", c.ID, 1)
}

func (h *hosts) twoAgents() {
	site, err := h.StartBuiltin("west", "pair", "pair.example.test")
	h.OK(err)
	defer site.Stop()
	h.Do(site.TargetArgs("pair-west", "west")...)
	path := h.pemTarget("pair-east", "east")
	c := h.order("pair", "--dns", "pair.example.test", "--issuer", "ca", "--target", "pair-west", "--target", "pair-east")
	if len(c.Leaves) != 2 {
		h.T.Fatalf("two agents hold two leaves, not %d", len(c.Leaves))
	}
	west, err := estate.Trusted(h.Ctx, site.Addr, site.Host, h.roots)
	h.OK(err)
	east, err := tls.LoadX509KeyPair(path, path)
	h.OK(err)
	if west.SerialNumber.Cmp(east.Leaf.SerialNumber) == 0 || slices.Equal(west.RawSubjectPublicKeyInfo, east.Leaf.RawSubjectPublicKeyInfo) {
		h.T.Error("the agents share a leaf or a key")
	}
	for agent, leaf := range map[string]*x509.Certificate{"east": east.Leaf, "west": west} {
		keys := h.KeyFiles(agent, c.ID)
		if len(keys) != 1 {
			h.T.Fatalf("%s keeps %d keys", agent, len(keys))
		}
		pub := h.Tool("openssl", "pkey", "-in", keys[0], "-pubout", "-outform", "DER")
		if pub != string(leaf.RawSubjectPublicKeyInfo) {
			h.T.Errorf("the key at %s is not its leaf's", agent)
		}
	}
	h.renew("pair")
	if n := len(h.Versions("pair")); n != 4 {
		h.T.Errorf("after one renewal at two agents there are %d versions, not 4", n)
	}
}

func (h *hosts) names() {
	path := h.pemTarget("names", "east")
	args := []string{"--cn", "names.example.test", "--dns", "names.example.test", "--dns", "*.names.example.test", "--ip", "192.0.2.7",
		"--ip", "2001:db8::7", "--email", "ops@example.test", "--uri", "spiffe://example.test/names", "--issuer", "ca", "--target", "names",
		"--owner", "platform", "--request-id", "names-1"}
	c := h.order("names", args...)
	p, err := tls.LoadX509KeyPair(path, path)
	h.OK(err)
	l := p.Leaf
	slices.Sort(l.DNSNames) // their order means nothing
	got := fmt.Sprintf("%s %s %s %s %s", l.Subject.CommonName, l.DNSNames, l.IPAddresses, l.EmailAddresses, l.URIs)
	if want := "names.example.test [*.names.example.test names.example.test] [192.0.2.7 2001:db8::7] [ops@example.test] [spiffe://example.test/names]"; got != want {
		h.T.Errorf("the certificate's names are\n%s, not\n%s", got, want)
	}
	var again estate.Certificate
	h.Get(&again, append([]string{"certs", "create", "names"}, args...)...)
	if again.ID != c.ID {
		h.T.Errorf("the order said again with its request id made %s beside %s", again.ID, c.ID)
	}
	h.Refused(1, []string{"names"}, "certs", "create", "names", "--dns", "names.example.test", "--issuer", "ca", "--target", "names")
}

func (h *hosts) smime() {
	path := h.pemTarget("mail", "west")
	h.order("mail", "--email", "anna@example.test", "--issuer", "ca", "--profile", "smime", "--target", "mail")
	p, err := tls.LoadX509KeyPair(path, path)
	h.OK(err)
	if !slices.Equal(p.Leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection}) || p.Leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		h.T.Errorf("key usage %b, extended %v do not fit mail", p.Leaf.KeyUsage, p.Leaf.ExtKeyUsage)
	}
	msg, signed := h.File("mail.txt", "a message\n"), h.Path("mail.signed")
	var chain strings.Builder
	for _, der := range p.Certificate[1:] {
		h.OK(pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	h.Tool("openssl", "cms", "-sign", "-in", msg, "-signer", path, "-inkey", path, "-certfile", h.File("mail-chain.pem", chain.String()), "-md", "sha256", "-out", signed)
	h.Tool("openssl", "cms", "-verify", "-in", signed, "-CAfile", h.File("mail-root.pem", h.roots), "-purpose", "smimesign", "-out", os.DevNull)
}

// caKeys is about CAs' keys: what agents make is the profile's, and the profiles that are seeded say ECDSA P-256.
func (h *hosts) caKeys() {
	// The others are left to the tests of the CA itself: making RSA keys of 4096 bits with the race detector takes long.
	for _, alg := range []string{"ECDSA-P384", "RSA-3072"} {
		name := "ca-" + strings.ToLower(alg)
		issuer := h.Issuer(name, "--key-algorithm", alg, "--cn", "Root of "+alg, "--timeout", estatetest.Long)
		path := h.pemTarget("on-"+name, "west")
		h.order("by-"+name, "--dns", name+".example.test", "--issuer", name, "--target", "on-"+name)
		h.verify(issuer.ChainPEM, path)
	}
	h.Refused(1, []string{"RSA-1024"}, "issuers", "create", "weak", "--key-algorithm", "RSA-1024")
}

// verify has openssl verify the certificate in a PEM file by the issuer's root and what the file brings.
func (h *hosts) verify(chain, path string) {
	h.T.Helper()
	root := h.File("roots/"+filepath.Base(path), estate.SelfSigned(chain))
	h.Tool("openssl", "verify", "-x509_strict", "-CAfile", root, "-untrusted", path, path)
}

func (h *hosts) subCA() {
	conf := h.File("foreign/ca.cnf", `[req]
distinguished_name = dn
prompt = no
[dn]
CN = Foreign Root
[root]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[sub]
basicConstraints = critical,CA:TRUE,pathlen:0
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
`)
	p := func(name string) string { return h.Path("foreign", name) }
	for _, name := range []string{"root.key", "sub.key"} {
		h.Tool("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", p(name))
	}
	h.Tool("openssl", "req", "-x509", "-new", "-key", p("root.key"), "-config", conf, "-extensions", "root", "-days", "3650", "-out", p("root.pem"))
	h.Tool("openssl", "req", "-new", "-key", p("sub.key"), "-config", conf, "-subj", "/CN=Handed Sub CA", "-out", p("sub.csr"))
	h.Tool("openssl", "x509", "-req", "-in", p("sub.csr"), "-CA", p("root.pem"), "-CAkey", p("root.key"), "-set_serial", "0x1234567890abcdef", "-days", "1825",
		"-extfile", conf, "-extensions", "sub", "-out", p("sub.pem"))
	chain := h.File("foreign/chain.pem", h.read(p("sub.pem"))+h.read(p("root.pem")))
	issuer := h.Issuer("sub", "--ca-cert", chain, "--ca-key", p("sub.key"))
	path := h.pemTarget("on-sub", "west")
	h.order("by-sub", "--dns", "sub.example.test", "--issuer", "sub", "--target", "on-sub")
	h.Tool("openssl", "verify", "-x509_strict", "-CAfile", p("root.pem"), "-untrusted", path, path)
	if strings.Contains(issuer.ChainPEM, "PRIVATE KEY") {
		h.T.Error("the issuer shows its key")
	}
	// A key that is not the certificate's is refused.
	h.Refused(1, []string{"key"}, "issuers", "create", "mixed", "--ca-cert", chain, "--ca-key", p("root.key"))
}

func (h *hosts) read(path string) string {
	h.T.Helper()
	b, err := os.ReadFile(path)
	h.OK(err)
	return string(b)
}

// keysByProfile orders a key of every algorithm that a seeded profile has the host make.
func (h *hosts) keysByProfile() {
	for profile, bits := range map[string]string{
		"tls-server-p384": "384 bit", "tls-server-rsa2048": "2048 bit", "tls-server-rsa3072": "3072 bit", "tls-server-ed25519": "ED25519",
	} {
		path := h.pemTarget(profile, "west")
		h.order("key-"+profile, "--dns", profile+".example.test", "--issuer", "ca", "--profile", profile, "--target", profile)
		text := h.Tool("openssl", "x509", "-in", path, "-noout", "-text")
		if !strings.Contains(text, bits) {
			h.T.Errorf("%s: no key of %s in\n%s", profile, bits, text)
		}
		// RFC 8813: keyEncipherment is for RSA alone.
		if rsa := strings.Contains(profile, "rsa"); strings.Contains(text, "Key Encipherment") != rsa {
			h.T.Errorf("%s: Key Encipherment is %v in\n%s", profile, !rsa, text)
		}
	}
}

func (h *hosts) shortLived() {
	path := h.pemTarget("brief", "west")
	// Due after a fifteenth of half an hour, backdated by three minutes at most: long enough for the order to settle and
	// short enough to see.
	c := h.order("brief", "--dns", "brief.example.test", "--issuer", "ca", "--profile", "short-lived", "--renew-fraction", "0.04", "--target", "brief")
	h.Until("the certificate to renew by itself", func() error {
		v, err := h.Estate.Versions(h.Ctx, "brief")
		if err == nil && len(v) < 2 {
			err = fmt.Errorf("there is %d version; why: %s", len(v), h.Do("certs", "why", "brief"))
		}
		return err
	})
	h.Until("the file to hold the newest version", func() error {
		p, err := tls.LoadX509KeyPair(path, path)
		if err != nil {
			return err
		}
		if s := h.LastSerial("brief", h.west.ID); estate.Serial(p.Leaf) != s || s == c.Leaves[0].Serial {
			return fmt.Errorf("it holds %s; the newest is %s", estate.Serial(p.Leaf), s)
		}
		return nil
	})
}

func (h *hosts) revocation() {
	path := h.pemTarget("gone", "west")
	h.order("gone", "--dns", "gone.example.test", "--issuer", "ca", "--target", "gone")
	p, err := tls.LoadX509KeyPair(path, path)
	h.OK(err)
	serial := estate.Serial(p.Leaf)
	if len(p.Leaf.CRLDistributionPoints) != 1 || len(p.Leaf.IssuingCertificateURL) != 1 {
		h.T.Fatalf("the certificate names CRLs %v and CAs %v", p.Leaf.CRLDistributionPoints, p.Leaf.IssuingCertificateURL)
	}
	crlURL, caURL := p.Leaf.CRLDistributionPoints[0], p.Leaf.IssuingCertificateURL[0]
	root := h.File("gone-root.pem", h.roots)
	ca := h.fetch(caURL, "gone-ca.der")
	caPEM := h.Path("gone-ca.pem")
	h.Tool("openssl", "x509", "-inform", "DER", "-in", ca, "-out", caPEM)
	h.Tool("openssl", "verify", "-CAfile", root, caPEM)

	var out struct {
		Certificate estate.Certificate `json:"certificate"`
		Serials     []string           `json:"serials"`
	}
	h.Get(&out, "certs", "revoke", "gone", "--reason", "keyCompromise")
	if out.Certificate.Status != "Revoked" || !slices.Equal(out.Serials, []string{serial}) {
		h.T.Errorf("revocation answered %+v", out)
	}
	var text string
	h.Until("the CRL to list the serial", func() error {
		text = h.Tool("openssl", "crl", "-inform", "DER", "-in", h.fetch(crlURL, "gone.crl"), "-noout", "-text")
		if !strings.Contains(strings.ToLower(text), strings.ToLower("Serial Number: "+padded(serial))) {
			return fmt.Errorf("it lacks %s:\n%s", serial, text)
		}
		return nil
	})
	if !strings.Contains(text, "Key Compromise") {
		h.T.Errorf("the CRL does not give the reason:\n%s", text)
	}
	pemCRL := h.Path("gone.crl.pem")
	h.Tool("openssl", "crl", "-inform", "DER", "-in", h.Path("gone.crl"), "-out", pemCRL)
	h.Tool("openssl", "crl", "-in", pemCRL, "-noout", "-verify", "-CAfile", caPEM)
	refused, err := h.TryTool("openssl", "verify", "-CAfile", root, "-untrusted", caPEM, "-crl_check", "-CRLfile", pemCRL, path)
	if err == nil || !strings.Contains(refused, "certificate revoked") {
		h.T.Errorf("openssl does not refuse the revoked certificate: %v\n%s", err, refused)
	}
	for _, v := range h.Versions("gone") {
		if v.RevokedAt.IsZero() || v.RevocationReason != "keyCompromise" {
			h.T.Errorf("the version does not say that it is revoked: %+v", v)
		}
	}
	h.Refused(1, []string{"revoked"}, "certs", "renew", "gone")
	h.Audited("certificate.revoked=ok")
}

// padded is a serial as openssl prints it: whole bytes.
func padded(serial string) string {
	if len(serial)%2 == 1 {
		return "0" + serial
	}
	return serial
}

// fetch gets a URL of the pki listener into a file.
func (h *hosts) fetch(url, name string) string {
	h.T.Helper()
	status, body, err := h.Estate.Get(h.Ctx, url)
	h.OK(err)
	if status != 200 {
		h.T.Fatalf("GET %s: %d %s", url, status, body)
	}
	return h.File(name, string(body))
}

func (h *hosts) lists() {
	for i := range 5 {
		name := fmt.Sprintf("list-%d", i)
		h.pemTarget(name, "east")
		h.Do("certs", "create", name, "--dns", "list.example.test", "--issuer", "ca", "--target", name, "--owner", "lists")
	}
	for i := range 5 {
		h.Current(fmt.Sprintf("list-%d", i))
	}
	for _, args := range [][]string{{"--owner", "lists"}, {"--name-prefix", "list-"}} {
		found, err := h.Certificates(h.Ctx, args...)
		h.OK(err)
		if len(found) != 5 {
			h.T.Errorf("certs list %v finds %d, not 5", args, len(found))
		}
	}
	seen, cursor := map[string]bool{}, ""
	for range 6 {
		args := []string{"certs", "list", "--name-prefix", "list-", "--page-size", "2"}
		if cursor != "" {
			args = append(args, "--cursor", cursor)
		}
		var page struct {
			Certificates []estate.Certificate `json:"certificates"`
			NextCursor   string               `json:"next_cursor"`
		}
		h.Get(&page, args...)
		if len(page.Certificates) > 2 {
			h.T.Fatalf("a page of 2 has %d", len(page.Certificates))
		}
		for _, c := range page.Certificates {
			if seen[c.Name] {
				h.T.Errorf("%s is on two pages", c.Name)
			}
			seen[c.Name] = true
		}
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if len(seen) != 5 {
		h.T.Errorf("the pages hold %d certificates, not 5", len(seen))
	}
	table := h.Do("certs", "list", "--name-prefix", "list-")
	if n := strings.Count(table, "list-"); n != 5 {
		h.T.Errorf("the table shows %d of 5:\n%s", n, table)
	}
	yaml := h.Do("certs", "get", "list-0", "--format", "yaml")
	if !strings.Contains(yaml, "name: list-0") {
		h.T.Errorf("the YAML has no name:\n%s", yaml)
	}
	h.Refused(2, []string{"1001"}, "certs", "list", "--page-size", "1001")
	h.Refused(1, []string{"no-such"}, "certs", "get", "no-such")
	h.Do("profiles", "list")
	h.Do("issuers", "list")
	h.Do("targets", "list", "--agent", "east")
	h.Do("agents", "list", "--state", "Online")
	h.Do("jobs", "list", "--state", "Completed")
	h.Do("status")
}
