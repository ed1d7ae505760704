package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"sidegate/appliance/admin"
	"sidegate/appliance/gateway"
	"sidegate/appliance/policy"
)

// TestScripts runs testdata/*.txt: what the commands print, as documentation. Besides the usual commands
// (pkg.go.dev/github.com/rogpeppe/go-internal/testscript) they have
//
//	sidegate ARGS…           the program, in this process
//	exits STATUS ARGS…       the program, which must exit with STATUS
//	gateway [lies] FILE      a running gateway with FILE as its configuration, flows.json as its flow table,
//	                         status.json as its status and names.json as the names that it learned; one that
//	                         lies has a kernel that always answers block
func TestScripts(t *testing.T) {
	dir, err := filepath.Abs("testdata") // the working directory changes under the scripts
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: dir,
		Setup: func(e *testscript.Env) error {
			e.Setenv("SIDEGATE_SOCKET", filepath.Join(e.WorkDir, "admin.sock"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"sidegate": func(ts *testscript.TestScript, negated bool, args []string) {
				if status := sidegate(ts, args); (status != 0) != negated {
					ts.Fatalf("it exits with %d", status)
				}
			},
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				if status := sidegate(ts, args[1:]); strconv.Itoa(status) != args[0] {
					ts.Fatalf("it exits with %d, not %s", status, args[0])
				}
			},
			"gateway": startFake,
		},
	})
}

// directory keeps scripts from changing each other's: the process has one.
var directory sync.Mutex

func sidegate(ts *testscript.TestScript, args []string) int {
	directory.Lock()
	defer directory.Unlock()
	home, err := os.Getwd()
	ts.Check(err)
	ts.Check(os.Chdir(ts.MkAbs(".")))
	defer func() { ts.Check(os.Chdir(home)) }()
	return (&env{stdout: ts.Stdout(), stderr: ts.Stderr(), getenv: ts.Getenv}).main(context.Background(), args)
}

// fake is a gateway without a kernel.
type fake struct {
	plan  *gateway.Plan
	file  string
	lies  bool
	dir   string
	count uint32
}

func startFake(ts *testscript.TestScript, _ bool, args []string) {
	f := &fake{lies: args[0] == "lies", file: ts.MkAbs(args[len(args)-1]), dir: ts.MkAbs("."), count: 1}
	var err error
	f.plan, err = gateway.Load(f.file)
	ts.Check(err)
	log := slog.New(slog.DiscardHandler)
	server, err := admin.Listen(admin.SocketOptions{Path: ts.Getenv("SIDEGATE_SOCKET")}, f, log)
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx) }()
	ts.Defer(func() {
		cancel()
		if err := <-ended; err != nil {
			ts.Logf("the gateway: %v", err)
		}
	})
}

func (f *fake) read(name string, into any) error {
	data, err := os.ReadFile(filepath.Join(f.dir, name))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

func (f *fake) config() admin.Config {
	p := f.plan.Config.Policy
	return admin.Config{File: f.file, Digest: f.plan.Digest, Rules: len(p.Rules), Default: p.Default, OnFailure: "block", ReturnPath: "asymmetric", IPv6: "advertise"}
}

func (f *fake) Status(context.Context) (s admin.Status, err error) {
	err = f.read("status.json", &s)
	s.Config, s.Started = f.config(), time.Now().Add(-90*time.Second)
	s.LastReload.Time = s.Started
	return s, err
}

func (f *fake) Flows(context.Context) (flows []admin.Flow, err error) {
	return flows, f.read("flows.json", &flows)
}

func (f *fake) Rules(context.Context) (rules []admin.Rule, err error) {
	return rules, f.read("rules.json", &rules)
}

func (f *fake) Names(context.Context) (names []admin.Name, err error) {
	return names, f.read("names.json", &names)
}

func (f *fake) FlowCounts(context.Context) ([]admin.FlowCount, error) {
	return nil, errors.New("nobody asks for it")
}

func (f *fake) Explain(_ context.Context, facts map[string][]string) (admin.LiveExplanation, error) {
	flow, err := gateway.ParseFlow(facts)
	if err != nil {
		return admin.LiveExplanation{}, admin.BadRequest{Err: err}
	}
	var sources admin.Sources
	if len(flow.Names) == 0 && f.read("names.json", &sources.Names) == nil {
		sources.Names = slices.DeleteFunc(sources.Names, func(n admin.Name) bool { return n.Address != flow.Destination.Addr() })
		flow.Names = sources.Known()
	}
	e := admin.LiveExplanation{Config: f.config(), Generation: f.count, Policy: f.plan.Explain(flow)}
	e.Policy.Sources.Names = sources.Names
	if flow.Destination.Addr().IsValid() {
		answer := e.Policy.Answer
		if f.lies {
			answer = admin.Answer{Verdict: policy.Block, Outbound: "block", Index: -1}
		}
		e.Kernel = &answer
	}
	return e, nil
}

func (f *fake) Reload(context.Context) (admin.Reload, error) {
	r := admin.Reload{Time: time.Now(), Generation: f.count}
	plan, err := gateway.Load(f.file)
	if err != nil {
		r.Error = err.Error()
		return r, nil
	}
	f.plan = plan
	f.count++
	r.OK, r.Generation = true, f.count
	return r, nil
}

// TestExample: what the reference of the configuration shows is what run takes.
func TestExample(t *testing.T) {
	var stdout, stderr strings.Builder
	e := &env{stdout: &stdout, stderr: &stderr, getenv: func(string) string { return "" }}
	if status := e.main(t.Context(), []string{"check", "-c", "../config/testdata/example.yaml"}); status != 0 {
		t.Errorf("it exits with %d: %s", status, stderr.String())
	}
	if !strings.Contains(stdout.String(), "tests passed") {
		t.Errorf("it says %q", stdout.String())
	}
}
