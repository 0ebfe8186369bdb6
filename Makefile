# Two commands matter: `make demo` and `make test`. Each does all of its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run tests: each has a file at a time, and exports the tiny models that it needs itself.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
PACKAGES := quant devices export runtime cli

.PHONY: demo test quick chaos oldest lint bench proto clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# Threads of the BLAS's own would wait for each other's turn on processors that tests share: minutes of nothing.
test quick chaos oldest: export OMP_NUM_THREADS := 1

test: lint
	$(BIN)/python -m pytest $(PARALLEL)
	$(MAKE) oldest

# What depends on onnxruntime's kernels, on the oldest version that a bundle accepts.
OLDEST := 1.28.0
oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	grep -v '^onnxruntime=' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint $(VENV)-oldest/constraints.txt \
		onnxruntime==$(OLDEST) pytest pytest-timeout pytest-xdist hypothesis --editable '.[server,export]'
	$(VENV)-oldest/bin/python -m pytest -n $(JOBS) tests/runtime/test_invariance.py tests/runtime/test_segments.py

# Without the tests that need the default model or more than a few seconds.
quick: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Servers, devices, links, disks and certificates that fail, three times in a row; see docs/faults.md.
chaos: $(VENV)/.installed-dev
	for run in 1 2 3; do $(BIN)/python -m pytest -q tests/chaos || exit; done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typecheck && ln -sfn ../.. build/typecheck/isthmus  # mypy wants the package under its name
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -m isthmus $(PACKAGES:%=-p isthmus.%)

# What produces the published figures; minutes each. See benchmarks/README.md.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/single_graph.py
	$(BIN)/python benchmarks/codec_cost.py
	$(BIN)/python benchmarks/peers.py

# The wire's schema; the generated files are committed.
proto: $(VENV)/.installed-dev
	cd runtime/wire && ../../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. isthmus.proto

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt quant/_native.c quant/_tabq.c
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[server,export]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
