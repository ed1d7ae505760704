/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* skb → flow key and header facts. Whatever is cut short or contradicts itself gets a reason. */
#ifndef SIDEGATE_PARSE_H
#define SIDEGATE_PARSE_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "types.h"

enum parsed {
	PARSED_INVALID,
	PARSED_FLOW, /* key and facts are filled in */
	PARSED_PASS, /* not for us to decide */
	PARSED_DROP, /* packet->reason says why */
};

enum fragment_part {
	FRAGMENT_NONE,
	FRAGMENT_FIRST,
	FRAGMENT_LATER, /* no ports */
};

struct packet {
	struct flow_key key;
	__u32 link_length; /* of the link-layer header: 14 or 0 */
	__u32 transport; /* offset of the transport header */
	__u32 end; /* of the IP packet: the frame may be padded */
	__u32 fragment_id;
	__u32 reason; /* enum reason */
	__u32 sequence; /* TCP, network byte order */
	__u32 acknowledgement;
	__u8 ipv6;
	__u8 dscp;
	__u8 fragment; /* enum fragment_part */
	__u8 tcp_flags;
	__u8 on_link; /* from or to a link-local address: nothing that is forwarded */
	__u8 own; /* of a process of this box */
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define TCP_LENGTH_OFFSET 12 /* of the byte with the header's length (RFC 9293 §3.1) */

#define EXTENSION_HEADERS 8

static __always_inline enum parsed parse_drop(struct packet *p, enum reason reason)
{
	p->reason = reason;
	return PARSED_DROP;
}

#define MAX_OFFSET 0x3fff /* of any header: lets the verifier bound packet pointers */

/*
 * Reads from inside the IP packet only. Headers that lie in the skb's page fragments are beyond
 * data_end; the helper finds them there.
 */
static __always_inline bool load(struct __sk_buff *skb, const struct packet *p, __u32 offset,
				 void *to, __u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (offset > MAX_OFFSET || offset + size > p->end)
		return false;
	if (data + offset + size > end)
		return !bpf_skb_load_bytes(skb, offset, to, size);
	/* Without this the compiler copies byte by byte; the machines we run on need no alignment. */
	__builtin_memcpy(to, __builtin_assume_aligned(data + offset, 4), size);
	return true;
}

static __always_inline enum parsed parse_tcp(struct __sk_buff *skb, struct packet *p)
{
	struct tcphdr tcp;

	if (!load(skb, p, p->transport, &tcp, sizeof(tcp)))
		return parse_drop(p, REASON_TRUNCATED);
	if (tcp.doff * 4 < sizeof(tcp))
		return parse_drop(p, REASON_MALFORMED);
	if (p->transport + tcp.doff * 4 > p->end)
		return parse_drop(p, REASON_TRUNCATED);
	p->key.source_port = tcp.source;
	p->key.destination_port = tcp.dest;
	p->sequence = tcp.seq;
	p->acknowledgement = tcp.ack_seq;
	p->tcp_flags = ((__u8 *)&tcp)[13];
	return PARSED_FLOW;
}

static __always_inline enum parsed parse_udp(struct __sk_buff *skb, struct packet *p)
{
	struct udphdr udp;

	if (!load(skb, p, p->transport, &udp, sizeof(udp)))
		return parse_drop(p, REASON_TRUNCATED);
	p->key.source_port = udp.source;
	p->key.destination_port = udp.dest;
	return PARSED_FLOW;
}

static __always_inline enum parsed parse_transport(struct __sk_buff *skb, struct packet *p)
{
	if (p->fragment == FRAGMENT_LATER)
		return PARSED_FLOW;
	if (p->key.protocol == IPPROTO_TCP)
		return parse_tcp(skb, p);
	if (p->key.protocol == IPPROTO_UDP)
		return parse_udp(skb, p);
	return PARSED_FLOW;
}

static __always_inline void map_ipv4(struct address *a, __be32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = v4;
}

/* Not multicast, limited broadcast, or "this network" (RFC 1122 §3.2.1.3). */
static __always_inline bool ipv4_is_routable(__be32 destination)
{
	__u32 a = bpf_ntohl(destination);

	return a >> 28 != 0xe && a != 0xffffffff && a >> 24 != 0;
}

static __always_inline enum parsed parse_ipv4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;
	__u32 length, total;
	__u16 offset;

	if (!load(skb, p, p->link_length, &ip, sizeof(ip)))
		return parse_drop(p, REASON_TRUNCATED);
	length = ip.ihl * 4;
	total = bpf_ntohs(ip.tot_len);
	if (!total && skb->gso_size) /* BIG TCP: the length does not fit the field */
		total = skb->len - p->link_length;
	if (ip.version != 4 || length < sizeof(ip) || total < length)
		return parse_drop(p, REASON_MALFORMED);
	p->end = p->link_length + total;
	if (p->end > skb->len)
		return parse_drop(p, REASON_TRUNCATED);
	if (!ipv4_is_routable(ip.daddr))
		return PARSED_PASS;

	map_ipv4(&p->key.source, ip.saddr);
	map_ipv4(&p->key.destination, ip.daddr);
	p->key.protocol = ip.protocol;
	p->dscp = ip.tos >> 2;
	p->transport = p->link_length + length;
	offset = bpf_ntohs(ip.frag_off);
	if (offset & 0x3fff) { /* MF or an offset */
		p->fragment = offset & 0x1fff ? FRAGMENT_LATER : FRAGMENT_FIRST;
		p->fragment_id = ip.id;
	}
	return parse_transport(skb, p);
}

static __always_inline bool ipv6_is_routable(const struct in6_addr *a)
{
	__u32 top = bpf_ntohl(a->in6_u.u6_addr32[0]);

	return top >> 24 != 0xff && top >> 22 != 0xfe80 >> 6;
}

static __always_inline bool ipv6_is_mapped(const struct in6_addr *a)
{
	return !a->in6_u.u6_addr32[0] && !a->in6_u.u6_addr32[1] &&
	       a->in6_u.u6_addr32[2] == bpf_htonl(0xffff);
}

struct extension {
	__u8 next;
	__u8 length;
	__be16 offset; /* this and the next of a fragment header only */
	__be32 id;
};

static __always_inline bool is_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	       next == IPPROTO_FRAGMENT || next == IPPROTO_AH;
}

/* One extension header: its length, and what it says of fragmentation. */
static __always_inline void parse_extension(struct packet *p, __u8 kind, struct extension *ext)
{
	__u16 offset;

	if (kind == IPPROTO_AH) {
		p->transport += (ext->length + 2) * 4; /* RFC 4302 §2.2 */
		return;
	}
	if (kind != IPPROTO_FRAGMENT) {
		p->transport += (ext->length + 1) * 8;
		return;
	}
	p->transport += sizeof(*ext);
	offset = bpf_ntohs(ext->offset);
	if (!(offset & ~6)) /* a lone "atomic" fragment (RFC 6946) is a whole packet */
		return;
	p->fragment = offset & ~7 ? FRAGMENT_LATER : FRAGMENT_FIRST;
	p->fragment_id = ext->id;
}

/* Walks the extension headers (RFC 8200 §4) to the transport header. */
__noinline int parse_extensions(struct __sk_buff *skb, struct packet *p, __u8 next)
{
	struct extension ext;

	if (!p)
		return PARSED_INVALID;
	for (int i = 0; i < EXTENSION_HEADERS; i++) {
		if (p->fragment == FRAGMENT_LATER || !is_extension(next))
			break;
		/* every one of them is at least eight bytes long */
		if (!load(skb, p, p->transport, &ext, sizeof(ext)))
			return parse_drop(p, REASON_TRUNCATED);
		parse_extension(p, next, &ext);
		next = ext.next;
	}
	if (p->fragment != FRAGMENT_LATER && is_extension(next))
		return parse_drop(p, REASON_EXTENSION_HEADERS);
	p->key.protocol = next;
	return parse_transport(skb, p);
}

static __always_inline enum parsed parse_ipv6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;

	if (!load(skb, p, p->link_length, &ip, sizeof(ip)))
		return parse_drop(p, REASON_TRUNCATED);
	if (ip.version != 6)
		return parse_drop(p, REASON_MALFORMED);
	p->end = p->link_length + sizeof(ip) + bpf_ntohs(ip.payload_len);
	if (!ip.payload_len && skb->gso_size) /* BIG TCP, RFC 2675 */
		p->end = skb->len;
	if (p->end > skb->len)
		return parse_drop(p, REASON_TRUNCATED);
	if (bpf_ntohl(ip.daddr.in6_u.u6_addr32[0]) >> 24 == 0xff)
		return PARSED_PASS;
	p->on_link = !ipv6_is_routable(&ip.daddr) || !ipv6_is_routable(&ip.saddr);
	/* mapped addresses are no wire format (RFC 4291 §2.5.5.2), and here they mean IPv4 */
	if (ipv6_is_mapped(&ip.daddr) || ipv6_is_mapped(&ip.saddr))
		return parse_drop(p, REASON_MALFORMED);

	__builtin_memcpy(&p->key.source, &ip.saddr, sizeof(p->key.source));
	__builtin_memcpy(&p->key.destination, &ip.daddr, sizeof(p->key.destination));
	p->ipv6 = 1;
	p->dscp = (ip.priority << 2 | ip.flow_lbl[0] >> 6) & 63;
	p->transport = p->link_length + sizeof(ip);
	if (is_extension(ip.nexthdr))
		return parse_extensions(skb, p, ip.nexthdr);
	p->key.protocol = ip.nexthdr;
	return parse_transport(skb, p);
}

static __always_inline bool is_tag(__be32 ether_type)
{
	return ether_type == bpf_htons(ETH_P_8021Q) || ether_type == bpf_htons(ETH_P_8021AD);
}

static __always_inline int parse(struct __sk_buff *skb, struct packet *p, __u32 link_length)
{
	/* a VLAN's packets belong to the VLAN's own interface; VID 0 is only a priority */
	if (skb->vlan_present && skb->vlan_tci & 0xfff)
		return PARSED_PASS;
	/* ... and behind it the kernel would take off another tag and find a packet that we did not */
	if (skb->vlan_present && is_tag(skb->protocol))
		return parse_drop(p, REASON_MALFORMED);
	/* bridged, broadcast or multicast frames are not sent to us */
	if (skb->pkt_type != PACKET_HOST)
		return PARSED_PASS;

	p->link_length = link_length;
	p->end = skb->len;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, p);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(skb, p);
	return PARSED_PASS;
}

#endif
