package node

import (
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

const day = 24 * time.Hour

// seedProfiles are there from the first start. Their ids are fixed, so that several nodes starting at once seed the
// same rows. 47 days is what public certificates come to in 2029: an estate that lives with it today is ready.
func seedProfiles(now time.Time) []domain.Profile {
	all := domain.KeyAlgorithms
	profile := func(n byte, name string, ttl, maxTTL time.Duration, ekus ...domain.EKU) domain.Profile {
		return domain.Profile{ID: "prof_0000000000000000000000000000000" + string(n), Name: name,
			KeyAlgorithm: domain.ECDSAP256, Allowed: all, EKUs: ekus, TTL: ttl, MaxTTL: maxTTL, CreatedAt: domain.Micro(now)}
	}
	// For servers whose clients cannot do with P-256.
	server := func(n byte, name string, key domain.KeyAlgorithm) domain.Profile {
		p := profile(n, name, 47*day, 398*day, domain.EKUServerAuth)
		p.KeyAlgorithm, p.Allowed = key, []domain.KeyAlgorithm{key}
		return p
	}
	return []domain.Profile{
		profile('1', "tls-server", 47*day, 398*day, domain.EKUServerAuth),
		profile('2', "tls-client", 47*day, 398*day, domain.EKUClientAuth),
		profile('3', "tls-peer", 47*day, 398*day, domain.EKUServerAuth, domain.EKUClientAuth),
		profile('4', "smime", 365*day, 825*day, domain.EKUEmailProtection),
		profile('5', "short-lived", 30*time.Minute, 59*time.Minute, domain.EKUServerAuth, domain.EKUClientAuth),
		server('6', "tls-server-p384", domain.ECDSAP384),
		server('7', "tls-server-rsa2048", domain.RSA2048),
		server('8', "tls-server-rsa3072", domain.RSA3072),
		server('9', "tls-server-rsa4096", domain.RSA4096),
		server('a', "tls-server-ed25519", domain.Ed25519),
	}
}
