/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where a socket of the box connects, or sends without being connected (cgroup hooks). Direct ones are left alone from
 * then on; those for the daemon are steered into lo, by the socket's mark or by the datagram's source address.
 */
#ifndef SIDEGATE_SOCKET_H
#define SIDEGATE_SOCKET_H

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "own.h"
#include "types.h"

#define ALLOW 1
#define REFUSE 0

/* Other bits of the mark are the program's own. */
static __always_inline bool socket_mark(struct bpf_sock_addr *ctx, __u32 mask, __u32 mark)
{
	__u32 old = ctx->sk->mark, new = (old & ~mask) | mark;

	return new == old || !bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &new, sizeof(new));
}

/* Fills in what the hook knows of the packets to come; says whether they are ours to decide. */
static __always_inline bool socket_concerns(struct bpf_sock_addr *ctx, struct packet *p)
{
	if (bpf_get_netns_cookie(ctx) != own_netns || (ctx->sk->mark & MARK_MASK) == MARK_OWN)
		return false;
	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return false;
	p->own = 1;
	p->key.protocol = ctx->protocol;
	p->key.destination_port = (__be16)ctx->user_port;
	p->key.source_port = bpf_htons(ctx->sk->src_port);
	return own_leaves(&p->key.destination);
}

/* The source of an IPv4 packet: what the socket is bound to, or what it will get. */
static __always_inline void socket_source4(struct bpf_sock_addr *ctx, struct packet *p)
{
	__be32 bound = ctx->sk->src_ip4;

	map_ipv4(&p->key.source, bound ?: bpf_htonl(OWN_SOURCE4));
}

static __always_inline void socket_source6(struct bpf_sock_addr *ctx, struct packet *p)
{
	struct address *a = &p->key.source;

	a->w[0] = ctx->sk->src_ip6[0];
	a->w[1] = ctx->sk->src_ip6[1];
	a->w[2] = ctx->sk->src_ip6[2];
	a->w[3] = ctx->sk->src_ip6[3];
	if (!(a->w[0] | a->w[1] | a->w[2] | a->w[3]))
		a->w[3] = bpf_htonl(1);
}

static __always_inline bool socket_meets4(struct bpf_sock_addr *ctx, struct packet *p)
{
	map_ipv4(&p->key.destination, ctx->user_ip4);
	socket_source4(ctx, p);
	return socket_concerns(ctx, p);
}

static __always_inline bool socket_meets6(struct bpf_sock_addr *ctx, struct packet *p)
{
	p->key.destination.w[0] = ctx->user_ip6[0];
	p->key.destination.w[1] = ctx->user_ip6[1];
	p->key.destination.w[2] = ctx->user_ip6[2];
	p->key.destination.w[3] = ctx->user_ip6[3];
	if (address_is_ipv4(&p->key.destination)) {
		socket_source4(ctx, p);
	} else {
		p->ipv6 = 1;
		socket_source6(ctx, p);
	}
	return socket_concerns(ctx, p);
}

/* Of UDP, which may send to others all the same. */
static __always_inline bool socket_is_connected(struct bpf_sock_addr *ctx)
{
	return ctx->sk->state == BPF_TCP_ESTABLISHED;
}

static __always_inline bool socket_device(struct bpf_sock_addr *ctx, __u32 device)
{
	return ctx->sk->bound_dev_if == device ||
	       !bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTOIFINDEX, &device, sizeof(device));
}

/* A socket bound to a device does not follow the route into lo. */
static __always_inline bool socket_unbind(struct bpf_sock_addr *ctx, struct own_socket *own)
{
	own->device = ctx->sk->bound_dev_if ?: own->device;
	return socket_device(ctx, 0);
}

/* … and is bound again where it is left alone; what disconnects a UDP socket takes its device, too. */
static __always_inline bool socket_rebind(struct bpf_sock_addr *ctx, struct own_socket *own)
{
	__u32 device = own->device;

	own->device = 0;
	if (!device || ctx->sk->bound_dev_if)
		return true;
	if (ctx->protocol == IPPROTO_UDP && !socket_is_connected(ctx))
		return true;
	return socket_device(ctx, device);
}

static __always_inline int socket_refuse(__u8 reject)
{
	count_reason(reject ? REASON_RULE_REJECT : REASON_RULE_BLOCK);
	bpf_set_retval(reject ? -ECONNREFUSED : -EPERM);
	return REFUSE;
}

static __always_inline int socket_fail(enum reason reason, int error)
{
	count_reason(reason);
	bpf_set_retval(error);
	return REFUSE;
}

static __always_inline struct own_socket *socket_storage(struct bpf_sock_addr *ctx)
{
	struct own_socket *own =
		bpf_sk_storage_get(&own_sockets, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);

	if (!own)
		return NULL;
	find_origin(&own->origin.process, &own->origin);
	own->flow.owner = bpf_get_socket_cookie(ctx);
	return own;
}

static __always_inline bool answers_dns(const struct packet *p)
{
	return on_failure != ON_FAILURE_DIRECT || has_listener(p, VERDICT_DNS);
}

/* What becomes of a connection or a flow that begins; returns a reason if that is not known. */
static __always_inline __u32 socket_decide(const struct packet *p, const struct process *process,
					   struct flow *flow)
{
	__u32 reason = own_decide(p, process, own_name(p), flow);

	if (!reason && flow->verdict != VERDICT_SNIFF)
		count_rule(flow->rule);
	own_without_daemon(p, flow);
	return reason;
}

/* Left alone; what may be left of an earlier connection would lead it into lo. */
static __always_inline int socket_ignore(struct bpf_sock_addr *ctx)
{
	if ((ctx->sk->mark & MARK_MASK) == MARK_PROXY && bpf_get_netns_cookie(ctx) == own_netns)
		socket_mark(ctx, MARK_MASK, 0);
	return ALLOW;
}

/*
 * At every connect: it may have been steered before. Then a UDP socket has its steered source still, and lo's program asks what was
 * decided on it.
 */
static __always_inline int socket_let(struct bpf_sock_addr *ctx, const struct flow *flow)
{
	struct own_socket *own = bpf_sk_storage_get(&own_sockets, ctx->sk, NULL, 0);

	if (own) {
		find_origin(&own->origin.process, &own->origin);
		own->flow = *flow;
		if (!socket_rebind(ctx, own))
			return REFUSE;
	}
	return socket_mark(ctx, MARK_MASK | flow->mark, flow->mark & ~MARK_MASK) ? ALLOW : REFUSE;
}

static __always_inline int socket_steer(struct bpf_sock_addr *ctx, const struct flow *flow)
{
	struct own_socket *own = socket_storage(ctx);

	if (!own)
		return socket_fail(REASON_OWN_UNKNOWN, -ENOMEM);
	own->flow = *flow;
	if (!socket_unbind(ctx, own))
		return socket_fail(REASON_OWN_DEVICE, -EPERM);
	return socket_mark(ctx, MARK_MASK, MARK_PROXY) ? ALLOW : REFUSE;
}

static __always_inline int socket_connect(struct bpf_sock_addr *ctx, struct packet *p)
{
	struct flow flow = { .verdict = VERDICT_DIRECT, .mark = direct_mark, .rule = RULE_DEFAULT };
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct own_socket *recent = recent_place(cookie);
	struct process process;
	__u32 reason = 0;

	if (!recent)
		return socket_fail(REASON_POLICY_MISSING, -EPERM);
	recent->flow.owner = 0; /* not to be listed while it is written */
	find_origin(&process, &recent->origin);
	if (asks_dns(p))
		flow.verdict = answers_dns(p) ? VERDICT_DNS : VERDICT_DIRECT;
	else
		reason = socket_decide(p, &process, &flow);
	if (reason)
		return socket_fail(reason, -EPERM);
	flow.owner = cookie;
	recent->flow = flow;
	if (flow.verdict == VERDICT_BLOCK)
		return socket_refuse(flow.reject);
	if (flow.verdict == VERDICT_DIRECT)
		return socket_let(ctx, &flow);
	return socket_steer(ctx, &flow);
}

static __always_inline bool socket_is_marked(struct bpf_sock_addr *ctx)
{
	return (ctx->sk->mark & MARK_MASK) == MARK_PROXY;
}

/* A socket that was connected and is no more has the mark still: no hook saw it. This datagram has it already. */
static __always_inline void socket_forget(struct bpf_sock_addr *ctx)
{
	if (!socket_is_connected(ctx) && socket_is_marked(ctx))
		socket_mark(ctx, MARK_MASK, 0);
}

/* Records a flow that has no connection, of whose first packet all is known. Others may send by the same socket just now. */
static __always_inline struct flow *socket_begin(struct bpf_sock_addr *ctx, const struct packet *p)
{
	struct own_socket *own = socket_storage(ctx);
	struct flow *old, flow = {};

	if (!own)
		return NULL;
	if (!socket_is_connected(ctx))
		own->flow.verdict = VERDICT_INVALID; /* not what it was connected to before */
	if (socket_decide(p, &own->origin.process, &flow))
		return NULL;
	flow.owner = own->flow.owner;
	bpf_map_update_elem(&origins, &p->key, &own->origin, BPF_ANY);
	old = flow_lookup(&p->key);
	if (old) /* another socket's, which had the port before */
		*old = flow;
	else
		flow_record(own_client(), &p->key, &flow);
	return flow_lookup(&p->key);
}

/* What was decided for this socket: an entry may be what an earlier one of the same port has left. */
static __always_inline struct flow *socket_flow(struct bpf_sock_addr *ctx, const struct packet *p)
{
	struct flow *flow = flow_lookup(&p->key);

	return flow && flow->owner == bpf_get_socket_cookie(ctx) ? flow : NULL;
}

/* The number by which lo's program finds the source again; 0: it needs none, or has none. */
static __always_inline __u32 socket_number(const struct packet *p)
{
	__u32 *number;

	if (is_loopback(&p->key.source))
		return 0;
	number = bpf_map_lookup_elem(&own_addresses, &p->key.source);
	return number ? *number : 0;
}

/* What of a sending socket is steered: its mark would only count from its next datagram on. */
static __always_inline int socket_steer4(struct bpf_sock_addr *ctx, const struct packet *p)
{
	__u32 number = socket_number(p) ?: OWN_SOURCE4 & 0xffff;

	ctx->msg_src_ip4 = bpf_htonl(OWN_PREFIX4 << 16 | number);
	return ALLOW;
}

static __always_inline int socket_steer6(struct bpf_sock_addr *ctx, const struct packet *p)
{
	__u32 number = socket_number(p);

	ctx->msg_src_ip6[0] = number ? bpf_htonl(OWN_PREFIX6) : 0;
	ctx->msg_src_ip6[1] = 0;
	ctx->msg_src_ip6[2] = 0;
	ctx->msg_src_ip6[3] = bpf_htonl(number ?: 1);
	return ALLOW;
}

/* Whether a datagram is to be steered: SEND_STEER, or the hook's own result. */
#define SEND_STEER 2

static __always_inline int socket_send(struct bpf_sock_addr *ctx, struct packet *p)
{
	struct flow *flow;

	if (is_published(p)) /* the answer of a service that was reached from outside */
		return ALLOW;
	socket_forget(ctx);
	if (asks_dns(p)) {
		if (!answers_dns(p))
			return ALLOW;
	} else {
		flow = socket_flow(ctx, p) ?: socket_begin(ctx, p);
		if (!flow)
			return socket_fail(REASON_POLICY_MISSING, -EPERM);
		own_without_daemon(p, flow); /* it may have died since */
		flow->last_seen = bpf_jiffies64();
		if (flow->verdict == VERDICT_BLOCK)
			return socket_refuse(flow->reject);
		if (flow->verdict == VERDICT_DIRECT)
			return ALLOW;
	}
	/* the datagram knows its device already, and the next one may be direct, by that device */
	if (ctx->sk->bound_dev_if)
		return socket_fail(REASON_OWN_DEVICE, -EPERM);
	/* connected elsewhere, and steered for that already? */
	return socket_is_marked(ctx) ? ALLOW : SEND_STEER;
}

static __always_inline struct address *box_address(enum own_number number)
{
	__u32 key = number;

	return bpf_map_lookup_elem(&own_numbers, &key);
}

/* A program is told the address that its packets would have without us: it may tell it to others. */
static __always_inline void socket_name4(struct bpf_sock_addr *ctx)
{
	struct address *box;

	if (ctx->user_ip4 != bpf_htonl(OWN_SOURCE4))
		return;
	box = box_address(OWN_NUMBER_SOURCE4);
	if (box && box->w[3])
		ctx->user_ip4 = box->w[3];
}

/* ::1 is the source of what goes to the box itself, too. */
static __always_inline bool socket_is_steered(struct bpf_sock_addr *ctx)
{
	struct address peer;

	peer.w[0] = ctx->sk->dst_ip6[0];
	peer.w[1] = ctx->sk->dst_ip6[1];
	peer.w[2] = ctx->sk->dst_ip6[2];
	peer.w[3] = ctx->sk->dst_ip6[3];
	return own_leaves(&peer);
}

static __always_inline void socket_name6(struct bpf_sock_addr *ctx)
{
	struct address *box, name;

	name.w[0] = ctx->user_ip6[0];
	name.w[1] = ctx->user_ip6[1];
	name.w[2] = ctx->user_ip6[2];
	name.w[3] = ctx->user_ip6[3];
	if (address_is_ipv4(&name) && name.w[3] == bpf_htonl(OWN_SOURCE4))
		box = box_address(OWN_NUMBER_SOURCE4);
	else if (is_ipv6_loopback(&name) && socket_is_steered(ctx))
		box = box_address(OWN_NUMBER_SOURCE6);
	else
		return;
	if (!box || !box->w[3])
		return;
	ctx->user_ip6[0] = box->w[0];
	ctx->user_ip6[1] = box->w[1];
	ctx->user_ip6[2] = box->w[2];
	ctx->user_ip6[3] = box->w[3];
}

#endif
