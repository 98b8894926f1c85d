"""A training step: a batch of each dataset, and one update, or one of each (section 3.2 of v1).

"Section" is Flamingo's (arXiv 2204.14198), of its first version where said.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flamingo_fast.models.config import OPTIMISATIONS
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.ranges import span
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import OptimizerConfig
from flamingo_fast.training.optimizer import (
    MasterWeights,
    all_reduce_gradients,
    clip,
    global_norm,
    local,
    make_optimizer,
    trained_buffers,
    warm_up,
)

_COUNTERS = ("steps", "updates", "skipped")


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step did, the same on all ranks.

    Attributes:
        losses: of each dataset, the mean over all of its predicted tokens, without lambda; 0.0
            where there are none.
        loss_tokens: of each dataset, how many those are, on all ranks together.
        grad_norm: of the gradients before they are clipped; with several updates the largest. Not
            finite where an update was skipped because of it.
        skipped: updates that were not made because a loss or a gradient was not finite.
    """

    losses: dict[str, float]
    loss_tokens: dict[str, int]
    grad_norm: float
    skipped: int


class TrainStep:
    """Gradient updates of a model on a mixture of datasets.

    The loss of a dataset is the mean over the tokens to be predicted in its batch, on all ranks
    together, times lambda. "accumulation" adds the gradients of all datasets for one update;
    "round_robin" makes one update for each dataset, in the order of `weights` (section 3.2.3 of
    v1). A dataset whose batch has nothing to predict is left out. Gradients are clipped by their
    global norm. Where a loss or that norm is not finite, on any rank, no rank makes the update:
    weights, moments and batch norm's statistics stay as they are.

    Every step seeds PyTorch's generators by `seed`, its own number and `dp_group`'s rank, so there
    is no state of theirs to keep.

    With FSDP each backward sums its gradients over ranks, so that no rank holds whole ones; with
    whole models that happens once an update.

    Arguments:
        model: on its device, sharded or not, see `parallel.prepare`. Its trainable parameters are
            taken now; they get fp32 master weights where they have 16 bits.
        optimizer: AdamW's settings. Its warm-up counts steps.
        weights: lambda of each dataset.
        optimisation: "accumulation" or "round_robin".
        micro_batch_size: rows of a forward; None: a batch's. Gradients don't depend on it.
        master_weights: False: parameters of 16 bits are updated as they are, with moments of 16
            bits, and gradients are added up in them. That takes half of the memory and loses small
            updates: for measurements.
        dp_group: the ranks that have different rows, FSDP's among them; None: this process alone.
            Ranks outside of it, of tensor parallelism, are given the same batches.

    Attributes:
        steps, updates, skipped: so far; of updates those that were made and those that were not.

    Raises:
        ValueError: a wrong argument, by name; nothing in the model is trainable.
    """

    def __init__(
        self,
        model: Flamingo,
        optimizer: OptimizerConfig,
        *,
        weights: Mapping[str, float],
        optimisation: str = "accumulation",
        micro_batch_size: int | None = None,
        master_weights: bool = True,
        seed: int = 0,
        dp_group: dist.ProcessGroup | None = None,
    ) -> None:
        if optimisation not in OPTIMISATIONS:
            raise ValueError(
                f"optimisation: expected one of {', '.join(OPTIMISATIONS)}; got {optimisation!r}"
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: expected at least 1, got {micro_batch_size}")
        if not weights or not all(math.isfinite(each) and each >= 0 for each in weights.values()):
            raise ValueError(f"weights: expected one of each dataset, at least 0, got {weights}")
        self.model = model
        self.config = optimizer
        self.weights = dict(weights)
        self.optimisation = optimisation
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.steps = self.updates = self.skipped = 0
        self._dp_group = dp_group
        self._dp_rank = 0 if dp_group is None else dist.get_rank(dp_group)
        self._masters = MasterWeights(model, widen=master_weights)
        self._optimizer = make_optimizer(self._masters.weights, optimizer)
        self._device = next(iter(self._masters.weights.values())).device
        # A forward changes these before anyone knows whether its loss is finite.
        self._statistics = [*trained_buffers(model).values()]

    def __call__(self, batches: Mapping[str, Batch]) -> StepResult:
        """One step.

        Arguments:
            batches: this rank's rows of each dataset, on any device. All ranks give the same
                datasets and as many rows of each.

        Raises:
            ValueError: a dataset without lambda; ranks that differ in datasets or rows; packed rows
                whose documents don't begin where rows do.
        """
        unknown = [name for name in batches if name not in self.weights]
        if unknown or not batches:
            raise ValueError(
                f"batches: expected some of the datasets {', '.join(self.weights)}; got "
                f"{', '.join(batches) or 'none'}"
            )
        if not self.model.training:
            self.model.train()
        torch.manual_seed(_seed_of(self.seed, self.steps, self._dp_rank))
        micro_batches = {
            name: [*split_batch(batches[name], self.micro_batch_size)]
            for name in self.weights
            if name in batches
        }
        loss_tokens = self._count_tokens(micro_batches)
        for group in self._optimizer.param_groups:
            group["lr"] = warm_up(self.config, self.steps)
        self.steps += 1
        present = [name for name in micro_batches if loss_tokens[name]]
        in_update = [present] if self.optimisation == "accumulation" else [[x] for x in present]
        losses, norms, skipped = dict.fromkeys(micro_batches, 0.0), [0.0], 0
        for names in filter(None, in_update):
            statistics = [each.clone() for each in self._statistics]
            sums = []
            for name in names:
                with span(f"dataset {name}"):
                    sums.append(self._backward(micro_batches[name], name, loss_tokens))
            with span("optimiser"):
                of_datasets, norm, is_made = self._update(sums)
                self._settle(statistics, is_made)
            losses |= {
                name: each / loss_tokens[name]
                for name, each in zip(names, of_datasets, strict=True)
            }
            norms.append(norm)
            skipped += not is_made
        self.skipped += skipped
        # max() of NaN is whatever comes first.
        norm = next((each for each in norms if not math.isfinite(each)), max(norms))
        return StepResult(losses, loss_tokens, norm, skipped)

    def state(self) -> dict[str, Any]:
        """Everything that a step changes, for torch.distributed.checkpoint, which loads it in
        place; call `load` after that.

        Returns:
            "weights": fp32 weights by the model's names, and buffers of parts that are trained;
            "exp_avg" and "exp_avg_sq": AdamW's moments by the same names; "counters": (3,) int64,
            steps, updates, skipped.
        """
        names = {weight: name for name, weight in self._masters.weights.items()}
        moments = {
            key: {names[weight]: each[key] for weight, each in self._optimizer.state.items()}
            for key in ("exp_avg", "exp_avg_sq")
        }
        counters = [getattr(self, name) for name in _COUNTERS]
        return {
            "weights": {
                **{name: each.detach() for name, each in self._masters.weights.items()},
                **trained_buffers(self.model),
            },
            **moments,
            "counters": torch.tensor(counters, dtype=torch.int64),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned, there or here, with values loaded into it or not.

        Raises:
            KeyError: a name that it lacks.
        """
        own = self.state()
        for key in ("weights", "exp_avg", "exp_avg_sq"):
            for name, tensor in own[key].items():
                given = state[key][name]
                # A DTensor has no memory of its own: all of theirs would seem to be the same.
                if local(given).data_ptr() != local(tensor).data_ptr():
                    tensor.copy_(given)
        for name, value in zip(_COUNTERS, state["counters"].tolist(), strict=True):
            setattr(self, name, value)
        for each in self._optimizer.state.values():
            each["step"].fill_(self.updates)
        self._masters.copy_to_model()

    def _count_tokens(self, micro_batches: Mapping[str, Sequence[Batch]]) -> dict[str, int]:
        """Tokens that each dataset predicts on all ranks; checks that these do the same.

        It waits for the device when that has nothing to do yet.
        """
        counts = torch.stack(
            [
                sum(
                    (each.loss_tokens().to(self._device) for each in micro_batches.get(name, ())),
                    torch.zeros((), dtype=torch.int64, device=self._device),
                )
                for name in self.weights
            ]
        )
        forwards = torch.tensor(
            [len(micro_batches.get(name, ())) for name in self.weights], device=self._device
        )
        mine = torch.stack([counts, forwards])
        if self._dp_group is None:
            of_ranks = [mine]
        else:
            size = dist.get_world_size(self._dp_group)
            of_ranks = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(of_ranks, mine, group=self._dp_group)
        tokens, forwards_of_ranks = torch.stack(of_ranks, 1).tolist()
        # With FSDP they would wait for each other for good.
        if any(each != forwards_of_ranks[0] for each in forwards_of_ranks):
            raise ValueError(
                f"batches: expected as many rows of each dataset on all ranks; the ranks have "
                f"{forwards_of_ranks} forwards of {', '.join(self.weights)}"
            )
        totals = map(sum, zip(*tokens, strict=True))
        by_name = dict(zip(self.weights, totals, strict=True))
        return {name: by_name[name] for name in micro_batches}

    def _backward(
        self, micro_batches: Sequence[Batch], name: str, loss_tokens: Mapping[str, int]
    ) -> torch.Tensor:
        """Adds a dataset's gradients; the sum of its tokens' losses on this rank, fp32 scalar."""
        scale = self.weights[name] / loss_tokens[name]
        total = torch.zeros((), device=self._device)
        for each in micro_batches:
            loss = self._loss_sum(each.to(self._device, non_blocking=True))
            with span("backward"):
                (loss * scale).backward()
            total += loss.detach()
        return total

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        return self.model(
            batch.input_ids,
            videos=batch.pixels,
            features=batch.features,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            num_media=batch.num_media,
            cu_seqlens=batch.cu_seqlens,
            attend=batch.attend,
            loss_reduction="sum",
        ).loss

    def _update(self, sums: Sequence[torch.Tensor]) -> tuple[list[float], float, bool]:
        """Sums of losses over all ranks, the gradients' norm, and whether there was an update."""
        gradients = self._masters.gradients()
        losses = torch.stack([*sums])
        if self._dp_group is not None:
            with span("all-reduce"):
                # FSDP has done so in the backward, but for what it leaves whole.
                is_sharded = isinstance(self.model, FSDPModule)
                all_reduce_gradients(
                    [each for each in gradients if not (is_sharded and isinstance(each, DTensor))],
                    self._dp_group,
                )
                dist.all_reduce(losses, group=self._dp_group)
        norm = global_norm(gradients)
        clip(gradients, norm, self.config.max_grad_norm)
        *of_datasets, total_norm = torch.cat([losses, norm[None]]).tolist()
        is_made = all(map(math.isfinite, (*of_datasets, total_norm)))
        if is_made:
            self._optimizer.step()
            self._masters.copy_to_model()
            self.updates += 1
        self._masters.clear_gradients()
        return of_datasets, total_norm, is_made

    @torch.no_grad()
    def _settle(self, earlier: Sequence[torch.Tensor], is_made: bool) -> None:
        """Batch norm's statistics after an update: the first rank's, as each saw its own rows and a
        checkpoint has one rank's; the earlier ones if it was skipped."""
        for statistic, before in zip(self._statistics, earlier, strict=True):
            if not is_made:
                statistic.copy_(before)
            elif self._dp_group is not None:
                dist.broadcast(statistic, group=self._dp_group, group_src=0)


def _seed_of(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def split_batch(batch: Batch, rows: int | None) -> Iterator[Batch]:
    """Batches of at most so many of its rows, in order; None: itself.

    Raises:
        ValueError: packed rows whose documents don't begin where rows do.
    """
    total, length = batch.input_ids.shape
    if rows is None or rows >= total:
        yield batch
        return
    ends = [0]
    for count in batch.num_media:
        ends.append(ends[-1] + count)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        first, last, cu_seqlens = start, stop, None
        if batch.cu_seqlens is not None:
            edges = torch.tensor([start * length, stop * length], dtype=batch.cu_seqlens.dtype)
            # Documents without tokens go with what comes after them.
            first, last = torch.searchsorted(batch.cu_seqlens, edges).tolist()
            cu_seqlens = batch.cu_seqlens[first : last + 1] - start * length
            if cu_seqlens[0] != 0 or cu_seqlens[-1] != (stop - start) * length:
                raise ValueError(
                    f"cu_seqlens: expected documents that begin where rows of {length} tokens do, "
                    f"got {batch.cu_seqlens.tolist()}"
                )
        of_rows, of_media = slice(start, stop), slice(ends[first], ends[last])
        has_media = ends[last] > ends[first]
        yield Batch(
            input_ids=batch.input_ids[of_rows],
            labels=batch.labels[of_rows],
            attention_mask=None if batch.attention_mask is None else batch.attention_mask[of_rows],
            cu_seqlens=cu_seqlens,
            num_media=batch.num_media[first:last],
            attend=None if batch.attend is None else batch.attend[first:last],
            pixels=batch.pixels[of_media] if batch.pixels is not None and has_media else None,
            # Empty, it still says that the vision encoder is not to run: it doesn't on other ranks.
            features=None if batch.features is None else batch.features[of_media],
        )
