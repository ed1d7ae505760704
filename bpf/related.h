/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Packets that follow another packet's decision: later fragments, and ICMP errors. */
#ifndef SIDEGATE_RELATED_H
#define SIDEGATE_RELATED_H

#include "bpf_helpers.h"
#include "flow.h"
#include "maps.h"
#include "parse.h"
#include "types.h"

static __always_inline void fragment_identify(const struct packet *p, struct fragment_key *key)
{
	key->source = p->key.source;
	key->destination = p->key.destination;
	key->id = p->fragment_id;
	/* IPv6 has no protocol here: the next header of a later fragment may be another's */
	if (!p->ipv6)
		key->protocol = p->key.protocol;
}

/* Records what became of the first fragment: the mark it left with, or that it was dropped. */
static __noinline void remember_fragment(struct __sk_buff *skb, const struct packet *p, int result)
{
	struct fragment_key key = {};
	struct fragment fragment = { .mark = skb->mark };

	fragment_identify(p, &key);
	fragment.verdict = result == TCX_NEXT ? VERDICT_PASS : VERDICT_BLOCK;
	bpf_map_update_elem(&fragments, &key, &fragment, BPF_ANY);
}

__noinline int later_fragment(struct __sk_buff *skb, const struct packet *p)
{
	struct fragment_key key = {};
	struct fragment *first;

	if (!p)
		return drop(REASON_POLICY_MISSING);
	fragment_identify(p, &key);
	first = bpf_map_lookup_elem(&fragments, &key);
	if (!first)
		return is_own(&p->key.destination) ? pass() : drop(REASON_FRAGMENT_UNKNOWN);
	if (first->verdict == VERDICT_BLOCK)
		return drop(REASON_RULE_BLOCK);
	skb->mark = first->mark;
	return pass();
}

/* Types that carry the packet they are about (RFC 792, RFC 4443). */
static __always_inline bool is_icmp_error(struct __sk_buff *skb, const struct packet *p)
{
	__u8 type;

	if (p->key.protocol != (p->ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) ||
	    !load(skb, p, p->transport, &type, sizeof(type)))
		return false;
	if (p->ipv6)
		return type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB;
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED ||
	       type == ICMP_PARAMETERPROB;
}

/* The flow that the quoted packet answers, read the client's way round. */
static __always_inline bool quoted_flow(struct __sk_buff *skb, const struct packet *p,
					struct flow_key *key)
{
	__u32 quoted = p->transport + 8;
	__be16 ports[2] = {};
	struct ipv6hdr ip6;
	struct iphdr ip4;

	if (p->ipv6) {
		if (!load(skb, p, quoted, &ip6, sizeof(ip6)))
			return false;
		__builtin_memcpy(&key->source, &ip6.daddr, sizeof(key->source));
		__builtin_memcpy(&key->destination, &ip6.saddr, sizeof(key->destination));
		key->protocol = ip6.nexthdr;
		quoted += sizeof(ip6);
	} else {
		if (!load(skb, p, quoted, &ip4, sizeof(ip4)))
			return false;
		map_ipv4(&key->source, ip4.daddr);
		map_ipv4(&key->destination, ip4.saddr);
		key->protocol = ip4.protocol;
		quoted += ip4.ihl * 4;
	}
	if (!load(skb, p, quoted, ports, sizeof(ports)))
		return false;
	key->source_port = ports[1];
	key->destination_port = ports[0];
	return true;
}

/*
 * An ICMP error goes the way of its flow: to the proxy's socket, which sent the packet that it is
 * about, or nowhere. All others pass: path MTU discovery depends on them.
 */
__noinline int icmp_error(struct __sk_buff *skb, const struct packet *p)
{
	struct flow_key key = {};
	struct flow *flow;

	if (!p)
		return drop(REASON_POLICY_MISSING);
	if (!quoted_flow(skb, p, &key))
		return pass();
	if (is_question(&key))
		return steer(skb);
	flow = flow_lookup(&key);
	if (!flow)
		return pass();
	if (needs_daemon(flow))
		return steer(skb);
	if (flow->verdict == VERDICT_BLOCK)
		return drop(REASON_RULE_BLOCK);
	return pass_marked(skb, flow->mark);
}

#endif
