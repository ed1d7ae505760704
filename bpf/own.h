/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The box's own sockets: what the policy says of them, and by which addresses what they send is steered into lo.
 * socket.h asks where a socket connects or sends; loopback.h meets the packets.
 */
#ifndef SIDEGATE_OWN_H
#define SIDEGATE_OWN_H

#include "act.h"
#include "address.h"
#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "client.h"
#include "config.h"
#include "flow.h"
#include "maps.h"
#include "names.h"
#include "parse.h"
#include "policy.h"
#include "process.h"
#include "types.h"

/* Whether the gateway has anything to say about what the box sends there: it leaves the box, and is routed. */
static __always_inline bool own_leaves(const struct address *a)
{
	__u32 top = bpf_ntohl(a->w[0]);

	if (address_is_ipv4(a)) {
		if (!ipv4_is_routable(a->w[3]))
			return false;
	} else if (!(a->w[0] | a->w[1] | a->w[2] | a->w[3]) || top >> 24 == 0xff ||
		   top >> 22 == 0xfe80 >> 6) {
		return false;
	}
	return !is_loopback(a) && !is_own(a);
}

/* Where in the ring what is decided on a socket belongs. */
static __always_inline struct own_socket *recent_place(__u64 cookie)
{
	__u32 place = cookie % OWN_RECENT;

	return bpf_map_lookup_elem(&own_recent, &place);
}

/* A question that the daemon answers. */
static __always_inline bool asks_dns(const struct packet *p)
{
	return own_dns && is_question(&p->key);
}

/* The address that the policy takes for the source. */
static __always_inline void own_source(const struct packet *p, struct address *source)
{
	__u32 number = p->ipv6 ? OWN_NUMBER_SOURCE6 : OWN_NUMBER_SOURCE4;
	struct address *known = bpf_map_lookup_elem(&own_numbers, &number);

	*source = p->key.source;
	if (known && is_loopback(source))
		*source = *known;
}

static __noinline struct client *own_client(void)
{
	struct client_key key = {};

	client_box(&key);
	return client_by(&key);
}

/* What the box knows the destination by: find_name's word, looked up before own_decide, for stack is scarce. */
static __always_inline __u64 own_name(const struct packet *p)
{
	__u8 mac[6] = {};

	return uses_name ? find_name(p, mac) : 0;
}

/* Asks the policy about what a process sends; returns a reason if it has no answer. */
static __noinline __u32 own_decide(const struct packet *p, const struct process *process,
				   __u64 name, struct flow *flow)
{
	struct decision decision = {};
	struct facts facts = {
		.destination = p->key.destination,
		.source_port = p->key.source_port,
		.destination_port = p->key.destination_port,
		.network = network_bits(p->key.protocol),
		.ipv6 = p->ipv6,
		.interface = LOOPBACK_INDEX,
		.process = *process,
		.name.class = (__u32)name,
		.name.flags = sniff == SNIFF_OFF ? NAME_CERTAIN : name >> 32,
	};

	own_source(p, &facts.source);
	decide(&facts, &decision);
	flow->first_seen = bpf_jiffies64();
	flow->last_seen = flow->first_seen;
	flow->mark = decision.action.mark;
	flow->outbound = decision.action.outbound;
	flow->generation = generation;
	flow->rule = decision.rule;
	flow->verdict = decision.doubtful ? VERDICT_SNIFF : decision.action.verdict;
	flow->decided = decision.action.verdict;
	flow->reject = decision.action.reject;
	flow->state = FLOW_OPENING;
	return decision.reason;
}

static __always_inline bool own_needs_daemon(__u8 verdict)
{
	return verdict == VERDICT_PROXY || verdict == VERDICT_SNIFF || verdict == VERDICT_DNS;
}

/* With no daemon the owner's choice holds, from the start: a connection does not change sides later. */
static __always_inline void own_without_daemon(const struct packet *p, struct flow *flow)
{
	if (!own_needs_daemon(flow->verdict) || on_failure != ON_FAILURE_DIRECT ||
	    has_listener(p, flow->verdict))
		return;
	flow->verdict = flow->decided == VERDICT_BLOCK ? VERDICT_BLOCK : VERDICT_DIRECT;
}

#endif
