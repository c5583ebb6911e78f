"""A model as the steps want it: its weights in a backend's layout, and its sizes.

``run_layers`` is the only way through the layers: early exit, the rest, and the full depth are one function,
and live in the backend (reference.run_layers says what it does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from layerskip_kernels import ops
from layerskip_kernels.config import AUTO, MOST_SPECULATIONS, NUM_SPECULATIONS, GenerationConfig
from layerskip_kernels.model import quantise
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.defaults import DraftDefaults
from layerskip_kernels.model.exit_adapter import DraftExit, ExitAdapter
from layerskip_kernels.model.finite import LateChecks
from layerskip_kernels.model.layout import laid_out_adapter, layer_weights
from layerskip_kernels.model.rope import rope_names, rope_tables
from layerskip_kernels.model.tensor_names import layer_products
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.model.weight_hash import HashedTensors, UploadedTensors, tensor_digest
from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.operands import DraftHead, ModelSizes, ModelWeights
from layerskip_kernels.ops import Backend

__all__ = ["Model"]

QUANTISED_ROWS = 1024
FIRST_POSITIONS = 4096  # a larger cache extends the tables
EXIT_PARTS = (1 / 8, 1 / 4, 1 / 3, 1 / 2)  # of all layers: exits among which one is chosen on the way


@dataclass(frozen=True)
class Model:
    """Weights, sizes and the backend that runs them.

    ``weights`` are in ``dtype`` (matrices perhaps quantised), linear weights and the embedding in the backend's
    layout. ``draft_head``: a draft vocabulary, in the backend's layout; None: drafts may be any token.
    ``exit_adapters``: what drafts pass after their exit layers (`with_exit_adapter`), at most one an exit, in their
    order; without any, drafts go to the head at once, at every exit.
    """

    config: ModelConfig
    dtype: torch.dtype
    weights: ModelWeights
    backend: str
    tokenizer: Tokenizer | None = None
    name: str = "model"
    draft_head: DraftHead | None = None
    defaults: DraftDefaults | None = None  # how it is best run, where that was measured
    exit_adapters: tuple[ExitAdapter, ...] = ()
    weights_digest: bytes | None = None  # SHA-256 of what was loaded to a GPU, and of how it was quantised

    @property
    def ops(self) -> Backend:
        return ops.backend(self.backend, self.weights.final_norm.device)

    @property
    def draft_ids(self) -> Tensor | None:
        """The draft vocabulary of exits without an adapter, int64 [N], ascending; None: all tokens."""
        return None if self.draft_head is None else self.draft_head.ids

    @property
    def num_adapter_kv_layers(self) -> int:
        """Layers of the exit adapters that have K and V, which follow the model's in the cache."""
        return sum(adapter.num_kv_layers for adapter in self.exit_adapters)

    def exit_at(self, layer: int) -> DraftExit:
        """What says a token after ``layer`` layers, and the adapters that a row passes on its way there.

        At an exit that is what drafts; at L it is the model itself. Adapters of lower exits are passed if they attend,
        since later drafts may read their K and V, and the exit's own is.
        """
        own = next((a for a in self.exit_adapters if a.exit_layer == layer), None)
        passed = tuple(a for a in self.exit_adapters if a.num_kv_layers and a.exit_layer < layer)
        if own is not None:
            return DraftExit(own.draft_weights, own.draft_head, (*passed, own) if own.num_layers else passed)
        return DraftExit(self.weights, self.draft_head if layer < self.config.num_layers else None, passed)

    @cached_property
    def sizes(self) -> ModelSizes:
        """What the tensors' shapes do not say, for run_layers and the passes made of it."""
        c = self.config
        tables = {name: table for table, name in enumerate(rope_names(c))}
        return ModelSizes(
            num_heads=c.num_heads,
            intermediate_size=c.intermediate_size,
            vocab_size=c.vocab_size,
            eps=c.rms_norm_eps,
            scale=c.softmax_scale,
            windows=c.layer_windows or (0,) * c.num_layers,
            ropes=tuple(tables.get(name, -1) for name in c.layer_ropes) or (0,) * c.num_layers,
            gelu=c.activation == "gelu_tanh",
            norm_offset=c.norm_offset,
            embedding_multiplier=float(torch.tensor(c.embedding_multiplier, dtype=self.dtype)),
            residual_multiplier=c.residual_multiplier,
            logits_multiplier=c.logits_multiplier,
            score_cap=c.score_cap,
            logits_cap=c.logits_cap,
        )

    @cached_property
    def layer_products(self) -> int:
        """tensor_names.layer_products, counted once."""
        return layer_products(self.config)

    @cached_property
    def draft_products(self) -> tuple[int, ...]:
        """Those of a draft after 0..L layers: of these, of the adapters on the way, and of the head."""
        products, c = [], self.config
        for layer in range(c.num_layers + 1):
            _, head, adapters = self.exit_at(layer)
            words = c.vocab_size if head is None else len(head.ids)
            adapted = sum(adapter.products(c) for adapter in adapters)
            products.append(layer * self.layer_products + adapted + words * c.hidden_size)
        return tuple(products)

    @cached_property
    def adapter_products(self) -> dict[int, int]:
        """Those of the adapters that a row passes on its way to the last layer, by their exits."""
        return {a.exit_layer: a.products(self.config) for a in self.exit_at(self.config.num_layers).adapters}

    @cached_property
    def identity(self) -> bytes:
        """What a token's K and V depend on besides the tokens: SHA-256 of config, dtype, backend and weights.

        Exit adapters' weights and layers belong to it: their K and V are the cache's, too.

        For what outlives the process: swap files. Weights on a GPU were hashed as they were loaded; others are read
        once here, with torch's number of threads.
        """
        weights = (
            [] if self.weights_digest is not None else [*self.weights.flat[:3], *self.weights.flat[5:]]
        )  # cos and sin follow from the config
        weights += [tensor for adapter in self.exit_adapters for tensor in adapter.tensors]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            digests = list(threads.map(tensor_digest, weights))
        adapted = [(adapter.exit_layer, adapter.num_layers) for adapter in self.exit_adapters]
        settings = repr((self.config, self.dtype, self.backend, *adapted)).encode() + (self.weights_digest or b"")
        return hashlib.sha256(hashlib.sha256(settings).digest() + b"".join(digests)).digest()

    def extend_positions(self, count: int) -> None:
        """Make cos and sin long enough for ``count`` positions, or for all that the model has, if they are not.

        A cache asks for what its pages can hold, so a config that allows millions of positions costs nothing until
        there is memory for them. Plans that were made before keep the shorter tables, which suffice for their caches;
        the values do not depend on the length.
        """
        count = min(count, self.config.max_positions)
        if count > self.weights.cos.size(1):
            place = self.ops.placer()
            cos, sin = rope_tables(self.config, count)
            self.weights.replace_tables(place(cos), place(sin))
        for adapter in self.exit_adapters:
            if self.weights.cos.size(1) > adapter.weights.cos.size(1):
                for weights in (adapter.weights, adapter.draft_weights):
                    weights.replace_tables(self.weights.cos, self.weights.sin)

    def has_kv_of(self, other: Model) -> bool:
        """Whether both compute the same K and V from the same tokens: one set of weights in memory, run the same way.

        The draft vocabulary, defaults, tokenizer and name do not matter. A checkpoint loaded twice counts as two
        models: to find out that they are equal would take a pass over all weights.
        """
        return self is other or (
            self.weights is other.weights
            and [id(a.weights) for a in self.exit_adapters] == [id(a.weights) for a in other.exit_adapters]
            and (self.config, self.dtype, self.backend) == (other.config, other.dtype, other.backend)
        )

    def draft_settings(self, config: GenerationConfig) -> tuple[int, int]:
        """The exit layer and the number of drafts that ``config`` means for this model.

        (0, 0) in plain decoding, no drafts for an early exit alone. What the config leaves open is that of
        ``defaults``; without it, a third of the layers and 4 drafts. "auto" begins with that exit, and has a largest
        number of drafts. With exit adapters the exit is one of theirs, by itself the first. Raises ValueError for an
        exit layer that this model does not have, or that no adapter follows where there are adapters.
        """
        if config.strategy == "autoregressive":
            return 0, 0
        if config.strategy == "early_exit":
            return config.resolve_exit_layer(self.config.num_layers), 0
        chosen, default = self.defaults, self.defaults.exit_layer if self.defaults else None
        if self.exit_adapters and default not in (exits := [adapter.exit_layer for adapter in self.exit_adapters]):
            default = exits[0]
        exit_layer = config.resolve_exit_layer(self.config.num_layers, default)
        self.check_exit(exit_layer)
        if isinstance(config.num_speculations, int):
            return exit_layer, config.num_speculations
        if config.num_speculations == AUTO:
            return exit_layer, MOST_SPECULATIONS
        return exit_layer, (chosen.num_speculations if chosen else None) or NUM_SPECULATIONS

    def check_exit(self, exit_layer: int) -> None:
        """Raise ValueError unless this model's layers below the last can draft at ``exit_layer``."""
        if not 1 <= exit_layer < self.config.num_layers:
            raise ValueError(f"exit_layer must be in 1..{self.config.num_layers - 1}, got {exit_layer}")
        exits = [str(adapter.exit_layer) for adapter in self.exit_adapters]
        if exits and str(exit_layer) not in exits:
            follows = "exit adapter follows" if len(exits) == 1 else "exit adapters follow"
            raise ValueError(
                f"exit_layer must be {' or '.join(exits)}, which this model's {follows}, got {exit_layer}; leave it "
                "None, or use the model without adapters (with_exit_adapters([]))"
            )

    def leaves_drafting_open(self, config: GenerationConfig) -> bool:
        """Whether something about drafting is chosen on the way: "auto", or neither config nor measurements say how."""
        measured = self.defaults is not None and self.defaults.num_speculations is not None
        said = measured or config.exit_layer is not None or config.num_speculations is not None
        return config.strategy == "self_speculative" and (config.asks_for_auto or not said)

    def draft_exits(self, config: GenerationConfig) -> tuple[int, ...]:
        """The exit layers that may draft, the first one to begin with; none where nothing is drafted."""
        if config.strategy != "self_speculative":
            return ()
        first, count = self.draft_settings(config)[0], self.config.num_layers
        chosen = config.exit_layer == AUTO or (config.exit_layer is None and self.defaults is None)
        if not (chosen and self.leaves_drafting_open(config)):
            return (first,)
        others = {adapter.exit_layer for adapter in self.exit_adapters}
        others = others or {min(count - 1, max(1, round(count * part))) for part in EXIT_PARTS}
        return (first, *sorted(others - {first}))

    def with_draft_vocab(self, token_ids: Iterable[int] | None, exit_layer: int | None = None) -> Model:
        """The same model, drafting only tokens of a list (None: any); verification still chooses among all of them.

        The LM head recurs with every draft, so a short list of frequent tokens makes drafts cheaper. Where an exit
        adapter has a head of its own, any means any of that. ``exit_layer``: of drafts through the adapter there alone;
        None: of all. Raises ValueError for an empty list and for an id outside the vocabulary, or outside that head's.
        """
        ids = None if token_ids is None else sorted(set(token_ids))
        if ids is not None and (not ids or ids[0] < 0 or ids[-1] >= self.config.vocab_size):
            shown = f"{len(ids)} ids" + (f" from {ids[0]} to {ids[-1]}" if ids else "")
            raise ValueError(f"draft_vocab must be token ids in 0..{self.config.vocab_size - 1}, got {shown}")
        of_model = self._with_words(None, ids)
        adapters = tuple(
            a if exit_layer not in (None, a.exit_layer)
            else replace(a, draft_head=self._with_words(a.head, ids) if a.head else of_model)
            for a in self.exit_adapters
        )  # fmt: skip
        return replace(self, draft_head=of_model if exit_layer is None else self.draft_head, exit_adapters=adapters)

    def _with_words(self, whole: DraftHead | None, token_ids: list[int] | None) -> DraftHead | None:
        """A head (None: the LM head) with some tokens' rows alone, the ids ascending; None: it as it is."""
        if token_ids is None:
            return whole
        ids = rows = torch.tensor(token_ids)
        weight = self.weights.lm_head if whole is None else whole.weight
        if whole is not None:
            rows = torch.searchsorted(whole.ids, ids).clamp(max=len(whole.ids) - 1)
            if not torch.equal(whole.ids[rows], ids):
                raise ValueError(
                    f"draft_vocab must be among the {len(whole.ids)} tokens of the exit adapter's own head; "
                    "leave it None, which means all of them"
                )
        head = self.ops.select_rows(weight, rows)
        return DraftHead(self.ops.empty(*head.shape, dtype=head.dtype).copy_(head), ids)

    def with_exit_adapter(self, exit_layer: int, tensors: dict[str, Tensor]) -> Model:
        """The same model with one more exit adapter, which drafts pass after ``exit_layer``, before the head.

        ``tensors``: `exit_adapter.adapter_shapes`, of the model's dtype or quantised, on the CPU: the adapter's layers,
        each like one of the model's, its final norm, and perhaps a head with HEAD_IDS, which drafts there then have.
        The model's own K, V, logits and text are what they are without. Raises ValueError for an exit layer outside
        1..L-1, and for one that has an adapter.
        """
        if not 1 <= exit_layer < self.config.num_layers:
            raise ValueError(f"exit_layer must be in 1..{self.config.num_layers - 1}, got {exit_layer}")
        if any(adapter.exit_layer == exit_layer for adapter in self.exit_adapters):
            raise ValueError(f"exit_layer {exit_layer} has an exit adapter already; an exit has at most one")
        adapter = laid_out_adapter(exit_layer, tensors, self.config, self.weights, self.sizes, self.ops)
        adapter = adapter if adapter.head else replace(adapter, draft_head=self.draft_head)
        adapters = sorted((*self.exit_adapters, adapter), key=lambda adapter: adapter.exit_layer)
        return replace(self, exit_adapters=tuple(adapters))

    def with_exit_adapters(self, exits: Iterable[int]) -> Model:
        """The same model with those of its exit adapters alone that follow these exit layers: what is not there costs
        nothing. Their K and V are what they were."""
        wanted = set(exits)
        kept = tuple(adapter for adapter in self.exit_adapters if adapter.exit_layer in wanted)
        return self if kept == self.exit_adapters else replace(self, exit_adapters=kept)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, backend: str = "cpu", weights: str | None = None,
        device: torch.device | None = None,
    ) -> Model:  # fmt: skip
        """Lay a checkpoint's tensors out for a backend, taking each out of ``checkpoint.tensors`` as it goes.

        ``device``: where the backend keeps the weights, and the model stays (None: its own choice, ops.backend).

        ``weights``: None and "16bit" keep them as they are; a type of quantise.WEIGHT_TYPES rounds the linear layers
        and the LM head to it, not the embedding and the norms; ``checkpoint`` has numbers then.
        """
        quantise.check_weights(weights)
        config, its = checkpoint.config, ops.backend(backend, device)
        pack_weight, place = its.pack_weight, its.placer()
        tensors: dict[str, Tensor] | HashedTensors = checkpoint.tensors
        checks = None
        if its.empty(0, dtype=checkpoint.dtype).is_cuda:
            checks = None if weights in quantise.ON_HOST else LateChecks()
            read = checkpoint.tensors
            tensors = HashedTensors(read) if checks is None else UploadedTensors(read, place, checks)

        def pack(weight: Tensor) -> Tensor:
            return place(pack_weight(weight))

        def pack_linear(weight: Tensor) -> Tensor:
            if weights in (None, "16bit"):
                return pack(weight)
            # Some rows at a time: quantising takes several times a weight's memory.
            return pack(torch.cat([quantise.quantise(rows, weights, checks) for rows in weight.split(QUANTISED_ROWS)]))

        head_rows = tensors.pop("model.embed_tokens.weight")
        embedding = pack(head_rows)
        if not config.tie_word_embeddings:
            del head_rows
            head_rows = tensors.pop("lm_head.weight")
        shared = config.tie_word_embeddings and weights in (None, "16bit")
        lm_head = embedding if shared else pack_linear(head_rows)
        del head_rows
        cos, sin = rope_tables(config, min(config.max_positions, FIRST_POSITIONS))
        final_norm, cos, sin = place(tensors.pop("model.norm.weight")), place(cos), place(sin)
        layers = tuple(
            layer_weights(tensors, f"model.layers.{layer}.", pack_linear, place, config)
            for layer in range(config.num_layers)
        )
        laid_out = ModelWeights(embedding, final_norm, lm_head, cos, sin, layers)
        defaults, digest = checkpoint.defaults, None
        if isinstance(tensors, HashedTensors):
            if checks is not None:
                checks.settle()
            digest = hashlib.sha256(tensors.digest() + (weights or "16bit").encode()).digest()
        model = cls(
            config, checkpoint.dtype, laid_out, backend, checkpoint.tokenizer, checkpoint.name, defaults=defaults,
            weights_digest=digest,
        )  # fmt: skip
        return model.with_draft_vocab(defaults.draft_vocab) if defaults and defaults.draft_vocab else model
