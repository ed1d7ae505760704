package exchange

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// locating is a locator whose nth look-up is answered by look.
func locating(look func(n int) ([]string, time.Duration, error)) (l *locator, times *[]time.Duration) {
	begun := time.Now()
	times = new([]time.Duration)
	l = &locator{host: "dns.example", timeout: 2 * time.Second, life: newLife()}
	l.look = func(context.Context, string) ([]netip.Addr, time.Duration, error) {
		*times = append(*times, time.Since(begun))
		list, ttl, err := look(len(*times))
		return addresses(list...), ttl, err
	}
	return l, times
}

// TestLocatorRenews asks every second for three hours. The TTL counts, within bounds; a look-up that
// fails, or takes long, changes nothing for who asks.
func TestLocatorRenews(t *testing.T) {
	for _, row := range []struct{ ttl, every time.Duration }{
		{0, minKnown}, {10 * time.Minute, 10 * time.Minute}, {1000 * time.Hour, maxKnown},
	} {
		synctest.Test(t, func(t *testing.T) {
			l, times := locating(func(n int) ([]string, time.Duration, error) {
				time.Sleep(10 * time.Second)
				if n == 2 {
					return nil, 0, errors.New("broken")
				}
				return []string{"192.0.2.1"}, row.ttl, nil
			})
			const span = 3 * time.Hour
			for range span / time.Second {
				begun := time.Now()
				list, err := l.addresses(t.Context())
				if fmt.Sprint(list) != "[192.0.2.1]" || err != nil {
					t.Fatal(list, err)
				}
				if took := time.Since(begun); took > 0 && len(*times) > 1 {
					t.Fatalf("waited %v for what was known", took)
				}
				time.Sleep(time.Second)
			}
			l.life.close()
			want := int(span/(row.every+11*time.Second)) + 1
			if n := len(*times); n < want-1 || n > want+2+want/20 {
				t.Errorf("a TTL of %v: %d look-ups in %v; want about %d", row.ttl, n, span, want)
			}
		})
	}
}

// TestLocatorFails wants look-ups that fail to be rare, and to be one for all who wait.
func TestLocatorFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, times := locating(func(int) ([]string, time.Duration, error) {
			time.Sleep(100 * time.Millisecond)
			return []string{"0.0.0.0", "ff02::1"}, time.Hour, nil
		})
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				for range 1000 {
					if list, err := l.addresses(t.Context()); err == nil || err.Error() != "looking up dns.example: it has no usable address" {
						t.Error(list, err)
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		all.Wait()
		l.life.close()
		if n := len(*times); n < 8 || n > 12 {
			t.Errorf("%d look-ups in 10 s: %v", n, *times)
		}
		if _, err := l.addresses(t.Context()); err == nil {
			t.Error("closed, but found")
		}
	})
}

// TestLocatorDoubts wants a host that cannot be reached to be looked up again before its TTL is over.
func TestLocatorDoubts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, times := locating(func(n int) ([]string, time.Duration, error) {
			return []string{fmt.Sprintf("192.0.2.%d", n)}, time.Hour, nil
		})
		ask := func() string {
			synctest.Wait()
			list, err := l.addresses(t.Context())
			return fmt.Sprint(list, err)
		}
		ask()
		for range 100 {
			l.doubt()
			if got := ask(); got != "[192.0.2.1] <nil>" {
				t.Fatal(got)
			}
		}
		time.Sleep(retryAfter)
		ask()
		if got := ask(); got != "[192.0.2.2] <nil>" || len(*times) != 2 {
			t.Errorf("%s after look-ups at %v", got, *times)
		}
		l.life.close()
	})
}
