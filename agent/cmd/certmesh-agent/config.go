package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/agent/agentd"
	"github.com/certmesh/certmesh/protocol/fault"
)

const environment = `Settings come from flags, then from the environment:

  CERTMESH_SERVER_URL        mesh addresses of the control plane, host:port[,host:port…] (localhost:8444)
  CERTMESH_JOIN_TOKEN        join token, needed once; or CERTMESH_JOIN_TOKEN_FILE, a file that holds it
  CERTMESH_DATA_DIR          identity, journal and states (/var/lib/certmesh-agent)
  CERTMESH_KEY_DIR           private keys of certificates (keys in the data directory)
  CERTMESH_AGENT_NAME        name that operators see, given at enrolment (the host's name)
  CERTMESH_LABELS            k=v[,k=v…]
  CERTMESH_TARGET_ROOTS      absolute directories that targets may write below, separated by colon or comma (none)
  CERTMESH_ALLOW_COMMANDS    commands that targets may have run, as JSON: [["systemctl","reload","nginx"]] (none)
  CERTMESH_BACKUP_RETENTION  former versions kept per target (3; -1 keeps none)
  CERTMESH_LOG_LEVEL         debug, info, warn or error (info)
  CERTMESH_LOG_FORMAT        json or text (json)`

// flags hold what the command line says.
type flags struct {
	server, token, tokenFile, data, keys, name, level, format string
	labels, roots, commands                                   []string
	retention                                                 int
}

func (f *flags) addPlaces(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.data, "data-dir", "/var/lib/certmesh-agent", "identity, journal and states")
	fs.StringVar(&f.keys, "key-dir", "", "private keys of certificates (keys in the data directory)")
}

func (f *flags) add(cmd *cobra.Command) {
	f.addPlaces(cmd)
	fs := cmd.Flags()
	fs.StringVar(&f.server, "server-url", "localhost:8444", "mesh addresses of the control plane, host:port[,host:port…]")
	fs.StringVar(&f.tokenFile, "join-token-file", "", "file that holds the join token")
	fs.StringVar(&f.token, "join-token", "", "the join token itself; others on this host can read a command line, so prefer the file or CERTMESH_JOIN_TOKEN")
	fs.StringVar(&f.name, "name", "", "name that operators see (the host's name)")
	fs.StringArrayVar(&f.labels, "label", nil, "label as k=v; may be given again")
	fs.StringArrayVar(&f.roots, "target-root", nil, "absolute directory that targets may write below; may be given again")
	fs.StringArrayVar(&f.commands, "allow-command", nil, `command that targets may have run, as JSON: ["systemctl","reload","nginx"]; may be given again`)
	fs.IntVar(&f.retention, "backup-retention", 3, "former versions kept per target; -1 keeps none")
	fs.StringVar(&f.level, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&f.format, "log-format", "json", "json or text")
}

// env returns the variable unless the flag was given; an empty variable counts as absent.
func (c *command) env(cmd *cobra.Command, flag, name, fallback string) string {
	if flag != "" && cmd.Flags().Changed(flag) {
		return fallback
	}
	if v, ok := c.getenv(name); ok && v != "" {
		return v
	}
	return fallback
}

// places reads where things are; nothing else is needed to look at them.
func (c *command) places(cmd *cobra.Command) (agentd.Config, error) {
	cfg := agentd.Config{
		DataDir: c.env(cmd, "data-dir", "CERTMESH_DATA_DIR", c.flags.data),
		KeyDir:  c.env(cmd, "key-dir", "CERTMESH_KEY_DIR", c.flags.keys),
		Version: version,
	}
	var err error
	if cfg.DataDir, err = filepath.Abs(cfg.DataDir); err != nil {
		return cfg, fault.InvalidField("data_dir", "%q is no path", cfg.DataDir)
	}
	if cfg.KeyDir != "" {
		if cfg.KeyDir, err = filepath.Abs(cfg.KeyDir); err != nil {
			return cfg, fault.InvalidField("key_dir", "%q is no path", cfg.KeyDir)
		}
	}
	return cfg, nil
}

func (c *command) config(cmd *cobra.Command) (agentd.Config, error) {
	cfg, err := c.places(cmd)
	if err != nil {
		return cfg, err
	}
	if cfg.Log, err = logger(c.stderr, c.env(cmd, "log-level", "CERTMESH_LOG_LEVEL", c.flags.level),
		c.env(cmd, "log-format", "CERTMESH_LOG_FORMAT", c.flags.format)); err != nil {
		return cfg, err
	}
	cfg.Servers = list(c.env(cmd, "server-url", "CERTMESH_SERVER_URL", c.flags.server), ",")
	cfg.Name = c.env(cmd, "name", "CERTMESH_AGENT_NAME", c.flags.name)
	if cfg.JoinToken, err = c.token(cmd); err != nil {
		return cfg, err
	}
	labels, roots := c.flags.labels, c.flags.roots
	if !cmd.Flags().Changed("label") {
		labels = list(c.env(cmd, "", "CERTMESH_LABELS", ""), ",")
	}
	cfg.Labels = map[string]string{}
	for _, kv := range labels {
		k, v, ok := strings.Cut(kv, "=")
		if k = strings.TrimSpace(k); !ok || k == "" {
			return cfg, fault.InvalidField("labels", "%q is not of the form k=v", kv)
		}
		cfg.Labels[k] = strings.TrimSpace(v)
	}
	if !cmd.Flags().Changed("target-root") {
		roots = list(c.env(cmd, "", "CERTMESH_TARGET_ROOTS", ""), ":,")
	}
	for _, r := range roots {
		if !filepath.IsAbs(r) {
			return cfg, fault.InvalidField("target_roots", "%q is not an absolute path", r)
		}
		cfg.TargetRoots = append(cfg.TargetRoots, filepath.Clean(r))
	}
	if cfg.AllowCommands, err = c.commands(cmd); err != nil {
		return cfg, err
	}
	cfg.BackupRetention = c.flags.retention
	if s := c.env(cmd, "backup-retention", "CERTMESH_BACKUP_RETENTION", ""); s != "" {
		if cfg.BackupRetention, err = strconv.Atoi(s); err != nil {
			return cfg, fault.InvalidField("backup_retention", "%q is not a number", s)
		}
	}
	if cfg.BackupRetention == 0 {
		return cfg, fault.InvalidField("backup_retention", "is 0; give the number of former versions to keep, or -1 for none")
	}
	return cfg, nil
}

// list splits at any of the separators and leaves out what is empty.
func list(s, separators string) []string {
	var out []string
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(separators, r) }) {
		if f = strings.TrimSpace(f); f != "" {
			out = append(out, f)
		}
	}
	return out
}

// maxToken bounds what is read from a token file; a token has about 130 bytes.
const maxToken = 4096

func (c *command) token(cmd *cobra.Command) (string, error) {
	path := c.env(cmd, "join-token-file", "CERTMESH_JOIN_TOKEN_FILE", c.flags.tokenFile)
	token, ok := c.getenv("CERTMESH_JOIN_TOKEN")
	switch {
	case cmd.Flags().Changed("join-token") && cmd.Flags().Changed("join-token-file"):
		return "", fault.InvalidField("join_token", "is given twice, as --join-token and as --join-token-file; leave one out")
	case cmd.Flags().Changed("join-token"):
		return strings.TrimSpace(c.flags.token), nil
	case path == "":
		return strings.TrimSpace(token), nil
	case ok && token != "" && !cmd.Flags().Changed("join-token-file"):
		return "", fault.InvalidField("join_token", "is given twice, as CERTMESH_JOIN_TOKEN and as CERTMESH_JOIN_TOKEN_FILE; unset one")
	}
	f, err := os.Open(path)
	if err != nil {
		// A token file may be removed once the agent has joined.
		if os.IsNotExist(err) && joined(c, cmd) {
			return "", nil
		}
		return "", fault.InvalidField("join_token_file", "%s cannot be read; check its name and permissions", path)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil || len(b) > maxToken {
		return "", fault.InvalidField("join_token_file", "%s cannot be read or is too large for a join token", path)
	}
	return strings.TrimSpace(string(b)), nil
}

func joined(c *command, cmd *cobra.Command) bool {
	cfg, err := c.places(cmd)
	if err != nil {
		return false
	}
	r, err := agentd.Status(cfg)
	return err == nil && r.Identity != nil
}

func (c *command) commands(cmd *cobra.Command) ([][]string, error) {
	const form = `give JSON such as [["systemctl","reload","nginx"]]`
	if cmd.Flags().Changed("allow-command") {
		var out [][]string
		for _, s := range c.flags.commands {
			var v []string
			if err := json.Unmarshal([]byte(s), &v); err != nil {
				return nil, fault.InvalidField("allow_command", `%q is not a list of strings; give JSON such as ["systemctl","reload","nginx"]`, s)
			}
			out = append(out, v)
		}
		return out, nil
	}
	s := c.env(cmd, "", "CERTMESH_ALLOW_COMMANDS", "")
	if s == "" {
		return nil, nil
	}
	var out [][]string
	if err := json.Unmarshal([]byte(s), &out); err != nil {
		return nil, fault.InvalidField("CERTMESH_ALLOW_COMMANDS", "is not a list of lists of strings; %s", form)
	}
	return out, nil
}
