// Testreport runs go test and tells a person what happened: one line per package while it runs,
// failures in full as they occur, and at the end everything that was skipped, with the reason.
//
//	go run ./scripts/testreport [go test flags and packages]
//
// The last line is "N passed, N failed, N skipped". A skipped test is never counted as passed. The exit
// code is 0 only if something passed and nothing failed; a package that does not build, panics, times
// out or exits early has failed.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	// Ctrl-C reaches go test too, by the terminal's process group; what ran before it is still reported.
	signal.Ignore(os.Interrupt)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	code, err := run(ctx, ".", os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
	}
	os.Exit(code)
}

// run executes go test with args in dir and reports on out. The code is that of the process.
func run(ctx context.Context, dir string, args []string, out io.Writer) (code int, err error) {
	goTest := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	goTest.Dir = dir
	goTest.Stderr = os.Stderr
	goTest.Cancel = func() error { return goTest.Process.Signal(syscall.SIGTERM) }
	stdout, err := goTest.StdoutPipe()
	if err != nil {
		return 2, err
	}
	if err := goTest.Start(); err != nil {
		return 2, fmt.Errorf("starting go test: %w", err)
	}

	r := newReport(out)
	readErr := consume(stdout, r)
	waitErr := goTest.Wait()
	ok := r.finish()

	var exit *exec.ExitError
	switch {
	case readErr != nil:
		return 2, readErr
	case waitErr != nil && !errors.As(waitErr, &exit):
		return 2, fmt.Errorf("running go test: %w", waitErr)
	case waitErr != nil && ok:
		// Trust neither alone: go test knows of failures that it reports only on stderr.
		return 1, fmt.Errorf("go test failed without naming a test: %w", waitErr)
	case !ok:
		return 1, nil
	}
	return 0, nil
}

// consume feeds r with the events of stream, and with a tick when nothing has happened for a while.
func consume(stream io.Reader, r *report) error {
	type line struct {
		text []byte
		err  error
	}
	lines := make(chan line)
	go func() {
		defer close(lines)
		in := bufio.NewReader(stream)
		for {
			text, err := in.ReadBytes('\n')
			if len(text) > 0 {
				lines <- line{text: text}
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					lines <- line{err: fmt.Errorf("reading the output of go test: %w", err)}
				}
				return
			}
		}
	}()

	ticker := time.NewTicker(30 * time.Second)
	defer ticker.Stop()
	for {
		select {
		case l, open := <-lines:
			if !open {
				return nil
			}
			if l.err != nil {
				return l.err
			}
			var e event
			if err := json.Unmarshal(l.text, &e); err != nil {
				// Not JSON: go itself speaks, for example about a flag.
				r.print("%s", l.text)
				continue
			}
			r.add(e)
			ticker.Reset(30 * time.Second)
		case <-ticker.C:
			r.tick()
		}
	}
}
