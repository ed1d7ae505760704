/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The list of the box's own sockets that are direct: they have no entry in a table of flows, and their addresses are the sockets' own. */
#ifndef SIDEGATE_LIST_H
#define SIDEGATE_LIST_H

#include "bpf_core_read.h"
#include "bpf_helpers.h"
#include "own.h"
#include "parse.h"
#include "types.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__s64 counter;
} atomic64_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	__u16 skc_family;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
};

struct sock {
	struct socket *sk_socket;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};

#pragma clang attribute pop

/* A socket of IPv6 that speaks IPv4 has mapped addresses there. */
static __always_inline void list_addresses(struct sock_common *sk, struct flow_key *key)
{
	if (BPF_CORE_READ(sk, skc_family) == AF_INET6) {
		BPF_CORE_READ_INTO(&key->source, sk, skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&key->destination, sk, skc_v6_daddr);
		return;
	}
	map_ipv4(&key->source, BPF_CORE_READ(sk, skc_rcv_saddr));
	map_ipv4(&key->destination, BPF_CORE_READ(sk, skc_daddr));
}

/* Whether any program still has it. Of a whole socket: what the kernel makes of one for TIME_WAIT has no storage, and is not found. */
static __always_inline bool is_held(struct sock_common *sk)
{
	return BPF_CORE_READ((struct sock *)sk, sk_socket);
}

/* What was decided on a socket. It moves from the ring to the socket's own storage, for in the ring the next ones take its place. */
static __always_inline struct own_socket *list_find(struct sock_common *sk)
{
	struct own_socket *own = bpf_sk_storage_get(&own_sockets, sk, NULL, 0), *recent;
	__u64 cookie = BPF_CORE_READ(sk, skc_cookie.counter);

	if (own)
		return own;
	recent = recent_place(cookie);
	if (!recent || recent->flow.owner != cookie || recent->flow.verdict != VERDICT_DIRECT)
		return NULL;
	own = bpf_sk_storage_get(&own_sockets, sk, recent, BPF_SK_STORAGE_GET_F_CREATE);
	if (!own || own->flow.owner == cookie)
		return own;
	bpf_sk_storage_delete(&own_sockets, sk); /* it was just being overwritten */
	return NULL;
}

static __always_inline void list_socket(struct seq_file *seq, struct sock_common *sk, __u8 protocol)
{
	struct own_entry entry = {};
	struct own_socket *own;

	own = list_find(sk);
	if (!own || own->flow.verdict != VERDICT_DIRECT || !is_held(sk))
		return;
	list_addresses(sk, &entry.key);
	if (!own_leaves(&entry.key.destination)) /* it is connected no more, or to the box itself */
		return;
	entry.key.source_port = bpf_htons(BPF_CORE_READ(sk, skc_num));
	entry.key.destination_port = BPF_CORE_READ(sk, skc_dport);
	entry.key.protocol = protocol;
	entry.socket = *own;
	bpf_seq_write(seq, &entry, sizeof(entry));
}

#endif
