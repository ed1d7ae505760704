package exchange

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// These tests are about time, so they run on a clock of their own.

// script is a session that does what a test says.
type script struct {
	answer func(ctx context.Context) error
	ended  chan struct{}
	once   sync.Once
	closed atomic.Bool
}

func (s *script) ask(ctx context.Context, _ *question) (reply, error) { return reply{}, s.answer(ctx) }
func (s *script) dead() <-chan struct{}                               { return s.ended }
func (s *script) die()                                                { s.once.Do(func() { close(s.ended) }) }

func (s *script) close() {
	s.closed.Store(true)
	s.die()
}

func at(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// scripted is a pool whose nth session is made by open, with when each was opened.
func scripted(t *testing.T, l limits, open func(n int) (*script, error)) (p *pool, opened *[]time.Duration) {
	begun := time.Now()
	opened = new([]time.Duration)
	p = &pool{timeout: 2 * time.Second, connectTimeout: 2 * time.Second, life: newLife(), limits: l}
	p.open = func(ctx context.Context) (session, error) {
		*opened = append(*opened, time.Since(begun))
		s, err := open(len(*opened))
		if err != nil {
			return nil, err
		}
		s.ended = make(chan struct{})
		return s, nil
	}
	t.Cleanup(p.life.close)
	return p, opened
}

func (p *pool) try(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	_, err := p.ask(ctx, nil)
	return err
}

// TestIdle wants a session to be closed when it was idle for so long, counted from its last question.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{answer: at(0)}
		p, opened := scripted(t, streamLimits, func(int) (*script, error) { return s, nil })
		for range 3 {
			if err := p.try(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(idle - time.Second)
			synctest.Wait()
			if s.closed.Load() {
				t.Fatal("closed too early")
			}
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !s.closed.Load() || len(*opened) != 1 || len(p.links) != 0 {
			t.Errorf("closed %v, opened at %v, %d kept", s.closed.Load(), *opened, len(p.links))
		}
		if p.failures != 0 {
			t.Error("idleness counts as a failure")
		}
		p.life.close()
	})
}

// TestBackoff has a server that cannot be reached, and one that is silent, for a minute of questions.
func TestBackoff(t *testing.T) {
	for _, row := range []struct {
		name string
		open func(int) (*script, error)
	}{
		{"refuses", func(int) (*script, error) { return nil, errors.New("refused") }},
		{"hangs up", func(int) (*script, error) {
			return &script{answer: func(context.Context) error { return errors.New("hung up") }}, nil
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, opened := scripted(t, streamLimits, row.open)
				var all sync.WaitGroup
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				for range 50 {
					all.Go(func() {
						for ctx.Err() == nil {
							if p.try(ctx) == nil {
								t.Error("answered")
							}
						}
					})
				}
				all.Wait()
				p.life.close()
				// The first two at once, then 50, 100, 200 and 400 ms later, and then every 800 ms.
				if n := len(*opened); n < 70 || n > 80 || (*opened)[1] != 0 || (*opened)[4]-(*opened)[3] < 100*time.Millisecond {
					t.Errorf("%d times: %v …", n, (*opened)[:min(n, 10)])
				}
			})
		})
	}
}

// TestBackoffEnds wants no more waiting once there was an answer.
func TestBackoffEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var working *script
		p, _ := scripted(t, streamLimits, func(n int) (*script, error) {
			if n <= 5 {
				return nil, errors.New("refused")
			}
			working = &script{answer: at(0)}
			return working, nil
		})
		for p.try(t.Context()) != nil {
		}
		working.die()
		synctest.Wait()
		begun := time.Now()
		if err := p.try(t.Context()); err != nil || time.Since(begun) != 0 {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
		p.life.close()
	})
}

// TestJoin wants one connecting for all who wait, which outlives the one who needed it first.
func TestJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, opened := scripted(t, streamLimits, func(int) (*script, error) {
			time.Sleep(time.Second)
			return &script{answer: at(0)}, nil
		})
		first, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := p.ask(first, nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
		for range 100 {
			all.Go(func() {
				if err := p.try(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if len(*opened) != 1 {
			t.Errorf("opened at %v", *opened)
		}
		p.life.close()
	})
}

// TestWidth wants more links under load, up to the limit, and the load spread over them.
func TestWidth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, opened := scripted(t, limits{width: 3, depth: 2}, func(int) (*script, error) { return &script{answer: at(time.Second)}, nil })
		var all sync.WaitGroup
		for range 30 {
			all.Go(func() {
				if err := p.try(t.Context()); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		p.mu.Lock()
		for _, l := range p.links {
			if l.load < 9 || l.load > 11 {
				t.Errorf("a load of %d", l.load)
			}
		}
		if len(p.links) != 3 || len(*opened) != 3 {
			t.Errorf("%d links, opened at %v", len(p.links), *opened)
		}
		p.mu.Unlock()
		all.Wait()
		p.life.close()
	})
}

// TestSilent has a proven link whose peer vanishes: the question goes to another link after half of the
// timeout, and the first is closed when the last question on it has ended.
func TestSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := false
		first := &script{}
		first.answer = func(ctx context.Context) error {
			if gone {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		p, opened := scripted(t, streamLimits, func(n int) (*script, error) {
			if n == 1 {
				return first, nil
			}
			return &script{answer: at(0)}, nil
		})
		if err := p.try(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		gone = true
		begun := time.Now()
		if err := p.try(t.Context()); err != nil || time.Since(begun) != p.timeout/2 {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
		synctest.Wait()
		if !first.closed.Load() || len(*opened) != 2 {
			t.Errorf("closed %v, opened at %v", first.closed.Load(), *opened)
		}
		p.life.close()
	})
}

// TestMute has a link that accepts questions and says nothing for long: when connecting could have been over other
// questions are asked on another link, and the first one may still be answered on its own.
func TestMute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := &script{answer: at(5 * time.Second)}
		p, opened := scripted(t, streamLimits, func(n int) (*script, error) {
			if n == 1 {
				return first, nil
			}
			return &script{answer: at(0)}, nil
		})
		p.connectTimeout = p.timeout * 3 / 4
		var waiting sync.WaitGroup
		waiting.Go(func() {
			begun := time.Now()
			if _, err := p.ask(t.Context(), nil); err != nil || time.Since(begun) != 5*time.Second {
				t.Errorf("%v after %v", err, time.Since(begun))
			}
		})
		time.Sleep(p.connectTimeout)
		synctest.Wait()
		begun := time.Now()
		if err := p.try(t.Context()); err != nil || time.Since(begun) != 0 || len(*opened) != 2 {
			t.Errorf("%v after %v, opened at %v", err, time.Since(begun), *opened)
		}
		if first.closed.Load() {
			t.Error("the first link was closed under its question")
		}
		waiting.Wait()
		synctest.Wait()
		if !first.closed.Load() {
			t.Error("the first link was not closed after its question")
		}
		p.life.close()
	})
}
