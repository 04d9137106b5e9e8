package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/certmesh/certmesh/tui/cli"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/operatortest"
)

var update = flag.Bool("update", false, "rewrite golden output and docs/cli")

func TestMain(m *testing.M) {
	flag.Parse()
	goleak.VerifyTestMain(m)
}

// still is a clock that always shows the stand-in's time, while its timers run.
type still struct{ clockwork.Clock }

func (still) Now() time.Time                  { return operatortest.Now }
func (still) Since(t time.Time) time.Duration { return operatortest.Now.Sub(t) }

func newStill() still { return still{clockwork.NewRealClock()} }

type serverKey struct{}

// TestScripts runs the command line in process, each script against a server of its own.
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", UpdateScripts: *update, RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			s, err := operatortest.New(context.Background())
			if err != nil {
				return err
			}
			e.Defer(s.Stop)
			e.Values[serverKey{}] = s
			profile := filepath.Join(e.WorkDir, "client.yaml")
			e.Setenv("CERTMESH_CONFIG", profile)
			e.Setenv("SERVER", s.Address)
			e.Setenv("PORT", s.Address[strings.LastIndex(s.Address, ":")+1:])
			e.Setenv("KEY", operatortest.Key)
			e.Setenv("FINGERPRINT", client.Fingerprint(s.Root))
			if err := os.WriteFile(filepath.Join(e.WorkDir, "ca.pem"), []byte(s.CA), 0o600); err != nil {
				return err
			}
			other, err := operatortest.New(context.Background())
			if err != nil {
				return err
			}
			e.Defer(other.Stop)
			e.Setenv("OTHER", other.Address)
			if err := os.WriteFile(filepath.Join(e.WorkDir, "other.pem"), []byte(other.CA), 0o600); err != nil {
				return err
			}
			return client.Profile{ServerURL: s.Address, APIKey: operatortest.Key, CACertificate: s.CA}.Save(profile)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"certmesh": certmesh, "exits": exits, "stand-in": standIn, "request": request, "mode": mode,
		},
	})
}

// run runs the command line with the script's environment; STDIN names a file to read from.
func run(ts *testscript.TestScript, args []string) int {
	stdin := ""
	if file := ts.Getenv("STDIN"); file != "" {
		stdin = ts.ReadFile(file)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// Paths in a script are relative to its directory, and the process has one directory for all.
	for i, a := range args {
		if rest, found := strings.CutPrefix(a, "./"); found {
			args[i] = ts.MkAbs(rest)
		} else if rest, found := strings.CutPrefix(a, "@./"); found {
			args[i] = "@" + ts.MkAbs(rest)
		}
	}
	app := &cli.App{In: strings.NewReader(stdin), Out: ts.Stdout(), Err: ts.Stderr(), Env: ts.Getenv, Clock: newStill(), Version: "v9.9.9"}
	return app.Run(ctx, args)
}

// certmesh ARGS… must succeed.
func certmesh(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("use exits STATUS")
	}
	if code := run(ts, args); code != 0 {
		ts.Fatalf("certmesh %s: exit status %d", strings.Join(args, " "), code)
	}
}

// exits STATUS ARGS… must end with that status and, unless it is 0, say why in one line that has a next step.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	if neg || err != nil {
		ts.Fatalf("usage: exits STATUS ARGS…")
	}
	if code := run(ts, args[1:]); code != want {
		ts.Fatalf("certmesh %s: exit status %d, want %d", strings.Join(args[1:], " "), code, want)
	}
}

// stand-in VERB … changes what the server does.
func standIn(ts *testscript.TestScript, _ bool, args []string) {
	s, ok := ts.Value(serverKey{}).(*operatortest.Server)
	if !ok {
		ts.Fatalf("no server")
	}
	switch args[0] {
	case "down":
		s.Stop()
	case "fails": // METHOD CODE MESSAGE NEXT
		n, err := strconv.Atoi(args[2])
		ts.Check(err)
		s.Fail(args[1], codes.Code(n), args[3], args[4])
	case "serves": // NAME: issues and then serves what is ordered
		s.Play(func(d *operatortest.Data) { d.Issue(args[1]) }, func(d *operatortest.Data) { d.Serve(args[1]) })
	case "deploys": // NAME: ends its jobs well at once
		s.Play(func(d *operatortest.Data) { d.Issue(args[1]); d.Serve(args[1]) })
	case "fails-job": // NAME
		s.Play(func(d *operatortest.Data) {
			for _, j := range d.Jobs {
				if j.GetCertificateId() == d.Certificate(args[1]).GetId() {
					j.State, j.Error, j.FinishedAt = "Failed", "the CA said no"+operatortest.Hostile, timestamppb.New(operatortest.Now)
				}
			}
		})
	case "fails-placement": // NAME
		s.Play(func(d *operatortest.Data) { d.Issue(args[1]) }, func(d *operatortest.Data) {
			for _, p := range d.Certificate(args[1]).GetPlacements() {
				p.State, p.LastError = "Failed", "nginx -t ended with status 1"
			}
		})
	default:
		ts.Fatalf("what is %s?", args[0])
	}
}

// request METHOD prints the last request of a method; request METHOD N how often it was called.
func request(ts *testscript.TestScript, _ bool, args []string) {
	s, ok := ts.Value(serverKey{}).(*operatortest.Server)
	if !ok {
		ts.Fatalf("no server")
	}
	calls := s.Calls(args[0])
	if len(args) > 1 {
		if fmt.Sprint(len(calls)) != args[1] {
			ts.Fatalf("%s was called %d times, want %s", args[0], len(calls), args[1])
		}
		return
	}
	if len(calls) == 0 {
		ts.Fatalf("%s was never called", args[0])
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(calls[len(calls)-1])
	ts.Check(err)
	var b bytes.Buffer
	ts.Check(json.Indent(&b, raw, "", "  "))
	fmt.Fprintln(ts.Stdout(), b.String())
}

// mode FILE MODE checks permissions.
func mode(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); got != args[1] {
		ts.Fatalf("%s has mode %s, want %s", args[0], got, args[1])
	}
}
