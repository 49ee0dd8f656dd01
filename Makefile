# Targets are listed by `make help`. Whatever a target needs it installs or names.
SHELL := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/wrenn-sandbox/wrenn/internal/version.Version=$(VERSION)
GO_TOOL := go tool -modfile=tools/go.mod

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build build-cp build-agent build-envd build-cli
build: build-cp build-agent build-envd build-cli ## Build the four programs into builds/
build-cp: ## Build wrenn-cp
	go build -trimpath -ldflags '$(LDFLAGS)' -o builds/wrenn-cp ./cmd/wrenn-cp
build-agent: ## Build wrenn-agent
	go build -trimpath -ldflags '$(LDFLAGS)' -o builds/wrenn-agent ./cmd/wrenn-agent
build-envd: ## Build envd (static)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o builds/envd ./cmd/envd
build-cli: ## Build the wrenn CLI
	go build -trimpath -ldflags '$(LDFLAGS)' -o builds/wrenn ./cmd/wrenn

.PHONY: generate
generate: generate-proto generate-api generate-sql ## Regenerate all generated code
.PHONY: generate-proto generate-api generate-sql
generate-proto:
	$(GO_TOOL) buf lint
	$(GO_TOOL) buf generate
generate-api:
	$(GO_TOOL) oapi-codegen -config api/oapi-codegen.yaml api/openapi.yaml
generate-sql:
	cd internal/controlplane/store && go tool -modfile=$(CURDIR)/tools/go.mod sqlc generate

.PHONY: images
IMAGES ?= minimal base
WRENN_DIR ?= .wrenn
images: build-envd ## Make the guest's kernel, initramfs and images (IMAGES="minimal base", WRENN_DIR=.wrenn)
	go run ./images/build -images $(WRENN_DIR)/images -kernels $(WRENN_DIR)/kernels $(IMAGES)
