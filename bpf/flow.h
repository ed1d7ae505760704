/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A flow's life: found in the table, or decided and recorded. */
#ifndef SIDEGATE_FLOW_H
#define SIDEGATE_FLOW_H

#include "act.h"
#include "address.h"
#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "client.h"
#include "config.h"
#include "maps.h"
#include "names.h"
#include "parse.h"
#include "policy.h"
#include "quic.h"
#include "types.h"
#include "watch.h"

static __always_inline struct flow *flow_lookup(const struct flow_key *key)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);

	return flow ?: bpf_map_lookup_elem(&crowd_flows, key);
}

static __always_inline bool needs_daemon(const struct flow *flow)
{
	return flow->verdict == VERDICT_PROXY || flow->verdict == VERDICT_SNIFF;
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

/*
 * UDP has no SYN, but QUIC has Initials: a client that is past its handshake sends no more of them
 * (RFC 9001 §4.9.1), so one that comes later begins another connection of the same ports, which may
 * be meant for another site. Where the last one is direct that site's name decides. Where it is
 * proxied it stays so: programs have many connections on one socket, and the last one may live.
 */
static __always_inline bool opens_quic(struct __sk_buff *skb, const struct packet *p,
				       const struct flow *flow)
{
	return uses_name && sniff != SNIFF_OFF && flow->verdict == VERDICT_DIRECT &&
	       flow->state == FLOW_ESTABLISHED && quic_packet(skb, p) == QUIC_INITIAL;
}

static __always_inline bool is_opening(struct __sk_buff *skb, const struct packet *p,
				       const struct flow *flow)
{
	return is_proxied_tcp(p, flow) || quic_packet(skb, p) != QUIC_OTHER;
}

static __always_inline void flow_seen(struct __sk_buff *skb, const struct packet *p,
				      struct flow *flow)
{
	flow->last_seen = bpf_jiffies64();
	flow->packets++;
	flow->bytes += skb->len;
	if (flow->packets < WATCHED_PACKETS && flow->verdict == VERDICT_DIRECT)
		watch(skb, p, flow);
	if (p->tcp_flags & (TCP_FIN | TCP_RST))
		flow->state = FLOW_CLOSING;
	else if (flow->state == FLOW_OPENING && !is_opening(skb, p, flow))
		flow->state = FLOW_ESTABLISHED;
}

static __always_inline int flow_continue(struct __sk_buff *skb, const struct packet *p,
					 struct flow *flow)
{
	flow_seen(skb, p, flow);
	return act(skb, p, flow);
}

static __always_inline bool is_own(const struct address *a)
{
	return bpf_map_lookup_elem(&own_addresses, a);
}

/* Sent to the address by which the box is known: a comparison, where is_own is a search. Other own addresses may be there. */
__noinline int is_for_box(const struct packet *p)
{
	const struct address *box;
	__u32 number;

	if (!p)
		return false;
	number = p->ipv6 ? OWN_NUMBER_SOURCE6 : OWN_NUMBER_SOURCE4;
	box = bpf_map_lookup_elem(&own_numbers, &number);
	if (!box || p->key.destination.w[3] != box->w[3])
		return false;
	return !p->ipv6 ||
	       !((p->key.destination.w[0] ^ box->w[0]) | (p->key.destination.w[1] ^ box->w[1]) |
		 (p->key.destination.w[2] ^ box->w[2]));
}

/*
 * The reply of a service that was reached from outside, by UDP: there is no SYN to tell. A socket of the box itself that is bound
 * to no address may reply by each.
 */
static __always_inline bool is_published(const struct packet *p)
{
	struct published_key key = {
		.address = p->key.source,
		.port = p->key.source_port,
		.protocol = p->key.protocol,
	};

	if (p->own && is_loopback(&key.address))
		key.address.w[3] = 0;
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
	__u8 mac[6] = {};
	__u64 name;

	if (p->link_length)
		bpf_skb_load_bytes(skb, 6, mac, sizeof(mac));
	__builtin_memcpy(facts.mac, mac, sizeof(mac));
	if (uses_name) {
		name = find_name(p, mac);
		facts.name.class = (__u32)name;
		facts.name.flags = sniff == SNIFF_OFF ? NAME_CERTAIN : name >> 32;
	}
	decide(&facts, &decision);
	flow->mark = decision.action.mark;
	flow->outbound = decision.action.outbound;
	flow->rule = decision.rule;
	flow->verdict = decision.action.verdict;
	flow->reject = decision.action.reject;
	flow->dscp = facts.dscp;
	flow->decided = decision.action.verdict;
	__builtin_memcpy(flow->client_mac, mac, sizeof(mac));
	if (decision.doubtful && can_sniff(skb, p) &&
	    (on_failure != ON_FAILURE_DIRECT || has_listener(p, VERDICT_SNIFF)))
		flow->verdict = VERDICT_SNIFF;
	return decision.reason;
}

static __always_inline void count_rule(__u32 rule)
{
	__u64 *count = bpf_map_lookup_elem(&rule_flows, &rule);

	if (count)
		(*count)++;
}

/* In the flow table, or the crowd's for a client that is over its share. */
static __noinline void flow_record(struct client *client, const struct flow_key *key,
				   struct flow *flow)
{
	long err;

	if (client && client->flows < client_flows) {
		err = bpf_map_update_elem(&flows, key, flow, BPF_NOEXIST);
		if (!err)
			__sync_fetch_and_add(&client->flows, 1);
		if (!err || err == -EEXIST)
			return;
	}
	bpf_map_update_elem(&crowd_flows, key, flow, BPF_ANY);
}

/*
 * Whether the proxy has a socket for a UDP flow that is to be forwarded: somebody spoke to the client
 * through its upstream before the client spoke to him, or the flow's entry was lost. The kernel would
 * find that socket (early demux), and ip_forward drops what has one.
 */
static __always_inline bool must_be_handed_over(struct __sk_buff *skb, const struct packet *p,
						const struct flow *flow)
{
	return flow->verdict == VERDICT_DIRECT && p->key.protocol == IPPROTO_UDP && !p->fragment &&
	       has_udp_socket(skb, p);
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
	if (is_own_source(&p->key.source))
		return drop(REASON_OWN_FORGED);
	if (is_own(&p->key.destination) || is_published(p))
		return pass();
	reason = flow_decide(skb, p, &flow);
	if (reason)
		return drop(reason);
	if (must_be_handed_over(skb, p, &flow))
		flow.verdict = VERDICT_SNIFF;
	if (old && still_proxied(skb, p, &flow, old)) {
		flow.verdict = old->verdict;
		flow.outbound = old->outbound;
		flow.rule = old->rule;
		flow.generation = old->generation;
	} else if ((!old || old->state != FLOW_OPENING) && flow.verdict != VERDICT_SNIFF) {
		/* a SYN that comes again is the same flow */
		count_rule(flow.rule);
	}
	/* decided once: a connection cannot change sides when the daemon comes back */
	if (on_failure == ON_FAILURE_DIRECT && network_bits(p->key.protocol) &&
	    needs_daemon(&flow) && !has_listener(p, flow.verdict))
		flow.verdict = VERDICT_DIRECT;
	if (flow.verdict == VERDICT_DIRECT && opens_tcp(p))
		watch_begin(p, &flow, old);
	if (old)
		*old = flow;
	else
		flow_record(client_of(skb, p), &p->key, &flow);
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

/*
 * DNS from the LAN is answered by the daemon, whichever resolver was meant. There is no flow to
 * remember: the port says it all.
 */
__noinline int question(struct __sk_buff *skb, const struct packet *p)
{
	struct flow flow = {
		.verdict = VERDICT_DNS,
		.state = FLOW_OPENING,
		.mark = direct_mark,
		.rule = RULE_DEFAULT,
	};
	int result;

	if (!p)
		return drop(REASON_POLICY_MISSING);
	if (!p->own && is_own_source(&p->key.source))
		return drop(REASON_OWN_FORGED);
	if (!p->own && is_resolver(&p->key.source))
		return pass_marked(skb, direct_mark);
	if (is_published(p)) /* a name server's answer to a resolver that asks from this port */
		return pass();
	if (on_failure == ON_FAILURE_DIRECT && !has_listener(p, VERDICT_DNS))
		return is_own(&p->key.destination) ? pass() : pass_marked(skb, direct_mark);
	/* a SYN cookie leaves no socket: the listener knows its own, and resets what it does not */
	if (p->key.protocol == IPPROTO_TCP && tcp_socket_state(skb, p))
		return steer(skb);
	result = to_listener(skb, p, &flow);
	if (result == TCX_NEXT && !p->own)
		remember_asker(skb, p);
	return result;
}

/* Whose listener a packet is for that the kernel delivers locally: VERDICT_INVALID if not ours. */
static __always_inline __u32 lookup_verdict(const struct flow_key *key, __u32 interface)
{
	struct flow *flow;

	/* the box itself, and networks that are not the LAN, have their own resolvers */
	if (is_question(key)) {
		if (interface == LOOPBACK_INDEX ? own_dns && !is_loopback(&key->destination) &&
							  !is_own(&key->destination) :
						  !!bpf_map_lookup_elem(&interfaces, &interface))
			return VERDICT_DNS;
		return VERDICT_INVALID;
	}
	flow = flow_lookup(key);
	return flow && needs_daemon(flow) ? flow->verdict : VERDICT_INVALID;
}

static __always_inline int flow_packet(struct __sk_buff *skb, const struct packet *p)
{
	struct flow *flow;

	if (is_question(&p->key))
		return question(skb, p);
	/* the answers that the box's own connections get: unseen_tcp's verdict, before anything is looked up */
	if (p->key.protocol == IPPROTO_TCP && !opens_tcp(p) && is_for_box(p))
		return pass();
	flow = flow_lookup(&p->key);
	if (flow && !flow->interface) /* of the box itself, and such packets do not come here */
		return drop(REASON_OWN_FORGED);
	if (flow && !opens_tcp(p) && !opens_quic(skb, p, flow))
		return flow_continue(skb, p, flow);
	if (!flow && p->key.protocol == IPPROTO_TCP && !opens_tcp(p))
		return unseen_tcp(skb, p);
	return flow_begin(skb, p, flow);
}

#endif
