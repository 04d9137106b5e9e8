SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

MODULE  := github.com/certmesh/certmesh
GIT     := git -c safe.directory='*'
VERSION ?= $(shell $(GIT) describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)

# The version is stamped above; asking git a second time fails in checkouts that belong to another user.
export GOFLAGS := $(filter-out -buildvcs=%,$(GOFLAGS)) -buildvcs=false

# Build tools are pinned in tools/, each heavy one in a module of its own, and kept in bin/tools by version.
TOOLS        := $(CURDIR)/bin/tools
pinned        = $(shell sed -n 's|^.*$(2) \(v[^ ]*\).*|\1|p' $(1)/go.mod | head -n 1)
BUF          := $(TOOLS)/buf-$(call pinned,tools/buf,github.com/bufbuild/buf)
GOLANGCI     := $(TOOLS)/golangci-lint-$(call pinned,tools/lint,github.com/golangci/golangci-lint/v2)

# What buf breaking compares with: the last release, before the first one the last commit.
BUF_BASE     ?= $(shell $(GIT) describe --tags --abbrev=0 --match 'v*' 2>/dev/null || echo HEAD)

CHAOS_MINUTES ?= 10
CHAOS_ROUNDS ?= 200
SOAK_MINUTES ?= 10
KEEP         ?=
BASE         ?=
MINUTE       ?=
FACTOR       ?= 3
LINT_FLAGS   ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: bin/certmeshd bin/certmesh-agent bin/certmesh ## Build certmeshd, certmesh-agent and certmesh into bin/

# Go knows best what is stale.
.PHONY: FORCE
FORCE:

bin/certmeshd: FORCE
	CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o $@ ./controlplane/cmd/certmeshd

bin/certmesh-agent: FORCE
	CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o $@ ./agent/cmd/certmesh-agent

bin/certmesh: FORCE
	CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o $@ ./tui/cmd/certmesh

.PHONY: demo
demo: ## Issue, deploy, verify and renew a certificate on this machine; KEEP=1 leaves it running
	KEEP=$(KEEP) go run ./e2e/cmd/demo

.PHONY: demo-cluster
demo-cluster: ## Three nodes on one PostgreSQL; the leader is killed in the middle of 200 renewals
	go run ./e2e/cmd/demo -cluster

.PHONY: test
test: test-deps $(BUF) ## Run everything with the race detector; installs what is missing
	@mkdir -p bin/test
	@rm -f bin/test/sql.jsonl
	CERTMESH_SQL_DUMP=$(CURDIR)/bin/test/sql.jsonl go run ./e2e/testrun -race -timeout 25m \
	  -check 'format=make -s check-format' \
	  -check 'vet=make -s check-vet' \
	  -check 'proto-lint=make -s check-proto-lint' \
	  -check 'proto-breaking=make -s check-proto-breaking' \
	  -check 'tidy=make -s check-tidy' \
	  . tools e2e/sqlgrammar

.PHONY: test-unit
test-unit: ## Run the packages' own tests, without e2e/ and without the race detector
	go test $$(go list ./... | grep -v '^$(MODULE)/e2e')

.PHONY: test-deps
test-deps:
	@tools/testdeps.sh

.PHONY: chaos
chaos: ## Break a cluster's parts for CHAOS_MINUTES (10), a single server's CHAOS_ROUNDS times (200), then cut at every single event
	CERTMESH_SIM_SEEDS=5000 go test -count=1 -run TestSimulation ./controlplane/internal/dispatch
	CERTMESH_CHAOS_MINUTES=$(CHAOS_MINUTES) go test -v -count=1 -run TestCluster -timeout $$(($(CHAOS_MINUTES) + 20))m ./e2e/chaos
	CERTMESH_CHAOS_ROUNDS=$(CHAOS_ROUNDS) go test -v -count=1 -run TestChaos -timeout 30m ./e2e/...
	CERTMESH_CUT_EVERY=1 go test -v -count=1 -run CutAnywhere -timeout 30m ./controlplane/node

.PHONY: soak
soak: test-deps ## Offer a node more than it takes for SOAK_MINUTES (10), each engine in turn; memory must stay where it was
	CERTMESH_SOAK_MINUTES=$(SOAK_MINUTES) go test -v -count=1 -run TestSoak -timeout 2h ./controlplane/node

.PHONY: bench
bench: test-deps ## Measure everything that is promised about speed and write it into docs/benchmarks.md (10 minutes)
	go run -C tools ./bench run -root $(CURDIR)

.PHONY: bench-compare
bench-compare: test-deps ## Compare this tree with the revision BASE; MINUTE=1 for the short form, FACTOR=3 is what fails
	go run -C tools ./bench compare -root $(CURDIR) -base '$(BASE)' -factor $(FACTOR) $(if $(MINUTE),-minute -turns 3)

.PHONY: cover
cover: ## Measure coverage over all packages: bin/test/cover.html
	@mkdir -p bin/test
	go test -count=1 -coverpkg=./... -coverprofile=bin/test/cover.out ./...
	go tool cover -html=bin/test/cover.out -o bin/test/cover.html
	go tool cover -func=bin/test/cover.out | tail -n 1

.PHONY: lint
lint: $(GOLANGCI) ## Run golangci-lint; LINT_FLAGS=--fix mends what it can
	$(GOLANGCI) run $(LINT_FLAGS) ./...
	cd tools && $(GOLANGCI) run $(LINT_FLAGS) --config ../.golangci.yml ./...
	cd e2e/sqlgrammar && $(GOLANGCI) run $(LINT_FLAGS) --config ../../.golangci.yml ./...

.PHONY: generate
generate: $(BUF) tools-protoc ## Generate Go from protocol/**/*.proto
	PATH="$(TOOLS):$$PATH" $(BUF) generate

.PHONY: tools-protoc
tools-protoc:
	go build -C tools -o $(TOOLS)/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc

.PHONY: verify
verify: check-format check-vet check-proto-lint check-proto-breaking check-tidy check-tidy-tools ## Check that nothing is stale, unformatted or across a wall
	go test -count=1 ./e2e/deptest ./e2e/sqltext
	go test -C tools -count=1 ./...

.PHONY: check-format check-vet check-proto-lint check-proto-breaking check-tidy check-tidy-tools
check-format:
	@stale=$$(gofmt -l .); if [ -n "$$stale" ]; then echo "run gofmt -w on:"; echo "$$stale"; exit 1; fi

# With the race detector's build, which the tests share.
check-vet:
	go vet -race -gcflags='modernc.org/sqlite/lib=-race=false' ./...
	go vet -C tools -race ./...

check-proto-lint: $(BUF)
	$(BUF) lint

check-proto-breaking: $(BUF)
	@rm -rf bin/test/proto-base && mkdir -p bin/test/proto-base
	$(GIT) archive $(BUF_BASE) buf.yaml ':(glob)protocol/**/*.proto' | tar -x -C bin/test/proto-base
	$(BUF) breaking --against bin/test/proto-base

check-tidy:
	go mod tidy -diff
	cd tools && go mod tidy -diff

check-tidy-tools:
	for module in tools/buf tools/lint e2e/sqlgrammar; do (cd $$module && go mod tidy -diff); done

# buf and golangci-lint take about a minute and a half each to build, once a version.
$(BUF):
	go build -C tools/buf -trimpath -ldflags "-s -w" -o $@ github.com/bufbuild/buf/cmd/buf

$(GOLANGCI):
	go build -C tools/lint -trimpath -ldflags "-s -w" -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: clean
clean: ## Remove bin/, the cached tools included
	rm -rf bin
