/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The list of the box's own sockets that something was decided on: what is direct has no entry in a table of flows. */
#ifndef SIDEGATE_LIST_H
#define SIDEGATE_LIST_H

#include "bpf_core_read.h"
#include "bpf_helpers.h"
#include "parse.h"
#include "types.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	__u16 skc_family;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	struct sock *sk;
	struct own_socket *value;
};

#pragma clang attribute pop

/* A socket of IPv6 that speaks IPv4 has mapped addresses there. */
static __always_inline void list_addresses(struct sock *sk, struct flow_key *key)
{
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET6) {
		BPF_CORE_READ_INTO(&key->source, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&key->destination, sk, __sk_common.skc_v6_daddr);
		return;
	}
	map_ipv4(&key->source, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
	map_ipv4(&key->destination, BPF_CORE_READ(sk, __sk_common.skc_daddr));
}

static __always_inline void list_socket(struct seq_file *seq, struct sock *sk,
					const struct own_socket *own)
{
	struct own_entry entry = {};

	list_addresses(sk, &entry.key);
	entry.key.source_port = bpf_htons(BPF_CORE_READ(sk, __sk_common.skc_num));
	entry.key.destination_port = BPF_CORE_READ(sk, __sk_common.skc_dport);
	entry.key.protocol = BPF_CORE_READ(sk, sk_protocol);
	entry.socket = *own;
	bpf_seq_write(seq, &entry, sizeof(entry));
}

#endif
