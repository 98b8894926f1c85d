"""State dicts of OpenFlamingo, flamingo-pytorch, flamingo-mini and Otter, to our modules and back.

`PerceiverResampler` and `GatedCrossAttentionBlock` have OpenFlamingo's keys, the canonical ones
here; every other peer is a map to them, in `peer_layouts`.

What a state dict does not say, and the modules must be made with: the number of heads, the
activation (flamingo-mini's may be "gelu", "sqrelu" or "relu"), which media a text token sees.
Nothing here reads files: load them with safetensors, or torch.load(..., weights_only=True).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from flamingo_fast.modules.peer_layouts import BLOCKS, OPTIONAL_KEYS, PEERS, RESAMPLERS, PeerLayout

# Their (F, 1, D) is our (F, D).
_WITH_PATCH_AXIS = "time_pos_emb"

# DistributedDataParallel, FSDP, activation checkpointing and torch.compile put these in names.
_WRAPPERS = {"module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}

_State = Mapping[str, torch.Tensor]
# The index of a block's LM layer, or None for the resampler.
_Part = int | None


class _Place(NamedTuple):
    """Of a tensor: lower ranks are kept where there are copies."""

    part: _Part
    key: str
    rank: int = 0


@dataclass(frozen=True)
class CanonicalCheckpoint:
    """A peer's state dict, sorted and renamed; the tensors are its own, not copies, where one
    tensor of theirs is one of ours.

    Arguments:
        peer: whose layout it has, of `PEERS`.
        resampler: by the keys of `PerceiverResampler`; empty if there is none. A name unknown in
            the peer's layout is kept as it is.
        blocks: of each LM layer that has one, by the keys of `GatedCrossAttentionBlock`.
        other: what belongs to neither (LM, vision encoder), under the names it had.
        duplicates: names of copies that were dropped.
    """

    peer: str
    resampler: dict[str, torch.Tensor]
    blocks: dict[int, dict[str, torch.Tensor]]
    other: dict[str, torch.Tensor]
    duplicates: tuple[str, ...]


@dataclass(frozen=True)
class LoadReport:
    """What `load_peer_state_dict` found; str() of it is for people.

    Arguments:
        missing: keys of the modules that the state dict lacks: "resampler.latents",
            "blocks.3.attn_gate", the number being the LM layer's.
        unexpected: tensors of the resampler or the blocks that the modules have no place for,
            named likewise.
        duplicates: names of copies that were dropped.
        other: names of what belongs to neither, and keys of a part that no module was given for.
    """

    peer: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    duplicates: tuple[str, ...]
    other: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"state dict of {self.peer}: {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected; {len(self.duplicates)} copies dropped, "
            f"{len(self.other)} other tensors left alone"
        ]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {name}" for name in self.unexpected]
        return "\n".join(lines)


def canonical_state_dict(
    state_dict: Mapping[str, object], peer: str | None = None
) -> CanonicalCheckpoint:
    """Sorts a peer's state dict into resampler, blocks and the rest, under our keys.

    Arguments:
        state_dict: of a whole model, of a part of one as OpenFlamingo's and Otter's training
            saves it, with or without the "model_state_dict" around it, or of a resampler or a
            block alone (then the block of layer 0). Names may have the marks of wrappers
            ("module.") and any prefix ("model.").
        peer: of `PEERS`; by default the one whose layout has most of the keys. Where peers call
            everything alike (a block of OpenFlamingo and of flamingo-pytorch), the first of them.

    OpenFlamingo's models hold each block twice and each LM layer twice
    (`gated_cross_attn_layers`, `old_decoder_blocks`): the copies are dropped and listed. A copy
    without its original is used.

    Raises:
        TypeError: state_dict is no mapping of names to tensors.
        ValueError: no peer, or more than one, fits the keys; copies of one tensor differ; an
            unknown peer, or a peer given whose keys these are not.
    """
    tensors = _tensors(state_dict)
    names = {key: _without_wrappers(key) for key in tensors}
    peer = _detect(names.values()) if peer is None else _check_peer(peer)
    places = _places(peer, names.values())
    if not places:
        raise ValueError(f"state_dict: no resampler or block of {peer} in {_seen(tensors)}")
    placed = {key: places[name] for key, name in names.items() if name in places}
    other = [key for key in tensors if key not in placed]
    copies = [*_copies(placed), *_copied_lm_layers({key: names[key] for key in other})]
    for copy, kept in copies:
        if not _same_bits(tensors[copy], tensors[kept]):
            raise ValueError(f"state_dict: {copy} and {kept} are one tensor twice, but differ")
    duplicates = dict.fromkeys(copy for copy, _ in copies)
    parts: dict[_Part, dict[str, torch.Tensor]] = {}
    for key, place in placed.items():
        if key not in duplicates:
            parts.setdefault(place.part, {})[place.key] = tensors[key]
    resampler = _to_ours(parts.pop(None, {}), RESAMPLERS[peer], peer)
    blocks = {i: state for i, state in parts.items() if i is not None}
    return CanonicalCheckpoint(
        peer=peer,
        resampler=resampler,
        blocks={i: _to_ours(blocks[i], BLOCKS[peer], peer) for i in sorted(blocks)},
        other={key: tensors[key] for key in other if key not in duplicates},
        duplicates=tuple(duplicates),
    )


def load_peer_state_dict(
    state_dict: Mapping[str, object],
    *,
    resampler: nn.Module | None = None,
    blocks: Mapping[int, nn.Module] | Sequence[nn.Module] | nn.ModuleList | None = None,
    peer: str | None = None,
    strict: bool = True,
) -> LoadReport:
    """Copies a peer's weights into modules with OpenFlamingo's keys; all or nothing.

    Arguments:
        state_dict: as for `canonical_state_dict`.
        resampler: a `PerceiverResampler`; None leaves the resampler's weights alone.
        blocks: `GatedCrossAttentionBlock`s, by the index of their LM layer, or in its order, then
            as many as the state dict has; None leaves the blocks' weights alone.
        peer: of `PEERS`; by default detected.
        strict: whether a missing or unexpected key of the given parts is an error. If not, what
            fits is copied.

    The modules keep their dtype and device. Returns what was found; see `LoadReport`.

    Raises:
        TypeError: state_dict is no mapping of names to tensors, or a module is none.
        ValueError: as for `canonical_state_dict`; keys missing or unexpected if strict; a shape
            that isn't the module's, or another number of blocks, whether strict or not. Nothing
            was copied then.
    """
    if resampler is None and blocks is None:
        raise ValueError("resampler, blocks: expected modules to load into, got neither")
    checkpoint = canonical_state_dict(state_dict, peer)
    modules = _modules(resampler, blocks, checkpoint)
    given = {"resampler.": checkpoint.resampler}
    given |= {f"blocks.{i}.": state for i, state in checkpoint.blocks.items()}
    ours = _joined({prefix: module.state_dict() for prefix, module in modules.items()})
    theirs = _joined(given)
    left_alone = {
        key for key in theirs if (resampler if key.startswith("resampler.") else blocks) is None
    }
    report = LoadReport(
        peer=checkpoint.peer,
        missing=tuple(key for key in ours if key not in theirs),
        unexpected=tuple(key for key in theirs if key not in ours and key not in left_alone),
        duplicates=checkpoint.duplicates,
        other=(*checkpoint.other, *(key for key in theirs if key in left_alone)),
    )
    if strict and (report.missing or report.unexpected):
        raise ValueError(f"state_dict: does not fit the modules; nothing was copied\n{report}")
    _check_shapes(ours, theirs)
    for prefix, module in modules.items():
        state = given.get(prefix, {})
        # What the module has no place for is in the report.
        module.load_state_dict(state, strict=False)
    return report


def peer_state_dict(
    peer: str,
    *,
    resampler: nn.Module | _State | None = None,
    blocks: Mapping[int, nn.Module | _State] | None = None,
    decoder_layers: str | None = None,
    resampler_prefix: str | None = None,
    block_prefix: str | None = None,
) -> dict[str, torch.Tensor]:
    """The weights of our modules in a peer's layout.

    Arguments:
        peer: of `PEERS`.
        resampler: a `PerceiverResampler`, or its state dict (`CanonicalCheckpoint.resampler`).
        blocks: `GatedCrossAttentionBlock`s, or their state dicts, by the index of their LM layer.
        decoder_layers: where the LM keeps its layers: "model.layers" of Llama,
            "transformer.blocks" of MPT, "gpt_neox.layers" of GPT-NeoX, "model.decoder.layers" of
            OPT; flamingo-mini's LM has no head, so there "h" of GPT-2 and "decoder.layers" of
            OPT. Needed for blocks in the peer's own block prefix, but of flamingo-pytorch.
        resampler_prefix: instead of the peer's own ("perceiver."); "" for a resampler alone.
        block_prefix: instead of the peer's own
            ("lang_encoder.{decoder_layers}.{i}.gated_cross_attn_layer."), with {i} for the index;
            "" for one block alone.

    The tensors share memory with the modules', as in `state_dict()`, but flamingo-mini's to_k and
    to_v are copies: safetensors saves no two parts of one tensor. What else the peer's checkpoint
    holds, its second names for the blocks among it, is for the caller to add.

    Raises:
        TypeError: resampler or blocks are no modules or state dicts.
        ValueError: the peer's layout can't hold the modules: biases, a norm on the media of the
            cross-attention, gates that aren't of shape (1,), embeddings of frames or media that
            it doesn't have; or it has tensors that they don't: a norm's bias, embeddings that are
            not optional. Names the key. That an activation isn't the peer's, such as squared ReLU
            where it is GELU, is in no state dict and not noticed.
    """
    _check_peer(peer)
    if resampler is None and not blocks:
        raise ValueError("resampler, blocks: expected modules to save, got neither")
    result: dict[str, torch.Tensor] = {}
    if resampler is not None:
        layout = RESAMPLERS[peer]
        prefix = layout.prefix if resampler_prefix is None else resampler_prefix
        result |= _to_theirs("resampler", resampler, layout, peer, prefix)
    if blocks:
        template = _block_prefix(peer, blocks, decoder_layers, block_prefix)
        for i, block in blocks.items():
            prefix = template.replace("{i}", str(i))
            result |= _to_theirs(f"blocks.{i}", block, BLOCKS[peer], peer, prefix)
    return result


def _tensors(state_dict: Mapping[str, object]) -> dict[str, torch.Tensor]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    inner = state_dict.get("model_state_dict", state_dict)
    if not isinstance(inner, Mapping):
        kind = type(inner).__name__
        raise TypeError(f"state_dict: expected a mapping as model_state_dict, got {kind}")
    for key, tensor in inner.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected names of tensors, got {key!r}")
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"state_dict: expected tensors, got {kind} for {key!r}")
    return dict(inner)


def _without_wrappers(key: str) -> str:
    return ".".join(word for word in key.split(".") if word not in _WRAPPERS)


def _check_peer(peer: str) -> str:
    if peer not in PEERS:
        raise ValueError(f"peer: expected one of {', '.join(PEERS)}; got {peer!r}")
    return peer


def _seen(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = ", ..." if len(keys) > 4 else ""
    return f"{len(keys)} keys ({', '.join(keys[:4])}{more})"


def _layout(peer: str, part: _Part) -> PeerLayout:
    return RESAMPLERS[peer] if part is None else BLOCKS[peer]


def _detect(names: Iterable[str]) -> str:
    """The first peer that knows every name that some peer knows."""
    known = {peer: _known(peer, names) for peer in PEERS}
    everything = set().union(*known.values())
    if not everything:
        peers = ", ".join(PEERS)
        raise ValueError(f"state_dict: no resampler or block of {peers} in {_seen(names)}")
    for peer in PEERS:
        if known[peer] == everything:
            return peer
    examples = {
        ", ".join(peer for peer in PEERS if name in known[peer]): name
        for name in sorted(everything, reverse=True)
    }
    seen = ", ".join(f"{name} ({whose})" for whose, name in examples.items())
    raise ValueError(f"state_dict: keys of several peers, {seen}; say whose it is by peer=")


def _known(peer: str, names: Iterable[str]) -> set[str]:
    places = _places(peer, names)
    return {name for name, place in places.items() if _is_known(peer, place)}


def _is_known(peer: str, place: _Place) -> bool:
    template, _ = _without_number(place.key)
    return template in _layout(peer, place.part).ours


def _places(peer: str, names: Iterable[str]) -> dict[str, _Place]:
    """Of each name that is of the resampler or a block; none if there are no names that `peer`
    knows among them."""
    found = {name: place for name in names if (place := _place_in_model(peer, name))}
    if any(_is_known(peer, place) for place in found.values()):
        return found
    parts = {part for part in (None, 0) for name in names if _is_alone(peer, part, name)}
    return {name: _Place(part, name) for part in parts for name in names} if len(parts) == 1 else {}


def _place_in_model(peer: str, name: str) -> _Place | None:
    for rank, pattern in enumerate(RESAMPLERS[peer].patterns):
        if match := pattern.fullmatch(name):
            return _Place(None, match["key"], rank)
    for rank, pattern in enumerate(BLOCKS[peer].patterns):
        if match := pattern.fullmatch(name):
            return _Place(int(match["i"]), match["key"], rank)
    return None


def _is_alone(peer: str, part: _Part, name: str) -> bool:
    # Any model may have a norm at its top.
    return not name.startswith("norm.") and _is_known(peer, _Place(part, name))


def _copies(placed: Mapping[str, _Place]) -> Iterator[tuple[str, str]]:
    """Keys of copies, each with the key that is kept."""
    kept: dict[tuple[_Part, str], str] = {}
    for key in sorted(placed, key=lambda key: placed[key].rank):
        first = kept.setdefault((placed[key].part, placed[key].key), key)
        if first != key:
            yield key, first


def _copied_lm_layers(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """OpenFlamingo's second names for LM layers, each with the first one's key."""
    layers = {
        (match["i"], match["key"]): key
        for key, name in names.items()
        if (match := re.fullmatch(r".*\.(?P<i>\d+)\.decoder_layer\.(?P<key>.+)", name))
    }
    for key, name in names.items():
        match = re.fullmatch(r"(?:.*\.)?old_decoder_blocks\.(?P<i>\d+)\.(?P<key>.+)", name)
        if match and (match["i"], match["key"]) in layers:
            yield key, layers[match["i"], match["key"]]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Unlike torch.equal, a NaN is the same as itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # torch.load keeps what is one tensor one: no need to read gigabytes of LM layers.
    if a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    a_bytes, b_bytes = (x.detach().cpu().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a_bytes, b_bytes)


def _without_number(key: str) -> tuple[str, str]:
    match = re.match(r"layers\.(\d+)\.", key)
    if match is None:
        return key, ""
    return "layers.{i}." + key[match.end() :], match[1]


def _to_ours(state: _State, layout: PeerLayout, peer: str) -> dict[str, torch.Tensor]:
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        template, number = _without_number(name)
        key = layout.ours.get(template)
        if key is None:
            if template in (*layout.keys, *layout.our_keys):
                raise ValueError(f"peer: {peer} has no {name}, which other peers have")
            ours[name] = tensor
            continue
        pieces = [piece.replace("{i}", number) for piece in layout.theirs(key)]
        if len(pieces) == 1:
            ours[key.replace("{i}", number)] = _without_patch_axis(name, tensor)
        elif all(piece in state for piece in pieces):
            ours[key.replace("{i}", number)] = torch.cat([state[piece] for piece in pieces])
        else:
            ours[name] = tensor
    return ours


def _without_patch_axis(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name != _WITH_PATCH_AXIS:
        return tensor
    if tensor.dim() != 3 or tensor.shape[1] != 1:
        raise ValueError(f"state_dict: {name} of shape {tuple(tensor.shape)}, not (F, 1, D)")
    return tensor.squeeze(1)


def _modules(
    resampler: nn.Module | None,
    blocks: Mapping[int, nn.Module] | Sequence[nn.Module] | nn.ModuleList | None,
    checkpoint: CanonicalCheckpoint,
) -> dict[str, nn.Module]:
    """The modules by the prefix of their keys in a report."""
    modules = {} if resampler is None else {"resampler.": resampler}
    if blocks is not None:
        modules |= {f"blocks.{i}.": block for i, block in _by_layer(blocks, checkpoint).items()}
    for prefix, module in modules.items():
        if not isinstance(module, nn.Module):
            name, kind = prefix.rstrip("."), type(module).__name__
            raise TypeError(f"{name}: expected a module, got {kind}")
    return modules


def _by_layer(
    blocks: Mapping[int, nn.Module] | Sequence[nn.Module] | nn.ModuleList,
    checkpoint: CanonicalCheckpoint,
) -> dict[int, nn.Module]:
    if isinstance(blocks, Mapping):
        return dict(blocks)
    modules, layers = list(blocks), list(checkpoint.blocks)
    if len(modules) != len(layers):
        raise ValueError(
            f"blocks: {len(modules)} modules, but the state dict has {len(layers)} blocks, of the "
            f"LM layers {layers}; give a mapping of LM layers to modules for some of them"
        )
    return dict(zip(layers, modules, strict=True))


def _joined(parts: Mapping[str, _State]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}


def _check_shapes(ours: _State, theirs: _State) -> None:
    wrong = [
        f"{key}: expected the module's shape {tuple(tensor.shape)}, got {tuple(theirs[key].shape)}"
        for key, tensor in ours.items()
        if key in theirs and tensor.shape != theirs[key].shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _block_prefix(
    peer: str, blocks: Mapping[int, object], decoder_layers: str | None, block_prefix: str | None
) -> str:
    if not isinstance(blocks, Mapping):
        kind = type(blocks).__name__
        raise TypeError(f"blocks: expected a mapping of LM layers to modules, got {kind}")
    prefix = BLOCKS[peer].prefix if block_prefix is None else block_prefix
    if len(blocks) > 1 and "{i}" not in prefix:
        raise ValueError(f"block_prefix: no {{i}} in {prefix!r}, for {len(blocks)} blocks")
    if "{decoder_layers}" not in prefix:
        return prefix
    if not decoder_layers:
        raise ValueError(f'decoder_layers: {peer} needs it, such as "model.layers" of Llama')
    return prefix.replace("{decoder_layers}", decoder_layers)


def _to_theirs(
    what: str, module: nn.Module | _State, layout: PeerLayout, peer: str, prefix: str
) -> dict[str, torch.Tensor]:
    state = module.state_dict() if isinstance(module, nn.Module) else module
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise TypeError(f"{what}: expected a module or its state dict, got {kind}")
    _check_holds(what, state, layout, peer)
    result: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        template, number = _without_number(key)
        names = [prefix + name.replace("{i}", number) for name in layout.theirs(template)]
        if len(names) > 1:
            pieces = [piece.clone() for piece in tensor.chunk(len(names))]
        else:
            patch_axis = layout.theirs(template) == (_WITH_PATCH_AXIS,)
            pieces = [tensor.unsqueeze(1) if patch_axis else tensor]
        result |= dict(zip(names, pieces, strict=True))
    return result


def _check_holds(what: str, state: _State, layout: PeerLayout, peer: str) -> None:
    has = [key for key in layout.keys if key not in layout.lacks]
    extra = [key for key in state if _without_number(key)[0] not in has]
    if extra:
        raise ValueError(f"{what}: {peer}'s layout has no place for {', '.join(extra)}")
    numbers = dict.fromkeys(number for key in state if (number := _without_number(key)[1]))
    needed = dict.fromkeys(
        key.replace("{i}", number)
        for key in has
        if key not in OPTIONAL_KEYS or key in layout.requires
        for number in (numbers if "{i}" in key else ("",))
    )
    if absent := [key for key in needed if key not in state]:
        raise ValueError(f"{what}: {peer}'s layout has {', '.join(absent)}, which is missing here")
    for gate in ("attn_gate", "ff_gate"):
        if gate in state and state[gate].shape != (1,):
            shape = tuple(state[gate].shape)
            raise ValueError(f"{what}: {peer}'s {gate} has shape (1,), this one {shape}")
    if layout.one_width:
        media, text = state["attn.to_kv.weight"].shape[1], state["attn.to_out.weight"].shape[0]
        if media != text:
            raise ValueError(
                f"{what}: {peer}'s media are as wide as the text; here attn.to_kv.weight is for "
                f"media of width {media}, attn.to_out.weight for text of width {text}"
            )
