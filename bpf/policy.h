/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Classification: the third rendering of policy.Match (appliance/policy). Each dimension maps a
 * fact to a class and a class to the set of rules that it permits; the first bit of the
 * intersection is the rule. The cost is a fixed number of look-ups, whatever the rules say.
 */
#ifndef SIDEGATE_POLICY_H
#define SIDEGATE_POLICY_H

#include "address.h"
#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "config.h"
#include "maps.h"
#include "types.h"

static __always_inline __u32 prefix_class(void *map4, void *map6, const struct address *a)
{
	struct prefix4 key4 = { .length = 32, .address = a->w[3] };
	struct prefix6 key6 = { .length = 128 };
	__u32 *class;

	if (address_is_ipv4(a)) {
		class = bpf_map_lookup_elem(map4, &key4);
	} else {
		__builtin_memcpy(key6.address, a->w, sizeof(key6.address));
		class = bpf_map_lookup_elem(map6, &key6);
	}
	return class ? *class : CLASS_OTHER;
}

static __always_inline __u32 destination_class(const struct address *a)
{
	__u64 *cached, entry;
	__u32 slot, class;

	if (!uses_destination)
		return CLASS_OTHER;
	if (!address_is_ipv4(a))
		return prefix_class(&destination4, &destination6, a);

	/* Knuth's multiplicative hash: the top bits depend on all of the address. */
	slot = (a->w[3] * 2654435761U) >> (32 - DESTINATION_CACHE_BITS);
	cached = bpf_map_lookup_elem(&destination_cache, &slot);
	if (!cached)
		return prefix_class(&destination4, &destination6, a);
	entry = *(volatile __u64 *)cached;
	if (entry >> 32 == a->w[3] && (__u32)entry)
		return (__u32)entry - 1;
	class = prefix_class(&destination4, &destination6, a);
	*(volatile __u64 *)cached = (__u64)a->w[3] << 32 | (class + 1);
	return class;
}

static __always_inline __u32 source_class(const struct address *a)
{
	return uses_source ? prefix_class(&source4, &source6, a) : CLASS_OTHER;
}

static __always_inline __u32 port_class(void *map, __u8 network, __be16 port)
{
	struct port_classes *ports;
	__u32 zero = 0, index;

	if (!network)
		return CLASS_UNKNOWN;
	ports = bpf_map_lookup_elem(map, &zero);
	/*
	 * clang would swap and scale by one shift of 64 bits, and older verifiers (6.12) not see that
	 * the offset is even: the last entry would be beyond their bounds.
	 */
	index = bpf_ntohs(port);
	barrier_var(index);
	return ports ? ports->class[index & 0xffff] : CLASS_UNKNOWN;
}

static __always_inline __u32 destination_port_class(const struct facts *f)
{
	if (!uses_destination_port)
		return CLASS_OTHER;
	return port_class(&destination_ports, f->network, f->destination_port);
}

static __always_inline __u32 source_port_class(const struct facts *f)
{
	if (!uses_source_port)
		return CLASS_OTHER;
	return port_class(&source_ports, f->network, f->source_port);
}

static __always_inline __u32 mac_class(const __u8 *mac)
{
	__u64 key = 0;
	__u32 *class;

	if (!uses_mac)
		return CLASS_UNKNOWN;
	__builtin_memcpy(&key, mac, 6);
	if (!key)
		return CLASS_UNKNOWN;
	class = bpf_map_lookup_elem(&macs, &key);
	return class ? *class : CLASS_OTHER;
}

static __always_inline __u32 interface_class(__u32 ifindex)
{
	__u32 *class;

	if (!uses_interface || !ifindex)
		return CLASS_UNKNOWN;
	class = bpf_map_lookup_elem(&interfaces, &ifindex);
	return class ? *class : CLASS_OTHER;
}

static __always_inline __u32 first_bit(__u64 word)
{
	/* BPF has no such instruction: a De Bruijn sequence finds the lowest bit in three steps. */
	static const __u8 position[64] = {
		0,  1,	2,  53, 3,  7,	54, 27, 4,  38, 41, 8,	34, 55, 48, 28,
		62, 5,	39, 46, 44, 42, 22, 9,	24, 35, 59, 56, 49, 18, 29, 11,
		63, 52, 6,  26, 37, 40, 33, 47, 61, 45, 43, 21, 23, 58, 17, 10,
		51, 25, 36, 32, 60, 20, 57, 16, 50, 31, 19, 15, 30, 14, 13, 12,
	};

	return position[((word & -word) * 0x022fdd63cc95386dULL) >> 58];
}

/* Of each dimension, the rules that the flow's class permits. */
struct rows {
	struct bits *destination;
	struct bits *source;
	struct bits *destination_port;
	struct bits *source_port;
	struct bits *header;
	struct bits *mac;
	struct bits *interface;
	struct bits *name;
	struct bits *process_name; /* this and what follows: NULL where no rule looks */
	struct bits *process_path;
	struct bits *process_unit;
};

/* Where no rule looks at this of a process there is nothing to find: row stays NULL. */
static __always_inline bool find_process_row(bool used, void *classes, void *rows, __u64 hash,
					     struct bits **row)
{
	__u32 class, *known;

	if (!used)
		return true;
	known = hash ? bpf_map_lookup_elem(classes, &hash) : NULL;
	class = known ? *known : hash ? CLASS_OTHER : CLASS_UNKNOWN;
	*row = bpf_map_lookup_elem(rows, &class);
	return *row;
}

static __always_inline bool find_rows(const struct facts *f, struct rows *r)
{
	__u32 class = destination_class(&f->destination);

	r->destination = bpf_map_lookup_elem(&destination_bits, &class);
	class = source_class(&f->source);
	r->source = bpf_map_lookup_elem(&source_bits, &class);
	class = destination_port_class(f);
	r->destination_port = bpf_map_lookup_elem(&destination_port_bits, &class);
	class = source_port_class(f);
	r->source_port = bpf_map_lookup_elem(&source_port_bits, &class);
	class = header_class[(f->dscp & 63) | (f->network & 3) << 6 | (f->ipv6 & 1) << 8];
	r->header = bpf_map_lookup_elem(&header_bits, &class);
	class = mac_class(f->mac);
	r->mac = bpf_map_lookup_elem(&mac_bits, &class);
	class = interface_class(f->interface);
	r->interface = bpf_map_lookup_elem(&interface_bits, &class);
	class = f->name.class;
	r->name = bpf_map_lookup_elem(&name_bits, &class);
	return r->header && r->destination && r->source && r->destination_port && r->source_port &&
	       r->mac && r->interface && r->name &&
	       find_process_row(uses_process_name, &process_names, &process_name_bits,
				f->process.name, &r->process_name) &&
	       find_process_row(uses_process_path, &process_paths, &process_path_bits,
				f->process.path, &r->process_path) &&
	       find_process_row(uses_process_unit, &process_units, &process_unit_bits,
				f->process.unit, &r->process_unit);
}

/* What all dimensions but the name permit. */
static __always_inline __u64 nameless_word(const struct rows *r, __u32 i)
{
	__u64 word = r->header->w[i] & r->destination->w[i] & r->source->w[i] &
		     r->destination_port->w[i] & r->source_port->w[i] & r->mac->w[i] &
		     r->interface->w[i];

	if (r->process_name)
		word &= r->process_name->w[i];
	if (r->process_path)
		word &= r->process_path->w[i];
	if (r->process_unit)
		word &= r->process_unit->w[i];
	return word;
}

/* The first rule that every row permits; RULE_DEFAULT if none. */
static __always_inline __u32 first_rule(const struct rows *r)
{
	for (__u32 i = 0; i < RULE_WORDS && i < rule_words; i++) {
		__u64 word = nameless_word(r, i) & r->name->w[i];

		if (word)
			return i * 64 + first_bit(word);
	}
	return RULE_DEFAULT;
}

/*
 * Might the flow's one true name lead it elsewhere? Whatever the name, the deciding rule is
 * one of those that some name permits, and does not come after the first that every name permits: so
 * these must lead to one place (policy.Tables.Doubtful).
 */
static __always_inline bool is_doubtful(const struct rows *r, const struct name *name)
{
	__u32 class = name->class;
	struct bits *certain = bpf_map_lookup_elem(&certain_bits, &class);
	struct bits *same = NULL;
	__u32 first = 0, fallback = RULE_DEFAULT;

	if (!certain)
		return false;
	for (__u32 i = 0; i < RULE_WORDS && i < rule_words; i++) {
		__u64 possible = nameless_word(r, i);
		__u64 sure;

		if (!(name->flags & NAME_ANY))
			possible &= r->name->w[i];
		sure = possible & certain->w[i];
		if (sure)
			possible &= sure ^ (sure - 1); /* up to the lowest bit of sure */
		if (!same && possible) {
			first = i * 64 + first_bit(possible);
			same = bpf_map_lookup_elem(&alike, &first);
		}
		if (same && possible & ~same->w[i])
			return true;
		if (sure)
			return false;
	}
	if (!same)
		return false;
	same = bpf_map_lookup_elem(&alike, &fallback);
	return same && first < RULE_DEFAULT && !(same->w[first / 64] >> (first % 64) & 1);
}

static __always_inline void decide(const struct facts *f, struct decision *d)
{
	struct rows rows = {};
	struct action *action;
	__u32 rule; /* in memory, for the look-up, and so the decision need not be: stack is scarce */

	d->reason = REASON_POLICY_MISSING;
	if (!find_rows(f, &rows))
		return;
	d->doubtful = f->name.flags && is_doubtful(&rows, &f->name);
	d->rule = rule = first_rule(&rows);
	action = bpf_map_lookup_elem(&actions, &rule);
	if (!action || action->verdict == VERDICT_INVALID)
		return;
	d->action = *action;
	d->reason = REASON_INVALID;
}

#endif
