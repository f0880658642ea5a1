"""Several processes or GPUs, through accelerate: who am I, what is the mean over all of us, are we in step.

Gradients are averaged here and not by DistributedDataParallel, because a loss may call `encode`, `decode` and a
discriminator in any order, and DDP follows only a module's `forward`.
"""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ldmfast.ops import native

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
KNOWN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
RANKS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
BUCKET = 25 * 2**20  # bytes of gradients in one all-reduce, as in DDP


def start(config):
    """The Accelerator of a run: its device, its precision, its place among the processes.

    Raises ValueError for a device that is not there, for fp16 without a GPU, and for a way of distributing that the
    training loop does not know.
    """
    if config.device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r}, but torch sees no CUDA device; use auto or cpu")
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.precision == "fp16" and cpu:
        raise ValueError("precision='fp16' needs a GPU; on a CPU use bf16 or fp32")
    precision = MIXED[automatic_precision(cpu) if config.precision == "auto" else config.precision]
    refuse_a_lone_process()
    # accelerate keeps the first run's settings for the life of the process; a process group stays as it is
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    # a plugin, because the bare number gives way to an environment variable
    accumulate = GradientAccumulationPlugin(num_steps=config.accumulate, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_plugin=accumulate)
    if accelerator.distributed_type not in KNOWN:
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type}; this loop knows several CPU or CUDA processes "
            "with a whole model each (accelerate launch --multi_gpu, or --cpu)"
        )
    return accelerator


def automatic_precision(cpu):
    """ "bf16" where it is multiplied as such, else "fp32": a processor that has to widen it gains nothing by it.

    cpu  whether the run is on the processor
    """
    if cpu:
        multiplied = native.multiplies_bfloat16()
    else:
        multiplied = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if multiplied else "fp32"


def refuse_a_lone_process():
    """`accelerate launch --cpu --num_processes 2` starts a single process where there is no mpirun, without a word."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and not any(name in os.environ for name in RANKS):
        raise ValueError(
            "accelerate launch was asked for several processes and started one: without mpirun it does so on a CPU; "
            "add --multi_gpu to it (with --device cpu here: it then uses gloo), or use torchrun --nproc-per-node"
        )


def average_gradients(parameters):
    """Replace every gradient by its mean over the processes. One that is missing everywhere stays missing."""
    if _alone():
        return
    parameters = list(parameters)
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    grads = []
    for parameter, somewhere in zip(parameters, present.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    for bucket, flat, work in [_reduce(bucket) for bucket in _buckets(grads)]:
        work.wait()
        flat /= dist.get_world_size()
        torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))


def _reduce(bucket):
    flat = _flatten_dense_tensors(bucket)
    return bucket, flat, dist.all_reduce(flat, async_op=True)


def _buckets(tensors):
    """Lists of tensors of one dtype and together at most BUCKET bytes (or one tensor)."""
    found, size = [], {}
    latest = {}
    for tensor in tensors:
        key, n = tensor.dtype, tensor.numel() * tensor.element_size()
        if key not in latest or size[key] + n > BUCKET:
            latest[key], size[key] = [], 0
            found.append(latest[key])
        latest[key].append(tensor)
        size[key] += n
    return found


def mean(values):
    """Mean over the processes of a float32 tensor."""
    if not _alone():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def same_everywhere(model):
    """Give every process the weights and buffers of process 0."""
    if not _alone():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def agree(value, what):
    """Raise ValueError unless all processes hold the same `value`."""
    if _alone():
        return
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if any(v != values[0] for v in values):
        raise ValueError(f"the processes differ in {what}: {values}; they need one shared output folder")


def leave():
    """Wait for the others and end the process group. Returns whether this is the process that speaks."""
    if not dist.is_initialized():
        return True
    main = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    return main


def _alone():
    return not dist.is_initialized() or dist.get_world_size() == 1
