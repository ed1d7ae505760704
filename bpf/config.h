/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Constants of a generation: set by the daemon before the programs load, read-only afterwards. */
#ifndef SIDEGATE_CONFIG_H
#define SIDEGATE_CONFIG_H

#include "types.h"

const volatile __u32 generation = 0;
const volatile __u8 on_failure = ON_FAILURE_BLOCK; /* enum failure_policy */
const volatile __u8 intercept_dns = 0;
const volatile __u32 direct_mark = MARK_DIRECT; /* of what goes direct by no rule of the policy */
const volatile __u8 sniff = SNIFF_OFF; /* enum sniff_mode */

/* Flows that one client may hold in the flow table; beyond, its flows go to the crowd's table. */
const volatile __u32 client_flows = 8192;

/* Packets a second that one client may give to the proxy's listeners (new flows, in effect). */
const volatile __u32 client_fresh = 4096;

/* … and to the DNS listeners. */
const volatile __u32 client_questions = 250000;

/* Words of the bit vectors in use: 64 rules each. */
const volatile __u32 rule_words = RULE_WORDS;

/* Dimensions that some rule looks at; the verifier removes the look-ups of the others. */
const volatile __u8 uses_destination = 1;
const volatile __u8 uses_source = 1;
const volatile __u8 uses_destination_port = 1;
const volatile __u8 uses_source_port = 1;
const volatile __u8 uses_mac = 1;
const volatile __u8 uses_interface = 1;
const volatile __u8 uses_name = 1;
const volatile __u8 uses_process_name = 1;
const volatile __u8 uses_process_path = 1;
const volatile __u8 uses_process_unit = 1;

/* dscp | network << 6 | ipv6 << 8 → class */
const volatile __u16 header_class[512] = {};

/* The gateway's network namespace: cgroups have the sockets of all. */
const volatile __u64 own_netns = 0;
const volatile __u8 own_dns = 0; /* the box's own questions are answered by the daemon too */

/* Of the program inject alone: the interface that packets come in by, and their mark. */
const volatile __u32 inject_to = 0;
const volatile __u32 inject_mark = 0;

#endif
