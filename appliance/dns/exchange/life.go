package exchange

import (
	"context"
	"sync"
)

// life owns the goroutines of one upstream. They end when its context does, and close waits for them.
type life struct {
	ctx    context.Context
	cancel context.CancelFunc

	mu    sync.Mutex // between the beginning of one more and the waiting for all
	ended bool
	all   sync.WaitGroup
}

func newLife() *life {
	l := &life{}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// begin says that something begins which close must wait for; the caller calls end then. It is false
// when it is too late for that.
func (l *life) begin() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return false
	}
	l.all.Add(1)
	return true
}

func (l *life) end() { l.all.Done() }

// start runs f in a goroutine, unless it is too late for that.
func (l *life) start(f func()) bool {
	if !l.begin() {
		return false
	}
	go func() {
		defer l.end()
		f()
	}()
	return true
}

func (l *life) close() {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.cancel()
	l.all.Wait()
}
