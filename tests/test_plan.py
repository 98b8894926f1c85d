"""A plan's numbers are what ranks have and send: of one among others that are not there."""

import collections
import dataclasses
from typing import Any

import pytest
import torch
from rank_cases import one_rank_of
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.work import Batch as Sizes
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import OptimizerConfig, ParallelConfig
from flamingo_fast.training.parallel import prepare
from flamingo_fast.training.plan import H100_CLUSTER, _reduced, _shares, plan
from flamingo_fast.training.step import TrainStep

ROWS, TOKENS, MEDIA = 4, 8, 2
# How many times a message's bytes a rank of two sends.
SENT = {"_allgather_base_": 1 / 2, "_reduce_scatter_base_": 1 / 2, "all_reduce": 1, "allreduce_": 1}
CHECKPOINTING = ParallelConfig(activation_checkpointing=True)


def small_config(encoder: str = "vit_mini", **conditioning: Any) -> FlamingoConfig:
    """The mini model with frozen parts, as the large ones."""
    mini = FlamingoConfig.preset("flamingo-mini")
    return dataclasses.replace(
        mini,
        vision=dataclasses.replace(mini.vision, encoder=encoder, is_frozen=True),
        conditioning=dataclasses.replace(mini.conditioning, **conditioning),
        lm=dataclasses.replace(mini.lm, is_frozen=True),
        eoc_token_id=mini.lm.vocab_size,
        learnt_token_ids=(mini.lm.vocab_size,),
        datasets=("m3w",),
    )


class Sent(TorchDispatchMode):
    """Bytes of messages, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace in ("c10d", "_c10d_functional") and name in SENT:
            tensors = [each for each in pytree.tree_leaves(args) if torch.is_tensor(each)]
            self.bytes[name] += max(each.numel() * each.element_size() for each in tensors)
        return func(*args, **(kwargs or {}))


def held(model: nn.Module, is_trained: bool) -> int:
    """Numbers of this rank's parameters."""
    parameters = (each for each in model.parameters() if each.requires_grad == is_trained)
    local = (each.to_local() if isinstance(each, DTensor) else each for each in parameters)
    return sum(each.numel() for each in local)


def random_batch(config: FlamingoConfig, rows: int) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(10, 100, (rows, TOKENS))
    ids[:, ::4] = config.image_token_id
    side = config.vision.image_size
    return Batch(
        input_ids=ids,
        labels=ids,
        attention_mask=None,
        cu_seqlens=None,
        num_media=[MEDIA] * rows,
        attend=None,
        pixels=torch.randn(rows * MEDIA, 1, 3, side, side),
        features=None,
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a rank: numbers of parameters, scalars among them, and bytes that a step sends."""

    frozen: int
    trained: int
    trained_scalars: int
    sent: collections.Counter[str]

    @property
    def reduced(self) -> float:
        return self.sent["_reduce_scatter_base_"] + self.sent["allreduce_"]


def measure(config: FlamingoConfig, gpus: int, parallel: ParallelConfig, rows: int) -> Measured:
    """A step of one of so many ranks, with forwards of one row."""
    model = Flamingo(config)
    with one_rank_of(gpus):
        ranks = prepare(model, parallel, "bf16", "cpu")
        step = TrainStep(
            model,
            OptimizerConfig(),
            weights={"m3w": 1.0},
            micro_batch_size=1,
            dp_group=ranks.dp_group,
        )
        with Sent() as sent:
            step({"m3w": random_batch(config, rows)})
        return Measured(
            held(model, False),
            held(model, True),
            sum(each.requires_grad and each.dim() == 0 for each in model.parameters()),
            collections.Counter({name: SENT[name] * n for name, n in sent.bytes.items()}),
        )


# Beside gradients, a loss and norms.
BESIDE = 16


@pytest.mark.parametrize(
    ("gpus", "tensor_parallel", "fsdp", "options"),
    [
        (4, 2, True, {}),
        # Frozen scalars, which FSDP doesn't gather.
        (2, 1, True, {"encoder": "nfnet_mini"}),
        (4, 2, True, {"every": 2}),
        (2, 2, True, {}),
        (2, 1, True, {}),
        (4, 2, False, {}),
    ],
)
def test_ranks_hold_and_send_what_is_planned(gpus, tensor_parallel, fsdp, options):
    config = small_config(**options)
    parallel = ParallelConfig(
        fsdp=fsdp, tensor_parallel=tensor_parallel, activation_checkpointing=True
    )
    rows = ROWS * tensor_parallel // gpus
    measured = measure(config, gpus, parallel, rows)
    sizes = {"m3w": Sizes(ROWS, TOKENS, MEDIA)}
    planned = plan(config, gpus, parallel, batches=sizes, micro_batch_size=1)

    memory, traffic = planned.memory, planned.traffic
    is_sharded = fsdp and gpus > tensor_parallel
    assert memory.frozen == 2 * measured.frozen
    assert memory.weights == (4 if is_sharded else 6) * measured.trained
    assert memory.gradients == 4 * measured.trained
    assert memory.moments == 8 * measured.trained
    assert planned.passes == rows
    assert traffic.gather == measured.sent["_allgather_base_"]
    assert traffic.tensor_parallel == measured.sent["all_reduce"]
    assert measured.reduced - BESIDE <= traffic.reduce <= measured.reduced


def test_gradients_of_trained_scalars_are_summed_beside_those_of_fsdp():
    # `plan` takes no trained encoder, and nothing else of a model has scalars.
    config, rows = FlamingoConfig.preset("flamingo-mini"), 2
    measured = measure(config, 2, CHECKPOINTING, rows)
    assert measured.trained_scalars > 0
    units = _shares(config, 1, 2)
    assert sum(each.scalars for each in units if each.is_trained) == measured.trained_scalars
    by_fsdp = sum(4 * each.shard for each in units if each.is_trained) * rows
    assert by_fsdp == measured.sent["_reduce_scatter_base_"]
    # One rank of two sends what an all-reduce is of.
    assert _reduced(units, 2, True, rows) == by_fsdp + 4 * measured.trained_scalars
    assert 0 < measured.reduced - _reduced(units, 2, True, rows) <= BESIDE


def test_weights_that_are_not_let_go_are_all_in_flight():
    config = small_config(encoder="nfnet_mini")
    kept = dataclasses.replace(CHECKPOINTING, reshard_after_forward=False)
    gathered = {}
    for parallel in (CHECKPOINTING, kept):
        model = Flamingo(config)
        batch = random_batch(config, 1)
        with one_rank_of(2):
            prepare(model, parallel, "bf16", "cpu")
            layers = (*model.conditioning.blocks, model.resampler)
            trained = [
                sum(each.numel() for each in layer.parameters() if each.requires_grad)
                for layer in layers
            ]
            model(
                batch.input_ids, videos=batch.pixels, num_media=batch.num_media, labels=batch.labels
            )
            # Those that are gathered are whole tensors between forward and backward.
            gathered[parallel] = sum(
                each.numel() * each.element_size()
                for each in model.parameters()
                if not isinstance(each, DTensor) and each.dim() > 0
            )
    sizes = {"m3w": Sizes(2, TOKENS, MEDIA)}
    few, all_of_them = (plan(config, 2, each, batches=sizes) for each in (CHECKPOINTING, kept))
    # A layer's gradients are bf16 and fp32.
    gradients = (2 + 4) * max(trained)
    assert all_of_them.memory.in_flight == gathered[kept] + gradients
    assert gathered[CHECKPOINTING] < few.memory.in_flight - gradients < gathered[kept]
    assert all_of_them.memory.state == few.memory.state
    assert all_of_them.traffic.gather < few.traffic.gather


# What is saved for the backward is found by a forward of each dataset.
PAGES = {"m3w": Sizes(64, 256, 5)}


def test_more_rows_take_more_memory_and_more_ranks_less():
    config, parallel = FlamingoConfig.preset("flamingo-3b"), CHECKPOINTING
    few, many = (plan(config, 8, parallel, batches=PAGES, micro_batch_size=rows) for rows in (1, 8))
    assert few.memory.activations < many.memory.activations
    assert few.memory.state == many.memory.state
    assert few.passes == 8 * many.passes
    assert few.traffic.gather == 8 * many.traffic.gather
    alone = plan(config, 1, parallel, batches=PAGES, micro_batch_size=1)
    assert alone.memory.state > 8 * few.memory.state
    assert alone.traffic.gather == alone.traffic.reduce == 0
    assert (
        alone.fits
        and not dataclasses.replace(
            alone, cluster=dataclasses.replace(H100_CLUSTER, memory=10**10)
        ).fits
    )


@pytest.mark.parametrize(
    ("ranks", "stride", "bandwidth"),
    [
        # In a machine.
        (1, 1, 450e9),
        (8, 1, 450e9),
        (2, 4, 450e9),
        # Eight, two and one of a machine's GPUs are in the group.
        (16, 1, 400e9),
        (1024, 1, 400e9),
        (256, 4, 100e9),
        (128, 8, 50e9),
        (64, 16, 50e9),
    ],
)
def test_bandwidth_is_that_of_the_links_a_group_has(ranks, stride, bandwidth):
    assert H100_CLUSTER.bandwidth(ranks, stride) == bandwidth


def test_times_are_bounds_by_peaks():
    config = FlamingoConfig.preset("flamingo-3b")
    parallel = dataclasses.replace(CHECKPOINTING, tensor_parallel=8)
    planned = plan(config, 16, parallel, batches=PAGES, micro_batch_size=1)
    traffic = planned.traffic
    assert planned.tensor_parallel_s == traffic.tensor_parallel / 450e9 > 0
    assert planned.data_parallel_s == (traffic.gather + traffic.reduce) / 50e9 > 0
    assert planned.compute_s == planned.flops / 989e12 > 0


@pytest.mark.parametrize(
    ("config", "gpus", "tensor_parallel", "message"),
    [
        ("flamingo-mini", 1, 1, "config: expected a frozen vision encoder"),
        ("flamingo-3b", 6, 4, "gpus: expected a multiple of tensor_parallel = 4, got 6"),
        ("flamingo-3b", 3, 1, r"batches.m3w: expected rows that 3 .* divide, got 256"),
        ("flamingo-3b", 64, 32, "tensor_parallel: expected"),
    ],
)
def test_what_can_not_be_planned_is_refused_by_name(config, gpus, tensor_parallel, message):
    with pytest.raises(ConfigError, match=message):
        plan(
            FlamingoConfig.preset(config),
            gpus,
            dataclasses.replace(CHECKPOINTING, tensor_parallel=tensor_parallel),
        )


def test_without_activation_checkpointing_nothing_is_planned():
    with pytest.raises(ConfigError, match=r"parallel.activation_checkpointing: expected true"):
        plan(FlamingoConfig.preset("flamingo-3b"), 8, ParallelConfig(), batches=PAGES)
