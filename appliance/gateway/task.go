package gateway

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
)

// task is a part of the daemon that runs until its context ends.
type task interface {
	Run(ctx context.Context) error
	Ready() <-chan struct{} // closed when the task does its work
	String() string
}

// plain is a task made of a function that is ready as soon as it runs.
type plain struct {
	name  string
	run   func(ctx context.Context) error
	ready chan struct{}
}

func newTask(name string, run func(ctx context.Context) error) *plain {
	return &plain{name, run, make(chan struct{})}
}

func (p *plain) String() string         { return p.name }
func (p *plain) Ready() <-chan struct{} { return p.ready }
func (p *plain) Run(ctx context.Context) error {
	close(p.ready)
	return p.run(ctx)
}

// runTasks runs all until ctx ends or one of them does, which ends the others, and waits for all. It calls
// ready once, when every task is.
func runTasks(ctx context.Context, tasks []task, ready func()) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, t := range tasks {
		g.Go(func() error {
			err := t.Run(ctx)
			if err == nil && ctx.Err() == nil {
				err = errors.New("it ended by itself")
			}
			if err != nil {
				return fmt.Errorf("%s: %w", t, err)
			}
			return nil
		})
	}
	g.Go(func() error {
		for _, t := range tasks {
			select {
			case <-t.Ready():
			case <-ctx.Done():
				return nil
			}
		}
		ready()
		return nil
	})
	return g.Wait()
}
