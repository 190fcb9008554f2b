# Each target installs what it needs; `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEPLOY := .venv/.deploy
WEB := .venv/.web

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-web goldens lint types soak soak-scale fuzz bench bench-gpu \
	bench-wide bench-learning bench-serving bench-scale images test-images test-compose test-cluster lint-deploy \
	lock monitoring tutorial \
	pictures check format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(INSTALLED) ## make .venv with all dependencies, at the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "use Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## run the pipeline on generated reviews: prepare, pretrain, evaluate, archive, serve, query
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## run all tests, including those with a real TorchServe (PYTEST_FLAGS=--cov: print the coverage)
	# Two processes with a thread each. Uploads of checkpoints have the lowest priority, so everything gets it:
	# otherwise the tests of one process starve the uploads of the other.
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 \
		-m "not serial" $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m serial $(PYTEST_FLAGS)

test-fast: $(INSTALLED) ## run the tests that are not marked slow or system: under two minutes on two cores
	$(BIN)/python -m pytest -m "not slow and not system"

test-web: $(WEB) ## test the page of `babybert playground` in a headless Chromium
	$(BIN)/python -m pytest tests/web

goldens: $(INSTALLED) ## record tests/golden/goldens.json again (BABYBERT_IMDB=aclImdb_labelled.tar.gz)
	$(BIN)/python tests/golden/record.py

lint: $(INSTALLED) ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED) ## check types
	$(BIN)/mypy

soak: $(INSTALLED) ## kill one run with a real S3 server 50 times; the result must be equal to the bit
	$(BIN)/python tests/soak.py

soak-scale: $(INSTALLED) ## kill workers and drivers of prepare 100 times; the files must be the same; 15 minutes
	$(BIN)/python tests/soak_scale.py

fuzz: $(INSTALLED) ## run 1,000 strange inputs and 3,000 strange settings; up to five minutes (FUZZ_FLAGS=--seed=7)
	$(BIN)/python tests/fuzz.py $(FUZZ_FLAGS)

bench: $(INSTALLED) ## measure speed against other tools: make bench ARCHIVE=aclImdb_v1.tar.gz
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/data.py $(ARCHIVE)
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb --overwrite
	$(BIN)/python benchmarks/pretrain.py --data data/imdb
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/checkpoint.py --data data/imdb

bench-gpu: $(INSTALLED) ## check and measure the GPU code: under ten minutes on one GPU (DATA=folder: an epoch's share)
	$(BIN)/python benchmarks/gpu.py $(if $(DATA),--data $(DATA))

bench-wide: $(INSTALLED) ## measure steps of wide models on the CPU against two peers: 25 minutes (MINUTES=5: fewer cases)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/wide.py $(if $(MINUTES),--minutes $(MINUTES))

bench-learning: $(INSTALLED) ## compare held-out loss over time: make bench-learning ARCHIVE=aclImdb_v1.tar.gz
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb --overwrite
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb-wordpiece \
		--tokenizer-kind wordpiece --vocab-size 8192 --overwrite
	$(BIN)/python benchmarks/learning.py

bench-serving: $(INSTALLED) ## compare requests per second: make bench-serving ARCHIVE=aclImdb_v1.tar.gz; needs wrk
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb --overwrite
	$(BIN)/python benchmarks/serving.py --data data/imdb

bench-scale: $(INSTALLED) ## measure how prepare scales with size, workers and Ray, and simulate clusters; 15 minutes
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/scale_simulation.py

images: ## build both container images with docker or podman and print their sizes (TORCH=cuda: for GPUs)
	docker/build-images.sh

test-images: $(DEPLOY) images ## run the images as a user would, and the Job's pod with podman
	$(BIN)/python -m pytest tests/images.py

test-compose: $(DEPLOY) images ## run docker/compose.yaml as a whole, with docker or podman, as root
	$(BIN)/python -m pytest tests/compose.py

test-cluster: $(DEPLOY) ## apply k8s/ to a real control plane and play exit codes: make test-cluster BINARIES=folder CRDS=folder
	@test -n "$(BINARIES)" || { echo "name the folder with kube-apiserver: make test-cluster BINARIES=folder"; exit 1; }
	$(BIN)/python tests/cluster/check.py --bin "$(BINARIES)" $(if $(CRDS),--crds "$(CRDS)")

lint-deploy: $(DEPLOY) ## check Dockerfiles, manifests and alerts, and that they agree with each other
	$(BIN)/python -m pytest tests/test_deploy.py tests/test_alerts.py

lock: $(DEPLOY) ## write the images' requirements with hashes, after a change of constraints.txt
	PATH="$(BIN):$$PATH" $(BIN)/python docker/lock.py

monitoring: $(INSTALLED) ## write k8s/monitoring.yaml from the alerts and dashboards
	$(BIN)/python k8s/render_monitoring.py

tutorial: $(INSTALLED) ## run the tutorial into runs/tutorial (ARCHIVE=aclImdb_v1.tar.gz: into docs/tutorial)
	BABYBERT_TUTORIAL_ARCHIVE=$(ARCHIVE) $(BIN)/python docs/tutorial/render.py

pictures: $(WEB) ## draw the dashboards into docs and take screenshots of the playground page
	BABYBERT_PICTURES=docs $(BIN)/python -m pytest tests/system/test_dashboards.py tests/web

$(DEPLOY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deploy]'
	command -v kubectl > /dev/null || $(BIN)/python k8s/get_kubectl.py
	@touch $@

$(WEB): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[web]'
	command -v chromium > /dev/null || \
		{ apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } || \
		{ echo "no chromium, and it cannot be installed: as root, apt-get install chromium"; exit 1; }
	@touch $@

check: lint types test ## run the lint, type checks and all tests

format: $(INSTALLED) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and all data, runs and archives of this folder
	rm -rf .venv .coverage data runs model-store build dist
