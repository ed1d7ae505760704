/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a flow's verdict does to each of its packets: left to the kernel, given to a socket, refused.
 *
 * Functions that are not static are checked by the verifier once, by themselves, and not again at each
 * call for every state that leads there. The price is that they must not trust their pointers.
 */
#ifndef SIDEGATE_ACT_H
#define SIDEGATE_ACT_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "client.h"
#include "config.h"
#include "maps.h"
#include "parse.h"
#include "reject.h"
#include "types.h"

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

/* The TCP socket that the packet belongs to, if it is more than a listener; to be released. */
static __always_inline struct bpf_sock *tcp_socket(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(p, &tuple);
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);

	if (!sk || sk->state != BPF_TCP_LISTEN)
		return sk;
	bpf_sk_release(sk);
	return NULL;
}

/* The state of that socket; 0 if there is none. */
static __always_inline __u32 tcp_socket_state(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock *sk = tcp_socket(skb, p);
	__u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state;
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
	if (on_failure != ON_FAILURE_DIRECT || p->key.protocol != IPPROTO_UDP)
		return drop(REASON_NO_LISTENER);
	if (flow->verdict == VERDICT_SNIFF && flow->decided == VERDICT_BLOCK) {
		flow->verdict = VERDICT_BLOCK;
		return drop(REASON_RULE_BLOCK);
	}
	flow->verdict = VERDICT_DIRECT;
	return pass_marked(skb, flow->mark);
}

static __always_inline int to_listener(struct __sk_buff *skb, const struct packet *p,
				       struct flow *flow)
{
	__u32 slot = listener_slot(p, flow->verdict);
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &slot);

	if (!sk)
		return without_listener(skb, p, flow);
	if (flow->verdict == VERDICT_DNS && client_over_questions(skb, p)) {
		bpf_sk_release(sk);
		return drop(REASON_DNS_RATE);
	}
	if (flow->verdict != VERDICT_DNS && client_over_rate(skb, p)) {
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

/* The socket that the proxy has for just this flow, to be released. */
static __always_inline struct bpf_sock *udp_socket(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(p, &tuple);
	struct bpf_sock *sk = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);

	if (!sk || sk->state == BPF_TCP_ESTABLISHED)
		return sk;
	bpf_sk_release(sk);
	return NULL;
}

static __always_inline bool has_udp_socket(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock *sk = udp_socket(skb, p);

	if (sk)
		bpf_sk_release(sk);
	return sk;
}

/* Until the proxy has a socket for the flow, packets reach the listener. */
static __always_inline int proxy_udp(struct __sk_buff *skb, const struct packet *p,
				     struct flow *flow)
{
	struct bpf_sock *sk = udp_socket(skb, p);

	return sk ? assign(skb, p, sk) : to_listener(skb, p, flow);
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
	case VERDICT_SNIFF:
		return proxy(skb, p, flow);
	case VERDICT_BLOCK:
		return refuse(skb, p, flow);
	}
	return drop(REASON_POLICY_MISSING);
}

#endif
