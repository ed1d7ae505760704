// Sidegate is a side-router gateway: see the README. This package is its command line, and holds no logic
// of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"sidegate/appliance/admin"
	"sidegate/appliance/config"
)

// version is set by the linker.
var version = ""

func main() {
	os.Exit((&env{
		stdin:  os.Stdin,
		stdout: os.Stdout,
		stderr: os.Stderr,
		getenv: os.Getenv,
	}).main(context.Background(), os.Args[1:]))
}

// env is what the commands see of the world, so that tests run them in-process.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
}

// commandLine is the command table. Nouns read, verbs change.
type commandLine struct {
	Run     runCmd     `cmd:"" help:"Run the gateway."`
	Check   checkCmd   `cmd:"" help:"Check a configuration: what run would refuse, and its tests."`
	Explain explainCmd `cmd:"" help:"Tell which rule decides a flow, and why no earlier one does."`
	Doctor  doctorCmd  `cmd:"" help:"Examine the surroundings of the gateway: what breaks or bypasses it, and the fix."`
	Sysctls sysctlsCmd `cmd:"" help:"List the kernel parameters that a gateway needs."`
	Status  statusCmd  `cmd:"" help:"Show how the running gateway fares."`
	Flows   flowsCmd   `cmd:"" help:"List the flows of the running gateway."`
	Names   namesCmd   `cmd:"" help:"List the names that clients know addresses by."`
	Rules   rulesCmd   `cmd:"" help:"List the policy in force and what its rules decided."`
	Reload  reloadCmd  `cmd:"" help:"Make the running gateway read its configuration again."`
	Demo    demoCmd    `cmd:"" help:"Show what sidegate does, in a network of its own (root)."`
	Version versionCmd `cmd:"" help:"Print the version."`
}

// exit ends a command with a status and nothing more to say.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// main runs a command line and returns the exit status: 0, 1 for every failure, or what a command documents.
func (e *env) main(ctx context.Context, args []string) (status int) {
	defer func() { // kong exits after --help
		if r := recover(); r != nil {
			code, ok := r.(exit)
			if !ok {
				panic(r)
			}
			status = int(code)
		}
	}()
	var c commandLine
	parser, err := kong.New(
		&c,
		kong.Name("sidegate"),
		kong.Description("A side-router gateway: decides in the kernel which flows go direct, through a proxy, or nowhere."),
		kong.Writers(e.stdout, e.stderr),
		kong.Exit(func(code int) { panic(exit(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(e),
		kong.Vars{"socket": admin.DefaultSocket},
	)
	if err != nil {
		panic(err) // the command table is wrong, not its use
	}
	if len(args) == 0 {
		args = []string{"--help"}
	}
	command, err := parser.Parse(args)
	if err != nil {
		e.fail(fmt.Errorf("%w; see: sidegate %s--help", err, within(err)))
		return 1
	}
	err = command.Run()
	if code := exit(0); errors.As(err, &code) {
		return int(code)
	}
	if err != nil {
		e.fail(err)
		return 1
	}
	return 0
}

// within is the command whose help to read.
func within(err error) string {
	if at := (*kong.ParseError)(nil); errors.As(err, &at) && at.Context.Selected() != nil {
		return at.Context.Selected().Name + " "
	}
	return ""
}

// fail prints an error: lines about a configuration as a compiler does, FILE:LINE: …, others after our name.
func (e *env) fail(err error) {
	if list, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range list.Unwrap() {
			e.fail(one)
		}
		return
	}
	if at := (*config.Error)(nil); errors.As(err, &at) && at == err {
		fmt.Fprintln(e.stderr, at)
		return
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(e.stderr, "sidegate: %s\n", strings.TrimSpace(line))
	}
}

// socketFlag is how commands find the running gateway.
type socketFlag struct {
	Socket string `placeholder:"PATH" help:"Admin socket of the gateway (default: $$SIDEGATE_SOCKET, else ${socket})."`
}

func (f socketFlag) path(e *env) string {
	for _, path := range []string{f.Socket, e.getenv("SIDEGATE_SOCKET")} {
		if path != "" {
			return path
		}
	}
	return admin.DefaultSocket
}

func (f socketFlag) client(e *env) *admin.Client { return admin.NewClient(f.path(e)) }

// terminal reports whether people look at w, and want colours.
func (e *env) terminal(w io.Writer) bool {
	return isTerminal(w) && e.getenv("NO_COLOR") == "" && e.getenv("TERM") != "dumb"
}

// isTerminal reports whether people are at the other end of an input or output.
func isTerminal(end any) bool {
	f, ok := end.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
