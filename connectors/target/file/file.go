// Package file installs certificates as files, in one of three layouts (see target.FileSettings), and runs a command of
// the host's allow-list where something must be told to load them.
package file

import (
	"context"
	"fmt"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Settings of a target of kind "file".
type Settings struct {
	target.FileSettings
	target.VerifySettings

	ReloadCommand   []string `json:"reload_command" doc:"Argument vector that makes the service load the files; it must equal one that the host's agent allows. Empty: the service watches the files itself."`
	ValidateCommand []string `json:"validate_command" doc:"Argument vector that is run before reload_command and must end with status 0; it must equal one that the host's agent allows."`
}

// Kind returns the connector.
func Kind() target.Kind {
	k := target.Define("file", 1, target.Facts{
		// Of dir and pem_path only, so it cannot be said of the kind.
		Atomic:      false,
		Undo:        true,
		NeedsKey:    true,
		Unsupported: []string{"atomic switch with cert_path and key_path", "undo with backup_retention -1"},
	}, check, open)
	k.Paths = target.FilePaths[Settings]
	return k
}

func check(s Settings) []target.Problem {
	ps := append(s.FileSettings.Problems(), s.VerifySettings.Problems()...)
	for _, c := range []struct {
		field  string
		vector []string
	}{{"validate_command", s.ValidateCommand}, {"reload_command", s.ReloadCommand}} {
		if len(c.vector) > 0 {
			ps = append(ps, target.Command(c.vector).Problems(c.field)...)
		}
	}
	if len(s.ValidateCommand) > 0 && len(s.ReloadCommand) == 0 {
		ps = append(ps, target.Problem{Field: "validate_command", Message: "has no effect without reload_command; give that too"})
	}
	return ps
}

func open(_ context.Context, env target.Env, s Settings) (target.Target, error) {
	f, err := target.OpenFiles(env, s.FileSettings, target.FileOptions{})
	if err != nil {
		return nil, err
	}
	if len(s.ReloadCommand) == 0 {
		return s.Probed(env, f), nil
	}
	for _, c := range [][]string{s.ValidateCommand, s.ReloadCommand} {
		if len(c) == 0 {
			continue
		}
		if err := env.Allowed(c); err != nil {
			return nil, err
		}
	}
	return s.Probed(env, &reloaded{f, env, s.ValidateCommand, s.ReloadCommand}), nil
}

// reloaded is a set of files and the commands that make a service load it.
type reloaded struct {
	*target.Files
	env              target.Env
	validate, reload target.Command
}

// Domain is what is run: targets with the same commands are activated together.
func (r *reloaded) Domain() string {
	return fmt.Sprintf("command:%s%s", r.validate, r.reload)
}

// Activate validates, then reloads.
func (r *reloaded) Activate(ctx context.Context) error {
	if len(r.validate) > 0 {
		if err := r.env.Run(ctx, r.validate); err != nil {
			return err
		}
	}
	err := r.env.Run(ctx, r.reload)
	if len(r.validate) > 0 && fault.Is(err, fault.Rejected) {
		// What was validated is not at fault: the service may be down, and no certificate is the culprit.
		return fault.Wrap(fault.Retryable, err, "the configuration is valid, but %s", target.Sentence(err))
	}
	return err
}
