package ca

import (
	"slices"
	"strings"

	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3/lint"
	_ "github.com/zmap/zlint/v3/lints/rfc" // registers the lints of RFCs, the only ones that bind a private CA

	"github.com/certmesh/certmesh/protocol/fault"
)

// lintSources are the documents that bind every CA. The CA/Browser Forum's and the root programmes' rules are for
// publicly trusted ones: they forbid internal names and demand policies, logs and validity that a private CA has no
// business with.
var lintSources = lint.SourceList{lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC8813}

// excusedLints are lints of these sources that a private CA may fail, each with its reason.
var excusedLints = map[string]string{}

// linter runs zlint's lints. Building one filters the registry, which is slow; linting is not. It is safe for
// concurrent use.
type linter struct {
	certificate []*lint.CertificateLint
	crl         []*lint.RevocationListLint
	config      lint.Configuration
}

func newLinter() (*linter, error) {
	excused := make([]string, 0, len(excusedLints))
	for name := range excusedLints {
		excused = append(excused, name)
	}
	r, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lintSources, ExcludeNames: excused})
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "select the lints")
	}
	return &linter{certificate: r.CertificateLints().Lints(), crl: r.RevocationListLints().Lints(), config: r.GetConfiguration()}, nil
}

// checkCertificate returns a Rejected error that names every lint that der fails. selfSigned says that der will be signed
// by its own key: the parser finds that out by verifying the signature, and der carries a placeholder.
func (l *linter) checkCertificate(der []byte, selfSigned bool) error {
	c, err := zx509.ParseCertificate(der)
	if err != nil {
		return fault.Wrap(fault.Rejected, err, "the certificate does not parse and was not signed")
	}
	c.SelfSigned = c.SelfSigned || selfSigned
	var failed []string
	for _, rule := range l.certificate {
		failed = note(failed, rule.Name, rule.Execute(c, l.config))
	}
	return rejected("certificate", failed)
}

// checkCRL is checkCertificate for a CRL.
func (l *linter) checkCRL(der []byte) error {
	c, err := zx509.ParseRevocationList(der)
	if err != nil {
		return fault.Wrap(fault.Rejected, err, "the CRL does not parse and was not signed")
	}
	var failed []string
	for _, rule := range l.crl {
		failed = note(failed, rule.Name, rule.Execute(c, l.config))
	}
	return rejected("CRL", failed)
}

func note(failed []string, name string, r *lint.LintResult) []string {
	if r.Status != lint.Error && r.Status != lint.Fatal {
		return failed
	}
	if r.Details != "" {
		name += " (" + r.Details + ")"
	}
	return append(failed, name)
}

func rejected(what string, failed []string) error {
	if len(failed) == 0 {
		return nil
	}
	slices.Sort(failed)
	return fault.New(fault.Rejected, "the %s breaks a standard and was not signed: %s", what, strings.Join(failed, "; "))
}
