package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

const (
	hostName = "web-1"
	caName   = "demo-ca"
	certName = "demo-site"
	siteName = "demo.certmesh.test"
	target   = "demo-site"
)

// seen is a certificate as a client of the site meets it.
type seen struct {
	leaf *x509.Certificate
	// serial is what the control plane says is served.
	serial string
	// issued and served are the control plane's times of signing it and of seeing it in a handshake.
	issued, served time.Time
}

// play runs the steps.
func (d *demo) play(ctx context.Context) error {
	var err error
	if d.estate, err = estate.New(estate.Config{Dir: d.dir, Bin: d.bin}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	d.began = time.Now()
	for _, s := range []struct {
		name string
		do   func(context.Context) (string, error)
	}{
		{"control plane", d.startServer},
		{"agent", d.join},
		{"local CA", d.createCA},
		{"site", d.startSite},
		{"order", d.order},
		{"handshake", d.first},
		{"renewal", d.renew},
		{"handshake", d.second},
		{"keys", d.keys},
	} {
		if err := d.step(ctx, s.name, s.do); err != nil {
			return err
		}
	}
	d.summary()
	return nil
}

func (d *demo) startServer(ctx context.Context) (string, error) {
	p, err := d.estate.StartServer(ctx)
	d.server = p
	return "certmeshd dev is ready, with a fresh SQLite store and mesh CA", err
}

// join starts the agent. It may run two commands, those that check and reload the site's nginx.
func (d *demo) join(ctx context.Context) (string, error) {
	o := estate.AgentOptions{Name: hostName}
	if nginx := estate.NginxPath(); nginx != "" {
		o.Commands = d.estate.NginxCommands(hostName, "site")
	}
	p, a, err := d.estate.Join(ctx, o)
	d.agent, d.host = p, a
	return fmt.Sprintf("%s joined by a token as %s and holds its stream", hostName, short(a.ID)), err
}

func (d *demo) createCA(ctx context.Context) (string, error) {
	err := d.estate.JSON(ctx, &d.issuer, "issuers", "create", caName)
	return caName + ": a root and an online intermediate, keys sealed in the store", err
}

func (d *demo) startSite(ctx context.Context) (string, error) {
	what := "the built-in TLS server (nginx is not installed)"
	var err error
	if estate.NginxPath() == "" {
		d.site, err = d.estate.StartBuiltin(hostName, "site", siteName)
	} else {
		d.site, err = d.estate.StartNginx(ctx, hostName, "site", siteName)
		what = nginxVersion(ctx)
	}
	if err != nil {
		return "", err
	}
	if _, err := d.estate.CLI(ctx, d.site.TargetArgs(target, hostName)...); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s at %s, still with a self-signed placeholder", what, d.site.Addr), nil
}

func nginxVersion(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, estate.NginxPath(), "-v").CombinedOutput()
	if err != nil {
		return "nginx"
	}
	_, v, _ := strings.Cut(strings.TrimSpace(string(out)), "nginx/")
	return "nginx " + v
}

func (d *demo) order(ctx context.Context) (string, error) {
	began := time.Now()
	_, err := d.estate.CLI(ctx, "certs", "create", certName, "--dns", siteName, "--issuer", caName, "--target", target,
		"--wait")
	if err != nil {
		return "", err
	}
	d.before, err = d.current(ctx)
	return fmt.Sprintf("%s: %s", siteName, d.before.story(began)), err
}

func (d *demo) first(ctx context.Context) (string, error) {
	leaf, err := d.visit(ctx, d.before)
	if err != nil {
		return "", err
	}
	d.before.leaf = leaf
	return "a client that trusts the CA's root gets " + name(leaf), nil
}

func (d *demo) renew(ctx context.Context) (string, error) {
	began := time.Now()
	if _, err := d.estate.CLI(ctx, "certs", "renew", certName, "--wait"); err != nil {
		return "", err
	}
	var err error
	d.after, err = d.current(ctx)
	return "asked for by the operator: " + d.after.story(began), err
}

func (d *demo) second(ctx context.Context) (string, error) {
	leaf, err := d.visit(ctx, d.after)
	if err != nil {
		return "", err
	}
	d.after.leaf = leaf
	if estate.Serial(leaf) == estate.Serial(d.before.leaf) {
		return "", errors.New("the site still serves the certificate from before the renewal")
	}
	return "the same client gets " + name(leaf), nil
}

// keys shows that the former key is retired once the new certificate is served.
func (d *demo) keys(ctx context.Context) (string, error) {
	c, err := d.estate.Certificate(ctx, certName)
	if err != nil {
		return "", err
	}
	err = estate.Wait(ctx, "the former key to be retired", func(context.Context) error {
		if n := len(d.estate.KeyFiles(hostName, c.ID)); n != 1 {
			return fmt.Errorf("the agent keeps %d keys", n)
		}
		return nil
	})
	return "the former one is retired; the new one was made on " + hostName + " and never left it", err
}

// current reads what the control plane knows of the newest version.
func (d *demo) current(ctx context.Context) (seen, error) {
	c, err := d.estate.Certificate(ctx, certName)
	if err != nil {
		return seen{}, err
	}
	if len(c.Leaves) != 1 || len(c.Placements) != 1 || !c.Placements[0].Current {
		b, _ := json.Marshal(c) // plain values always encode
		return seen{}, fmt.Errorf("the command came back before the certificate is served: %s", b)
	}
	versions, err := d.estate.Versions(ctx, certName)
	if err != nil {
		return seen{}, err
	}
	for _, v := range versions {
		if v.Serial == c.Leaves[0].Serial {
			return seen{serial: v.Serial, issued: v.CreatedAt, served: c.Placements[0].ServedAt}, nil
		}
	}
	return seen{}, fmt.Errorf("there is no version with the serial %s", c.Leaves[0].Serial)
}

// visit makes a real handshake as a client that trusts nothing but the CA's root.
func (d *demo) visit(ctx context.Context, want seen) (*x509.Certificate, error) {
	leaf, err := estate.Trusted(ctx, d.site.Addr, siteName, estate.SelfSigned(d.issuer.ChainPEM))
	if err == nil && estate.Serial(leaf) != want.serial {
		err = fmt.Errorf("the site serves %s, not %s as the control plane says", estate.Serial(leaf), want.serial)
	}
	return leaf, err
}

func (s seen) story(began time.Time) string {
	return fmt.Sprintf("issued after %s, served after %s", took(s.issued.Sub(began)), took(s.served.Sub(began)))
}

// summary closes the page.
func (d *demo) summary() {
	total := time.Since(d.began)
	d.out.gap()
	d.out.table([][]string{
		{"", "before", "after"},
		{"serial", short(estate.Serial(d.before.leaf)), short(estate.Serial(d.after.leaf))},
		{"SHA-256", short(estate.Fingerprint(d.before.leaf)), short(estate.Fingerprint(d.after.leaf))},
		{"key", short(keyOf(d.before.leaf)), short(keyOf(d.after.leaf))},
		{"valid until", until(d.before.leaf), until(d.after.leaf)},
	})
	d.out.gap()
	d.out.line("Ordered, deployed, verified and renewed in %s. %s serves the new certificate at %s.", took(total), siteName, d.site.Addr)
}

// invite says how to look around.
func (d *demo) invite() {
	d.out.gap()
	d.out.line("It stays up until Ctrl-C. To look around, in another terminal:")
	d.out.gap()
	d.out.line(`  export PATH="%s:$PATH"`, d.bin)
	for _, kv := range d.estate.CLIEnv() {
		d.out.line("  export %s", kv)
	}
	for _, c := range []string{"certmesh status", "certmesh certs get " + certName, "certmesh certs why " + certName,
		"certmesh certs renew " + certName + " --wait", "certmesh audit list"} {
		d.out.line("  %s", c)
	}
	d.out.gap()
	d.out.line("To see what the site serves:")
	d.out.gap()
	d.out.line("  openssl s_client -connect %s -servername %s </dev/null 2>/dev/null | openssl x509 -noout -serial -issuer -dates", d.site.Addr, siteName)
}
