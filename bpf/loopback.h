/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the box's own sockets send into lo to be proxied (ingress of lo). All else that passes there is let by at a glance. */
#ifndef SIDEGATE_LOOPBACK_H
#define SIDEGATE_LOOPBACK_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "own.h"
#include "related.h"
#include "types.h"

/* By the socket's mark or, where there is none (a datagram's, a reset's of a socket that is gone), by the source. */
static __noinline bool own_is_steered(struct __sk_buff *skb)
{
	struct address pair[2];
	__be32 source;

	if ((skb->mark & MARK_MASK) == MARK_PROXY)
		return true;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return !bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), &source,
					   sizeof(source)) &&
		       bpf_ntohl(source) >> 16 == OWN_PREFIX4;
	return skb->protocol == bpf_htons(ETH_P_IPV6) &&
	       !bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), pair,
				   sizeof(pair)) &&
	       is_own_source(&pair[0]) && !is_loopback(&pair[1]) && !is_own(&pair[1]);
}

/* Puts the address back that a datagram's socket is bound to. */
static __noinline bool own_restore(struct __sk_buff *skb, struct packet *p, __u32 number)
{
	struct address *source = bpf_map_lookup_elem(&own_numbers, &number);
	struct address old = p->key.source;
	__u32 checksum = p->transport + offsetof(struct udphdr, check);
	__u64 flags = BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0;

	if (!source || p->key.protocol != IPPROTO_UDP)
		return false;
	p->key.source = *source;
	if (p->ipv6)
		return !bpf_l4_csum_replace(skb, checksum, 0,
					    bpf_csum_diff((__be32 *)&old, sizeof(old),
							  (__be32 *)source, sizeof(*source), 0),
					    flags) &&
		       !bpf_skb_store_bytes(skb, p->link_length + offsetof(struct ipv6hdr, saddr),
					    source, sizeof(*source), 0);
	return !bpf_l4_csum_replace(skb, checksum, old.w[3], source->w[3],
				    flags | sizeof(__be32)) &&
	       !bpf_l3_csum_replace(skb, p->link_length + offsetof(struct iphdr, check), old.w[3],
				    source->w[3], sizeof(__be32)) &&
	       !bpf_skb_store_bytes(skb, p->link_length + offsetof(struct iphdr, saddr),
				    &source->w[3], sizeof(__be32), 0);
}

static __always_inline __u32 answer_tuple(const struct packet *p, struct bpf_sock_tuple *tuple)
{
	if (p->ipv6) {
		__builtin_memcpy(tuple->ipv6.saddr, &p->key.destination, 16);
		__builtin_memcpy(tuple->ipv6.daddr, &p->key.source, 16);
		tuple->ipv6.sport = p->key.destination_port;
		tuple->ipv6.dport = p->key.source_port;
		return sizeof(tuple->ipv6);
	}
	tuple->ipv4.saddr = p->key.destination.w[3];
	tuple->ipv4.daddr = p->key.source.w[3];
	tuple->ipv4.sport = p->key.destination_port;
	tuple->ipv4.dport = p->key.source_port;
	return sizeof(tuple->ipv4);
}

/* The box's own socket that a packet comes from, to be released: it is the one that an answer would go to. */
static __always_inline struct bpf_sock *own_sender(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = answer_tuple(p, &tuple);

	if (p->key.protocol == IPPROTO_TCP)
		return bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	return bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
}

static __always_inline int own_act(struct __sk_buff *skb, const struct packet *p, struct flow *flow)
{
	if (flow->verdict == VERDICT_BLOCK)
		return drop(flow->reject ? REASON_RULE_REJECT : REASON_RULE_BLOCK);
	return proxy(skb, p, flow); /* what is direct, too: it is here, and the proxy sends it on */
}

/* What was decided when the packet's socket connected, if it did, and who opened it. */
static __noinline void own_recall(struct __sk_buff *skb, const struct packet *p, struct flow *flow)
{
	struct bpf_sock *sk = own_sender(skb, p);
	struct own_socket *own;

	/* a look-up takes no lock: while another socket moves in the table it may miss this one */
	if (!sk)
		sk = own_sender(skb, p);
	if (!sk)
		return;
	own = bpf_sk_storage_get(&own_sockets, sk, NULL, 0);
	if (own) {
		*flow = own->flow;
		bpf_map_update_elem(&origins, &p->key, &own->origin, BPF_ANY);
	}
	bpf_sk_release(sk);
}

/* Records a flow of the box that has come to lo. `old` is what an earlier connection of the same ports left. */
__noinline int own_begin(struct __sk_buff *skb, const struct packet *p, struct flow *old)
{
	struct origin *origin;
	struct flow flow = {};

	if (!p)
		return drop(REASON_POLICY_MISSING);
	own_recall(skb, p, &flow);
	origin = bpf_map_lookup_elem(&origins, &p->key);
	if (flow.verdict == VERDICT_INVALID &&
	    (!origin || own_decide(p, &origin->process, own_name(p), &flow)))
		return drop(REASON_OWN_UNKNOWN);
	flow.packets = 1;
	flow.bytes = skb->len;
	if (old)
		*old = flow;
	else
		flow_record(own_client(), &p->key, &flow);
	return own_act(skb, p, &flow);
}

/* Whether a flow is what an earlier socket of the same port has left. UDP has no SYN to tell. */
static __noinline bool own_is_left(struct __sk_buff *skb, const struct packet *p,
				   const struct flow *flow)
{
	struct bpf_sock *sk;
	struct own_socket *own;
	bool left;

	if (p->key.protocol != IPPROTO_UDP)
		return false;
	sk = own_sender(skb, p);
	if (!sk)
		return false;
	own = bpf_sk_storage_get(&own_sockets, sk, NULL, 0);
	left = own && own->flow.owner != flow->owner;
	bpf_sk_release(sk);
	return left;
}

static __always_inline int own_flow_packet(struct __sk_buff *skb, const struct packet *p)
{
	struct flow *flow = flow_lookup(&p->key);

	if (p->key.protocol == IPPROTO_TCP && !opens_tcp(p)) {
		if (flow)
			flow_seen(skb, p, flow);
		return tcp_socket_state(skb, p) ? pass() : drop(REASON_OWN_UNKNOWN);
	}
	if (!flow || opens_tcp(p) || opens_quic(skb, p, flow) || own_is_left(skb, p, flow))
		return own_begin(skb, p, flow);
	flow_seen(skb, p, flow);
	return own_act(skb, p, flow);
}

static __always_inline bool own_give(struct __sk_buff *skb, const struct packet *p,
				     struct bpf_sock *sk)
{
	bool given = p->fragment || !bpf_sk_assign(skb, sk, 0);

	bpf_sk_release(sk);
	return given;
}

/* Two functions: to the verifier what the two look-ups find are different kinds of pointers, and one call cannot have both. */
static __noinline bool own_receives_tcp(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock *sk = tcp_socket(skb, p);

	return sk && own_give(skb, p, sk);
}

static __noinline bool own_receives_udp(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(p, &tuple);
	struct bpf_sock *sk = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);

	return sk && own_give(skb, p, sk);
}

/*
 * Gives what the daemon sends in a server's name to the socket that it is for; says whether there is one. Were it only looked for,
 * it could be closed before the kernel looks again; closed while it has the packet, it says nothing.
 */
static __always_inline bool own_receives(struct __sk_buff *skb, const struct packet *p)
{
	return p->key.protocol == IPPROTO_TCP ? own_receives_tcp(skb, p) : own_receives_udp(skb, p);
}

/*
 * What the daemon sends in a server's name to a socket that is gone. The kernel would answer in the name of no socket, so without
 * a mark: where the address is one of the box's own, its reset or ICMP error would leave for that server. The daemon is told here.
 */
__noinline int own_gone(struct __sk_buff *skb, const struct packet *p)
{
	if (!p)
		return drop(REASON_POLICY_MISSING);
	count_reason(REASON_OWN_GONE);
	if (p->key.protocol != IPPROTO_TCP || p->tcp_flags & TCP_RST || p->fragment)
		return TCX_DROP;
	steer(skb);
	return reject_tcp(skb, p);
}

static __always_inline int own_answer(struct __sk_buff *skb, struct packet *p)
{
	if (parse(skb, p, ETH_HLEN) != PARSED_FLOW || p->fragment == FRAGMENT_LATER ||
	    !network_bits(p->key.protocol) || is_loopback(&p->key.destination) ||
	    !own_leaves(&p->key.source) || own_receives(skb, p))
		return pass();
	return own_gone(skb, p);
}

static __always_inline int own_gate(struct __sk_buff *skb)
{
	struct packet p = { .own = 1 };
	__u32 number;

	if (!own_is_steered(skb))
		return (skb->mark & MARK_MASK) == MARK_OWN ? own_answer(skb, &p) : pass();
	switch (parse(skb, &p, ETH_HLEN)) {
	case PARSED_DROP:
		return drop(p.reason);
	case PARSED_FLOW:
		break;
	default:
		return pass();
	}
	if (!own_leaves(&p.key.destination))
		return pass();
	number = own_number(&p.key.source);
	if (number && !own_restore(skb, &p, number))
		return drop(REASON_OWN_UNKNOWN);
	if (is_icmp_error(skb, &p))
		return icmp_error(skb, &p);
	return asks_dns(&p) ? question(skb, &p) : own_flow_packet(skb, &p);
}

#endif
