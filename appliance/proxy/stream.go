package proxy

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// copyStream relays to an outbound that is no plain socket (an https proxy's TLS), through this
// process's memory. It returns when both directions have ended, or either failed, or ctx ended.
func (c *connection) copyStream(ctx context.Context, client *net.TCPConn, upstream net.Conn) {
	var once sync.Once
	end := func() {
		once.Do(func() {
			client.SetLinger(0)
			client.Close()
			upstream.Close()
		})
	}
	stop := context.AfterFunc(ctx, end)

	var halfClosed atomic.Bool
	var wg sync.WaitGroup
	copyHalf := func(to, from net.Conn, total *int64, counter *direction) {
		r := &patientReader{Conn: from, halfClosed: &halfClosed, patience: c.tcp.server.options.HalfClosed}
		n, err := io.CopyBuffer(counting{to, counter}, onlyReader{r}, make([]byte, 32<<10))
		*total = n
		if err == nil {
			halfClosed.Store(true)
			to.SetReadDeadline(time.Now().Add(r.patience))
			err = closeWrite(to)
		}
		if err != nil {
			end()
		}
	}
	wg.Go(func() { copyHalf(upstream, client, &c.up, &c.traffic.up) })
	wg.Go(func() { copyHalf(client, upstream, &c.down, &c.traffic.down) })
	wg.Wait()
	stop()
	once.Do(func() {
		client.Close()
		upstream.Close()
	})
}

// patientReader waits for ever, but not once the other direction has ended.
type patientReader struct {
	net.Conn
	halfClosed *atomic.Bool
	patience   time.Duration
}

func (r *patientReader) Read(p []byte) (int, error) {
	if r.halfClosed.Load() {
		r.SetReadDeadline(time.Now().Add(r.patience))
	}
	return r.Conn.Read(p)
}

func closeWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close() // it has no half-close: its end is the end of both directions
}

// counting counts while a stream lives, which may be long.
type counting struct {
	io.Writer
	counter *direction
}

func (w counting) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.counter.add(0, n)
	return n, err
}

// onlyReader hides everything but Read, so that io.CopyBuffer uses the buffer.
type onlyReader struct{ io.Reader }
