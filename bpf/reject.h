/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The TCP reset that answers a refused connection (RFC 9293 §3.10.7). Everything that is not TCP is
 * refused by the kernel itself, with an ICMP error, through the route of MARK_REJECT.
 */
#ifndef SIDEGATE_REJECT_H
#define SIDEGATE_REJECT_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "parse.h"
#include "types.h"

#define RESET_HOPS 64

struct pseudo_header {
	struct address source;
	struct address destination;
	__be32 length;
	__be32 protocol;
};

static __always_inline __u16 fold(__s64 sum)
{
	__u32 s = sum;

	s = (s & 0xffff) + (s >> 16);
	s = (s & 0xffff) + (s >> 16);
	return ~s;
}

/* Mapped IPv4 addresses add 0xffff each to the sum, which is zero in ones' complement. */
static __always_inline __u16 tcp_checksum(const struct packet *p, struct tcphdr *tcp)
{
	struct pseudo_header pseudo = {
		.source = p->key.destination,
		.destination = p->key.source,
		.length = bpf_htonl(sizeof(*tcp)),
		.protocol = bpf_htonl(IPPROTO_TCP),
	};
	__s64 sum = bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);

	return fold(bpf_csum_diff(NULL, 0, (__be32 *)tcp, sizeof(*tcp), sum));
}

static __always_inline void reset_of(const struct packet *p, struct tcphdr *tcp)
{
	tcp->source = p->key.destination_port;
	tcp->dest = p->key.source_port;
	tcp->doff = sizeof(*tcp) / 4;
	tcp->rst = 1;
	if (p->tcp_flags & TCP_ACK) {
		tcp->seq = p->acknowledgement;
	} else {
		tcp->ack = 1;
		tcp->ack_seq = bpf_htonl(bpf_ntohl(p->sequence) + 1);
	}
	tcp->check = tcp_checksum(p, tcp);
}

static __always_inline long store_ipv4(struct __sk_buff *skb, const struct packet *p)
{
	struct iphdr ip = {
		.version = 4,
		.ihl = sizeof(ip) / 4,
		.tot_len = bpf_htons(sizeof(ip) + sizeof(struct tcphdr)),
		.ttl = RESET_HOPS,
		.protocol = IPPROTO_TCP,
		.saddr = p->key.destination.w[3],
		.daddr = p->key.source.w[3],
	};

	ip.check = fold(bpf_csum_diff(NULL, 0, (__be32 *)&ip, sizeof(ip), 0));
	return bpf_skb_store_bytes(skb, p->link_length, &ip, sizeof(ip), 0);
}

static __always_inline long store_ipv6(struct __sk_buff *skb, const struct packet *p)
{
	struct ipv6hdr ip = {
		.version = 6,
		.payload_len = bpf_htons(sizeof(struct tcphdr)),
		.nexthdr = IPPROTO_TCP,
		.hop_limit = RESET_HOPS,
	};

	__builtin_memcpy(&ip.saddr, &p->key.destination, sizeof(ip.saddr));
	__builtin_memcpy(&ip.daddr, &p->key.source, sizeof(ip.daddr));
	return bpf_skb_store_bytes(skb, p->link_length, &ip, sizeof(ip), 0);
}

static __always_inline long swap_macs(struct __sk_buff *skb)
{
	__u8 macs[12];

	if (bpf_skb_load_bytes(skb, 0, macs + 6, 6) || bpf_skb_load_bytes(skb, 6, macs, 6))
		return -1;
	return bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
}

/* Rewrites the packet into the reset and sends it back by the interface it came from. */
static __always_inline int reject_tcp(struct __sk_buff *skb, const struct packet *p)
{
	__u32 ip_length = p->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	__u32 length = p->link_length + ip_length + sizeof(struct tcphdr);
	struct tcphdr tcp = {};

	reset_of(p, &tcp);
	/* Growing drops a pending checksum offload, which shrinking alone would leave in place. */
	if (bpf_skb_change_tail(skb, skb->len + 1, 0) || bpf_skb_change_tail(skb, length, 0))
		return TCX_DROP;
	if (p->ipv6 ? store_ipv6(skb, p) : store_ipv4(skb, p))
		return TCX_DROP;
	if (bpf_skb_store_bytes(skb, p->link_length + ip_length, &tcp, sizeof(tcp), 0))
		return TCX_DROP;
	if (p->link_length && swap_macs(skb))
		return TCX_DROP;
	return bpf_redirect(skb->ifindex, 0);
}

#endif
