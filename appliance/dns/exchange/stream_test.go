package exchange

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestUnanswered has a server read questions and answer none, while who asks goes away each time: what
// the stream keeps of them is bounded, and an answer that comes late makes room for another question.
func TestUnanswered(t *testing.T) {
	noLeaks(t)
	ours, theirs := net.Pipe()
	s := newStream(ours)
	arrived := make(chan []byte)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		defer close(arrived)
		for {
			wire, err := readMessage(theirs)
			if err != nil {
				return
			}
			arrived <- wire
		}
	}()
	t.Cleanup(func() {
		s.close()
		theirs.Close()
		for range arrived {
		}
		<-finished
	})
	q := mustAsk(t, query("www.example.", dns.TypeA), shape{})
	// ask goes away as soon as the server has the question.
	ask := func() (wire []byte, err error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		asked := make(chan error, 1)
		go func() {
			_, err := s.ask(ctx, q)
			asked <- err
		}()
		select {
		case wire = <-arrived:
			cancel()
			return wire, <-asked
		case err := <-asked:
			return nil, err
		}
	}
	var last []byte
	for i := range maxUnanswered {
		var err error
		if last, err = ask(); !errors.Is(err, context.Canceled) {
			t.Fatalf("question %d: %v", i+1, err)
		}
	}
	if wire, err := ask(); wire != nil || err == nil || err.Error() != "the server left 1024 questions unanswered" {
		t.Errorf("%d bytes of one question more were sent: %v", len(wire), err)
	}
	if _, err := theirs.Write(frame(pack(honest(unpack(last))))); err != nil {
		t.Fatal(err)
	}
	if !eventually(5*time.Second, func() bool {
		_, err := ask()
		return errors.Is(err, context.Canceled)
	}) {
		t.Error("an answer made no room")
	}
}
