"""CoAtNet: a flat list of blocks from the stem to the head, and its initial weights.

B: samples, S: sub-layers that stochastic depth may drop, K: classes.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

from models import drop_path as stochastic_depth
from models.attention import Backend, Lookup, RelativeAttention, relative_index
from models.blocks import Block, Choices, Head, MBConv, Patches, Stem, Transformer
from models.design import BlockSpec, Resolution, Spec, Stride
from models.norm import BatchNorm

DRAWERS = 4  # threads that draw the weights of a block
LARGE = 1 << 20  # elements of a block from which on threads are worth it

RunBlock = Callable[[Callable[..., Any], Tensor, Tensor | None], Tensor]


class CoAtNet(nn.Module):
    """The network of a spec at one resolution. Parameters are named blocks.<stage>.<index>.<path>.

    Attributes:
        spec, classes: what it was built from.
        resolution: (height, width) in pixels; the relative-bias tables belong to it.
        drop_rates: (S,) of every sub-layer of the whole network in order.
        drop_group: samples of which stochastic depth drops an exact count; 0: each drops by itself.
        part: (first, last) of the flat list that is left, see `cut`; the whole list of a network that is not cut.
    """

    def __init__(
        self, spec: Spec, resolution: Resolution, classes: int, drop_group: int, make: Callable[[BlockSpec], Block]
    ) -> None:
        """Put together the blocks that `make` builds; `build` is the way to call this."""
        super().__init__()
        self.spec, self.classes, self.resolution = spec, classes, spec.size(resolution)
        self.drop_group = drop_group
        self.blocks = nn.ModuleDict()
        for block in spec.blocks(resolution):
            _, stage, index = block.name.split(".")
            if stage not in self.blocks:
                self.blocks[stage] = nn.ModuleDict()
            cast(nn.ModuleDict, self.blocks[stage])[index] = make(block)
        self.part = (0, len(self.flat))
        self.drop_rates = tuple(rate for _, block in self.flat for rate in block.drop_rates)
        self._first_drop = 0

    @property
    def flat(self) -> list[tuple[str, Block]]:
        """Every block with its name, in the order of the forward pass: what recomputation and a pipeline cut."""
        return [
            (f"blocks.{stage}.{index}", cast(Block, block))
            for stage, blocks in self.blocks.items()
            for index, block in cast(nn.ModuleDict, blocks).items()
        ]

    def cut(self, first: int, last: int) -> None:
        """Keep the blocks [first, last) of the flat list only, under their names: a stage of a pipeline.

        Its forward takes what the block before `first` gives and returns what the block before `last` does. Stochastic
        depth's factors stay those of the whole network.

        Raises:
            ValueError: no such part of a network that is whole.
        """
        blocks = self.flat
        if self.part != (0, len(blocks)) or not 0 <= first < last <= len(blocks):
            raise ValueError(f"{self.spec.name}: no part [{first}, {last}) of the blocks {self.part}")
        self._first_drop = sum(len(block.drop_rates) for _, block in blocks[:first])
        self.part = (first, last)
        for name, _ in blocks[:first] + blocks[last:]:
            _, stage, index = name.split(".")
            del cast(nn.ModuleDict, self.blocks[stage])[index]
        for stage in [stage for stage, left in self.blocks.items() if not len(cast(nn.ModuleDict, left))]:
            del self.blocks[stage]

    def forward(self, x_BCHW: Tensor, drop_SB: Tensor | None = None, run: RunBlock | None = None) -> Tensor:
        """Logits (B, K) of pictures (B, 3, H, W); of a stage that was cut, its last block's output of its input.

        Args:
            x_BCHW: float, of the resolution the network was built for.
            drop_SB: stochastic depth's factors (`models.drop_path.scales`) on the device; None: nothing is dropped.
            run: calls a block as run(block, x, drop), to recompute or time it; None: plainly.

        Raises:
            ValueError: pictures or factors of another size than the network's.
        """
        ((_, logits_BK),) = deque(self._outputs(x_BCHW, drop_SB, run), maxlen=1)  # keeps no other output alive
        return logits_BK

    def forward_features(self, x_BCHW: Tensor, drop_SB: Tensor | None = None, run: RunBlock | None = None) -> Tensor:
        """The last feature map before the head; arguments and errors as in `forward`.

        Returns:
            (B, C, H / s, W / s) with s the total stride, 32 in a CoAtNet.
        """
        return self.forward_pyramid(x_BCHW, drop_SB, run)[-1]

    def forward_pyramid(
        self, x_BCHW: Tensor, drop_SB: Tensor | None = None, run: RunBlock | None = None
    ) -> list[Tensor]:
        """The last feature map of each size but the stem's, for detection and segmentation heads.

        Returns:
            (B, C, H / stride, W / stride) for each of `pyramid`, in its order. Arguments and errors as in `forward`.
        """
        wanted = {block.name for block, _ in _last_of_each_grid(self.spec, self.resolution)}
        grids = {block.name: block.grid for block in self.spec.blocks(self.resolution)}
        return [
            y if y.dim() == 4 else y.transpose(1, 2).reshape(len(y), -1, *grids[name])
            for name, y in self._outputs(x_BCHW, drop_SB, run, head=False)
            if name in wanted
        ]

    @property
    def pyramid(self) -> list[tuple[int, int]]:
        """(stride in pixels, channels) of each map of `forward_pyramid`: strides 4, 8, 16 and 32 in a CoAtNet."""
        return [(stride, block.width) for block, stride in _last_of_each_grid(self.spec, self.resolution)]

    def _outputs(
        self, x_BCHW: Tensor, drop_SB: Tensor | None, run: RunBlock | None, head: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Every block's name and output in order; without `head`, those before it. Raises as `forward` does."""
        if self.part[0] == 0 and tuple(x_BCHW.shape[1:]) != (3, *self.resolution):
            raise ValueError(f"{self.spec.name}: pictures {tuple(x_BCHW.shape)}, built for (B, 3, *{self.resolution})")
        if drop_SB is not None and drop_SB.shape != (len(self.drop_rates), len(x_BCHW)):
            raise ValueError(
                f"{self.spec.name}: stochastic depth's factors {tuple(drop_SB.shape)}, must be "
                f"{(len(self.drop_rates), len(x_BCHW))}"
            )
        x, first = x_BCHW, self._first_drop
        for name, block in self.flat if head else self.flat[:-1]:
            last = first + len(block.drop_rates)
            drop = drop_SB[first:last] if drop_SB is not None and last > first else None
            x = block(x, drop) if run is None else run(block, x, drop)
            yield name, x
            first = last


def _last_of_each_grid(spec: Spec, resolution: Resolution) -> list[tuple[BlockSpec, int]]:
    """The last block of each size of feature map before the head, with its stride in pixels; no stem's."""
    height, _ = spec.size(resolution)
    last = {block.grid: block for block in spec.blocks(resolution) if block.kind in ("mbconv", "transformer")}
    return [(block, height // block.grid[0]) for block in last.values()]


def compile_blocks(model: CoAtNet, backend: str = "inductor") -> None:
    """Let torch.compile translate every block but the head at its next pass.

    Blocks of equal widths, grid and stride share one compilation, since torch tells compiled code apart by what it
    reads. Shapes are taken as constants: another batch size is compiled again.

    Args:
        model: is changed in place; the names of its parameters stay.
        backend: torch.compile's.
    """
    # A network has a dozen kinds of blocks, each in training, recomputation and evaluation; torch gives up after eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for _, block in model.flat:
        if not isinstance(block, Head):
            block.__dict__["forward"] = torch.compile(block.forward, dynamic=False, backend=backend)


def build(
    spec: Spec,
    *,
    resolution: Resolution,
    classes: int,
    stride: Stride | None = None,
    drop_path: float = 0.0,
    norm_momentum: float = 0.01,
    attention: Backend = "auto",
    bias_lookup: Lookup = "index_select",
    drop_group: int = 0,
    device: torch.device | str = "meta",
) -> CoAtNet:
    """The network of `spec`, on the meta device unless told otherwise; `initialise` gives it its weights.

    Args:
        spec: the network as data.
        resolution: pixels, a multiple of the total stride (32); (height, width) where not square.
        classes: K.
        stride: which MBConv convolution down-samples; None: the spec's own.
        drop_path: rate of stochastic depth; block b of L drops with drop_path * b / L.
        norm_momentum: BatchNorm's, PyTorch's sense.
        attention: see `models.attention.attend`.
        bias_lookup: see `models.attention.look_up`.
        drop_group: of every so many consecutive samples stochastic depth drops an exact count, and Transformer blocks
            do not compute their branches; 0: each sample drops by itself.
        device: where the tensors lie.

    Raises:
        InputError: a resolution that the total stride does not divide.
    """
    dropped = [block.name for block in spec.blocks(resolution) if block.kind in ("mbconv", "transformer")]
    rates = dict(zip(dropped, stochastic_depth.rates(len(dropped), drop_path), strict=True))

    choices = Choices(stride or spec.stride, norm_momentum, attention, bias_lookup, drop_group)

    def make(block: BlockSpec) -> Block:
        if block.kind == "stem":
            return Stem(block, spec, choices)
        if block.kind == "patches":
            return Patches(block)
        if block.kind == "mbconv":
            return MBConv(block, spec, rates[block.name], choices)
        if block.kind == "transformer":
            return Transformer(block, spec, rates[block.name], choices)
        return Head(block.width, classes)

    with torch.device(device):
        return CoAtNet(spec, resolution, classes, drop_group, make)


def initialise(
    model: CoAtNet,
    seed: int,
    device: torch.device | str,
    head_bias: float | Tensor = 0.0,
    ready: Callable[[Block], object] | None = None,
) -> None:
    """Move `model` to `device` with fresh weights that depend on (seed, parameter name) alone, block by block.

    Everything is filled with NaN first, so that a forgotten weight cannot hide.

    Args:
        model: on any device; what it held is lost.
        seed: any integer.
        device: where the model goes.
        head_bias: the classifier's bias, one value or (K,).
        ready: is called with each block when it has its weights, before the next one is made.

    Raises:
        RuntimeError: a parameter or buffer was not given a value.
    """
    for name, block in model.flat:
        block.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        initialise_block(name, block, seed, model.spec.kernel_std, head_bias)
        held = (*block.named_parameters(prefix=name), *block.named_buffers(prefix=name))
        forgotten = [path for path, tensor in held if tensor.isnan().any().item()]
        if forgotten:
            raise RuntimeError(f"initialise: no initial value for {', '.join(forgotten)}")
        if ready is not None:
            ready(block)


@torch.no_grad()
def initialise_block(
    name: str, block: Block, seed: int, kernel_std: float = 0.02, head_bias: float | Tensor = 0.0
) -> None:
    """Give one block its initial weights, whatever other blocks there are and wherever it lies.

    Kernels and relative-bias tables are normal(0, kernel_std), biases zero, norms one and zero (COATNET.md section 2).

    Args:
        name: of the block in the flat list, "blocks.s3.4".
        block: on any device but meta.
        seed: any integer.
        head_bias: the classifier's bias, used if the block is the head.
    """
    drawn: dict[str, Tensor] = {}
    for path, module in block.named_modules(prefix=name):
        if isinstance(module, nn.Conv2d | nn.Linear):
            drawn[f"{path}.weight"] = module.weight
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm | BatchNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        if isinstance(module, BatchNorm):
            module.running_mean.zero_()
            module.running_var.fill_(1.0)
            module.pending.zero_()
        elif isinstance(module, RelativeAttention) and module.form != "none":
            drawn[f"{path}.table"] = module.table
            module.index.copy_(relative_index(*module.grid, device=module.index.device))
    _draw(drawn, seed, kernel_std)
    if isinstance(block, Head):
        block.classifier.bias.copy_(torch.as_tensor(head_bias))


def _draw(drawn: Mapping[str, Tensor], seed: int, std: float) -> None:
    """Fill parameters with normal(0, std), drawn on the CPU so that every device starts from the same values.

    Each has a generator of its own, so large ones are drawn side by side: CoAtNet-7 takes a core most of a minute.
    """

    def fill(name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        shape = drawn[name].shape
        with torch.no_grad():  # which holds for one thread only
            drawn[name].copy_(torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator))

    threads = DRAWERS if sum(tensor.numel() for tensor in drawn.values()) >= LARGE else 1
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, drawn))
