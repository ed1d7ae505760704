/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Names: which packets teach them, what is known of a destination, and whose first bytes tell. */
#ifndef SIDEGATE_NAMES_H
#define SIDEGATE_NAMES_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "client.h"
#include "config.h"
#include "maps.h"
#include "parse.h"
#include "quic.h"
#include "types.h"

#define DNS_PORT 53

static __always_inline bool is_question(const struct flow_key *key)
{
	return intercept_dns && key->destination_port == bpf_htons(DNS_PORT) &&
	       (key->protocol == IPPROTO_UDP || key->protocol == IPPROTO_TCP);
}

static __always_inline bool is_resolver(const struct address *a)
{
	return bpf_map_lookup_elem(&resolvers, a);
}

/* So that the daemon, which sees only the address, knows who asks. */
static __always_inline void remember_asker(struct __sk_buff *skb, const struct packet *p)
{
	struct asker *known, asker = { .interface = skb->ifindex };

	if (p->link_length)
		bpf_skb_load_bytes(skb, 6, asker.mac, sizeof(asker.mac));
	known = bpf_map_lookup_elem(&askers, &p->key.source);
	if (known && known->interface == asker.interface &&
	    !__builtin_memcmp(known->mac, asker.mac, sizeof(asker.mac)))
		return;
	bpf_map_update_elem(&askers, &p->key.source, &asker, BPF_ANY);
}

/*
 * The names by which the client knows the destination; else those by which anybody does. Returned as
 * one word, flags above the class, so that the caller's facts need not lie in memory: stack is scarce.
 */
static __noinline __u64 find_name(const struct packet *p, const __u8 *mac)
{
	struct name_key key = { .address = p->key.destination };
	struct name *name;

	client_identify(p, mac, &key.client);
	name = bpf_map_lookup_elem(&names, &key);
	if (!name) {
		__builtin_memset(&key.client, 0, sizeof(key.client));
		name = bpf_map_lookup_elem(&names, &key);
	}
	if (name)
		return (__u64)name->flags << 32 | name->class;
	return (__u64)(sniff == SNIFF_UNKNOWN ? NAME_ANY : NAME_CERTAIN) << 32;
}

/* Any TCP connection; of UDP only what begins like QUIC, all else has no name to tell. */
static __always_inline bool can_sniff(struct __sk_buff *skb, const struct packet *p)
{
	return p->key.protocol == IPPROTO_TCP ||
	       (quic_packet(skb, p) != QUIC_OTHER && quic_fills_initial(p));
}

#endif
