/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The entry points: a table of contents. */
#include "vmlinux.h"

#include "bpf_endian.h"
#include "bpf_helpers.h"
#include "config.h"
#include "flow.h"
#include "list.h"
#include "loopback.h"
#include "maps.h"
#include "parse.h"
#include "policy.h"
#include "redirect.h"
#include "related.h"
#include "socket.h"
#include "types.h"

static __always_inline int gate(struct __sk_buff *skb, __u32 link_length)
{
	struct packet p = {};
	int result;

	if (skb->mark == MARK_OWN) /* a probe: what arrives has no mark, unless root injected it */
		return pass();
	result = parse(skb, &p, link_length);
	if (p.on_link) /* but a resolver may be told by such an address (RFC 8106) */
		return result == PARSED_FLOW && !p.fragment && is_question(&p.key) ?
			       question(skb, &p) :
			       pass();
	switch (result) {
	case PARSED_DROP:
		return drop(p.reason);
	case PARSED_FLOW:
		break;
	default:
		return pass();
	}
	if (p.fragment == FRAGMENT_LATER)
		return later_fragment(skb, &p);
	result = is_icmp_error(skb, &p) ? icmp_error(skb, &p) : flow_packet(skb, &p);
	if (p.fragment)
		remember_fragment(skb, &p, result);
	return result;
}

/* Ingress of a LAN interface with Ethernet headers. */
SEC("tcx/ingress")
int lan_ethernet(struct __sk_buff *skb)
{
	return gate(skb, sizeof(struct ethhdr));
}

/* Ingress of a LAN interface without link-layer headers (a tunnel). */
SEC("tcx/ingress")
int lan_ip(struct __sk_buff *skb)
{
	return gate(skb, 0);
}

/* Ingress of lo: what the box itself sends by the gateway. */
SEC("tcx/ingress")
int own_loopback(struct __sk_buff *skb)
{
	return own_gate(skb);
}

SEC("cgroup/connect4")
int own_connect4(struct bpf_sock_addr *ctx)
{
	struct packet p = {};

	return socket_meets4(ctx, &p) ? socket_connect(ctx, &p) : socket_ignore(ctx);
}

SEC("cgroup/connect6")
int own_connect6(struct bpf_sock_addr *ctx)
{
	struct packet p = {};

	return socket_meets6(ctx, &p) ? socket_connect(ctx, &p) : socket_ignore(ctx);
}

SEC("cgroup/sendmsg4")
int own_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct packet p = {};
	int result;

	if (!socket_meets4(ctx, &p))
		return ALLOW;
	result = socket_send(ctx, &p);
	return result == SEND_STEER ? socket_steer4(ctx, &p) : result;
}

SEC("cgroup/sendmsg6")
int own_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct packet p = {};
	int result;

	if (!socket_meets6(ctx, &p))
		return ALLOW;
	result = socket_send(ctx, &p);
	return result == SEND_STEER ? socket_steer6(ctx, &p) : result;
}

SEC("cgroup/getsockname4")
int own_getsockname4(struct bpf_sock_addr *ctx)
{
	socket_name4(ctx);
	return ALLOW;
}

SEC("cgroup/getsockname6")
int own_getsockname6(struct bpf_sock_addr *ctx)
{
	socket_name6(ctx);
	return ALLOW;
}

/* Run for each socket of the network namespace when the daemon reads the list. */
SEC("iter/tcp")
int own_list_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;

	if (sk)
		list_socket(ctx->meta->seq, sk, IPPROTO_TCP);
	return 0;
}

SEC("iter/udp")
int own_list_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *sk = ctx->udp_sk;

	if (sk)
		list_socket(ctx->meta->seq, (struct sock_common *)sk, IPPROTO_UDP);
	return 0;
}

/* Packets of an interface that only the probe has come in by the LAN interface, with the probe's mark. */
SEC("tcx/ingress")
int inject(struct __sk_buff *skb)
{
	skb->mark = inject_mark;
	return bpf_redirect(inject_to, BPF_F_INGRESS);
}

/*
 * Runs where the kernel looks for the listener of a packet that is delivered locally. Finds the
 * proxy's for what lan_ethernet could not assign: a reassembled datagram, a SYN that meets a
 * TIME_WAIT socket.
 */
SEC("sk_lookup")
int proxy_lookup(struct bpf_sk_lookup *ctx)
{
	struct flow_key key = {
		.source_port = (__be16)ctx->remote_port,
		.destination_port = bpf_htons(ctx->local_port),
		.protocol = ctx->protocol,
	};
	struct packet p = { .ipv6 = ctx->family == AF_INET6 };
	struct bpf_sock *sk;
	__u32 slot, verdict;

	if (p.ipv6) {
		for (int i = 0; i < 4; i++) {
			key.source.w[i] = ctx->remote_ip6[i];
			key.destination.w[i] = ctx->local_ip6[i];
		}
	} else {
		map_ipv4(&key.source, ctx->remote_ip4);
		map_ipv4(&key.destination, ctx->local_ip4);
	}
	p.key.protocol = ctx->protocol;
	verdict = lookup_verdict(&key, ctx->ingress_ifindex);
	if (verdict == VERDICT_INVALID)
		return SK_PASS;
	slot = listener_slot(&p, verdict);
	sk = bpf_map_lookup_elem(&sockets, &slot);
	if (!sk)
		return SK_PASS;
	bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return SK_PASS;
}

/*
 * Runs on what the box itself sends by IPv6. Unlike IPv4's, the kernel's IPv6 redirects cannot be
 * switched off: it tells clients of any router with a link-local address, and they bypass us.
 */
SEC("netfilter")
int no_redirects(struct bpf_nf_ctx *ctx)
{
	return is_redirect(ctx->skb) ? netfilter_drop(REASON_REDIRECT) : NF_ACCEPT;
}

/* Puts what the daemon decided on a flow to be sniffed into its entry; says whether there is one. */
SEC("tc")
int settle(struct __sk_buff *skb)
{
	struct settlement s;
	struct flow *flow;

	if (bpf_skb_load_bytes(skb, 0, &s, sizeof(s)))
		return TCX_DROP;
	flow = flow_lookup(&s.key);
	if (!flow || flow->verdict != VERDICT_SNIFF)
		return TCX_DROP;
	flow->mark = s.mark;
	flow->outbound = s.outbound;
	flow->generation = s.generation;
	flow->rule = s.rule;
	flow->reject = s.reject;
	flow->verdict = s.verdict;
	count_rule(s.rule);
	return TCX_PASS;
}

/* Says whether a TCP connection that the proxy carries has a socket, whichever end closed it: the key in the packet's data. */
SEC("tc")
int is_carried(struct __sk_buff *skb)
{
	struct packet p = {};

	if (bpf_skb_load_bytes(skb, 0, &p.key, sizeof(p.key)))
		return TCX_PASS;
	p.ipv6 = !address_is_ipv4(&p.key.source);
	return tcp_socket_state(skb, &p) ? TCX_PASS : TCX_DROP;
}

/* Answers a question to the policy, for the daemon: facts in, decision out, in the packet's data. */
SEC("tc")
int policy_query(struct __sk_buff *skb)
{
	struct decision decision = {};
	struct facts facts;

	if (bpf_skb_load_bytes(skb, 0, &facts, sizeof(facts)))
		return TCX_DROP;
	decide(&facts, &decision);
	decision.now = bpf_jiffies64();
	return bpf_skb_store_bytes(skb, 0, &decision, sizeof(decision), 0) ? TCX_DROP : TCX_PASS;
}

const struct abi *abi __attribute__((unused));

char _license[] SEC("license") = "Dual BSD/GPL";
