package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Command is a program to be started on a host, in its network but otherwise with the machine's file systems and
// cgroups. (`ip netns exec` gives a program its own /sys, which hides cgroups and BPF file systems.)
type Command struct {
	Env    []string  // added to the environment of this process
	Dir    string    // working directory; empty: this process's
	Cgroup string    // directory of a cgroup v2 to start in; empty: this process's
	Stdin  io.Reader // nil: empty input
	Stdout io.Writer // nil: the log file, where standard error always goes

	host    *Host
	ctx     context.Context
	name    string
	args    []string
	private bool // own mount namespace
}

// Command prepares a program. When ctx ends, or the lab is closed, the program and its process group are killed.
func (h *Host) Command(ctx context.Context, name string, args ...string) *Command {
	return &Command{host: h, ctx: ctx, name: name, args: args}
}

// Process is a running Command.
type Process struct {
	name string
	host *Host
	cmd  *exec.Cmd
	log  string
	life context.Context // ends with the process
	err  error           // valid then
}

// startProcesses owns the thread that starts all processes of the lab. Linux sends a parent-death signal when the
// starting *thread* ends, and Go ends a thread whose goroutine exits while locked to it; this one stays until Close.
func (l *Lab) startProcesses() {
	defer close(l.stopped)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		select {
		case start := <-l.starting:
			start()
		case <-l.stop:
			return
		}
	}
}

// seeing makes a program that sees other files in the place of some of the machine's. They are replaced in a mount
// namespace that only the program has; the machine's own stay as they are.
func (c *Command) seeing(files map[string]string) *Command {
	script := "set -e\n"
	for _, file := range slices.Sorted(maps.Keys(files)) {
		script += fmt.Sprintf("mount --bind %s %s\n", files[file], file)
	}
	args := append([]string{"-c", script + `exec "$0" "$@"`, c.name}, c.args...)
	outer := *c
	outer.name, outer.args, outer.private = "sh", args, true
	return &outer
}

// Resolving makes a program whose getaddrinfo(3) asks a DNS server, which the machine's own /etc/resolv.conf does not
// name.
func (c *Command) Resolving(server netip.Addr) (*Command, error) {
	path := c.host.lab.file("resolv", ".conf")
	if err := os.WriteFile(path, []byte("nameserver "+server.String()+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("naming a DNS server for %s on %s: %w", c.name, c.host.name, err)
	}
	return c.seeing(map[string]string{"/etc/resolv.conf": path}), nil
}

// Start starts the program.
func (c *Command) Start() (_ *Process, err error) {
	life, end := context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			end()
			err = fmt.Errorf("starting %s on %s: %w", c.name, c.host.name, err)
		}
	}()
	if c.host.lab.isClosed() {
		return nil, errClosed
	}
	p := &Process{
		name: c.name,
		host: c.host,
		cmd:  exec.CommandContext(c.ctx, c.name, c.args...),
		log:  c.host.lab.file(c.host.name+"-"+filepath.Base(c.name), ".log"),
		life: life,
	}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own
	p.cmd.Env = append(os.Environ(), c.Env...)
	p.cmd.Dir = c.Dir
	p.cmd.Stdin = c.Stdin
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if c.Stdout != nil {
		p.cmd.Stdout = c.Stdout
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p.cmd.Cancel = func() error { return p.Signal(unix.SIGKILL) }
	p.cmd.WaitDelay = time.Second
	if c.private {
		p.cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
	}
	if c.Cgroup != "" {
		g, err := os.Open(c.Cgroup)
		if err != nil {
			return nil, fmt.Errorf("opening the cgroup: %w", err)
		}
		defer g.Close()
		p.cmd.SysProcAttr.UseCgroupFD, p.cmd.SysProcAttr.CgroupFD = true, int(g.Fd())
	}
	if err := c.host.lab.startOnThread(c.host, p.cmd); err != nil {
		return nil, err
	}
	forget, ok := c.host.lab.onClose(p.Kill)
	go func() {
		defer end()
		defer forget()
		if err := p.cmd.Wait(); err != nil {
			p.err = fmt.Errorf("%s on %s: %w%s", p.name, p.host.name, err, p.tailForError())
		}
	}()
	if !ok {
		return nil, errors.Join(errClosed, p.Kill())
	}
	return p, nil
}

func (l *Lab) startOnThread(h *Host, cmd *exec.Cmd) error {
	result := make(chan error, 1)
	select {
	case l.starting <- func() { result <- h.Do(cmd.Start) }:
		return <-result
	case <-l.stopped:
		return errClosed
	}
}

// Run starts the program and waits for its end.
func (c *Command) Run() error {
	p, err := c.Start()
	if err != nil {
		return err
	}
	return p.Wait()
}

// Output runs the program and returns its standard output. An error carries the end of its standard error.
func (c *Command) Output() (string, error) {
	var out bytes.Buffer
	c.Stdout = &out
	err := c.Run()
	return out.String(), err
}

// Exec runs a program on the host and returns its standard output.
func (h *Host) Exec(ctx context.Context, name string, args ...string) (string, error) {
	return h.Command(ctx, name, args...).Output()
}

// Pid is the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.life.Done() }

// Wait waits for the end. The error of an unsuccessful program carries the end of its log.
func (p *Process) Wait() error {
	<-p.life.Done()
	return p.err
}

// whileAlive returns a context that ends with ctx or with the process; then what why says is its cause.
func (p *Process) whileAlive(ctx context.Context, why func() error) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancelCause(ctx)
	stop := context.AfterFunc(p.life, func() { end(why()) })
	return ctx, func() {
		stop()
		end(nil)
	}
}

// Signal sends a signal to the process group. That the process has ended is not an error.
func (p *Process) Signal(s syscall.Signal) error {
	select {
	case <-p.life.Done():
		return nil // the number may already belong to somebody else
	default:
	}
	if err := unix.Kill(-p.Pid(), s); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signalling %s on %s: %w", p.name, p.host.name, err)
	}
	return nil
}

// Stop asks the process group to end, kills what is left when the process has ended, or after two seconds, and waits
// until all are gone. How the process ended is not reported: see Wait.
func (p *Process) Stop() error {
	if err := p.Signal(unix.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.life.Done():
	case <-time.After(2 * time.Second):
	}
	return p.Kill()
}

// Kill ends the process group at once, as a crash would, and waits until all are gone.
func (p *Process) Kill() error {
	if err := p.Signal(unix.SIGKILL); err != nil {
		return err
	}
	<-p.life.Done()
	if err := killGroup(p.Pid(), p.host.ns.name); err != nil {
		return fmt.Errorf("ending %s on %s: %w", p.name, p.host.name, err)
	}
	return nil
}

// Log is the path of the file with the output.
func (p *Process) Log() string { return p.log }

// Tail returns the last lines of the log.
func (p *Process) Tail(lines int) string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (p *Process) tailForError() string {
	if tail := p.Tail(10); tail != "" {
		return ": its last words:\n" + tail
	}
	return ""
}
