/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What can be seen of QUIC without its keys: how a connection begins, and when its beginning is over. */
#ifndef SIDEGATE_QUIC_H
#define SIDEGATE_QUIC_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "parse.h"
#include "types.h"

/* RFC 9000 §14.1: a client's first datagrams are no shorter. */
#define QUIC_INITIAL_BYTES 1200
#define QUIC_LONG_HEADER 0xc0 /* and the fixed bit, RFC 9000 §17.2 */
#define QUIC_TYPE 0x30

#define QUIC_V1 0x00000001
#define QUIC_V1_INITIAL 0x00
#define QUIC_V2 0x6b3343cf /* RFC 9369 §3 */
#define QUIC_V2_INITIAL 0x10

enum quic_packet {
	QUIC_OTHER, /* past the handshake, of another version, or no QUIC at all */
	QUIC_HANDSHAKE,
	QUIC_INITIAL, /* as a client sends them */
};

static __always_inline bool quic_fills_initial(const struct packet *p)
{
	return p->end >= p->transport + sizeof(struct udphdr) + QUIC_INITIAL_BYTES;
}

/* The first packet of a datagram. */
static __always_inline enum quic_packet quic_packet(struct __sk_buff *skb, const struct packet *p)
{
	__u8 header[5], initial; /* type and version */
	__be32 version;

	if (p->key.protocol != IPPROTO_UDP || p->fragment ||
	    !load(skb, p, p->transport + sizeof(struct udphdr), header, sizeof(header)) ||
	    (header[0] & QUIC_LONG_HEADER) != QUIC_LONG_HEADER)
		return QUIC_OTHER;
	__builtin_memcpy(&version, header + 1, sizeof(version));
	if (version == bpf_htonl(QUIC_V1))
		initial = QUIC_V1_INITIAL;
	else if (version == bpf_htonl(QUIC_V2))
		initial = QUIC_V2_INITIAL;
	else
		return QUIC_OTHER;
	return (header[0] & QUIC_TYPE) == initial && quic_fills_initial(p) ? QUIC_INITIAL :
									     QUIC_HANDSHAKE;
}

#endif
