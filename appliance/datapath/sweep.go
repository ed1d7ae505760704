package datapath

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// How long a flow stays in the table without a packet. An established TCP connection stays for as long as
// its client has room: only the endpoints know whether it is over (RFC 5382 §5 asks for two hours at least).
// UDP is kept for longer than RFC 4787 §4.3 asks, and than the proxy keeps its own sessions.
const (
	sweepEvery      = 10 * time.Second
	idleOpening     = 60 * time.Second
	idleClosing     = 4 * time.Minute // twice the maximum segment lifetime, RFC 9293 §3.4.2
	idleEstablished = 24 * time.Hour
	idleUDP         = 10 * time.Minute
	idleOther       = 60 * time.Second
)

func idleLimit(k gatewayFlowKey, v gatewayFlow) time.Duration {
	switch {
	case isOpenProxiedTCP(k, v):
		return idleEstablished
	case gatewayFlowState(v.State) == gatewayFlowStateFLOW_OPENING:
		return idleOpening
	case gatewayFlowState(v.State) == gatewayFlowStateFLOW_CLOSING:
		return idleClosing
	case v.Verdict == uint8(gatewayVerdictVERDICT_BLOCK):
		return idleOpening
	case k.Protocol == unix.IPPROTO_TCP:
		return idleEstablished
	case k.Protocol == unix.IPPROTO_UDP:
		return idleUDP
	}
	return idleOther
}

// isOpenProxiedTCP: the program calls a proxied connection established when it finds its socket for a packet with
// data. One that has only shaken hands is open all the same.
func isOpenProxiedTCP(k gatewayFlowKey, v gatewayFlow) bool {
	return k.Protocol == unix.IPPROTO_TCP && isProxied(v) &&
		v.State == uint8(gatewayFlowStateFLOW_OPENING) && v.Packets > 1
}

// mayBeCarried: a proxied connection is over when its socket is gone. A client that has been sent a reset, by the proxy or by the kernel
// for a daemon that died, says nothing to that, so its entry does not tell.
func mayBeCarried(k gatewayFlowKey, v gatewayFlow) bool {
	return k.Protocol == unix.IPPROTO_TCP && isProxied(v)
}

// carries asks the kernel by the program of that name. Where that fails a flow is kept.
func (g *generation) carries(k gatewayFlowKey) bool {
	const tcxDrop = 2
	in := make([]byte, binary.Size(k))
	if _, err := binary.Encode(in, binary.NativeEndian, k); err != nil {
		return true
	}
	code, _, err := g.objects.IsCarried.Test(in)
	return err != nil || code != tcxDrop
}

// Sweep removes flows that are over, until ctx ends, and recounts what each client holds.
func (d *Datapath) Sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := d.sweep(); err != nil {
				d.log.Warn("sweeping the flow table", "error", err)
			}
		}
	}
}

type agedFlow struct {
	key  gatewayFlowKey
	seen uint64
}

func (d *Datapath) sweep() error {
	used, names, err := d.sweepState()
	if err != nil {
		return err
	}
	if err := d.learning.sweep(names); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for number := range d.rules {
		if !used[number] && d.generation != nil && number != d.generation.number {
			delete(d.rules, number)
		}
	}
	return nil
}

// sweepState returns the generations that live flows are of, and where they lead to.
func (d *Datapath) sweepState() (used map[uint32]bool, names map[gatewayNameKey]bool, err error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return nil, nil, nil
	}
	now, err := d.generation.now()
	if err != nil {
		return nil, nil, err
	}
	used, names, err = d.state.sweep(now, d.generation)
	if err != nil {
		return nil, nil, err
	}
	own, err := d.ownEntries()
	for _, e := range own {
		used[e.Socket.Flow.Generation] = true
		names[gatewayNameKey{Client: boxKey(), Address: e.Key.Destination}] = true
	}
	return used, names, err
}

// sweep is one round, at a time of a generation's clock. It returns the generations that the flows it leaves are of, and the
// addresses that clients have such flows to.
func (s *state) sweep(now uint64, g *generation) (used map[uint32]bool, names map[gatewayNameKey]bool, err error) {
	used, names = map[uint32]bool{}, map[gatewayNameKey]bool{}
	c := g.clock
	held := map[gatewayClientKey][]agedFlow{}
	var over []gatewayFlowKey
	err = eachFlow(s.maps.Flows, func(k gatewayFlowKey, v gatewayFlow) {
		idle := c.since(now, v.LastSeen)
		if idle > idleLimit(k, v) || idle > idleClosing && mayBeCarried(k, v) && !g.carries(k) {
			over = append(over, k)
			return
		}
		used[v.Generation] = true
		client := clientOf(k, v)
		names[gatewayNameKey{Client: client, Address: k.Destination}] = true
		held[client] = append(held[client], agedFlow{k, v.LastSeen})
	})
	if err != nil {
		return nil, nil, err
	}
	err = eachFlow(s.maps.CrowdFlows, func(k gatewayFlowKey, v gatewayFlow) {
		if c.since(now, v.LastSeen) <= idleLimit(k, v) {
			used[v.Generation] = true
			names[gatewayNameKey{Client: clientOf(k, v), Address: k.Destination}] = true
		}
	})
	if err != nil {
		return nil, nil, err
	}
	over = append(over, s.overfull(held)...)
	if err := errors.Join(deleteFlows(s.maps.Flows, over), s.sweepOrigins()); err != nil {
		return nil, nil, err
	}
	return used, names, s.recount(held)
}

// sweepOrigins removes those of flows that are in no table any more. The programs write an origin a moment before its flow: by the time that
// all were read, the flow is there.
func (s *state) sweepOrigins() error {
	var key gatewayFlowKey
	var origin gatewayOrigin
	var keys, gone []gatewayFlowKey
	origins := s.maps.Origins.Iterate()
	for origins.Next(&key, &origin) {
		keys = append(keys, key)
	}
	if err := origins.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("reading who opened the flows: %w", err)
	}
	for _, k := range keys {
		var v gatewayFlow
		if !slices.ContainsFunc(s.flowTables(), func(m *ebpf.Map) bool { return m.Lookup(k, &v) == nil }) {
			gone = append(gone, k)
		}
	}
	return deleteFlows(s.maps.Origins, gone)
}

// overfull chooses what to give up when the table is nearly full, whoever filled it: the least recently
// used flows of the clients that hold most. It takes them out of held.
func (s *state) overfull(held map[gatewayClientKey][]agedFlow) []gatewayFlowKey {
	total, limit := 0, int(s.maps.Flows.MaxEntries())*7/8
	clients := make([]gatewayClientKey, 0, len(held))
	for c, flows := range held {
		total += len(flows)
		clients = append(clients, c)
	}
	if total <= limit {
		return nil
	}
	slices.SortFunc(clients, func(a, b gatewayClientKey) int { return cmp.Compare(len(held[b]), len(held[a])) })
	var over []gatewayFlowKey
	for _, c := range clients {
		if total <= limit {
			break
		}
		flows := held[c]
		slices.SortFunc(flows, func(a, b agedFlow) int { return cmp.Compare(a.seen, b.seen) })
		n := min((len(flows)+1)/2, total-limit)
		for _, f := range flows[:n] {
			over = append(over, f.key)
		}
		held[c] = flows[n:]
		total -= n
	}
	return over
}

func deleteFlows(table *ebpf.Map, keys []gatewayFlowKey) error {
	for _, k := range keys {
		if err := table.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("removing a flow: %w", err)
		}
	}
	return nil
}

// recount writes what each client holds. The programs count up meanwhile, so a count may be a few flows
// too low until the next round: a share is not a limit of correctness.
func (s *state) recount(held map[gatewayClientKey][]agedFlow) error {
	var key gatewayClientKey
	var client gatewayClient
	counts := map[gatewayClientKey]gatewayClient{}
	clients := s.maps.Clients.Iterate()
	for clients.Next(&key, &client) {
		counts[key] = client
	}
	if err := clients.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("reading the clients: %w", err)
	}
	for key, client := range counts {
		n := uint32(len(held[key]))
		if client.Flows == n {
			continue
		}
		client.Flows = n
		err := s.maps.Clients.Update(key, client, ebpf.UpdateExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("recounting a client's flows: %w", err)
		}
	}
	return nil
}
