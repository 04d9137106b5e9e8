package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) login() *cobra.Command {
	var fingerprint, caFile string
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Write the profile by which the control plane is found",
		Long: `Connects to a control plane, checks that it is the one meant and that it accepts the API key, and writes the profile
that later commands use. The profile belongs to you alone (mode 0600); it holds the key.

The server is recognised by its CA: by the SHA-256 fingerprint of the CA at the end of its chain, or by a file with that CA.
Without either the command tells the fingerprint that the server presents, and ends.

The key is taken from CERTMESH_API_KEY, otherwise asked for on standard input. An administrator makes one on the server by
"certmeshd apikey create".`,
		Example: `  certmesh login --server mesh.example.com:8442 --ca-fingerprint 3f9a0c…
  certmesh login --server mesh.example.com:8442 --ca-file mesh-root.pem < key.txt`,
		Args: takes(),
	}
	f := cmd.Flags()
	f.StringVar(&fingerprint, "ca-fingerprint", "", "`SHA256` of the CA at the end of the server's chain, in hex")
	f.StringVar(&caFile, "ca-file", "", "PEM `FILE` with the CA that the server's chain ends in (CERTMESH_CA_FILE)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		server := first(a.flags.server, a.Env("CERTMESH_SERVER_URL"))
		if server == "" {
			return misuse("--server is missing; give the HOST:PORT of the control plane's gRPC listener")
		}
		address, err := client.Address(server)
		if err != nil {
			return usageError{err.Error()}
		}
		if fingerprint != "" && caFile != "" {
			return misuse("--ca-fingerprint and --ca-file exclude each other; give one")
		}
		path, _, err := a.profilePath()
		if err != nil {
			return err
		}
		ca, err := a.recognise(ctx, address, fingerprint, caFile)
		if err != nil {
			return err
		}
		key, err := a.askKey(ctx)
		if err != nil {
			return err
		}
		a.key = key
		c, err := client.New(client.Config{Server: address, Key: key, CA: ca, Timeout: a.flags.timeout, Version: a.Version, Now: a.now})
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }() // the answer is here
		r, err := c.System.GetStatus(ctx, &operatorpb.GetStatusRequest{})
		if err != nil {
			return err
		}
		if err := (client.Profile{ServerURL: address, APIKey: key, CACertificate: ca}).Save(path); err != nil {
			return err
		}
		done := fmt.Sprintf("Logged in at %s (trust domain %s, version %s). The profile is %s.", address, r.GetTrustDomain(), r.GetVersion(), path)
		if a.flags.format != "table" {
			fmt.Fprintln(a.Err, render.Clean(done))
		}
		return a.show(view{doc: r, table: func(p *render.Page) { p.Say(done) }})
	}
	return cmd
}

// recognise makes sure that the server at address is the one meant, and returns the PEM of its CA.
func (a *App) recognise(ctx context.Context, address, fingerprint, caFile string) (string, error) {
	want := ""
	if fingerprint != "" {
		var err error
		if want, err = client.ParseFingerprint(fingerprint); err != nil {
			return "", misuse("--ca-fingerprint %s", err)
		}
	} else if path := first(caFile, a.Env("CERTMESH_CA_FILE")); path != "" {
		text, err := readFile("--ca-file", path)
		if err != nil {
			return "", err
		}
		cas, err := client.ParseCA([]byte(text))
		if err != nil {
			return "", misuse("--ca-file %s: %s", path, err)
		}
		// The file may hold more than CAs; the profile should not.
		text = ""
		for _, ca := range cas {
			text += client.EncodeCA(ca)
		}
		return text, nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.flags.timeout)
	defer cancel()
	chain, err := client.Presented(ctx, address)
	if err != nil {
		return "", err
	}
	if want == "" {
		got := client.Fingerprint(chain[len(chain)-1])
		return "", misuse("the server at %s presents the CA with SHA-256 fingerprint %s, which nobody has vouched for yet; "+
			"run the same command on the server's own host, where nobody can sit in between, or compare with the last part of a join token, "+
			"and if it is the same repeat with --ca-fingerprint %s", address, got, got)
	}
	ca, err := client.Pin(address, chain, want, a.now())
	if err != nil {
		return "", err
	}
	var text strings.Builder
	text.WriteString(client.EncodeCA(ca))
	for _, next := range client.Successors(chain, ca, a.now()) {
		text.WriteString(client.EncodeCA(next))
	}
	return text.String(), nil
}

// maxKeyLine bounds what is read as a key.
const maxKeyLine = 4096

// askKey takes the API key from the environment or asks for it, unseen on a terminal.
func (a *App) askKey(ctx context.Context) (client.Key, error) {
	text := a.Env("CERTMESH_API_KEY")
	if text == "" {
		var err error
		if a.ReadSecret != nil {
			text, err = a.ReadSecret(func() { fmt.Fprint(a.Err, "API key: ") })
			fmt.Fprintln(a.Err)
		} else {
			text, err = readLine(ctx, a.In)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("the API key cannot be read: %w; set CERTMESH_API_KEY or give it on standard input", err)
		}
	}
	text = strings.TrimSpace(text)
	if text == "" {
		return "", misuse("no API key was given; set CERTMESH_API_KEY or give it on standard input")
	}
	key := client.Key(text)
	return key, key.Check()
}

// readLine reads a line, or gives up when ctx ends.
func readLine(ctx context.Context, r io.Reader) (string, error) {
	type result struct {
		line string
		err  error
	}
	read := make(chan result, 1)
	go func() {
		line, err := bufio.NewReader(io.LimitReader(r, maxKeyLine)).ReadString('\n')
		read <- result{line, err}
	}()
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case got := <-read:
		return got.line, got.err
	}
}
