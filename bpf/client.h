/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Clients, and what each may claim of what all share. */
#ifndef SIDEGATE_CLIENT_H
#define SIDEGATE_CLIENT_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "config.h"
#include "maps.h"
#include "parse.h"
#include "types.h"

#define SECOND 1000000000ULL

/* By whatever address it speaks, the box itself is one client. */
static __always_inline void client_box(struct client_key *key)
{
	key->w[2] = bpf_htonl(0xffff);
	key->w[3] = bpf_htonl(OWN_SOURCE4);
}

static __always_inline void client_identify(const struct packet *p, const __u8 *mac,
					    struct client_key *key)
{
	if (p->own) {
		client_box(key);
		return;
	}
	__builtin_memcpy(key->w, mac, 6);
	if (key->w[0] || key->w[1])
		return;
	key->w[0] = p->key.source.w[0];
	key->w[1] = p->key.source.w[1];
	key->w[2] = p->ipv6 ? 0 : p->key.source.w[2];
	key->w[3] = p->ipv6 ? 1 : p->key.source.w[3]; /* else a prefix could look like a MAC */
}

static __always_inline struct client *client_by(const struct client_key *key)
{
	struct client fresh = {}, *client = bpf_map_lookup_elem(&clients, key);

	if (client)
		return client;
	bpf_map_update_elem(&clients, key, &fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&clients, key);
}

static __noinline struct client *client_of(struct __sk_buff *skb, const struct packet *p)
{
	struct client_key key = {};
	__u8 mac[6] = {};

	if (p->link_length && !p->own)
		bpf_skb_load_bytes(skb, 6, mac, sizeof(mac));
	client_identify(p, mac, &key);
	return client_by(&key);
}

static __always_inline struct client *client_this_second(struct __sk_buff *skb,
							 const struct packet *p)
{
	struct client *client = client_of(skb, p);
	__u64 second = bpf_ktime_get_coarse_ns() / SECOND;

	if (client && client->second != second) {
		client->second = second;
		client->fresh = 0;
		client->questions = 0;
	}
	return client;
}

/*
 * A listener's queue is shared by all clients: one that fills it faster than the daemon empties it
 * would cost the others their first packets.
 */
static __always_inline bool client_over_rate(struct __sk_buff *skb, const struct packet *p)
{
	struct client *client = client_this_second(skb, p);

	return !client || ++client->fresh > client_fresh;
}

static __always_inline bool client_over_questions(struct __sk_buff *skb, const struct packet *p)
{
	struct client *client = client_this_second(skb, p);

	return !client || ++client->questions > client_questions;
}

#endif
