# Every target installs what it needs; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEPLOY := .venv/.deploy
WEB := .venv/.web

.DEFAULT_GOAL := help
.PHONY: help install demo test test-web lint types soak bench bench-learning bench-serving check format clean lock images monitoring pictures tutorial lint-deploy test-images

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(INSTALLED) ## make .venv with everything, at the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## the whole line on generated reviews: prepare, pretrain, evaluate, archive, serve, ask
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## all tests, those with a real TorchServe among them
	$(BIN)/python -m pytest

test-web: $(WEB) ## the page of `babybert playground` in a headless Chromium
	$(BIN)/python -m pytest tests/web

lint: $(INSTALLED) ## format and style, checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED) ## types, checked
	$(BIN)/mypy

soak: $(INSTALLED) ## 50 random kills against one run with a real S3 server, which must end bit-equal
	$(BIN)/python tests/soak.py

bench: $(INSTALLED) ## speed beside the peers: make bench ARCHIVE=aclImdb_v1.tar.gz
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/data.py $(ARCHIVE)
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb --overwrite
	$(BIN)/python benchmarks/pretrain.py --data data/imdb
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/checkpoint.py --data data/imdb

bench-learning: $(INSTALLED) ## held-out loss by time, beside the peers, half an hour: make bench-learning ARCHIVE=aclImdb_v1.tar.gz
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb --overwrite
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb-wordpiece --tokenizer-kind wordpiece --vocab-size 8192 --overwrite
	$(BIN)/python benchmarks/learning.py

bench-serving: $(INSTALLED) ## requests/s beside the peers: make bench-serving ARCHIVE=aclImdb_v1.tar.gz; needs wrk
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/babybert prepare --corpus imdb --source $(ARCHIVE) --out data/imdb --overwrite
	$(BIN)/python benchmarks/serving.py --data data/imdb

images: ## both container images with docker or podman, their sizes and what is in them (TORCH=cuda: for GPUs)
	docker/build-images.sh

test-images: $(DEPLOY) images ## run the images as a user would, and the Job's pod with podman
	$(BIN)/python -m pytest tests/images.py

lint-deploy: $(DEPLOY) ## check Dockerfiles, manifests, alerts and what they promise each other
	$(BIN)/python -m pytest tests/test_deploy.py tests/test_alerts.py

lock: $(DEPLOY) ## the images' requirements with hashes, after a change of constraints.txt
	PATH="$(BIN):$$PATH" $(BIN)/python docker/lock.py

monitoring: $(INSTALLED) ## k8s/monitoring.yaml from the alerts and dashboards
	$(BIN)/python k8s/render_monitoring.py

tutorial: $(INSTALLED) ## run the tutorial's chapters into runs/tutorial; with ARCHIVE=aclImdb_v1.tar.gz on real reviews into docs/tutorial
	BABYBERT_TUTORIAL_ARCHIVE=$(ARCHIVE) $(BIN)/python docs/tutorial/render.py

pictures: $(WEB) ## draw the dashboards from a real job, server and Prometheus into docs, and take the page's pictures
	BABYBERT_PICTURES=docs $(BIN)/python -m pytest tests/system/test_dashboards.py tests/web

$(DEPLOY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deploy]'
	command -v kubectl > /dev/null || $(BIN)/python k8s/get_kubectl.py
	@touch $@

$(WEB): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[web]'
	command -v chromium > /dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } || \
		{ echo "no chromium, and it cannot be installed: as root, apt-get install chromium"; exit 1; }
	@touch $@

check: lint types test ## what CI runs

format: $(INSTALLED) ## put the code into the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv, data, runs and archives
	rm -rf .venv data runs model-store build dist
