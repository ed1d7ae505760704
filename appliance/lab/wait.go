package lab

import (
	"context"
	"fmt"
	"time"
)

// Wait polls condition until it returns nil. If ctx ends first, or after 10 seconds where ctx has no deadline, the
// error says what was waited for and what the condition said last.
func Wait(ctx context.Context, what string, condition func() error) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := condition()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w: last seen: %w", what, context.Cause(ctx), err)
		}
	}
}
