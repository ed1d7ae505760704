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
#include "config.h"
#include "flow.h"
#include "maps.h"
#include "names.h"
#include "parse.h"
#include "policy.h"
#include "process.h"
#include "types.h"

#define LOOPBACK_INDEX 1

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

/* Asks the policy on a socket's behalf; returns a reason if it has no answer. */
static __noinline __u32 own_decide(const struct packet *p, struct own_socket *own)
{
	struct decision decision = {};
	struct facts facts = {
		.destination = p->key.destination,
		.source_port = p->key.source_port,
		.destination_port = p->key.destination_port,
		.network = network_bits(p->key.protocol),
		.ipv6 = p->ipv6,
		.interface = LOOPBACK_INDEX,
		.process = own->origin.process,
	};
	__u8 mac[6] = {};
	__u64 name;

	own->first_seen = bpf_jiffies64();
	own_source(p, &facts.source);
	if (uses_name) {
		name = find_name(p, mac);
		facts.name.class = (__u32)name;
		facts.name.flags = sniff == SNIFF_OFF ? NAME_CERTAIN : name >> 32;
	}
	decide(&facts, &decision);
	own->mark = decision.action.mark;
	own->outbound = decision.action.outbound;
	own->generation = generation;
	own->rule = decision.rule;
	own->verdict = decision.doubtful ? VERDICT_SNIFF : decision.action.verdict;
	own->decided = decision.action.verdict;
	own->reject = decision.action.reject;
	return decision.reason;
}

static __always_inline bool own_needs_daemon(__u8 verdict)
{
	return verdict == VERDICT_PROXY || verdict == VERDICT_SNIFF || verdict == VERDICT_DNS;
}

/* With no daemon the owner's choice holds, from the start: a connection does not change sides later. */
static __always_inline __u8 own_without_daemon(const struct packet *p, __u8 verdict, __u8 decided)
{
	if (!own_needs_daemon(verdict) || on_failure != ON_FAILURE_DIRECT ||
	    has_listener(p, verdict))
		return verdict;
	return verdict == VERDICT_SNIFF && decided == VERDICT_BLOCK ? VERDICT_BLOCK :
								      VERDICT_DIRECT;
}

static __always_inline void own_flow(const struct packet *p, const struct own_socket *own,
				     struct flow *flow)
{
	flow->first_seen = bpf_jiffies64();
	flow->last_seen = flow->first_seen;
	flow->mark = own->mark;
	flow->outbound = own->outbound;
	flow->generation = own->generation;
	flow->rule = own->rule;
	flow->interface = 0;
	flow->verdict = own->verdict;
	flow->decided = own->decided;
	flow->reject = own->reject;
	flow->state = FLOW_OPENING;
}

#endif
