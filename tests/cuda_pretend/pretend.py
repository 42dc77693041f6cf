"""Pretend CUDA: a torch whose fake tensors live on a GPU that the machine does not have, and a watch
over what it would be asked to do.

`start` belongs in a process of its own, before torch is imported: from then on the process claims
a GPU that it does not have, and it must end with os._exit, since autograd's thread for the device
cannot be joined. A fake tensor has a shape, a dtype and a device and no values, so everything that
needs a value on the host cannot be computed: Watch writes down who asked, and gives a stand-in.

What this sees: mismatches of device, dtype and shape, missing arguments, the host waiting for the
device, the number of operations; on a torch that was built with CUDA also what Inductor makes of
compiled layers (machine_code.py). What it does not see: what a kernel itself demands, NCCL, numbers.
"""

import collections
import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Of torch, the versions that this was tried with: all of it stands on private parts.
TESTED = ("2.13", "2.14")
CAPABILITY = (9, 0)  # of the GPU that is pretended: an H100's


def why_not() -> str | None:
    """Why CUDA cannot be pretended here, in words; None where it can."""
    import torch

    if torch.cuda.is_available():
        return "there is a GPU: pytest -m gpu"
    version = torch.__version__.split("+")[0]
    if not version.startswith(tuple(f"{tested}." for tested in TESTED)):
        return f"torch {version} is none of those that this was tried with: {', '.join(TESTED)}"
    if shutil.which("c++") is None:
        return "there is no C++ compiler (c++) for tests/cuda_pretend/guard.cpp"
    return None


def compile_guard(folder: Path) -> Path:
    """guard.cpp as a library in `folder`; at once where it is there already."""
    library = folder / "guard.so"
    if not library.exists():
        (torch_folder,) = importlib.util.find_spec("torch").submodule_search_locations
        command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include"]
        command += [str(HERE / "guard.cpp"), "-o", str(library)]
        command += [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
    return library


def start(folder: Path):
    """Claim a GPU, and give the FakeTensorMode in which tensors live on it.

    folder: where guard.cpp is compiled to. Before torch is imported.
    """
    assert "torch" not in sys.modules, "torch has looked for its hooks already"
    (torch_folder,) = importlib.util.find_spec("torch").submodule_search_locations
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(f"{torch_folder}/lib/{name}", mode=ctypes.RTLD_GLOBAL)
    guard = ctypes.CDLL(str(compile_guard(folder)))
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    guard.claim_the_device()
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H100 of nowhere"
    torch.cuda.mem_get_info = lambda device=None: (78 << 30, 80 << 30)  # free and all, an H100's
    torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.max_memory_allocated = lambda device=None: 0
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    # else autocast("cuda") switches itself off
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.nn.Module.to = _module_to
    torch.Tensor.pin_memory = lambda self, device=None: self
    # else the mode makes a real tensor on the device first
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    return FakeTensorMode(allow_non_fake_inputs=True)


def _module_to(module, *args, **kwargs):
    """nn.Module.to for parameters that are fake tensors, which torch cannot change in place: those
    that are there already stay as they are, the others are replaced, tied ones together.
    """
    import torch

    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    replaced = {}  # by id

    def moved(x):
        if x is None:
            return None
        if id(x) not in replaced:
            there = x.detach().to(device, dtype if x.is_floating_point() else None)
            stays = there.device == x.device and there.dtype == x.dtype
            if not stays and isinstance(x, torch.nn.Parameter):
                there = torch.nn.Parameter(there, x.requires_grad)
            replaced[id(x)] = x if stays else there
        return replaced[id(x)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: moved(x) for name, x in held.items()})
    return module


@contextlib.contextmanager
def a_gpu_of(capability: tuple[int, int]):
    """Inside, the GPU is one of that compute capability."""
    import torch

    pretended = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = pretended


@contextlib.contextmanager
def no_gpu_for_dynamo():
    """Inside, torch.cuda.is_available() is honest again: dynamo would ask the device otherwise."""
    import torch

    pretended = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = pretended


# Operations that make no kernel run: they give memory, or another view of it.
WITHOUT_LAUNCH = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "_reshape_alias", "set_")
# As many kernels as the device has to do after what the host waits for, or it runs dry.
LAUNCHES_AHEAD = 200
# Operations whose result has a shape that depends on values: the host waits for it.
SHAPED_BY_VALUES = (
    "nonzero",
    "masked_select",
    "_unique",
    "unique_dim",
    "unique_consecutive",
    "bincount",
)


def make_watch(may_wait: dict[str, str]):
    """A Watch: see below. (A function, since torch must not be imported before `start`.)

    may_wait: FILE:FUNCTION of the project where the host may wait for the device -> why.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        """Counts operations and kernel launches, by phase, and notes where the host waits for the
        device.

        On top of a FakeTensorMode. `waits`: FILE:FUNCTION and the operation, of those that nobody
        allowed; `allowed`: of those that may.
        """

        def __init__(self):
            super().__init__()
            self.launched = 0  # kernels, in all
            self.trace = None  # a list: every operation with its arguments' shapes
            self._phase = ""
            self.forget(everything=True)

        def forget(self, everything=False):
            """Begin to count anew; `everything`: the waits as well."""
            if everything:
                self.waits, self.allowed = [], []
            self.ops = collections.Counter()  # by phase
            self.launches = collections.Counter()  # by phase
            self.names = collections.defaultdict(collections.Counter)  # of launches, by phase

        @contextlib.contextmanager
        def phase(self, name: str):
            """Inside, what is counted goes under `name`."""
            before, self._phase = self._phase, name
            try:
                yield
            finally:
                self._phase = before

        def waited(self, operation: str):
            """Note that the host waits for the device here."""
            place = _place(sys._getframe(1))
            noted = self.allowed if place in may_wait else self.waits
            noted.append(f"{place} ({operation})")

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            room, name = func._schema.name.split("::")
            if room == "prim":
                return func(*args, **kwargs)
            if name == "_local_scalar_dense":
                if args[0].is_cuda:
                    self.waited("item")
                return _stand_in(args[0].dtype)
            if self._waits(name, args, kwargs):
                self.waited(name)
                args = self._without_values(name, args)
                if name == "nonzero":
                    return args[0].new_zeros(1, args[0].dim(), dtype=torch.int64)
            found = func(*args, **kwargs)
            on_device = any(x.is_cuda for x in _tensors((args, kwargs, found)))
            if on_device:
                self.ops[self._phase] += 1
                if not (func.is_view or name.startswith(WITHOUT_LAUNCH)):
                    self.launched += 1
                    self.launches[self._phase] += 1
                    self.names[self._phase][name] += 1
                if self.trace is not None:
                    shapes = tuple((tuple(x.shape), x.dtype) for x in _tensors((args, kwargs)))
                    self.trace.append((name, shapes))
            return found

        def _without_values(self, name, args):
            """The arguments of an indexing operation with one hit a mask, which has no values."""
            if not name.startswith("index"):
                return args
            indices = []
            for x in args[1]:
                is_mask = x is not None and x.dtype == torch.bool
                hit = is_mask and [x.new_zeros(1, dtype=torch.int64) for _ in range(x.dim())]
                indices += hit or [x]
            return (args[0], indices, *args[2:])

        def _waits(self, name, args, kwargs) -> bool:
            """Whether the host waits for the device in an operation, by its name and arguments."""
            first = args[0] if args and torch.is_tensor(args[0]) else None
            if first is None:
                return False
            if name.startswith(SHAPED_BY_VALUES) or name in ("equal", "is_nonzero"):
                return first.is_cuda
            if name == "repeat_interleave":  # of a tensor of counts: how long is the result?
                return first.is_cuda and kwargs.get("output_size") is None
            if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                indices = [x for x in args[1] if x is not None]
                return first.is_cuda and any(x.dtype == torch.bool for x in indices)
            if name == "segment_reduce":
                return first.is_cuda and not kwargs.get("unsafe", False)
            if name == "_to_copy":
                to = torch.device(kwargs.get("device") or first.device)
                return _crosses(first.device, to) and not kwargs.get("non_blocking", False)
            if name == "copy_":
                blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                return _crosses(args[1].device, first.device) and blocks
            return False

    def _crosses(source, target):
        return {source.type, target.type} == {"cpu", "cuda"}

    def _stand_in(dtype):
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else 1

    def _tensors(tree):
        return [x for x in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(x)]

    watch = Watch()

    class Event:
        """An event of the device: to wait for it costs nothing while more has been launched since than
        the device can have done.
        """

        def __init__(self, *_, **__):
            self.launched = None

        def record(self, stream=None):
            self.launched = watch.launched

        def synchronize(self):
            if watch.launched - self.launched < LAUNCHES_AHEAD:
                watch.waited("event")

    # what waits without an operation
    torch.cuda.synchronize = lambda device=None: watch.waited("synchronize")
    torch.cuda.Event = Event
    return watch


def _place(frame) -> str:
    """FILE:FUNCTION of the innermost frame that is the project's own; of any, where none is."""
    innermost = frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and HERE not in path.parents:
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    while innermost.f_back is not None and HERE in Path(innermost.f_code.co_filename).parents:
        innermost = innermost.f_back
    return f"{innermost.f_code.co_filename}:{innermost.f_code.co_name}"
