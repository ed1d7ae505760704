/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Redirects (RFC 4861 §4.5): how a router tells a client of a shorter way than through itself. */
#ifndef SIDEGATE_REDIRECT_H
#define SIDEGATE_REDIRECT_H

#include "bpf_helpers.h"
#include "act.h"
#include "types.h"

#define ICMPV6_REDIRECT 137

/* declared for __sk_buff, takes the kernel's own too */
extern int bpf_dynptr_from_skb(struct __sk_buff *skb, __u64 flags, struct bpf_dynptr *ptr) __ksym;

static __always_inline bool is_redirect(struct sk_buff *skb)
{
	struct bpf_dynptr packet;
	struct ipv6hdr ip;
	__u8 type;

	if (bpf_dynptr_from_skb((struct __sk_buff *)skb, 0, &packet) ||
	    bpf_dynptr_read(&ip, sizeof(ip), &packet, 0, 0) || ip.nexthdr != IPPROTO_ICMPV6 ||
	    bpf_dynptr_read(&type, sizeof(type), &packet, sizeof(ip), 0))
		return false;
	return type == ICMPV6_REDIRECT;
}

static __always_inline int netfilter_drop(enum reason reason)
{
	count_reason(reason);
	return NF_DROP;
}

#endif
