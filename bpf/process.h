/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Who the current process is: its executable and its unit. Read from the task itself, so that it is known however
 * short its life is. The hashes are the same as those of appliance/datapath/process.go.
 */
#ifndef SIDEGATE_PROCESS_H
#define SIDEGATE_PROCESS_H

#include "bpf_core_read.h"
#include "bpf_helpers.h"
#include "config.h"
#include "maps.h"
#include "types.h"

/* What we read of the kernel's own structures; the loader finds their true layout (CO-RE). */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct qstr {
	__u64 hash_len;
	const unsigned char *name;
};

struct dentry {
	struct dentry *d_parent;
	struct qstr d_name;
};

struct vfsmount {
	struct dentry *mnt_root;
};

struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct file {
	struct path f_path;
};

struct mm_struct {
	struct file *exe_file;
};

struct kernfs_node {
	const char *name;
	struct kernfs_node *__parent;
	__u64 id; /* nobody else's, ever */
};

struct kernfs_node___before_6_15 {
	struct kernfs_node *parent;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct css_set {
	struct cgroup *dfl_cgrp; /* of version 2 */
};

struct task_struct {
	struct mm_struct *mm;
	struct css_set *cgroups;
};

#pragma clang attribute pop

#define FNV_OFFSET 0xcbf29ce484222325ULL
#define FNV_PRIME 0x100000001b3ULL

#define PATH_COMPONENTS 32
#define CGROUP_LEVELS 16

static __always_inline __u64 hash_byte(__u64 hash, __u8 byte)
{
	return (hash ^ byte) * FNV_PRIME;
}

/* FNV-1a, of a text that ends with a zero. */
static __always_inline __u64 hash_text(__u64 hash, const __u8 *text)
{
	for (__u32 i = 0; i < NAME_BYTES && text[i]; i++)
		hash = hash_byte(hash, text[i]);
	return hash;
}

static __always_inline struct mount *mount_of(struct vfsmount *mnt)
{
	return (void *)mnt - bpf_core_field_offset(struct mount, mnt);
}

/* A walk from a file towards the root, across mounts. */
struct ascent {
	struct dentry *dentry;
	struct mount *mount;
	__u64 hash;
	__u8 text[NAME_BYTES];
};

static long ascend(__u32 i, struct ascent *a)
{
	struct dentry *dentry = a->dentry, *parent = BPF_CORE_READ(dentry, d_parent);
	struct mount *mount = a->mount;

	if (dentry == BPF_CORE_READ(mount, mnt.mnt_root) || dentry == parent) {
		a->dentry = BPF_CORE_READ(mount, mnt_mountpoint);
		a->mount = BPF_CORE_READ(mount, mnt_parent);
		return a->mount == mount; /* the root */
	}
	bpf_probe_read_kernel_str(a->text, sizeof(a->text), BPF_CORE_READ(dentry, d_name.name));
	a->hash = hash_byte(hash_text(a->hash, a->text), '/');
	a->dentry = parent;
	return 0;
}

/* The components of the path from the last to the first, each with a slash behind it. */
static __noinline __u64 hash_path(struct file *exe)
{
	struct ascent a = {
		.dentry = BPF_CORE_READ(exe, f_path.dentry),
		.mount = mount_of(BPF_CORE_READ(exe, f_path.mnt)),
		.hash = FNV_OFFSET,
	};

	bpf_loop(2 * PATH_COMPONENTS, ascend, &a, 0);
	return a.hash;
}

static __always_inline struct kernfs_node *parent_of(struct kernfs_node *node)
{
	struct kernfs_node___before_6_15 *old = (void *)node;

	if (bpf_core_field_exists(old->parent))
		return BPF_CORE_READ(old, parent);
	return BPF_CORE_READ(node, __parent);
}

static __always_inline bool ends_with(const __u8 *text, __u32 length, const char *end, __u32 size)
{
	if (length <= size)
		return false;
	for (__u32 i = 0; i < size; i++)
		if (text[(length - size + i) & (NAME_BYTES - 1)] != end[i])
			return false;
	return true;
}

/* Those of systemd's units that processes live in (systemd.unit(5)), apart from slices. */
static __always_inline bool is_unit(const __u8 *text, __u32 length)
{
	return ends_with(text, length, ".service", 8) || ends_with(text, length, ".scope", 6) ||
	       ends_with(text, length, ".socket", 7) || ends_with(text, length, ".mount", 6) ||
	       ends_with(text, length, ".swap", 5);
}

/* A walk from a process's cgroup upwards, to the first that is a unit. */
struct climb {
	struct kernfs_node *node;
	struct origin *origin;
};

static long climb(__u32 i, struct climb *c)
{
	struct kernfs_node *node = c->node;
	long length = bpf_probe_read_kernel_str(c->origin->unit, sizeof(c->origin->unit),
						BPF_CORE_READ(node, name));

	if (length > 0 && is_unit(c->origin->unit, length - 1))
		return 1;
	c->node = parent_of(node);
	return !c->node;
}

/* The innermost unit that the process is in; where there is none, the directory that it is in. */
static __always_inline void read_unit(struct kernfs_node *leaf, struct origin *origin)
{
	struct climb c = { .node = leaf, .origin = origin };

	bpf_loop(CGROUP_LEVELS, climb, &c, 0);
	if (!c.node)
		bpf_probe_read_kernel_str(origin->unit, sizeof(origin->unit), leaf->name);
	origin->process.unit = hash_text(FNV_OFFSET, origin->unit);
}

/* Kernel threads have no executable, and no name here. */
static __always_inline void read_name(struct dentry *exe, struct origin *origin)
{
	if (!exe)
		return;
	bpf_probe_read_kernel_str(origin->name, sizeof(origin->name), exe->d_name.name);
	origin->process.name = hash_text(FNV_OFFSET, origin->name);
}

static __always_inline void copy_origin(const struct origin *from, struct process *process,
					struct origin *origin)
{
	*process = from->process;
	__builtin_memcpy(origin->name, from->name, sizeof(origin->name));
	__builtin_memcpy(origin->unit, from->unit, sizeof(origin->unit));
}

/* Read into the stack: only there nobody else writes. */
static __noinline void read_origin(struct dentry *exe, struct kernfs_node *leaf,
				   const struct origin_key *key, struct process *process,
				   struct origin *origin)
{
	struct origin read = {};

	read_unit(leaf, &read);
	read_name(exe, &read);
	if (exe->d_name.hash_len == key->name) /* it was not just renamed */
		bpf_map_update_elem(&known_origins, key, &read, BPF_NOEXIST);
	copy_origin(&read, process, origin);
}

/*
 * What the policy sees of the current process, and that with its names for people, which is never read here: others may write
 * there just now.
 */
static __noinline void find_origin(struct process *process, struct origin *origin)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct kernfs_node *leaf = task->cgroups->dfl_cgrp->kn;
	struct file *exe = task->mm->exe_file;
	struct dentry *name = exe->f_path.dentry;
	struct origin_key key = {
		.exe = (long)name,
		.name = name->d_name.hash_len,
		.cgroup = leaf->id,
	};
	struct origin *known = bpf_map_lookup_elem(&known_origins, &key);

	if (known)
		copy_origin(known, process, origin);
	else
		read_origin(name, leaf, &key, process, origin);
	if (uses_process_path && exe) /* not kept: a directory of it can be renamed */
		process->path = hash_path(exe);
	origin->process = *process;
	origin->pid = bpf_get_current_pid_tgid() >> 32;
}

#endif
