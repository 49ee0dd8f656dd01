# Targets are listed by `make help`. Whatever a target needs it installs or names.
SHELL := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/wrenn-sandbox/wrenn/internal/version.Version=$(VERSION)
GO_TOOL := CGO_ENABLED=0 go tool -modfile=$(CURDIR)/tools/go.mod
# Every program is static, so one build runs on any distribution and none needs a C compiler.
GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
# The guest agent without commit or version: images are made anew only when the guest agent itself changes.
GO_BUILD_ENVD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -buildid='

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- One machine --------------------------------------------------------------------------------
.PHONY: up down status reset
up: ## Run all of Wrenn on this machine and create a first sandbox
	@bash scripts/up.sh
down: build-cli ## Stop it; all data stays
	@builds/wrenn down
status: build-cli ## Show what runs
	@builds/wrenn status
reset: build-cli ## Stop it and remove all its data
	@builds/wrenn reset --yes

# --- Programs -----------------------------------------------------------------------------------
.PHONY: build build-cp build-agent build-envd build-cli
build: ## Build wrenn-cp, wrenn-agent, envd and wrenn into builds/
	@mkdir -p builds
	$(GO_BUILD) -o builds/ ./cmd/wrenn-cp ./cmd/wrenn-agent ./cmd/wrenn
	$(GO_BUILD_ENVD) -o builds/envd ./cmd/envd
build-cp: ## Build wrenn-cp
	$(GO_BUILD) -o builds/wrenn-cp ./cmd/wrenn-cp
build-agent: ## Build wrenn-agent
	$(GO_BUILD) -o builds/wrenn-agent ./cmd/wrenn-agent
build-envd: ## Build envd (static)
	$(GO_BUILD_ENVD) -o builds/envd ./cmd/envd
build-cli: ## Build the wrenn command
	$(GO_BUILD) -o builds/wrenn ./cmd/wrenn

# --- Development --------------------------------------------------------------------------------
.PHONY: dev dev-agent migrate-up
dev: build ## Start PostgreSQL and Redis, run migrations, run the control plane in this terminal
	@builds/wrenn dev control-plane
dev-agent: build ## Register this machine and run the host agent in this terminal (by sudo)
	@builds/wrenn dev agent
migrate-up: build-cp ## Apply the database migrations to DATABASE_URL, also from .env (wrenn-cp does that at its start too)
	@set -a; [ ! -f .env ] || . ./.env; builds/wrenn-cp migrate

.PHONY: generate
generate: generate-proto generate-api generate-sql ## Regenerate all generated code
.PHONY: generate-proto generate-api generate-sql
generate-proto:
	$(GO_TOOL) buf lint
	$(GO_TOOL) buf generate
generate-api:
	$(GO_TOOL) oapi-codegen -config api/oapi-codegen.yaml api/openapi.yaml
	$(GO_TOOL) oapi-codegen -config sdk/go/oapi-codegen.yaml api/openapi.yaml
generate-sql:
	cd internal/controlplane/store && $(GO_TOOL) sqlc generate

.PHONY: images
IMAGES ?= minimal base
WRENN_DIR ?= .wrenn
images: build-envd ## Make the guest's kernel, initramfs and images (IMAGES="minimal base", WRENN_DIR=.wrenn)
	@go run ./images/build -images $(WRENN_DIR)/images -kernels $(WRENN_DIR)/kernels $(IMAGES)

# --- Tests --------------------------------------------------------------------------------------
export WRENN_TEST_BIN := $(CURDIR)/builds
export WRENN_TEST_KERNEL := $(CURDIR)/.wrenn/kernels/vmlinuz
export WRENN_TEST_IMAGES := $(CURDIR)/.wrenn/images
TEST_RUN := go run ./test/run -p 2

.PHONY: test-inputs test test-firecracker test-attack check check-generated fmt-check vet lint fuzz bench chaos soak
test-inputs:
	@bash scripts/install.sh test
	@$(MAKE) --no-print-directory build images
test: export AGENT_WARM_VMS ?= 1
test: test-inputs ## Run all tests: unit, with real PostgreSQL and Redis, in real virtual machines
	$(TEST_RUN) -timeout 30m ./...
test-firecracker: export FIRECRACKER_BIN ?=
test-firecracker: export JAILER_BIN ?=
test-firecracker: ## The same with a real Firecracker (FIRECRACKER_BIN=… JAILER_BIN=…), in an emulated machine where there is no KVM
	@[ -z "$(FIRECRACKER_BIN)" ] || $(MAKE) --no-print-directory test-inputs
	@go run ./test/firecracker
test-attack: test-inputs ## Attack from within a sandbox and hold its neighbour's latency against it; on a quiet machine
	WRENN_TEST_ATTACK=1 $(TEST_RUN) -timeout 60m -count 1 -run TestNeighbourUnderAttack ./test/e2e
check: check-generated fmt-check vet lint test ## Everything CI checks
check-generated:
	@bash scripts/check-generated.sh
fmt-check:
	@bad=$$(gofmt -l cmd images internal sdk test); [ -z "$$bad" ] || { echo "not formatted: $$bad" >&2; exit 1; }
vet:
	go vet ./...
	cd sdk/go && go vet ./...
lint:
	$(GO_TOOL) golangci-lint run --allow-parallel-runners ./...
	cd sdk/go && $(GO_TOOL) golangci-lint run --allow-parallel-runners -c $(CURDIR)/.golangci.yml ./...
FUZZTIME ?= 30s
fuzz: ## Fuzz every parser for FUZZTIME (30s) each
	@bash scripts/fuzz.sh $(FUZZTIME)
bench: test-inputs ## Measure speed and memory against a floor on this machine; JSON and a table
	go run ./test/bench
chaos: export WRENN_CHAOS_FAULTS ?= 50
chaos: test-inputs ## Kill parts at random (WRENN_CHAOS_FAULTS=50, WRENN_CHAOS_SEED), then look for what is lost or left over
	$(TEST_RUN) -timeout 60m -count 1 ./test/chaos
soak: export WRENN_CHAOS_FAULTS ?= 1000
soak: export WRENN_SOAK = 1
soak: export WRENN_SOAK_ROUNDS ?= 50
soak: test-inputs ## Faults at every point, checksums of memory and disk (WRENN_SOAK_ROUNDS=50), and chaos, for hours
	$(TEST_RUN) -timeout 12h -count 1 -run 'TestFaults|TestCrashes|TestIntegrity' ./internal/agent
	$(TEST_RUN) -timeout 12h -count 1 ./test/chaos
