# make quickstart   real data -> a trained, measured, indexed, served recommender
# make test         everything that CI checks
# make check        the same without the slow tests
# make torchrec     installs TorchRec for the CPU: training.engine = "torchrec"
# make clean        removes the environment and what the checks left behind
#
# On a machine with a GPU: make quickstart TORCH_INDEX=   (torch from the default index, with CUDA)

VENV ?= .venv
ARGS ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CANDIDATES = python3.11 python3.12 python3.13 python3.14 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: quickstart test check clean torchrec

quickstart: $(VENV)/.installed
	$(VENV)/bin/foretaste quickstart --replace $(ARGS)

test: $(VENV)/.installed-dev
	VENV=$(VENV) scripts/check

check: $(VENV)/.installed-dev
	VENV=$(VENV) scripts/check --fast

# TorchRec is installed without its dependencies, which ask for a build with CUDA; those it needs
# are listed here.
torchrec: $(VENV)/.installed-dev
	$(PIP) install --quiet --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 tensordict==0.15.3 \
		torchmetrics==1.9.0 lightning-utilities==0.15.3 iopath==0.1.10 portalocker==4.4.2 \
		pyre-extensions==0.0.32 typing-inspect==0.9.0 mypy-extensions pyvers==0.2.3 \
		importlib-metadata zipp orjson cloudpickle tqdm psutil

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "foretaste needs Python 3.11 or newer: apt install python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing: apt install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch is installed first and alone, because the default index's Linux build brings 5 GB of CUDA.
# If torch's own index cannot be reached, pip uses its other indexes. Dependencies come with the
# next install, so pip asks that index only once.
$(VENV)/.torch: $(VENV)/.made
	@echo "installing torch for $(if $(TORCH_INDEX),the CPU,a GPU)"
	@$(PIP) install --quiet --no-deps --timeout 15 --retries 1 \
		$(if $(TORCH_INDEX),'torch==2.13.*' --extra-index-url $(TORCH_INDEX),torch)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing foretaste"
	@$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	@echo "installing foretaste and what its tests need"
	@$(PIP) install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.installed
