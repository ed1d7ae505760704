/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What an address says by itself. */
#ifndef SIDEGATE_ADDRESS_H
#define SIDEGATE_ADDRESS_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "types.h"

static __always_inline bool address_is_ipv4(const struct address *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_ipv6_loopback(const struct address *a)
{
	return !a->w[0] && !a->w[1] && !a->w[2] && a->w[3] == bpf_htonl(1);
}

static __always_inline bool is_loopback(const struct address *a)
{
	return address_is_ipv4(a) ? bpf_ntohl(a->w[3]) >> 24 == 127 : is_ipv6_loopback(a);
}

/* An address that stands for another one, of which the number says which; 0 if it does not. */
static __always_inline __u32 own_number(const struct address *a)
{
	__u32 low = bpf_ntohl(a->w[3]);

	if (address_is_ipv4(a) ? low >> 16 == OWN_PREFIX4 && low != OWN_SOURCE4 :
				 a->w[0] == bpf_htonl(OWN_PREFIX6) && !a->w[1] && !a->w[2])
		return low & 0xffff;
	return 0;
}

/* What only the box itself sends by. */
static __always_inline bool is_own_source(const struct address *a)
{
	return own_number(a) || is_ipv6_loopback(a) ||
	       (address_is_ipv4(a) && bpf_ntohl(a->w[3]) == OWN_SOURCE4);
}

#endif
