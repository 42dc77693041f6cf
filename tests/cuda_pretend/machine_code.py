"""Compiled layers down to machine code for a GPU that is not there: Inductor's kernels as Triton and
ptxas build them, for a torch that was built with CUDA and has Triton beside it.

What this sees: that Inductor and Triton can build what `--compile auto` asks for, and how many
kernels that is. What it does not see: numbers, and time. Nothing is launched or measured, so of
kernels with several configurations all are built and none is chosen.
"""

import contextlib
import importlib.util
import os
import re
import types
from pathlib import Path
from unittest import mock

import torch

from tests.cuda_pretend import pretend

# What Inductor asks of a GPU, beside its compute capability: an A100's and an H100's.
PROPERTIES = {
    (8, 0): {"multi_processor_count": 108, "shared_memory_per_block_optin": 166912},
    (9, 0): {"multi_processor_count": 132, "shared_memory_per_block_optin": 232448},
}
OF_BOTH = {
    "name": "of nowhere",
    "warp_size": 32,
    "total_memory": 80 << 30,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "shared_memory_per_block": 49152,
    "L2_cache_size": 40 << 20,
    "gcnArchName": "",
}
# A kernel's launch in Inductor's code of a graph: Triton's, a library's, an operation of torch.
LAUNCH = re.compile(r"\b(\w+)\.run\(|\bextern_kernels\.(\w+)\(|\btorch\.ops\.\w+\.(\w+)\.default\(")


def why_not() -> str | None:
    """Why no machine code can be built here, in words; None where it can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton"
    return None


class Built:
    """What Inductor built. graphs: the kernels that each launches, by name and in their order. binaries:
    the machine code of each kernel's configurations, by name.
    """

    def __init__(self):
        self.graphs = []
        self.binaries = {}

    def backend(self, graph, inputs):
        """For torch.compile: builds a graph for the GPU, and gives it back as it was, since fake tensors
        need no more.
        """
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def build(graph, inputs, **options):
            # which dynamo must not hear
            with mock.patch.object(torch.cuda, "is_available", lambda: True):
                code = compile_fx_inner(graph, inputs, **options).source_code
            self.graphs.append(_launches(code))

            def run(inputs):
                return graph.forward(*inputs)

            run._boxed_call = True
            return run

        return compile_fx(graph, inputs, inner_compile=build)

    def precompile(self, kernel):
        """In place of CachingAutotuner.precompile, which loads what it has built onto the GPU."""
        results = [kernel._precompile_config(config).kernel for config in kernel.configs]
        name = kernel.inductor_meta["kernel_name"]
        self.binaries[name] = [result.asm["cubin"] for result in results]


def _launches(code: str) -> list[str]:
    """Kernels that the code of a graph launches."""
    body = code.split("def get_args")[0]  # behind it stands a benchmark
    lines = [line for line in body.splitlines() if not line.lstrip().startswith("#")]
    found = [LAUNCH.search(line) for line in lines]
    return [next(filter(None, each.groups())) for each in found if each]


@contextlib.contextmanager
def building(folder: Path, capability: tuple[int, int]):
    """Inside, what is given gives a Built whose backend builds for a GPU of that compute capability.

    folder: for what is built.
    """
    import torch._inductor.config as inductor
    import torch.utils._triton
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import hints, triton_helpers, triton_heuristics

    built = Built()
    number = 10 * capability[0] + capability[1]
    properties = types.SimpleNamespace(
        **PROPERTIES[capability], **OF_BOTH, major=capability[0], minor=capability[1]
    )
    target = triton.backends.compiler.GPUTarget("cuda", number, 32)
    driver = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_device_capability=lambda device=0: capability,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor{number}")}
    with contextlib.ExitStack() as stack:

        def replace(owner, **parts):
            for name, part in parts.items():
                stack.enter_context(mock.patch.object(owner, name, part))

        stack.enter_context(mock.patch.dict(os.environ, caches))
        stack.enter_context(pretend.a_gpu_of(capability))
        stack.enter_context(pretend.no_gpu_for_dynamo())
        # in this process, the code in memory, and nothing computed on the way
        stack.enter_context(
            inductor.patch(
                compile_threads=1,
                use_static_triton_launcher=False,
                joint_graph_constant_folding=False,
            )
        )
        replace(
            torch.cuda,
            get_device_properties=lambda device=None: properties,
            is_current_stream_capturing=lambda: False,
            set_rng_state=lambda *_, **__: None,
            # each a function of its own: dynamo keeps them in a table
            _exchange_device=lambda device: 0,
            _maybe_exchange_device=lambda device: 0,
        )
        replace(
            CudaInterface,
            get_device_properties=staticmethod(lambda device=None: properties),
            get_compute_capability=staticmethod(lambda device=None: number),
            is_available=staticmethod(lambda: True),
        )
        replace(
            CudaInterface.Worker,
            get_device_properties=staticmethod(lambda device=None: properties),
        )
        replace(triton_helpers, set_driver_to_gpu=lambda: None)
        replace(
            triton_heuristics.CachingAutotuner,
            precompile=lambda kernel, *_, **__: built.precompile(kernel),
        )
        triton.runtime.driver.set_active(driver)
        # what torch asked before, and remembers
        hints.DeviceProperties.create.cache_clear()
        for asked in vars(torch.utils._triton).values():
            getattr(asked, "cache_clear", lambda: None)()
        yield built
