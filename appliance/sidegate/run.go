package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/lmittmann/tint"

	"sidegate/appliance/admin"
	"sidegate/appliance/gateway"
)

type runCmd struct {
	Config       string `short:"c" placeholder:"FILE" help:"Configuration; without one, the interface of the default route is the LAN and everything is direct."`
	SocketGroup  string `placeholder:"GROUP" help:"Group that may use the admin socket."`
	StateDir     string `placeholder:"DIR" help:"Where the datapath keeps its pins (default: in the system's BPF file system)."`
	DataDir      string `placeholder:"DIR" help:"Where is kept what the gateway found out, over reboots (default: $$STATE_DIRECTORY, else /var/lib/sidegate)."`
	LogLevel     string `default:"info" enum:"debug,info,warn,error" help:"The least that is logged: ${enum}."`
	LogJSON      bool   `name:"log-json" help:"Log JSON."`
	ApplySysctls bool   `name:"apply-sysctls" help:"Set the kernel parameters that are wrong, and put back what was there when stopped (see: sidegate sysctls)."`
	socketFlag
}

// Help says how a running gateway is steered.
func (runCmd) Help() string {
	return `Signals: SIGHUP reads the configuration again; a failure changes nothing. SIGTERM and SIGINT stop the
gateway and remove everything that it owns: the box then forwards plainly, or does not forward if it did not
before and --apply-sysctls made it. SIGUSR2 stops it and leaves the kernel's state, for an upgrade or restart:
direct flows go on, proxied ones wait (systemd: RestartKillSignal=SIGUSR2).`
}

func (c *runCmd) Run(ctx context.Context, e *env) error {
	log := e.logger(c.LogLevel, c.LogJSON)
	if c.Config == "" {
		log.Info("no configuration is given, so the built-in one is used: the LAN is the interface of the default route, and everything is direct")
		log.Info("to write your own, begin with `default: direct`, and start with: sidegate run -c FILE")
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR2)
	defer signal.Stop(signals)
	return gateway.Run(ctx, gateway.Options{
		ConfigFile: c.Config,
		StateDir:   c.StateDir,
		DataDir:    c.DataDir,
		Socket:     admin.SocketOptions{Path: c.path(e), Group: c.SocketGroup},
		Version:    versionText(),
		Log:        log,
		Signals:    signals,

		ApplySysctls: c.ApplySysctls,
	})
}

// logger writes to standard error: JSON for machines, else lines for people, coloured on a terminal.
func (e *env) logger(level string, asJSON bool) *slog.Logger {
	var least slog.Level
	if err := least.UnmarshalText([]byte(level)); err != nil {
		panic("the parser lets other levels through: " + err.Error())
	}
	if asJSON {
		return slog.New(slog.NewJSONHandler(e.stderr, &slog.HandlerOptions{Level: least}))
	}
	o := &tint.Options{Level: least, TimeFormat: time.DateTime, NoColor: !e.terminal(e.stderr)}
	if e.getenv("JOURNAL_STREAM") != "" { // the journal has its own clock
		o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey && len(groups) == 0 {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(tint.NewTextHandler(io.Writer(e.stderr), o))
}

type versionCmd struct {
	JSON bool `help:"Print JSON."`
}

func (c *versionCmd) Run(e *env) error {
	if c.JSON {
		return e.json(map[string]string{"version": versionText(), "go": runtime.Version(), "arch": runtime.GOARCH})
	}
	fmt.Fprintf(e.stdout, "sidegate %s (%s, linux/%s)\n", versionText(), runtime.Version(), runtime.GOARCH)
	return nil
}

// versionText is what the linker set, or the commit that an ordinary go build notes.
func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) > 12 {
				return s.Value[:12]
			}
		}
	}
	return "unknown"
}

type demoCmd struct {
	Keep bool `help:"Leave the network running until Ctrl-C, to look around."`
}

func (c *demoCmd) Run(ctx context.Context, e *env) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return demonstrate(ctx, e.stdout, e.terminal(e.stdout), c.Keep)
}
