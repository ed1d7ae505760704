/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Every map. The first group is pinned and outlives generations; the second belongs to one. */
#ifndef SIDEGATE_MAPS_H
#define SIDEGATE_MAPS_H

#include "bpf_helpers.h"
#include "types.h"

/* --- state: shared by all generations, pinned --- */

/*
 * A plain hash never evicts: an idle connection keeps its entry until the daemon, which knows the
 * timeouts, removes it. What is over a client's share goes to the crowd's table, where heavy
 * clients evict each other and nobody else.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 131072);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 32768);
	__type(key, struct flow_key);
	__type(value, struct flow);
} crowd_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 16384);
	__type(key, struct client_key);
	__type(value, struct client);
} clients SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 8192);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} drops SEC(".maps");

/* The listeners. An entry goes with its socket, so a dead daemon is seen here at once. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, SOCKET_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

/* The gateway's own addresses, and their slots in own_numbers: what is sent to them is not ours to decide. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address);
	__type(value, __u32);
} own_addresses SEC(".maps");

#define OWN_NUMBERS 4098
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, OWN_NUMBERS);
	__type(key, __u32);
	__type(value, struct address);
} own_numbers SEC(".maps");

/* What was decided on the box's sockets that are steered, send without being connected, or have been listed. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct own_socket);
} own_sockets SEC(".maps");

/*
 * What was decided on sockets of the box that connected of late, by their cookies, for people: no program looks at a direct one again. An entry for each
 * in a map, or storage with the socket, would cost short connections more than their decision. So this is a ring, where nobody has to clean up;
 * what lasts gets storage when the sockets are listed (list.h), which the daemon does more often than the ring goes round.
 */
#define OWN_RECENT 16384
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, OWN_RECENT);
	__type(key, __u32);
	__type(value, struct own_socket);
} own_recent SEC(".maps");

/* Who opened the flows of the box itself; for people. The daemon removes an entry with its flow. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 16384);
	__type(key, struct flow_key);
	__type(value, struct origin);
} origins SEC(".maps");

/* Services of clients that are reached from outside: their replies are not ours to decide. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct published_key);
	__type(value, __u8);
} published SEC(".maps");

/* DNS servers that we ask: their own questions are not ours to answer, or they would go in circles. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address);
	__type(value, __u8);
} resolvers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 16384);
	__type(key, struct address);
	__type(value, struct asker);
} askers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 32768);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct name_key);
	__type(value, struct lessons);
} learned SEC(".maps");

/* The number of the newest generation, so that a restarted daemon counts on. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} last_generation SEC(".maps");

/* --- policy: one set for each generation --- */

#define PREFIXES(name, key_type)                      \
	struct {                                      \
		__uint(type, BPF_MAP_TYPE_LPM_TRIE);  \
		__uint(max_entries, 1);               \
		__uint(map_flags, BPF_F_NO_PREALLOC); \
		__type(key, key_type);                \
		__type(value, __u32);                 \
	} name SEC(".maps")

PREFIXES(destination4, struct prefix4);
PREFIXES(destination6, struct prefix6);
PREFIXES(source4, struct prefix4);
PREFIXES(source6, struct prefix6);

/*
 * Recent IPv4 destinations and their classes, direct-mapped: the trie of a large set costs more
 * than all the rest of a decision. An entry is one word, so readers never see half of one:
 * address << 32 | class + 1; 0 is empty.
 */
#define DESTINATION_CACHE_BITS 16
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << DESTINATION_CACHE_BITS);
	__type(key, __u32);
	__type(value, __u64);
} destination_cache SEC(".maps");

#define PORTS(name)                                 \
	struct {                                    \
		__uint(type, BPF_MAP_TYPE_ARRAY);   \
		__uint(max_entries, 1);             \
		__type(key, __u32);                 \
		__type(value, struct port_classes); \
	} name SEC(".maps")

PORTS(destination_ports);
PORTS(source_ports);

/* key: the six bytes of the address, then two zero bytes */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u32);
} macs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
} interfaces SEC(".maps");

/* key: a hash of struct process */
#define PROCESSES(name)                          \
	struct {                                 \
		__uint(type, BPF_MAP_TYPE_HASH); \
		__uint(max_entries, 1);          \
		__type(key, __u64);              \
		__type(value, __u32);            \
	} name SEC(".maps")

PROCESSES(process_names);
PROCESSES(process_paths);
PROCESSES(process_units);

/*
 * Origins without path and process id: to read the same names at each connection of a program costs more than the decision. Nothing is ever taken
 * out, for who reads an entry must not find another's there; when it is full, what is new is read each time. It begins empty with each generation.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct origin_key);
	__type(value, struct origin);
} known_origins SEC(".maps");

/* The class of all names that a client, or everybody, knows an address by. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct name_key);
	__type(value, struct name);
} names SEC(".maps");

#define BITS(name)                                \
	struct {                                  \
		__uint(type, BPF_MAP_TYPE_ARRAY); \
		__uint(max_entries, 2);           \
		__type(key, __u32);               \
		__type(value, struct bits);       \
	} name SEC(".maps")

BITS(destination_bits);
BITS(source_bits);
BITS(destination_port_bits);
BITS(source_port_bits);
BITS(header_bits);
BITS(mac_bits);
BITS(interface_bits);
BITS(name_bits); /* any of the names permits the rule */
BITS(certain_bits); /* each of the names permits it */
BITS(process_name_bits);
BITS(process_path_bits);
BITS(process_unit_bits);

/* The last row, RULE_DEFAULT, is what no rule decides. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, RULE_DEFAULT + 1);
	__type(key, __u32);
	__type(value, struct action);
} actions SEC(".maps");

/* The rules that lead a flow where a rule, or in the last row the default, does. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, RULE_DEFAULT + 1);
	__type(key, __u32);
	__type(value, struct bits);
} alike SEC(".maps");

/* Flows that each rule decided. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RULE_DEFAULT + 1);
	__type(key, __u32);
	__type(value, __u64);
} rule_flows SEC(".maps");

#endif
