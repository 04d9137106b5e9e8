package ca

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// maxNames bounds the SANs of one certificate; every handshake carries them.
	maxNames = 100
	// maxCommonName is ub-common-name of RFC 5280, appendix A.
	maxCommonName = 64
)

// CheckNames brings the names of a certificate into canonical form or says what is wrong with them: DNS names in lower
// case, addresses as netip prints them, doubles dropped, and a common name that is a host's added to the SANs, because
// clients look at nothing else (RFC 9525 section 6.3). At least one SAN is needed. Errors are Invalid and name the field
// below "names".
func CheckNames(n domain.Names) (domain.Names, error) {
	out := domain.Names{CommonName: n.CommonName}
	for _, form := range []struct {
		field string
		in    []string
		out   *[]string
		parse func(string) (string, string)
	}{
		{"names.dns", n.DNS, &out.DNS, dnsName},
		{"names.ip", n.IP, &out.IP, ipAddress},
		{"names.email", n.Email, &out.Email, emailAddress},
		{"names.uri", n.URI, &out.URI, absoluteURI},
	} {
		if len(form.in) > maxNames {
			return domain.Names{}, fault.InvalidField(form.field, "%d names are too many for one certificate; at most %d are allowed", len(form.in), maxNames)
		}
		for i, s := range form.in {
			v, problem := form.parse(s)
			if problem != "" {
				return domain.Names{}, fault.InvalidField(fmt.Sprintf("%s[%d]", form.field, i), "%s %s", quoted(s), problem)
			}
			if !slices.Contains(*form.out, v) {
				*form.out = append(*form.out, v)
			}
		}
	}
	if err := addCommonName(&out); err != nil {
		return domain.Names{}, err
	}
	switch total := len(out.DNS) + len(out.IP) + len(out.Email) + len(out.URI); {
	case total == 0:
		return domain.Names{}, fault.InvalidField("names", "give at least one DNS name, IP address, e-mail address or URI; clients do not look at the common name")
	case total > maxNames:
		return domain.Names{}, fault.InvalidField("names", "%d names are too many for one certificate; at most %d are allowed", total, maxNames)
	}
	return out, nil
}

// addCommonName checks the common name and adds it to the SANs if it names a host. The name of a person, an e-mail
// address or a description stays where it is. A single word counts as a host unless the certificate is for a person.
func addCommonName(n *domain.Names) error {
	cn := n.CommonName
	switch {
	case cn == "":
		return nil
	case !utf8.ValidString(cn), cn != strings.TrimSpace(cn), strings.ContainsFunc(cn, unicode.IsControl):
		return fault.InvalidField("names.common_name", "%s has spaces at its ends or characters that do not print", quoted(cn))
	case utf8.RuneCountInString(cn) > maxCommonName:
		return fault.InvalidField("names.common_name", "is longer than %d characters (RFC 5280, appendix A); leave it empty, the SANs carry the names", maxCommonName)
	}
	if ip, problem := ipAddress(cn); problem == "" {
		n.IP = with(n.IP, ip)
		return nil
	}
	dns, problem := dnsName(cn)
	if problem == "" && (strings.Contains(dns, ".") || len(n.Email) == 0) {
		n.DNS = with(n.DNS, dns)
	}
	return nil
}

func with(all []string, s string) []string {
	if slices.Contains(all, s) {
		return all
	}
	return append(all, s)
}

// quoted prints a hostile name in bounded length.
func quoted(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}

func ascii(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII })
}

// dnsName returns the canonical name, or what is wrong: the preferred name syntax of RFC 1034 section 3.5 (RFC 5280
// section 4.2.1.6); a wildcard is the whole leftmost label (RFC 9525 section 6.3).
func dnsName(s string) (string, string) {
	if !ascii(s) {
		return "", "is not ASCII; write internationalised names in their xn-- form (RFC 5890)"
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return "", "is an IP address; list it under ip"
	}
	if s == "" || len(s) > 253 {
		return "", "is not a DNS name: it has 1 to 253 characters"
	}
	s = strings.ToLower(s)
	rest, wild := strings.CutPrefix(s, "*.")
	switch {
	case strings.Contains(rest, "*"):
		return "", "has a wildcard that is not the whole leftmost label; write *.example.com"
	case wild && rest == "":
		return "", "is a wildcard without a domain; write *.example.com"
	case strings.HasSuffix(rest, "."):
		return "", "ends in a dot, which names in certificates do not; leave it out"
	}
	last := ""
	for label := range strings.SplitSeq(rest, ".") {
		if !isLabel(label) {
			return "", "is not a DNS name: labels are 1 to 63 letters, digits and inner dashes (RFC 1034 section 3.5)"
		}
		last = label
	}
	if strings.Trim(last, "0123456789") == "" {
		return "", "ends in a number, which no DNS name does"
	}
	return s, ""
}

func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-':
		default:
			return false
		}
	}
	return true
}

func ipAddress(s string) (string, string) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return "", "is not an IP address"
	case a.Zone() != "":
		return "", "has a zone, which a certificate cannot carry"
	case a.Unmap().IsUnspecified():
		return "", "is not the address of a host"
	}
	return a.Unmap().String(), ""
}

// emailAddress checks a Mailbox of RFC 5321 section 4.1.2 without quoting and address literals. The local part keeps
// its case: it is the recipient's own.
func emailAddress(s string) (string, string) {
	if !ascii(s) {
		return "", "is an internationalised e-mail address, which rfc822Name cannot carry (RFC 9598); " +
			"use an ASCII local part and write the domain in its xn-- form"
	}
	local, host, ok := strings.Cut(s, "@")
	if !ok || local == "" || len(local) > 64 {
		return "", "is not an e-mail address, e.g. anna@example.com"
	}
	for atom := range strings.SplitSeq(local, ".") {
		if atom == "" || strings.ContainsFunc(atom, func(r rune) bool {
			return !isAtomText(r)
		}) {
			return "", "is not an e-mail address, e.g. anna@example.com"
		}
	}
	domain, problem := dnsName(host)
	if problem != "" || strings.HasPrefix(domain, "*") {
		return "", "is not an e-mail address: what follows @ is not a domain"
	}
	return local + "@" + domain, ""
}

// isAtomText is atext of RFC 5322 section 3.2.3.
func isAtomText(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("!#$%&'*+-/=?^_`{|}~", r)
}

// absoluteURI checks RFC 5280 section 4.2.1.6: an absolute URI, and where it has an authority, one with a host.
func absoluteURI(s string) (string, string) {
	u, err := url.Parse(s)
	switch {
	case !ascii(s):
		return "", "is not ASCII; escape it (RFC 3986 section 2.1)"
	case err != nil || u.Scheme == "":
		return "", "is not an absolute URI, e.g. spiffe://example.com/service"
	case len(s) > 2048:
		return "", "is longer than 2048 characters"
	case u.Opaque == "" && u.Hostname() == "":
		return "", "has no host (RFC 5280 section 4.2.1.6)"
	case u.User != nil:
		return "", "carries user information, which does not belong into a certificate"
	case u.String() != s:
		return "", "is not in canonical form; write " + quoted(u.String())
	}
	return s, ""
}
