// Package nginx installs certificates for an nginx on the same host, validates its whole configuration once and reloads
// it once for everything that was committed together.
//
// The files are target.FileSettings' layouts. nginx -s reload returns before the workers have changed, so a reload is
// known to be complete when a handshake with verify_address shows the new leaf.
package nginx

import (
	"context"
	"encoding/json"
	"strings"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Settings of a target of kind "nginx".
type Settings struct {
	target.FileSettings
	target.VerifySettings

	NginxPath  string `json:"nginx_path" default:"nginx" doc:"The nginx program: an absolute path, or a name that is looked for in the system's directories."`
	ConfigPath string `json:"config_path" default:"/etc/nginx/nginx.conf" doc:"nginx's main configuration file (-c); targets that share it are validated and reloaded together."`
	Prefix     string `json:"prefix" doc:"nginx's prefix directory (-p); empty: the one it was built with."`
}

// Kind returns the connector.
func Kind() target.Kind {
	k := target.Define("nginx", 1, target.Facts{
		// nginx itself loads files only when it is told, so what it serves is never a mixture. The files of cert_path and
		// key_path are not switched at once for other readers.
		Atomic:      false,
		Undo:        true,
		NeedsKey:    true,
		Unsupported: []string{"atomic switch with cert_path and key_path", "undo with backup_retention -1"},
	}, check, open)
	k.Paths = target.FilePaths[Settings]
	return k
}

// CommandsFor returns the argument vectors that a host must allow for settings: validation, then reload.
func CommandsFor(settings json.RawMessage) ([]target.Command, error) {
	s, ps := target.DecodeSettings[Settings](settings)
	if len(ps) == 0 {
		ps = check(s)
	}
	if len(ps) > 0 {
		return nil, fault.InvalidField(ps[0].Field, "%s", ps[0].Message)
	}
	return []target.Command{s.command("-t"), s.command("-s", "reload")}, nil
}

func (s Settings) command(args ...string) target.Command {
	c := append(target.Command{s.NginxPath}, args...)
	c = append(c, "-c", s.ConfigPath)
	if s.Prefix != "" {
		c = append(c, "-p", s.Prefix)
	}
	return c
}

func check(s Settings) []target.Problem {
	ps := append(s.FileSettings.Problems(), s.VerifySettings.Problems()...)
	ps = append(ps, target.Command{s.NginxPath}.Problems("nginx_path")...)
	for i, p := range []string{s.ConfigPath, s.Prefix} {
		field := []string{"config_path", "prefix"}[i]
		if p == "" && field == "prefix" {
			continue
		}
		if msg := target.PathProblem(p); msg != "" {
			ps = append(ps, target.Problem{Field: field, Message: msg})
		} else {
			ps = append(ps, target.Command{"nginx", p}.Problems(field)...)
		}
	}
	for i := range ps {
		// The path is one element of the vector; its user wrote a setting.
		for _, field := range []string{"nginx_path", "config_path", "prefix"} {
			if strings.HasPrefix(ps[i].Field, field+"[") {
				ps[i].Field = field
			}
		}
	}
	return ps
}

func open(_ context.Context, env target.Env, s Settings) (target.Target, error) {
	f, err := target.OpenFiles(env, s.FileSettings, target.FileOptions{FullChain: true})
	if err != nil {
		return nil, err
	}
	n := &nginx{f, env, s}
	for _, c := range []target.Command{n.validate(), n.reload()} {
		if err := env.Allowed(c); err != nil {
			return nil, err
		}
	}
	return s.Probed(env, n), nil
}

type nginx struct {
	*target.Files
	env      target.Env
	settings Settings
}

func (n *nginx) validate() target.Command { return n.settings.command("-t") }
func (n *nginx) reload() target.Command   { return n.settings.command("-s", "reload") }

// Domain is the configuration file: one nginx, one reload.
func (n *nginx) Domain() string { return "nginx:" + n.settings.ConfigPath }

// Activate runs nginx -t and, if that is content, nginx -s reload. What -t refuses is Rejected, with the end of its
// output; an nginx that cannot be signalled is Retryable, since no certificate is at fault.
func (n *nginx) Activate(ctx context.Context) error {
	if err := n.env.Run(ctx, n.validate()); err != nil {
		if fault.Is(err, fault.Rejected) {
			return fault.Wrap(fault.Rejected, err, "nginx refuses its configuration: %s", target.Sentence(err))
		}
		return err
	}
	err := n.env.Run(ctx, n.reload())
	if fault.Is(err, fault.Rejected) {
		return fault.Wrap(fault.Retryable, err, "nginx accepts the configuration but cannot be told to load it; check that it runs with %s", n.settings.ConfigPath)
	}
	return err
}
