package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxCSR bounds a request; one with an RSA-4096 key and a hundred long names has about 10 KiB.
const maxCSR = 16 << 10

// CSR is what was taken from a request that passed every check.
type CSR struct {
	PublicKey crypto.PublicKey
	// SPKI is the SHA-256 of the SubjectPublicKeyInfo in lower-case hex.
	SPKI         string
	KeyAlgorithm domain.KeyAlgorithm
}

// CheckCSR checks a PKCS#10 request (RFC 2986) in DER against what was ordered: its form and signature, that its key is
// strong and allowed by the profile, that it asks for exactly the names of the order and for nothing the profile does
// not give. Invalid: the request is malformed or names other things; Rejected: the key is not accepted.
func CheckCSR(csrDER []byte, want domain.Names, profile domain.Profile) (*CSR, error) {
	r, csr, err := checkRequest(csrDER, func(k domain.KeyAlgorithm) error { return allowed(k, profile) })
	if err != nil {
		return nil, err
	}
	if err := checkExtensions(r.Extensions, profile.EKUs); err != nil {
		return nil, err
	}
	if err := checkNames(r, want); err != nil {
		return nil, err
	}
	return csr, nil
}

// CheckIdentityCSR checks a request for an identity of the mesh. Only its key counts, which is ECDSA P-256: names and
// extensions that it asks for are ignored, because who somebody is comes from the token or certificate it showed.
func CheckIdentityCSR(csrDER []byte) (*CSR, error) {
	_, csr, err := checkRequest(csrDER, identityKey)
	return csr, err
}

// requestSignatures are what requests may be signed with.
var requestSignatures = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519,
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
}

// checkRequest does what needs no order, the cheap checks first: hostile keys must not cost a verification.
func checkRequest(der []byte, keyAllowed func(domain.KeyAlgorithm) error) (*x509.CertificateRequest, *CSR, error) {
	if len(der) == 0 || len(der) > maxCSR {
		return nil, nil, fault.InvalidField("csr", "has %d bytes; a request has 1 to %d, in DER", len(der), maxCSR)
	}
	if bytes.HasPrefix(der, []byte("-----BEGIN")) {
		return nil, nil, fault.InvalidField("csr", "is PEM; send DER")
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		e := fault.InvalidField("csr", "is not a PKCS#10 request with a key we know (RFC 2986): make it anew with one of %s", listed(domain.KeyAlgorithms))
		e.Err = err
		return nil, nil, e
	}
	pub, err := inspectKey(r.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	if err := keyAllowed(pub.kind.algorithm); err != nil {
		return nil, nil, err
	}
	if !bytes.Equal(pub.spki, r.RawSubjectPublicKeyInfo) {
		return nil, nil, fault.InvalidField("csr", "encodes its public key in an unusual way; make it with another tool")
	}
	if !slices.Contains(requestSignatures, r.SignatureAlgorithm) {
		return nil, nil, fault.InvalidField("csr", "is signed with %s, which is not accepted; use SHA-256 or better", r.SignatureAlgorithm)
	}
	if err := r.CheckSignature(); err != nil {
		e := fault.InvalidField("csr", "its signature does not verify: whoever made it does not hold the key, or it was changed since")
		e.Err = err
		return nil, nil, e
	}
	return r, &CSR{PublicKey: pub.key, SPKI: domain.HashHex(pub.spki), KeyAlgorithm: pub.kind.algorithm}, nil
}

// checkExtensions refuses what a request may not ask for. What the profile decides anyway is tolerated; extensions that
// are unknown are ignored unless the request insists on them.
func checkExtensions(all []pkix.Extension, ekus []domain.EKU) error {
	var known []asn1.ObjectIdentifier
	for _, e := range all {
		if slices.ContainsFunc(known, e.Id.Equal) {
			return fault.InvalidField("csr", "asks for extension %s twice", e.Id)
		}
		known = append(known, e.Id)
		var err error
		switch {
		case e.Id.Equal(oidSubjectAltName):
			err = checkNameForms(e.Value)
		case e.Id.Equal(oidBasicConstraints):
			err = checkNoCA(e.Value)
		case e.Id.Equal(oidKeyUsage):
			err = checkKeyUsage(e.Value)
		case e.Id.Equal(oidExtKeyUsage):
			err = checkEKUs(e.Value, ekus)
		case e.Id.Equal(oidSubjectKeyID):
		case e.Critical:
			err = fault.InvalidField("csr", "asks for the critical extension %s, which is not supported; leave it out", e.Id)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkNameForms refuses SAN forms that crypto/x509 passes over: they would be extra names that nobody compares.
func checkNameForms(value []byte) error {
	input := cryptobyte.String(value)
	var names cryptobyte.String
	if !input.ReadASN1(&names, cbasn1.SEQUENCE) || !input.Empty() {
		return fault.InvalidField("csr", "its subject alternative names do not parse")
	}
	forms := map[cbasn1.Tag]string{0: "otherName", 3: "x400Address", 4: "directoryName", 5: "ediPartyName", 8: "registeredID"}
	for !names.Empty() {
		var one cryptobyte.String
		var tag cbasn1.Tag
		if !names.ReadAnyASN1(&one, &tag) {
			return fault.InvalidField("csr", "its subject alternative names do not parse")
		}
		if form, extra := forms[tag&0x1f]; extra {
			return fault.InvalidField("csr", "asks for a name of the form %s, which was not ordered; DNS, IP, e-mail and URI are supported", form)
		}
	}
	return nil
}

func checkNoCA(value []byte) error {
	var c struct {
		IsCA    bool `asn1:"optional"`
		PathLen int  `asn1:"optional,default:-1"`
	}
	if rest, err := asn1.Unmarshal(value, &c); err != nil || len(rest) > 0 {
		return fault.InvalidField("csr", "its basic constraints do not parse")
	}
	if c.IsCA {
		return fault.InvalidField("csr", "asks for a CA certificate, which profiles do not give")
	}
	return nil
}

func checkKeyUsage(value []byte) error {
	var bits asn1.BitString
	if rest, err := asn1.Unmarshal(value, &bits); err != nil || len(rest) > 0 {
		return fault.InvalidField("csr", "its key usage does not parse")
	}
	const certSign, crlSign = 5, 6 // RFC 5280 section 4.2.1.3
	if bits.At(certSign) == 1 || bits.At(crlSign) == 1 {
		return fault.InvalidField("csr", "asks for the right to sign certificates or CRLs, which profiles do not give")
	}
	return nil
}

// ekuOIDs are the names of RFC 5280 section 4.2.1.12.
var ekuOIDs = map[string]domain.EKU{
	"1.3.6.1.5.5.7.3.1": domain.EKUServerAuth, "1.3.6.1.5.5.7.3.2": domain.EKUClientAuth, "1.3.6.1.5.5.7.3.3": domain.EKUCodeSigning,
	"1.3.6.1.5.5.7.3.4": domain.EKUEmailProtection, "1.3.6.1.5.5.7.3.8": domain.EKUTimeStamping,
}

func checkEKUs(value []byte, ekus []domain.EKU) error {
	var oids []asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(value, &oids); err != nil || len(rest) > 0 {
		return fault.InvalidField("csr", "its extended key usage does not parse")
	}
	for _, o := range oids {
		if e, ok := ekuOIDs[o.String()]; !ok || !slices.Contains(ekus, e) {
			name := o.String()
			if ok {
				name = string(e)
			}
			return fault.InvalidField("csr", "asks for the extended key usage %s; the profile gives %s", name, listed(ekus))
		}
	}
	return nil
}

var oidCommonName = asn1.ObjectIdentifier{2, 5, 4, 3}

// checkNames compares the names of r with those of the order, form by form. A common name may be left out.
func checkNames(r *x509.CertificateRequest, want domain.Names) error {
	want, err := CheckNames(want)
	if err != nil {
		return err
	}
	got := domain.Names{DNS: r.DNSNames, Email: r.EmailAddresses}
	for _, ip := range r.IPAddresses {
		got.IP = append(got.IP, ip.String())
	}
	for _, u := range r.URIs {
		got.URI = append(got.URI, u.String())
	}
	for _, a := range r.Subject.Names {
		cn, ok := a.Value.(string)
		switch {
		case !a.Type.Equal(oidCommonName):
			return fault.InvalidField("csr", "its subject carries the attribute %s, which was not ordered; give a common name or nothing", a.Type)
		case got.CommonName != "" || !ok || cn == "":
			return fault.InvalidField("csr", "its subject carries an empty common name or more than one")
		}
		got.CommonName = cn
	}
	got, err = CheckNames(got)
	if err != nil {
		return fault.New(fault.Invalid, "the request carries a name that cannot be issued: %w", err)
	}
	if got.CommonName != "" && !strings.EqualFold(got.CommonName, want.CommonName) &&
		(want.CommonName != "" || !isSAN(got.CommonName, want)) {
		return fault.InvalidField("csr", "its common name is %s; ordered was %s", quoted(got.CommonName), quoted(want.CommonName))
	}
	var extra, missing []string
	for _, f := range []struct {
		form      string
		got, want []string
	}{{"DNS", got.DNS, want.DNS}, {"IP", got.IP, want.IP}, {"e-mail", got.Email, want.Email}, {"URI", got.URI, want.URI}} {
		extra = append(extra, without(f.form, f.got, f.want)...)
		missing = append(missing, without(f.form, f.want, f.got)...)
	}
	if len(extra)+len(missing) == 0 {
		return nil
	}
	var said []string
	if len(extra) > 0 {
		said = append(said, "it also asks for "+some(extra))
	}
	if len(missing) > 0 {
		said = append(said, "it lacks "+some(missing))
	}
	return fault.InvalidField("csr", "its names are not the ones ordered: %s", strings.Join(said, "; "))
}

func isSAN(cn string, n domain.Names) bool {
	return slices.Contains(n.DNS, strings.ToLower(cn)) || slices.Contains(n.IP, cn) || slices.Contains(n.Email, cn)
}

// without lists what of a is not in b, with its form.
func without(form string, a, b []string) []string {
	var out []string
	for _, s := range a {
		if !slices.Contains(b, s) {
			out = append(out, form+" "+quoted(s))
		}
	}
	return out
}

// some keeps a sentence readable when a request carries a hundred wrong names.
func some(s []string) string {
	const most = 5
	if len(s) > most {
		return strings.Join(s[:most], ", ") + " and more"
	}
	return strings.Join(s, ", ")
}
