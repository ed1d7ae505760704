# `make` alone lists the targets. Everything here also works by hand: each recipe is a line or two.

GO ?= go
CLANG = clang-19
LLVM_STRIP = llvm-strip-19

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# make test PKG=./appliance/policy RUN=TestCompile RACE=1
PKG ?= ./...
RUN ?=
RACE ?=
# make fuzz FUZZTIME=5m PKG=./appliance/outbound
FUZZTIME ?= 60s
# make bench BENCHFLAGS='--quick --json FILE' (see BENCHFLAGS=--help)
BENCHFLAGS ?=

# make vmtest STEPS='image first'
STEPS ?=

# make image KERNEL=linux-image-6.12-amd64
KERNEL ?= linux-image-6.12-cloud-amd64

.DEFAULT_GOAL := help
.PHONY: help build image demo test vmtest bench fuzz lint fmt generate check-generated nix-check clean install-deps need-go need-root

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: need-go ## build bin/sidegate, one static file
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o bin/sidegate ./appliance/sidegate

image: build ## build bin/image: a disk to flash, and an OCI image (Debian; KERNEL=linux-image-6.12-amd64 for hardware)
	@scripts/install-deps.sh image
	images/build.sh $(KERNEL) bin/image

demo: need-root need-go ## show what sidegate does, in network namespaces of its own (root)
	@scripts/install-deps.sh demo
	@$(MAKE) --no-print-directory build
	bin/sidegate demo

test: need-go ## run every test that this machine can run, and list what was skipped (best as root)
	@scripts/install-deps.sh --if-root test
	@$(GO) build ./... 2>/dev/null || true # in parallel; what fails is reported below
	$(GO) run ./scripts/testreport -count=1 -p=1 -parallel=6 -timeout=30m $(if $(RACE),-race) $(if $(RUN),-run='$(RUN)') $(PKG)

vmtest: build ## run what needs other kernels, and the image, in emulated machines (Debian; some 10 minutes, without KVM)
	@scripts/install-deps.sh test vm image
	vmtests/run.sh $(STEPS)

bench: need-root need-go ## measure forwarding, proxying and DNS against what is simpler (root)
	@scripts/install-deps.sh bench
	@$(MAKE) --no-print-directory build
	@$(GO) run ./appliance/bench $(BENCHFLAGS)

fuzz: need-go ## run each fuzz target for FUZZTIME (60s)
	scripts/fuzz.sh $(FUZZTIME) $(PKG)

lint: need-go ## check formats, go vet, staticcheck, shell scripts, modules and licences
	@scripts/install-deps.sh lint
	@scripts/lint.sh

fmt: need-go ## format Go and C as lint wants them
	@scripts/install-deps.sh lint
	@scripts/lint.sh --fix

generate: need-go ## compile bpf/ and write the Go bindings
	@scripts/install-deps.sh generate
	BPF2GO_CC=$(CLANG) BPF2GO_STRIP=$(LLVM_STRIP) $(GO) generate ./appliance/datapath

check-generated: need-go ## fail if what is committed is not what generate makes
	@scripts/check-generated.sh

nix-check: need-go ## check the Nix files as far as nix, nixfmt and a nixpkgs tree (NIXPKGS_FLAKE) are there
	@scripts/nix-check.sh

clean: ## remove what was built
	rm -rf bin

install-deps: ## install everything that any target needs (root; Debian, Ubuntu)
	@scripts/install-deps.sh all

need-go:
	@command -v $(GO) >/dev/null || { echo 'sidegate is built with Go 1.26 or newer, and there is no "$(GO)" in PATH: https://go.dev/dl/' >&2; exit 1; }

need-root:
	@[ "$$(id -u)" = 0 ] || { echo 'this needs root, for network namespaces and eBPF: sudo make $(MAKECMDGOALS)' >&2; exit 1; }
