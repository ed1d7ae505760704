/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The watch on direct TCP. Its answers go another way, so that only what the client sends again tells
 * whether they come: its SYN, or the first bytes after it. appliance/datapath/halves.go reads it.
 */
#ifndef SIDEGATE_WATCH_H
#define SIDEGATE_WATCH_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "parse.h"
#include "types.h"

/* Later packets of a connection tell nothing that the first ones did not. */
#define WATCHED_PACKETS 32

static __always_inline __u16 low_half(__be32 sequence)
{
	return bpf_ntohl(sequence);
}

/* The same SYN once more, and not that of a new connection of the same ports. */
static __always_inline bool is_same_syn(const struct packet *p, const struct flow *old)
{
	return old->state == FLOW_OPENING && old->attempts && old->opening == low_half(p->sequence);
}

static __always_inline void count_attempt(struct flow *flow)
{
	if (flow->attempts < 0xff)
		flow->attempts++;
}

/* Data or a FIN: what the other end must acknowledge, or it is sent again. */
static __always_inline bool wants_acknowledgement(struct __sk_buff *skb, const struct packet *p)
{
	__u8 words; /* in its upper half: the header's length */

	if (p->tcp_flags & TCP_RST ||
	    !load(skb, p, p->transport + TCP_LENGTH_OFFSET, &words, sizeof(words)))
		return false;
	return p->tcp_flags & TCP_FIN || p->end > p->transport + (words >> 4) * 4;
}

static __always_inline void watch_begin(const struct packet *p, struct flow *flow,
					const struct flow *old)
{
	flow->opening = low_half(p->sequence);
	if (old && is_same_syn(p, old)) {
		flow->first_seen = old->first_seen;
		flow->packets += old->packets;
		flow->bytes += old->bytes;
		flow->attempts = old->attempts;
	}
	count_attempt(flow);
}

__noinline int watch(struct __sk_buff *skb, const struct packet *p, struct flow *flow)
{
	if (!p || !flow || p->key.protocol != IPPROTO_TCP)
		return 0;
	if (flow->state == FLOW_OPENING) /* what follows the SYN means that it was answered */
		flow->attempts = 0;
	if (low_half(p->sequence) == (__u16)(flow->opening + 1) && wants_acknowledgement(skb, p))
		count_attempt(flow);
	return 0;
}

#endif
