/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The ABI between the programs and the daemon. Every type here becomes a Go type of the same
 * layout (go generate ./appliance/datapath), and the enums' names become the texts that people
 * read. Pinned maps outlive the daemon: a change of layout needs a new ABI_VERSION.
 */
#ifndef SIDEGATE_TYPES_H
#define SIDEGATE_TYPES_H

#include "vmlinux.h"

#define ABI_VERSION 3

/* IPv4 addresses are stored mapped (::ffff:a.b.c.d), in network byte order. */
struct address {
	__be32 w[4];
};

enum verdict {
	VERDICT_INVALID,
	VERDICT_DIRECT, /* the kernel forwards it */
	VERDICT_PROXY, /* to the transparent proxy */
	VERDICT_BLOCK, /* drop, or refuse */
	VERDICT_DNS, /* to the DNS listener */
	VERDICT_PASS, /* not ours to decide: left alone */
	VERDICT_SNIFF, /* to the proxy, which reads the name from the first bytes and asks again */
};

/* Why a packet was dropped or refused. Each has a counter. */
enum reason {
	REASON_INVALID,
	REASON_TRUNCATED, /* the packet ends inside its headers */
	REASON_MALFORMED, /* its headers contradict each other */
	REASON_EXTENSION_HEADERS, /* more IPv6 extension headers than we follow */
	REASON_FRAGMENT_UNKNOWN, /* a later fragment whose first one we did not see */
	REASON_RULE_BLOCK, /* the policy says block */
	REASON_RULE_REJECT, /* the policy says block, and the client was told */
	REASON_NO_LISTENER, /* to be proxied, but no daemon listens */
	REASON_NOT_PROXYABLE, /* to be proxied, but neither TCP nor UDP */
	REASON_CLIENT_RATE, /* the client begins more proxied flows a second than its share */
	REASON_DNS_RATE, /* the client asks more DNS questions a second than its share */
	REASON_ASSIGN_FAILED, /* the kernel refused the socket */
	REASON_POLICY_MISSING, /* a policy table lacks a row: a bug, never traffic */
	REASON_REDIRECT, /* our own kernel's IPv6 redirect: the client would bypass us */
	REASON_OWN_UNKNOWN, /* of the box itself and steered, but by no socket that we know */
	REASON_OWN_DEVICE, /* a datagram of the box itself that is to be proxied, from a socket bound to a device */
	REASON_OWN_FORGED, /* from the network, by an address that only the box itself has */
	REASON_OWN_GONE, /* of the daemon to a socket of the box itself that is gone */
	REASON_COUNT,
};

/* Slots of the sockets map. */
enum socket_slot {
	SOCKET_INVALID,
	SOCKET_PROXY_TCP4,
	SOCKET_PROXY_TCP6,
	SOCKET_PROXY_UDP4,
	SOCKET_PROXY_UDP6,
	SOCKET_DNS_TCP4,
	SOCKET_DNS_TCP6,
	SOCKET_DNS_UDP4,
	SOCKET_DNS_UDP6,
	SOCKET_COUNT,
};

/* Whose name is read from the first bytes. */
enum sniff_mode {
	SNIFF_INVALID,
	SNIFF_OFF,
	SNIFF_AMBIGUOUS, /* flows whose names lead to different outbounds */
	SNIFF_UNKNOWN, /* and those that have no name, where one could matter */
};

/* What becomes of flows to be proxied while no daemon listens. */
enum failure_policy {
	ON_FAILURE_INVALID,
	ON_FAILURE_BLOCK,
	ON_FAILURE_DIRECT,
};

/*
 * Firewall marks. sidegate owns these four bits and touches no other, except that a rule may add
 * bits of the owner's choice to direct flows.
 */
enum mark {
	MARK_INVALID = 0,
	MARK_PROXY = 0x01000000, /* deliver locally, whatever the destination */
	MARK_OWN = 0x02000000, /* the daemon's own sockets: never steered */
	MARK_DIRECT = 0x04000000, /* forwarded by our verdict */
	MARK_REJECT = 0x08000000, /* answered with ICMP unreachable by the kernel */
	MARK_TRANSLATED = 0x0c000000, /* as MARK_DIRECT, and masqueraded on its way out */
	MARK_MASK = 0x0f000000,
};

struct flow_key {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 pad[3];
};

enum flow_state {
	FLOW_INVALID = 0,
	FLOW_OPENING = 1, /* nothing but the first packet's kind was seen */
	FLOW_ESTABLISHED =
		2, /* TCP past its SYN, QUIC its handshake; other UDP with more than one packet */
	FLOW_CLOSING = 3, /* TCP after a FIN or RST of the client */
};

struct flow {
	__u64 first_seen; /* jiffies: a clock in nanoseconds would cost a third of a hit */
	__u64 last_seen;
	__u64 packets; /* as the hook sees them: after GRO */
	__u64 bytes;
	__u64 owner; /* cookie of the box's own socket that it is of; 0: a client's */
	__u32 mark; /* what a direct packet is marked with */
	__u32 outbound; /* FNV-1a of its name */
	__u32 generation; /* of the policy that decided */
	__u32 interface; /* ifindex it came in by; 0: it is of the box itself */
	__u16 rule; /* index in that generation; RULE_DEFAULT if none matched */
	__u8 verdict; /* enum verdict */
	__u8 state; /* enum flow_state */
	__u8 reject; /* block answers */
	__u8 client_mac[6]; /* zero where the link has none */
	__u8 dscp; /* of the first packet */
	__u8 decided; /* enum verdict: what the policy says where nothing is sniffed */
	__u8 attempts; /* of direct TCP: times that the SYN, then the first data, was sent */
	__u16 opening; /* low half of the SYN's sequence number */
};

#define RULE_DEFAULT 1024

#define LOOPBACK_INDEX 1 /* of lo, in every network namespace */

/* Identifies the first fragment's decision for the rest of the datagram (RFC 791, RFC 8200). */
struct fragment_key {
	struct address source;
	struct address destination;
	__u32 id;
	__u8 protocol;
	__u8 pad[3];
};

struct fragment {
	__u32 mark;
	__u8 verdict; /* enum verdict */
	__u8 pad[3];
};

/*
 * A client is its MAC address, so that one host cannot become many by inventing addresses; on
 * links without MAC addresses it is its IPv4 address or its IPv6 /64.
 */
struct client_key {
	__u32 w[4];
};

struct client {
	__u32 flows; /* in the flow table; recounted by the daemon */
	__u32 fresh; /* packets given to the proxy's listeners in the second below */
	__u64 second;
	__u32 questions; /* packets given to the DNS listeners in that second */
	__u32 pad;
};

/*
 * What a process of the box itself is told by: 64-bit FNV-1a hashes, 0 where it is not known. name
 * and unit are of the text; path is of its components from the last to the first, each with a
 * slash behind it, for so the kernel finds them: /usr/bin/curl is "curl/bin/usr/".
 */
struct process {
	__u64 name; /* base name of the executable file */
	__u64 path; /* its absolute path */
	__u64 unit; /* systemd unit, or the cgroup's directory */
};

#define NAME_BYTES 64

struct origin {
	struct process process;
	__u32 pid;
	__u32 pad;
	__u8 name[NAME_BYTES];
	__u8 unit[NAME_BYTES];
};

/* What the names of an origin depend on. */
struct origin_key {
	__u64 exe; /* where the kernel keeps the executable's name */
	__u64 name; /* its hash and length: it can be renamed, and another's can take its place */
	__u64 cgroup; /* its number in the kernel, which no other one will have */
};

/* What was decided on a socket of the box itself when it connected. It lives as long as the socket. */
struct own_socket {
	struct origin origin;
	__u32 device; /* that it was bound to before it was steered */
	__u32 pad;
	struct flow
		flow; /* its verdict is invalid for a socket that sends without being connected */
};

/* One entry of the list of own_sockets: a socket, and what was decided on it. */
struct own_entry {
	struct flow_key key;
	struct own_socket socket;
};

/*
 * Source addresses of what the box itself sends into lo: they lead it there whatever socket sends, and the answers
 * back. IPv6 has ::1 in the place of OWN_SOURCE4. The others stand for the address that a datagram's socket is bound
 * to, by its number in the lower 16 bits; lo's program puts that one back.
 */
enum own_address {
	OWN_SOURCE4 = 0x7f530001, /* 127.83.0.1 */
	OWN_PREFIX4 = 0x7f53, /* 127.83.0.0/16 */
	OWN_PREFIX6 = 0xfd534753, /* fd53:4753::/112 */
};

/* Slots of own_numbers before the own addresses' own. */
enum own_number {
	OWN_NUMBER_SOURCE4 =
		0, /* the address by which the box is known, where a socket is not bound to one */
	OWN_NUMBER_SOURCE6 = 1,
	OWN_NUMBER_FIRST = 2,
};

struct published_key {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

/* Who asks by DNS from an address: people have several addresses, and one MAC. */
struct asker {
	__u8 mac[6]; /* zero where the link has none */
	__u8 pad[2];
	__u32 interface;
};

/* An address as one client knows it; a zero client stands for all others. */
struct name_key {
	struct client_key client;
	struct address address;
};

/*
 * What a client has learned of an address. The programs do not read it: it is kept here so that it
 * lives exactly as long as the flows that were decided by it.
 */
struct lessons {
	__u8 text[1024]; /* appliance/datapath/book.go */
};

/* --- one generation of the policy --- */

#define RULE_WORDS 16

struct bits {
	__u64 w[RULE_WORDS]; /* bit i: rule i permits this class */
};

/* Classes that each dimension has whatever the rules say. */
enum class_fixed {
	CLASS_UNKNOWN = 0, /* the flow lacks the fact */
	CLASS_OTHER = 1, /* a value that no rule names */
};

/* What is not certain about a flow's name. */
enum name_flag {
	NAME_CERTAIN = 0,
	NAME_ONE_OF = 1, /* it has several, which rules tell apart */
	NAME_ANY = 2, /* it could be any name at all */
};

struct name {
	__u32 class;
	__u32 flags; /* enum name_flag */
};

struct prefix4 {
	__u32 length;
	__be32 address;
};

struct prefix6 {
	__u32 length;
	__be32 address[4];
};

struct port_classes {
	__u16 class[65536];
};

struct action {
	__u32 mark;
	__u32 outbound;
	__u8 verdict; /* enum verdict */
	__u8 reject;
	__u8 pad[2];
};

/*
 * All that a decision depends on: the flow's facts, some already as classes. It is also the
 * input of the policy_query program, which the self-test and `explain` run.
 */
struct facts {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 network; /* 0 other, 1 TCP, 2 UDP: two bits of the header class */
	__u8 ipv6;
	__u8 dscp;
	__u8 pad;
	__u32 interface; /* ifindex, 0 unknown */
	__u8 mac[6];
	__u8 pad2[2];
	struct name name;
	__u32 pad3;
	struct process process; /* zero: a client's flow */
};

struct decision {
	struct action action;
	__u32 rule; /* RULE_DEFAULT if none matched */
	__u32 reason; /* enum reason: why there is no decision; 0 if there is one */
	__u32 doubtful; /* another name might lead to another outbound */
	__u64 now; /* jiffies: what the flows' times are compared with */
};

/* What the daemon decided on a flow that the programs had left to it. */
struct settlement {
	struct flow_key key;
	__u32 mark;
	__u32 outbound;
	__u32 generation;
	__u16 rule;
	__u8 verdict; /* enum verdict */
	__u8 reject;
};

/* Keeps in the type information what no map's key or value is made of. */
struct abi {
	enum verdict verdict;
	enum reason reason;
	enum socket_slot socket_slot;
	enum failure_policy failure_policy;
	enum mark mark;
	enum flow_state flow_state;
	enum class_fixed class_fixed;
	enum sniff_mode sniff_mode;
	enum name_flag name_flag;
	enum own_address own_address;
	enum own_number own_number;
	struct facts facts;
	struct decision decision;
	struct settlement settlement;
	struct own_entry own_entry;
};

#endif
