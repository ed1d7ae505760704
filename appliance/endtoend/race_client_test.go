package endtoend

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// raceOrder is what the client is told: as whom the server may see it, by verdict.
type raceOrder struct {
	Direct, Proxied []netip.Addr
	Count           int
}

type raceResult struct {
	Direct, Proxied, Wrong, Failed int
	Again                          int           // questions that were asked again
	Delay                          time.Duration // median from the answer to the call that sends the SYN
	Examples                       []string
}

// runRace is the client of TestConnectOnTheAnswer.
func runRace(text []byte) (any, error) {
	var order raceOrder
	if err := json.Unmarshal(text, &order); err != nil {
		return nil, err
	}
	var next atomic.Int64
	var mu sync.Mutex
	var total raceResult
	var delays []time.Duration
	var workers sync.WaitGroup
	var errs []error
	for range raceWorkers {
		workers.Go(func() {
			runtime.LockOSThread() // for good: it ends with the process
			r := racer{order: order}
			err := r.run(func() int { return int(next.Add(1)) - 1 })
			mu.Lock()
			defer mu.Unlock()
			total.Direct += r.Direct
			total.Proxied += r.Proxied
			total.Wrong += r.Wrong
			total.Failed += r.Failed
			total.Again += r.Again
			total.Examples = append(total.Examples, r.Examples...)
			delays = append(delays, r.delays...)
			if err != nil {
				errs = append(errs, err)
			}
		})
	}
	workers.Wait()
	total.Examples = total.Examples[:min(len(total.Examples), 10)]
	slices.Sort(delays)
	if len(delays) > 0 {
		total.Delay = delays[len(delays)/2]
	}
	return total, errors.Join(errs...)
}

// racer is one client: a socket for questions, and then a connection at a time.
type racer struct {
	raceResult
	order  raceOrder
	delays []time.Duration
	query  int // the socket
	buffer [1500]byte
}

func (r *racer) run(next func() int) (err error) {
	resolver := &unix.SockaddrInet4{Port: 53, Addr: somewhere.As4()}
	if r.query, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	defer unix.Close(r.query)
	if err := errors.Join(
		unix.SetsockoptTimeval(r.query, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 3}),
		unix.Connect(r.query, resolver),
	); err != nil {
		return err
	}
	for i := next(); i < r.order.Count; i = next() {
		saw, err := r.once(i)
		switch {
		case err == nil && slices.Contains(r.order.Direct, saw) && strings.Contains(raceName(i), ".direct."):
			r.Direct++
			continue
		case err == nil && slices.Contains(r.order.Proxied, saw) && strings.Contains(raceName(i), ".proxied."):
			r.Proxied++
			continue
		case err == nil || errors.Is(err, unix.ECONNREFUSED):
			r.Wrong++
		default:
			r.Failed++
		}
		r.Examples = append(r.Examples, fmt.Sprintf("%s at %s: the server saw %v, %v", raceName(i), raceAddress(i), saw, err))
	}
	return nil
}

// once asks and connects, and returns as whom the server saw it.
func (r *racer) once(i int) (saw netip.Addr, err error) {
	kind, family := dns.TypeA, unix.AF_INET
	if raceAddress(i).Is6() {
		kind, family = dns.TypeAAAA, unix.AF_INET6
	}
	m := new(dns.Msg).SetQuestion(raceName(i)+".", kind)
	question, err := m.Pack()
	if err != nil {
		return saw, err
	}
	// All that takes time is done before the answer is here.
	c, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return saw, err
	}
	defer unix.Close(c)
	patience := &unix.Timeval{Sec: 10}
	if err := errors.Join(
		unix.SetsockoptTimeval(c, unix.SOL_SOCKET, unix.SO_SNDTIMEO, patience),
		unix.SetsockoptTimeval(c, unix.SOL_SOCKET, unix.SO_RCVTIMEO, patience),
		unix.SetsockoptLinger(c, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	); err != nil {
		return saw, err
	}
	address, answered, err := r.ask(question, kind)
	if err != nil {
		return saw, err
	}
	if kind == dns.TypeA {
		to := &unix.SockaddrInet4{Port: racePort, Addr: [4]byte(address)}
		r.delays = append(r.delays, time.Since(answered))
		err = persist(func() error { return unix.Connect(c, to) })
	} else {
		to := &unix.SockaddrInet6{Port: racePort, Addr: [16]byte(address)}
		r.delays = append(r.delays, time.Since(answered))
		err = persist(func() error { return unix.Connect(c, to) })
	}
	if err != nil {
		return saw, fmt.Errorf("connecting: %w", err)
	}
	if got, _ := netip.AddrFromSlice(address); got != raceAddress(i) {
		return saw, fmt.Errorf("the answer was %s", got)
	}
	n, err := r.read(c)
	if err != nil {
		return saw, fmt.Errorf("reading as whom the server sees us: %w", err)
	}
	return netip.ParseAddr(string(bytes.TrimSpace(r.buffer[:n])))
}

func (r *racer) read(fd int) (n int, err error) {
	err = persist(func() (err error) { n, err = unix.Read(fd, r.buffer[:]); return err })
	return n, err
}

// ask returns the address, which are the last bytes of an answer of one record.
func (r *racer) ask(question []byte, kind uint16) (address []byte, answered time.Time, err error) {
	size := 4
	if kind == dns.TypeAAAA {
		size = 16
	}
	for range 3 {
		if _, err := unix.Write(r.query, question); err != nil {
			return nil, answered, err
		}
		for {
			n, err := r.read(r.query)
			answered = time.Now()
			if errors.Is(err, unix.EAGAIN) {
				r.Again++
				break // UDP may lose it
			}
			if err != nil {
				return nil, answered, fmt.Errorf("waiting for the answer: %w", err)
			}
			if n < 12 || !bytes.Equal(r.buffer[:2], question[:2]) {
				continue // late, of a question asked twice
			}
			if records := int(r.buffer[6])<<8 | int(r.buffer[7]); records != 1 {
				return nil, answered, fmt.Errorf("%d records in answer to one question, code %d", records, r.buffer[3]&15)
			}
			return r.buffer[n-size : n], answered, nil
		}
	}
	return nil, answered, errors.New("three questions without an answer")
}
