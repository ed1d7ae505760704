package datapath

// The object is committed, so that building needs no compiler for BPF; `make check-generated` rebuilds it and compares.
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -go-package datapath -cflags "-O2 -g -Wall -Werror -mcpu=v3" -type verdict -type reason -type socket_slot -type failure_policy -type mark -type flow_state -type class_fixed -type sniff_mode -type name_flag -type own_address -type own_number -type own_entry -type settlement -type process -type facts -type decision -type published_key gateway ../../bpf/gateway.bpf.c -- -I../../bpf/headers -I../../bpf
