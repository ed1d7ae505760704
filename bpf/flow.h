/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Flow state: the table, the beginning of a flow, and what its verdict does to each packet. */
#ifndef SIDEGATE_FLOW_H
#define SIDEGATE_FLOW_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "config.h"
#include "maps.h"
#include "parse.h"
#include "policy.h"
#include "reject.h"
#include "types.h"

#define SECOND 1000000000ULL
#define DNS_PORT 53

/* Lets other programs on the hook, then the kernel, have the packet. */
static __always_inline int pass(void)
{
	return TCX_NEXT;
}

static __always_inline void count_reason(enum reason reason)
{
	__u32 index = reason;
	__u64 *count = bpf_map_lookup_elem(&drops, &index);

	if (count)
		(*count)++;
}

static __always_inline int drop(enum reason reason)
{
	count_reason(reason);
	return TCX_DROP;
}

static __always_inline int pass_marked(struct __sk_buff *skb, __u32 mark)
{
	skb->mark = (skb->mark & ~MARK_MASK) | mark;
	return TCX_NEXT;
}

/* The mark's route delivers the packet locally, whatever its destination. */
static __always_inline int steer(struct __sk_buff *skb)
{
	return pass_marked(skb, MARK_PROXY);
}

static __always_inline bool opens_tcp(const struct packet *p)
{
	return (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline struct flow *flow_lookup(const struct flow_key *key)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);

	return flow ?: bpf_map_lookup_elem(&crowd_flows, key);
}

/* --- clients and their shares --- */

static __always_inline void client_identify(const struct packet *p, const __u8 *mac,
					    struct client_key *key)
{
	__builtin_memcpy(key->w, mac, 6);
	if (key->w[0] || key->w[1])
		return;
	key->w[0] = p->key.source.w[0];
	key->w[1] = p->key.source.w[1];
	if (!p->ipv6) {
		key->w[2] = p->key.source.w[2];
		key->w[3] = p->key.source.w[3];
	}
}

static __always_inline struct client *client_of(struct __sk_buff *skb, const struct packet *p)
{
	struct client_key key = {};
	struct client fresh = {}, *client;
	__u8 mac[6] = {};

	if (p->link_length)
		bpf_skb_load_bytes(skb, 6, mac, sizeof(mac));
	client_identify(p, mac, &key);
	client = bpf_map_lookup_elem(&clients, &key);
	if (client)
		return client;
	bpf_map_update_elem(&clients, &key, &fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&clients, &key);
}

/*
 * A listener's queue is shared by all clients: one that fills it faster than the daemon empties it
 * would cost the others their first packets.
 */
static __always_inline bool client_over_rate(struct __sk_buff *skb, const struct packet *p)
{
	struct client *client = client_of(skb, p);
	__u64 second = bpf_ktime_get_coarse_ns() / SECOND;

	if (!client)
		return true;
	if (client->second != second) {
		client->second = second;
		client->fresh = 0;
	}
	return ++client->fresh > client_fresh;
}

/*
 * --- proxy: into a socket ---
 *
 * Functions that are not static are checked by the verifier once, by themselves, and not again at each
 * call for every state that leads there. The price is that they must not trust their pointers.
 */

/* Returns the size that tells the kernel the family. */
static __always_inline __u32 tuple_of(const struct packet *p, struct bpf_sock_tuple *tuple)
{
	if (p->ipv6) {
		__builtin_memcpy(tuple->ipv6.saddr, &p->key.source, 16);
		__builtin_memcpy(tuple->ipv6.daddr, &p->key.destination, 16);
		tuple->ipv6.sport = p->key.source_port;
		tuple->ipv6.dport = p->key.destination_port;
		return sizeof(tuple->ipv6);
	}
	tuple->ipv4.saddr = p->key.source.w[3];
	tuple->ipv4.daddr = p->key.destination.w[3];
	tuple->ipv4.sport = p->key.source_port;
	tuple->ipv4.dport = p->key.destination_port;
	return sizeof(tuple->ipv4);
}

/* The state of the TCP socket that the packet belongs to; 0 if none or only a listener. */
static __always_inline __u32 tcp_socket_state(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(p, &tuple);
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	__u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state == BPF_TCP_LISTEN ? 0 : state;
}

static __always_inline int assign(struct __sk_buff *skb, const struct packet *p,
				  struct bpf_sock *sk)
{
	long err = 0;

	/* Only the whole datagram can be given to a socket: proxy_lookup finds it then. */
	if (!p->fragment)
		err = bpf_sk_assign(skb, sk, 0);
	bpf_sk_release(sk);
	return err ? drop(REASON_ASSIGN_FAILED) : steer(skb);
}

static __always_inline __u32 listener_slot(const struct packet *p, __u8 verdict)
{
	__u32 slot = p->key.protocol == IPPROTO_TCP ? SOCKET_PROXY_TCP4 : SOCKET_PROXY_UDP4;

	if (verdict == VERDICT_DNS)
		slot += SOCKET_DNS_TCP4 - SOCKET_PROXY_TCP4;
	return slot + p->ipv6;
}

static __always_inline bool has_listener(const struct packet *p, __u8 verdict)
{
	__u32 slot = listener_slot(p, verdict);
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &slot);

	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* A flow that the daemon carried and can carry no more, for it is gone. */
static __always_inline int without_listener(struct __sk_buff *skb, const struct packet *p,
					    struct flow *flow)
{
	if (p->key.protocol == IPPROTO_TCP && !opens_tcp(p)) {
		/* no socket of the kernel answers for a foreign address, so we do */
		count_reason(REASON_NO_LISTENER);
		return p->tcp_flags & TCP_RST || p->fragment ? TCX_DROP : reject_tcp(skb, p);
	}
	if (on_failure == ON_FAILURE_DIRECT && p->key.protocol == IPPROTO_UDP) {
		flow->verdict = VERDICT_DIRECT;
		return pass_marked(skb, flow->mark);
	}
	return drop(REASON_NO_LISTENER);
}

static __always_inline int to_listener(struct __sk_buff *skb, const struct packet *p,
				       struct flow *flow)
{
	__u32 slot = listener_slot(p, flow->verdict);
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &slot);

	if (!sk)
		return without_listener(skb, p, flow);
	if (client_over_rate(skb, p)) {
		bpf_sk_release(sk);
		return drop(REASON_CLIENT_RATE);
	}
	return assign(skb, p, sk);
}

static __always_inline int proxy_tcp(struct __sk_buff *skb, const struct packet *p,
				     struct flow *flow)
{
	__u32 state;

	if (flow->state != FLOW_OPENING)
		return has_listener(p, flow->verdict) ? steer(skb) : without_listener(skb, p, flow);
	state = tcp_socket_state(skb, p);
	/* a request socket goes away with its timer, and a SYN cookie leaves none at all */
	if (state && state != BPF_TCP_NEW_SYN_RECV && !opens_tcp(p))
		flow->state = FLOW_ESTABLISHED;
	/* For a SYN that meets TIME_WAIT the kernel decides, and asks proxy_lookup for the listener. */
	return state ? steer(skb) : to_listener(skb, p, flow);
}

/* The proxy gives each flow a connected socket; until it exists packets reach the listener. */
static __always_inline int proxy_udp(struct __sk_buff *skb, const struct packet *p,
				     struct flow *flow)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(p, &tuple);
	struct bpf_sock *sk = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);

	if (sk && sk->state == BPF_TCP_ESTABLISHED)
		return assign(skb, p, sk);
	if (sk)
		bpf_sk_release(sk);
	return to_listener(skb, p, flow);
}

__noinline int proxy(struct __sk_buff *skb, const struct packet *p, struct flow *flow)
{
	if (!p || !flow)
		return drop(REASON_POLICY_MISSING);
	if (p->key.protocol == IPPROTO_TCP)
		return proxy_tcp(skb, p, flow);
	if (p->key.protocol == IPPROTO_UDP)
		return proxy_udp(skb, p, flow);
	return drop(REASON_NOT_PROXYABLE);
}

__noinline int refuse(struct __sk_buff *skb, const struct packet *p, const struct flow *flow)
{
	if (!p || !flow)
		return drop(REASON_POLICY_MISSING);
	if (!flow->reject)
		return drop(REASON_RULE_BLOCK);
	count_reason(REASON_RULE_REJECT);
	if (p->key.protocol == IPPROTO_TCP && !p->fragment)
		return reject_tcp(skb, p);
	return pass_marked(skb, MARK_REJECT);
}

static __always_inline int act(struct __sk_buff *skb, const struct packet *p, struct flow *flow)
{
	switch (flow->verdict) {
	case VERDICT_DIRECT:
		return pass_marked(skb, flow->mark);
	case VERDICT_PROXY:
	case VERDICT_DNS:
		return proxy(skb, p, flow);
	case VERDICT_BLOCK:
		return refuse(skb, p, flow);
	}
	return drop(REASON_POLICY_MISSING);
}

/* --- a flow's life --- */

static __always_inline bool needs_daemon(const struct flow *flow)
{
	return flow->verdict == VERDICT_PROXY || flow->verdict == VERDICT_DNS;
}

/* proxy_tcp itself sees when such a flow is established */
static __always_inline bool is_proxied_tcp(const struct packet *p, const struct flow *flow)
{
	return p->key.protocol == IPPROTO_TCP && needs_daemon(flow);
}

/*
 * A SYN that meets what an earlier, proxied connection of the same ports left in the kernel, TIME_WAIT
 * as a rule, cannot be forwarded: the stack gives the packet to that socket before it routes, and
 * ip_forward drops what has a socket. For that minute such a connection stays with its outbound.
 */
static __always_inline bool still_proxied(struct __sk_buff *skb, const struct packet *p,
					  const struct flow *flow, const struct flow *old)
{
	return flow->verdict == VERDICT_DIRECT && is_proxied_tcp(p, old) &&
	       tcp_socket_state(skb, p);
}

static __always_inline int flow_continue(struct __sk_buff *skb, const struct packet *p,
					 struct flow *flow)
{
	flow->last_seen = bpf_jiffies64();
	flow->packets++;
	flow->bytes += skb->len;
	if (p->tcp_flags & (TCP_FIN | TCP_RST))
		flow->state = FLOW_CLOSING;
	else if (flow->state == FLOW_OPENING && !is_proxied_tcp(p, flow))
		flow->state = FLOW_ESTABLISHED;
	return act(skb, p, flow);
}

static __always_inline bool is_own(const struct address *a)
{
	return bpf_map_lookup_elem(&own_addresses, a);
}

/* The reply of a service that was reached from outside, by UDP: there is no SYN to tell. */
static __always_inline bool is_published(const struct packet *p)
{
	struct published_key key = {
		.address = p->key.source,
		.port = p->key.source_port,
		.protocol = p->key.protocol,
	};

	return bpf_map_lookup_elem(&published, &key);
}

static __always_inline __u32 network_bits(__u8 protocol)
{
	return protocol == IPPROTO_TCP ? 1 : protocol == IPPROTO_UDP ? 2 : 0;
}

/* Asks the policy; returns a reason if it has no answer. */
static __noinline __u32 flow_decide(struct __sk_buff *skb, const struct packet *p,
				    struct flow *flow)
{
	struct decision decision = {};
	struct facts facts = {
		.source = p->key.source,
		.destination = p->key.destination,
		.source_port = p->key.source_port,
		.destination_port = p->key.destination_port,
		.network = network_bits(p->key.protocol),
		.ipv6 = p->ipv6,
		.dscp = p->dscp,
		.interface = skb->ifindex,
	};

	if (p->link_length)
		bpf_skb_load_bytes(skb, 6, facts.mac, sizeof(facts.mac));
	decide(&facts, &decision);
	flow->mark = decision.action.mark;
	flow->outbound = decision.action.outbound;
	flow->rule = decision.rule;
	flow->verdict = decision.action.verdict;
	flow->reject = decision.action.reject;
	__builtin_memcpy(flow->client_mac, facts.mac, sizeof(facts.mac));
	return decision.reason;
}

static __always_inline void count_rule(__u32 rule)
{
	__u64 *count = bpf_map_lookup_elem(&rule_flows, &rule);

	if (count)
		(*count)++;
}

static __noinline void flow_record(struct __sk_buff *skb, const struct packet *p, struct flow *flow)
{
	struct client *client = client_of(skb, p);
	long err;

	if (client && client->flows < client_flows) {
		err = bpf_map_update_elem(&flows, &p->key, flow, BPF_NOEXIST);
		if (!err)
			__sync_fetch_and_add(&client->flows, 1);
		if (!err || err == -EEXIST)
			return;
	}
	bpf_map_update_elem(&crowd_flows, &p->key, flow, BPF_ANY);
}

/* Decides a flow and records it. `old` is what an earlier connection of the same ports left. */
__noinline int flow_begin(struct __sk_buff *skb, const struct packet *p, struct flow *old)
{
	__u32 reason;
	struct flow flow = {
		.first_seen = bpf_jiffies64(),
		.packets = 1,
		.bytes = skb->len,
		.generation = generation,
		.interface = skb->ifindex,
		.state = FLOW_OPENING,
	};

	if (!p)
		return drop(REASON_POLICY_MISSING);
	flow.last_seen = flow.first_seen;
	if (intercept_dns && network_bits(p->key.protocol) &&
	    p->key.destination_port == bpf_htons(DNS_PORT)) {
		flow.verdict = VERDICT_DNS;
		flow.rule = RULE_DEFAULT;
		flow.mark = MARK_DIRECT;
	} else if (is_own(&p->key.destination) || is_published(p)) {
		return pass();
	} else {
		reason = flow_decide(skb, p, &flow);
		if (reason)
			return drop(reason);
		if (old && still_proxied(skb, p, &flow, old)) {
			flow.verdict = old->verdict;
			flow.outbound = old->outbound;
			flow.rule = old->rule;
			flow.generation = old->generation;
		} else if (!old || old->state != FLOW_OPENING) {
			/* a SYN that comes again is the same flow */
			count_rule(flow.rule);
		}
	}
	/* decided once: a connection cannot change sides when the daemon comes back */
	if (on_failure == ON_FAILURE_DIRECT && network_bits(p->key.protocol) &&
	    needs_daemon(&flow) && !has_listener(p, flow.verdict))
		flow.verdict = VERDICT_DIRECT;
	if (old)
		*old = flow;
	else
		flow_record(skb, p, &flow);
	return act(skb, p, &flow);
}

/*
 * Never hijack a connection whose beginning we did not see: it began before us, or outside. But
 * one whose entry is gone and whose socket is the proxy's (the local address is not the gateway's,
 * so the socket is transparent) must not leak.
 */
__noinline int unseen_tcp(struct __sk_buff *skb, const struct packet *p)
{
	if (!p)
		return drop(REASON_POLICY_MISSING);
	if (!is_own(&p->key.destination) && tcp_socket_state(skb, p))
		return steer(skb);
	return pass();
}

static __always_inline int flow_packet(struct __sk_buff *skb, const struct packet *p)
{
	struct flow *flow = flow_lookup(&p->key);

	if (flow && !opens_tcp(p))
		return flow_continue(skb, p, flow);
	if (!flow && p->key.protocol == IPPROTO_TCP && !opens_tcp(p))
		return unseen_tcp(skb, p);
	return flow_begin(skb, p, flow);
}

#endif
