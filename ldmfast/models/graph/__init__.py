"""Graph mode: a call of the U-Net, or a whole step of sampling, as one CUDA graph that is replayed.

    unet.graph()                                  # or ldmfast.optimize(pipe, graph=True), ldmfast.load(..., graph=True)
    pipe(...)                                     # each step: inputs copied in, one launch, outputs copied out
    print(*unet.explain(), sep="\\n")              # why a call ran without its graph, if one did
    unet.graph(False)                             # off; what the graphs hold is released

The first call of its kind runs as it is: kernels compile, cuDNN chooses, tables go to the device, and weights of
convolutions are laid out for it, after which a first call comes once more. The second is captured, and the graph's
first replay compared with it, bit for bit. From the third on it is replayed. In LatentDiffusionPipeline a whole step is
one graph with DDIM (eta 0): the U-Net, guidance, the update (pipeline/captured_step.py); with another sampler, and in
diffusers' pipelines, the U-Net's call.

A graph is used only while everything that it has captured is as it was (network_state.py, call_inputs.py). The keys and
values of a prompt are computed in it at each step: kept outside, they would miss weights that change in place. All
graphs of a network share their memory, so its calls take turns, also those of several threads or streams. Each row is
a test of tests/models/graph/.

    what changes                              what happens
    ----------------------------------------  --------------------------------------------------------------------------
    values of the inputs                      seen: copied into the graph's buffers at each call
    timestep: a number, [] or [N]             seen, from any device, as one buffer [N]
    weights in place                          seen: a graph reads them where they are (EMA, fuse_lora, an optimiser)
    LoRA matrices in place                    seen
    shape, dtype or layout of an input        another graph; the older one is kept
    an argument given or left out             another graph (masks, residuals, added conditions)
    LoRA's scale or choice of adapters        another graph; going back to it finds the older one
    LoRA loaded or removed                    another graph
    a module's attribute (eps, groups, ...)   another graph
    use_backend, TF32, cuDNN's and SDPA's     another graph
    guidance, the sampler's configuration     another graph of the step
    weights moved, converted or replaced      the graphs on the old ones are released, and captured again
    a module replaced                         likewise
    more graphs than `entries`                the one not used for longest is released
    more memory than `memory`                 all are released, and captured again as they are used
    gradients, autocast                       off for that call
    a mode, transform or trace that watches   off for that call
    LDMFAST_DEBUG=1, the contract exact       off for that call
    an input on another device, a subclass    off for that call
    cross_attention_kwargs beyond scale       off for that call
    hooks or a forward put on a module        off while it is there (offloading, layerwise casting)
    a processor or module that is not stock's off while it is there (IP-Adapter, sliced attention, fused projections)
    FreeU, chunking, dropout in training      off while it is on: whatever `explain` names, but plain LoRA
    quantised weights, DoRA                   off while they are there
    stock's code replaced                     off while it is
    the network on a CPU, or in parts         off until it is on one GPU
    one graph larger than `memory`            off for that kind of call
    settings that change at every call        off until graph() is called again
    more kinds of calls in turn than entries  off until graph() is called again
    a first replay that differs, a failure    off until graph() is called again, with a warning
"""

from ldmfast.models.graph.graphed import Graphed, from_graph

__all__ = ["Graphed", "from_graph"]
