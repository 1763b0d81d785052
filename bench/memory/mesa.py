"""A baseline in plain torch, after Mesa (arXiv 2111.11124): what is saved for backward is kept in 8 bits a number."""

from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

GROUP = 256  # consecutive elements with a least value and a step of their own
LEVELS = 255
# What a 16-bit copy or another view of a weight comes through on its way from the parameter.
_OF_WEIGHTS = {"ToCopyBackward0", "TBackward0", "ViewBackward0", "TransposeBackward0", "PermuteBackward0"}


class Compressed:
    """A storage in 8 bits: codes, and a least value and a step in bfloat16 per group.

    Codes are rounded stochastically, so that decoded values are right on average. The least value is rounded down and
    the step up, so that every value of a group lies between its first and its last level: no error exceeds one step,
    (1 + 2^-6) (largest - least + 2^-7 |least|) / 255, and the rounding to the dtype. Groups with NaN or infinities
    decode to NaN.

    Args:
        flat: all elements of the storage.
    """

    def __init__(self, flat: Tensor):
        self.count, self.dtype = flat.numel(), flat.dtype
        groups = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP).float()
        if flat.numel() % GROUP:  # padded by its own last value, not to widen the range
            groups[-1, flat.numel() % GROUP :] = flat[-1]
        least, most = groups.aminmax(dim=1, keepdim=True)
        self.least = (least - 2**-8 * least.abs()).bfloat16()
        offset = groups.sub_(self.least.float())
        self.step = ((most - self.least.float()) / LEVELS * (1 + 2**-7)).bfloat16()
        tiny = torch.finfo(torch.float32).tiny  # of a group whose values are all equal
        levels = offset.div_(self.step.float().clamp_min(tiny)).add_(torch.rand_like(offset)).floor_()
        self.codes = levels.clamp_(0, LEVELS).to(torch.uint8)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.least.nbytes + self.step.nbytes

    def decode(self) -> Tensor:
        """All elements of the storage."""
        values = self.codes.float().mul_(self.step.float()).add_(self.least.float())
        return values.view(-1)[: self.count].to(self.dtype)


class View:
    """What autograd holds instead of a tensor: where it lies in a compressed storage."""

    def __init__(self, whole: Compressed, tensor: Tensor):
        self.whole, self.size, self.stride = whole, tensor.size(), tensor.stride()
        self.offset = tensor.storage_offset()

    def tensor(self) -> Tensor:
        return self.whole.decode().as_strided(self.size, self.stride, self.offset)


class Mesa(torch.autograd.graph.saved_tensors_hooks):
    """Inside it what autograd saves is compressed, each storage once however many operators save it.

    Left as it is: parameters and their 16-bit copies, what has no gradient (masks, statistics of norms and attention,
    all of a frozen part), statistics per row, storages below one group, integers.
    """

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[int, int, torch.dtype], Compressed] = WeakValueDictionary()
        self._alive: dict[int, StorageWeakRef] = {}  # or another storage could get the address of one that is gone
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | View:
        if not is_activation(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor._version, tensor.dtype
        whole = self._known.get(key)
        if whole is None:
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            self._known[key] = whole = Compressed(flat)
            self._alive[storage._cdata] = StorageWeakRef(storage)
        return View(whole, tensor)


def _unpack(kept: Tensor | View) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.tensor()


def is_activation(tensor: Tensor) -> bool:
    """Whether it is a tensor that Mesa compresses: see there."""
    whole = tensor if tensor._base is None else tensor._base
    elements = tensor.untyped_storage().nbytes() // tensor.itemsize
    if not (tensor.is_floating_point() and tensor.requires_grad) or tensor.shape[-1:] == (1,) or elements < GROUP:
        return False
    node = whole.grad_fn
    while node is not None and node.name() in _OF_WEIGHTS:
        node = node.next_functions[0][0]
    return node is not None and not hasattr(node, "variable")  # AccumulateGrad of a leaf has one
