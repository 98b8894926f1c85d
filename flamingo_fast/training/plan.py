"""A training run on paper: memory of a GPU, and what it sends in a step. Nothing is measured.

Parameters are those of the model, built on the meta device; how they are shared follows
`parallel.prepare`, and when they are sent FSDP2 and `tensor_parallel`. Collectives are rings: of n
ranks each sends (n - 1) / n of what an all-gather or a reduce-scatter is of, twice that of an
all-reduce, and receives as much. Bounds of times are operations and bytes over data-sheet peaks,
as if nothing waited for anything: a step takes at least the longest of them.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flamingo_fast.gpus import GPUS
from flamingo_fast.models.chinchilla import RelativeAttention
from flamingo_fast.models.conditioning import find_layers
from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.params import _vision_encoder, _WithoutInit
from flamingo_fast.models.work import DATASETS, Batch, pass_flops, vision_work
from flamingo_fast.modules.cross_attention import MaskedCrossAttention
from flamingo_fast.modules.feed_forward import FeedForward
from flamingo_fast.modules.resampler import PerceiverAttention
from flamingo_fast.ops.linear_cross_entropy import _CHUNK_BYTES
from flamingo_fast.training import tensor_parallel
from flamingo_fast.training.config import ParallelConfig
from flamingo_fast.training.optimizer import _BUCKET_ELEMENTS

_HALF, _WIDE = 2, 4


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs of machines, by data sheets.

    Attributes:
        gpu: of `gpus.GPUS`, by name.
        memory: bytes of a GPU.
        gpus_per_machine: that NVLink joins.
        within: bytes/s that a GPU can send to others of its machine.
        between: bytes/s that a GPU's own port can send to other machines.
        source: of these numbers.
    """

    gpu: str
    memory: int
    gpus_per_machine: int
    within: float
    between: float
    source: str

    @property
    def flops(self) -> float:
        """Operations a second of bf16 products."""
        return next(each for each in GPUS if each.name == self.gpu).matmul["bf16"] * 1e12

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes/s at most that each of a group's GPUs sends in a collective.

        What comes to a machine is passed on in it: with several of a group's GPUs in it, the ports
        of all of them carry what each of them is to have.

        Arguments:
            ranks: of the group.
            stride: how far apart they are, where GPUs are numbered machine by machine.
        """
        if ranks * stride <= self.gpus_per_machine:
            return self.within
        ports = min(ranks, max(1, self.gpus_per_machine // stride))
        return min(self.within, ports * self.between) if ports > 1 else self.between


H100_CLUSTER = Cluster(
    gpu="H100",
    memory=80 * 10**9,
    gpus_per_machine=8,
    # 900 GB/s count both directions.
    within=450e9,
    # A port of 400 Gb/s for each GPU.
    between=50e9,
    source="NVIDIA H100 data sheet (2023), SXM: 80 GB, NVLink 900 GB/s, both directions together; "
    "NVIDIA DGX H100 user guide: a ConnectX-7 port of 400 Gb/s for each of 8 GPUs",
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the GPU that has most.

    Attributes:
        frozen: weights that are not trained, in bf16.
        weights: trained ones: fp32, and without FSDP a bf16 copy to compute with.
        gradients, moments: fp32, of AdamW's moments two.
        in_flight: what is there for a moment: with FSDP two layers gathered, a third's gradients,
            and the last part, which stays gathered, or without reshard_after_forward all layers
            gathered and one's gradients; without FSDP, a bucket of gradients.
        activations: that the forward of a micro-batch keeps, and one layer that is computed again;
            as if no layer was shared, by the reference ops, which keep more than the kernels.
        logits: a chunk of them.
    """

    frozen: int
    weights: int
    gradients: int
    moments: int
    in_flight: int
    activations: int
    logits: int

    @property
    def state(self) -> int:
        """What is there between steps, gradients included."""
        return self.frozen + self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        return self.state + self.in_flight + self.activations + self.logits


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in a step, by what for.

    Attributes:
        gather: FSDP's weights, for forwards and backwards.
        reduce: gradients over data-parallel ranks.
        tensor_parallel: what layers add up over the ranks that share them.
    """

    gather: int
    reduce: int
    tensor_parallel: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """`plan`'s result.

    Attributes:
        gpus, parallel: as given.
        passes: forwards and backwards in a step of a rank.
        memory, traffic: of a GPU.
        flops: of a GPU, in a step.
        cluster: that it is planned for.
    """

    gpus: int
    parallel: ParallelConfig
    passes: int
    memory: Memory
    traffic: Traffic
    flops: int
    cluster: Cluster

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.memory

    @property
    def compute_s(self) -> float:
        """At least, for the products."""
        return self.flops / self.cluster.flops

    @property
    def data_parallel_s(self) -> float:
        """At least, for weights and gradients between data-parallel ranks."""
        sent, shared = self.traffic.gather + self.traffic.reduce, self.parallel.tensor_parallel
        return sent / self.cluster.bandwidth(self.gpus // shared, shared)

    @property
    def tensor_parallel_s(self) -> float:
        """At least, for what layers add up."""
        shared = self.parallel.tensor_parallel
        return self.traffic.tensor_parallel / self.cluster.bandwidth(shared, 1)


def plan(
    config: FlamingoConfig,
    gpus: int,
    parallel: ParallelConfig,
    *,
    batches: Mapping[str, Batch] | None = None,
    micro_batch_size: int | None = None,
    cluster: Cluster | None = None,
) -> Plan:
    """Memory and traffic of a training step in bf16, "accumulation", with activation checkpointing.

    Arguments:
        config: with a frozen vision encoder and a language model of kind "chinchilla".
        gpus: of all.
        parallel: fsdp, tensor_parallel, reshard_after_forward; with activation_checkpointing.
        batches: of each dataset, on all ranks together; by default those of the paper's ablations.
        micro_batch_size: rows of a forward; None: a batch's.
        cluster: None: `H100_CLUSTER`.

    Raises:
        ConfigError: another config; no activation checkpointing; GPUs that tensor_parallel doesn't
            divide, or rows that the data-parallel ranks don't.
    """
    if not config.vision.is_frozen or config.lm.kind != "chinchilla":
        raise ConfigError(
            "config: expected a frozen vision encoder and a language model of kind chinchilla"
        )
    if not parallel.activation_checkpointing:
        raise ConfigError(
            "parallel.activation_checkpointing: expected true, as only memory with it is known "
            "here; got false"
        )
    shared = parallel.tensor_parallel
    if gpus % shared:
        raise ConfigError(f"gpus: expected a multiple of tensor_parallel = {shared}, got {gpus}")
    ranks = gpus // shared
    named = _named(config) if batches is None else dict(batches)
    rows = {}
    for name, batch in named.items():
        if batch.samples % ranks:
            raise ConfigError(
                f"batches.{name}: expected rows that {ranks} data-parallel ranks divide, got "
                f"{batch.samples}"
            )
        rows[name] = batch.samples // ranks
    micro = {name: min(rows[name], micro_batch_size or rows[name]) for name, batch in named.items()}
    passes = {name: math.ceil(rows[name] / micro[name]) for name in named}
    is_sharded = parallel.fsdp and ranks > 1
    units = _shares(config, shared, ranks if is_sharded else 1)
    forwards = {
        name: dataclasses.replace(batch, samples=micro[name]) for name, batch in named.items()
    }
    flops = sum(pass_flops(config, batch).total for batch in named.values())
    return Plan(
        gpus,
        parallel,
        sum(passes.values()),
        _memory(config, units, is_sharded, ranks, parallel, forwards),
        Traffic(
            _gathered(units, ranks, parallel, sum(passes.values())) if is_sharded else 0,
            _reduced(units, ranks, is_sharded, sum(passes.values())),
            sum(_summed(config, named[name], rows[name], passes[name], shared) for name in named),
        ),
        flops // gpus,
        H100_CLUSTER if cluster is None else cluster,
    )


def _named(config: FlamingoConfig) -> dict[str, Batch]:
    return {
        name if len(DATASETS[name]) == 1 else f"{name}.{index}": batch
        for name in config.datasets
        for index, batch in enumerate(DATASETS[name])
    }


# What is shared.


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What FSDP gathers at once: numbers of parameters.

    `whole` are those of a rank before FSDP shards them, `shard` what it has of them for good, in
    FSDP's equal parts. `scalars` are in neither: FSDP leaves them whole. `largest` is the largest
    parameter.
    """

    name: str
    is_trained: bool
    has_backward: bool
    stays: bool
    whole: int
    shard: int
    scalars: int
    largest: int


@functools.lru_cache(maxsize=8)
def _model(config: FlamingoConfig) -> Flamingo:
    with _WithoutInit():
        vision_encoder = _vision_encoder(config.vision)
        model = Flamingo(config, vision_encoder=vision_encoder, device="meta")
    return model.to(torch.bfloat16)


def _modules(model: Flamingo) -> Iterator[tuple[str, Any, bool, bool]]:
    """As `parallel.prepare` shards them: name, module, whether a backward comes by, and whether it
    stays gathered."""
    conditioning = model.conditioning
    indices = conditioning.layer_indices
    blocks: dict[int, Any] = dict(zip(indices, conditioning.blocks, strict=False))
    # FSDP gathers ahead of a backward what ran before in the forward, this too, and in vain.
    yield "vision encoder", model.vision_encoder, True, False
    yield "resampler", model.resampler, True, False
    if model.tokens is not None:
        yield "tokens", model.tokens, True, True
    # A block comes before its layer; of grafting both come after all layers.
    is_graft = model.config.conditioning.kind == "grafting"
    first = indices[0] if indices else math.inf
    has_learnt = model.tokens is not None or not model.config.lm.is_frozen
    for index, layer in enumerate(find_layers(model.lang_model)):
        if not is_graft and index in blocks:
            yield f"block {index}", blocks[index], True, False
        yield f"layer {index}", layer, has_learnt or index >= first, False
    if is_graft:
        for index, block in enumerate(conditioning.blocks):
            yield f"graft {index}", conditioning.layers[index], True, False
            yield f"block {index}", block, True, False
    yield "rest", model, True, True


@functools.lru_cache(maxsize=64)
def _shares(config: FlamingoConfig, shared: int, ranks: int) -> tuple[_Unit, ...]:
    """Frozen and trained parameters of a module are units of their own here."""
    model = _model(config)
    rows_and_columns = _split(model)
    seen: set[int] = set()
    units = []
    for name, module, has_backward, stays in _modules(model):
        counts: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        scalars = {True: 0, False: 0}
        for parameter in module.parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            whole = _shape(parameter, rows_and_columns.get(id(parameter)), shared)
            dim = 1 if rows_and_columns.get(id(parameter)) == "pieces" and shared > 1 else 0
            if not whole:
                scalars[parameter.requires_grad] += 1
                continue
            shard = [*whole]
            shard[dim] = -(-shard[dim] // ranks)
            counts[parameter.requires_grad].append((math.prod(whole), math.prod(shard)))
        for is_trained, each in counts.items():
            if each or scalars[is_trained]:
                units.append(
                    _Unit(
                        name,
                        is_trained,
                        has_backward,
                        stays,
                        sum(whole for whole, _ in each),
                        sum(shard for _, shard in each),
                        scalars[is_trained],
                        max((whole for whole, _ in each), default=1),
                    )
                )
    return tuple(units)


def _split(model: Flamingo) -> dict[int, str]:
    """Of parameters that tensor parallelism shares: along which dimension; of "pieces", rows too.

    As `tensor_parallel.parallelize` does it.
    """
    found = {}
    for _, module in tensor_parallel._layers(model):
        *before, after = tensor_parallel._linears(module).items()
        for name, linear in before:
            pieces = tensor_parallel._BEFORE.get(type(module), {}).get(name, 1)
            found[id(linear.weight)] = "rows" if pieces == 1 else "pieces"
            if linear.bias is not None and pieces == 1:
                found[id(linear.bias)] = "rows"
        found[id(after[1].weight)] = "columns"
        if isinstance(module, RelativeAttention):
            found |= {id(module.content_bias): "rows", id(module.position_bias): "rows"}
    return found


def _shape(parameter: nn.Parameter, split: str | None, shared: int) -> tuple[int, ...]:
    shape = [*parameter.shape]
    if split is not None:
        dim = 1 if split == "columns" else 0
        if shape[dim] % shared:
            raise ConfigError(
                f"parallel.tensor_parallel: expected a divisor of {shape[dim]}, got {shared}"
            )
        shape[dim] //= shared
    return tuple(shape)


# Memory.


def _memory(
    config: FlamingoConfig,
    units: tuple[_Unit, ...],
    is_sharded: bool,
    ranks: int,
    parallel: ParallelConfig,
    forwards: Mapping[str, Batch],
) -> Memory:
    frozen = sum(each.shard + each.scalars for each in units if not each.is_trained)
    trained = sum(each.shard + each.scalars for each in units if each.is_trained)
    if is_sharded:
        gathered: dict[str, int] = collections.defaultdict(int)
        for each in units:
            if not each.stays:
                gathered[each.name] += _HALF * each.whole
        if parallel.reshard_after_forward:
            # A layer computes while the next one is gathered.
            pairs = zip(gathered.values(), [*gathered.values()][1:], strict=False)
            in_flight = max(sum(pair) for pair in pairs)
        else:
            # When the backward begins no layer was let go.
            in_flight = sum(gathered.values())
        in_flight += sum(_HALF * each.whole for each in units if each.stays)
        # Of a layer's gradients what the backward made, and fp32 ones to be sent.
        in_flight += max(
            ((_HALF + _WIDE) * each.whole for each in units if each.is_trained), default=0
        )
    else:
        largest = max((each.largest for each in units if each.is_trained), default=0)
        in_flight = _HALF * largest
        if ranks > 1:
            in_flight = _WIDE * max(_BUCKET_ELEMENTS, largest)
    return Memory(
        frozen=_HALF * frozen,
        weights=(_WIDE if is_sharded else _WIDE + _HALF) * trained,
        gradients=_WIDE * trained,
        moments=2 * _WIDE * trained,
        in_flight=in_flight,
        activations=max(_activations(config, batch) for batch in _largest(forwards.values())),
        logits=_CHUNK_BYTES["gpu"],
    )


def _largest(batches: Iterable[Batch]) -> list[Batch]:
    """Without those of which another has as much of everything."""
    different = list(dict.fromkeys(batches))
    return [
        batch
        for batch in different
        if not any(
            other != batch
            and all(
                mine <= its
                for mine, its in zip(
                    dataclasses.astuple(batch), dataclasses.astuple(other), strict=True
                )
            )
            for other in different
        )
    ]


def _activations(config: FlamingoConfig, batch: Batch) -> int:
    """What autograd saves in a forward on the meta device: outside of layers, and in one of them,
    which is computed again; of each layer its input is kept. Layers that are all alike are few."""
    depth, few, conditioning = config.lm.depth, 2, config.conditioning
    is_alike = isinstance(conditioning.every, int) and conditioning.first == 0
    if depth > few and is_alike and conditioning.kind != "grafting":
        config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, depth=few))
    outside, of_a_layer = _saved(config, batch)
    if conditioning.kind == "grafting":
        depth += conditioning.num_layers
    inputs = depth * _HALF * batch.samples * batch.tokens * config.lm.dim
    return outside + inputs + of_a_layer


@functools.lru_cache(maxsize=64)
def _saved(config: FlamingoConfig, batch: Batch) -> tuple[int, int]:
    """Bytes that are saved outside of layers, and the most that one layer saves."""
    model = _model(config)
    features = vision_work(config.vision)
    ids = torch.zeros(batch.samples, batch.tokens, dtype=torch.int64, device="meta")
    shape = (batch.samples * batch.media, batch.frames, features.tokens, features.features)
    of_model = {each.untyped_storage()._cdata for each in model.parameters()}
    place: list[str] = [""]
    sizes: dict[str, dict[int, int]] = collections.defaultdict(dict)
    kept: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_model:
            # So that no other gets its address.
            kept.append(tensor)
            sizes[place[-1]][storage._cdata] = storage.nbytes()
        return tensor

    handles = []
    layers: Any = find_layers(model.lang_model)
    for index, layer in enumerate((*layers, *model.conditioning.layers)):
        handles += [
            # Before the hook that runs the layer's block.
            layer.register_forward_pre_hook(
                lambda *_, name=f"layer {index}": place.append(name), prepend=True
            ),
            layer.register_forward_hook(lambda *_: place.pop() and None),
        ]
    try:
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(
                ids,
                features=torch.empty(shape, dtype=torch.bfloat16, device="meta"),
                num_media=[batch.media] * batch.samples,
                labels=ids,
                loss_reduction="sum",
            )
    finally:
        for handle in handles:
            handle.remove()
    of_layers = [sum(of.values()) for name, of in sizes.items() if name]
    return sum(sizes[""].values()), max(of_layers, default=0)


# Traffic.


def _gathered(units: tuple[_Unit, ...], ranks: int, parallel: ParallelConfig, passes: int) -> int:
    """Weights in bf16: for each forward, and again for a backward where they were let go."""
    sent = 0
    for each in units:
        again = each.has_backward and not each.stays and parallel.reshard_after_forward
        # What stays is let go after the backward.
        sent += (2 if again else 1) * _HALF * each.shard * (ranks - 1)
    return sent * passes


def _reduced(units: tuple[_Unit, ...], ranks: int, is_sharded: bool, passes: int) -> int:
    """Gradients in fp32: with FSDP of each backward, but for scalars; otherwise once."""
    trained = [each for each in units if each.is_trained]
    once = sum(each.scalars if is_sharded else each.whole + each.scalars for each in trained)
    sent = 2 * _WIDE * once * (ranks - 1) // ranks
    if is_sharded:
        sent += sum(_WIDE * each.shard * (ranks - 1) for each in trained) * passes
    return sent


def _summed(config: FlamingoConfig, batch: Batch, rows: int, passes: int, shared: int) -> int:
    """What the ranks of a layer add up: each linear layer's output after, and each input's gradient
    before; of what is computed again outputs once more. As if all layers had gradients."""
    if shared == 1:
        return 0
    model = _model(config)
    text = rows * batch.tokens * config.lm.dim
    media = rows * batch.media
    latents = config.resampler.num_latents * config.resampler.dim
    features = batch.frames * vision_work(config.vision).tokens * config.resampler.dim
    dim_media = config.conditioning.dim_media or config.resampler.dim
    numbers = 0
    for name, module in tensor_parallel._layers(model):
        part = name.partition(".")[0]
        biases = _biases_in_pieces(module)
        if part == "resampler":
            numbers += media * latents
            if isinstance(module, FeedForward):
                numbers += media * latents
            elif isinstance(module, PerceiverAttention):
                # Queries, and keys and values of latents, which in the first layer are the same for
                # all media; keys and values of features.
                of_latents = media * latents if ".layers.0." not in name else passes * latents
                numbers += 2 * of_latents + media * features + 2 * passes * biases
            else:
                numbers += media * features + passes * biases
            continue
        # A checkpointed layer is computed again as far as something in it was saved: not up to the
        # sum at its end, which is its feed-forward's.
        is_last = part == "lm" and isinstance(module, FeedForward)
        numbers += (2 if is_last else 3) * text + passes * biases
        if isinstance(module, MaskedCrossAttention):
            numbers += media * config.resampler.num_latents * dim_media
    return 2 * _HALF * numbers * (shared - 1) // shared


def _biases_in_pieces(module: Any) -> int:
    """Trained ones that stay whole, whose gradients are summed."""
    pieces = tensor_parallel._BEFORE.get(type(module), {})
    biases = [getattr(module, name).bias for name, number in pieces.items() if number > 1]
    return sum(each.numel() for each in biases if each is not None and each.requires_grad)
