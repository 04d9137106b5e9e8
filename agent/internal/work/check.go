package work

import (
	"crypto/sha256"
	"net"
	"net/url"
	"slices"

	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// maxIDLength keeps a Hello that lists MaxOpen assignments below 64 KiB.
	maxIDLength = 64
	// maxNames bounds the names of one request; the size of a message bounds them too.
	maxNames = 1000
	maxChain = 16
)

// check says whether an assignment can be done here at all; what it refuses is never accepted. It touches no disk.
func check(a *agentpb.Assignment, kinds []target.Kind) error {
	if id := a.GetId(); id == "" || len(id) > maxIDLength {
		return fault.InvalidField("id", "has %d bytes; 1 to %d are expected", len(id), maxIDLength)
	}
	if a.GetAttempt() < 1 {
		return fault.InvalidField("attempt", "%d is not an attempt; they count from 1", a.GetAttempt())
	}
	switch w := a.GetWork().(type) {
	case *agentpb.Assignment_Key:
		if a.GetClass() != agentpb.WorkClass_WORK_CLASS_KEY {
			return fault.New(fault.Unsupported, "the assignment's class does not fit its work")
		}
		return checkKey(w.Key)
	case *agentpb.Assignment_Deploy:
		if a.GetClass() != agentpb.WorkClass_WORK_CLASS_DEPLOY {
			return fault.New(fault.Unsupported, "the assignment's class does not fit its work")
		}
		return checkDeploy(w.Deploy, kinds)
	case *agentpb.Assignment_Verify:
		if a.GetClass() != agentpb.WorkClass_WORK_CLASS_VERIFY {
			return fault.New(fault.Unsupported, "the assignment's class does not fit its work")
		}
		return checkVerify(w.Verify, kinds)
	default:
		return fault.New(fault.Unsupported, "this agent does not know that kind of work; a newer version may")
	}
}

func checkKey(k *agentpb.KeyWork) error {
	if err := keystore.CheckName(k.GetCertificateId(), k.GetGeneration()); err != nil {
		return err
	}
	if !slices.Contains(keystore.Algorithms(), k.GetKeyAlgorithm()) {
		return fault.New(fault.Unsupported, "this agent cannot make a key of algorithm %q; it knows %v", clean(k.GetKeyAlgorithm(), 64, false), keystore.Algorithms())
	}
	if n := len(k.GetDnsNames()) + len(k.GetIpAddresses()) + len(k.GetEmailAddresses()) + len(k.GetUris()); n > maxNames {
		return fault.InvalidField("names", "%d names are too many; at most %d fit into one request", n, maxNames)
	}
	for _, s := range k.GetIpAddresses() {
		if net.ParseIP(s) == nil {
			return fault.InvalidField("ip_addresses", "%q is not an IP address", clean(s, 64, false))
		}
	}
	for _, s := range k.GetUris() {
		if u, err := url.Parse(s); err != nil || u.Scheme == "" {
			return fault.InvalidField("uris", "%q is not an absolute URI", clean(s, 200, false))
		}
	}
	return nil
}

func checkDeploy(d *agentpb.DeployWork, kinds []target.Kind) error {
	if err := keystore.CheckName(d.GetCertificateId(), d.GetGeneration()); err != nil {
		return err
	}
	if n := len(d.GetChain()); n == 0 || n > maxChain {
		return fault.InvalidField("chain", "holds %d certificates; 1 to %d are expected", n, maxChain)
	}
	if id := d.GetTarget().GetId(); id == "" || len(id) > maxIDLength {
		return fault.InvalidField("target.id", "has %d bytes; 1 to %d are expected", len(id), maxIDLength)
	}
	_, err := kindOf(d.GetTarget(), kinds)
	return err
}

func checkVerify(v *agentpb.VerifyWork, kinds []target.Kind) error {
	if err := keystore.CheckName(v.GetCertificateId(), v.GetGeneration()); err != nil {
		return err
	}
	if n := len(v.GetFingerprint()); n != sha256.Size {
		return fault.InvalidField("fingerprint", "has %d bytes; a SHA-256 has %d", n, sha256.Size)
	}
	if id := v.GetTarget().GetId(); id == "" || len(id) > maxIDLength {
		return fault.InvalidField("target.id", "has %d bytes; 1 to %d are expected", len(id), maxIDLength)
	}
	_, err := kindOf(v.GetTarget(), kinds)
	return err
}

// kindOf finds the connector of a target and checks its settings.
func kindOf(spec *agentpb.TargetSpec, kinds []target.Kind) (target.Kind, error) {
	i := slices.IndexFunc(kinds, func(k target.Kind) bool { return k.Name == spec.GetKind() })
	if i < 0 {
		return target.Kind{}, fault.New(fault.Unsupported, "this agent has no connector for targets of kind %q", clean(spec.GetKind(), 64, false))
	}
	if ps := kinds[i].Check(spec.GetSettings()); len(ps) > 0 {
		e := fault.InvalidField("settings."+ps[0].Field, "%s", ps[0].Message)
		for _, p := range ps[1:] {
			e.Message += "; settings." + p.Field + ": " + p.Message
		}
		return target.Kind{}, e
	}
	return kinds[i], nil
}
